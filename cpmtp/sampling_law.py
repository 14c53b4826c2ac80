"""Probability vectors: temperature, top-k and top-p, entropy, division, drawing by inversion.

The maps are equal to transformers' processors in its order (temperature, top-k, top-p), ties
included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SamplingLaw:
    """How tokens are drawn from a model's probabilities.

    Attributes
    ----------
    temperature : float
        0 is the one-hot law of the argmax (lowest id on ties).
    top_k : int, optional
        Tokens less probable than the k-th are removed; ties with the k-th stay.
    top_p : float, optional
        The smallest set of most probable tokens whose mass reaches `top_p` stays.

    Raises
    ------
    ValueError
        If the temperature is negative, top-k below 1, or top-p outside (0, 1].

    Examples
    --------
    >>> SamplingLaw(top_k=1).process(torch.tensor([0.2, 0.5, 0.3]))
    tensor([0., 1., 0.])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature {self.temperature}: expected a finite number of at least 0 (0 is "
                "greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: expected at least 1, or None to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p {self.top_p}: expected a number in (0, 1], or None to keep all tokens"
            )

    @property
    def is_identity(self) -> bool:
        """Whether probabilities pass unchanged."""
        return (
            self.temperature == 1 and self.top_k is None and (self.top_p is None or self.top_p == 1)
        )

    def process(self, probs: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Probabilities (normalised) to probabilities; differentiable where the kept set is
        constant.
        """
        if self.is_identity:
            return probs
        if self.temperature == 0:
            return torch.zeros_like(probs).scatter(-1, probs.argmax(-1, keepdim=True), 1.0)
        return self.process_log_probs(probs.log()).exp()

    def process_log_probs(
        self, log_probs: Float[Tensor, "*batch vocab"]
    ) -> Float[Tensor, "*batch vocab"]:
        """The same on log-probabilities (nats); removed tokens get ``-inf``."""
        if self.is_identity:
            return log_probs
        if self.temperature == 0:
            one_hot = torch.full_like(log_probs, -math.inf)
            return one_hot.scatter(-1, log_probs.argmax(-1, keepdim=True), 0.0)
        scores = log_probs / self.temperature
        if self.top_k is not None:
            scores = _remove_below_top_k(scores, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            scores = _remove_outside_top_p(scores, self.top_p)
        return scores.log_softmax(-1)


def _remove_below_top_k(scores: Tensor, top_k: int) -> Tensor:
    kth = scores.topk(min(top_k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < kth, -math.inf)


def _remove_outside_top_p(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[..., -1] = False
    return scores.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def entropy(probs: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Entropy over the last axis in nats; a zero adds nothing.

    Examples
    --------
    >>> entropy(torch.tensor([0.5, 0.5, 0.0]))
    tensor(0.6931)
    """
    return -torch.special.xlogy(probs, probs).sum(-1)


def ratio(a: Tensor, b: Tensor, *, otherwise: float) -> Tensor:
    """``a / b``, and `otherwise` where b is zero, without a NaN in the value or in the gradient.

    Examples
    --------
    >>> ratio(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), otherwise=0.0)
    tensor([0.5000, 0.0000])
    """
    positive = b > 0
    return torch.where(positive, a / torch.where(positive, b, 1.0), otherwise)


def draw(
    probs: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]
) -> Int[Tensor, "*batch"]:
    """One id per row by inversion; never one of zero probability, however the sums are rounded.

    Parameters
    ----------
    probs : (*batch, vocab) tensor
        Need not sum to one.
    uniform : (*batch,) tensor
        In [0, 1).

    Examples
    --------
    >>> draw(torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([0.0]))
    tensor([1])
    """
    totals = probs.cumsum(-1)
    total = totals[..., -1:]  # (*batch, 1)
    # Strictly below the total, so that the first entry whose sum exceeds it has mass.
    # (*batch,)
    found = torch.searchsorted(totals, uniform.unsqueeze(-1) * total, right=True).squeeze(-1)
    return torch.minimum(found, (totals < total).sum(-1))
