"""A joint distribution as a dense tensor, and what is read off it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from cpmtp.sampling_law import entropy, ratio
from cpmtp.whole_files import write_tensors

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class JointDistribution:
    """Probabilities of all sequences of `horizon` tokens.

    Attributes
    ----------
    probs : (*batch, vocab, …, vocab) tensor
        Non-negative; each batch entry sums to one.
    horizon : int, optional
        Number of token axes; needed only when there are batch axes (default: every axis is a token
        axis).

    Raises
    ------
    ValueError
        If an entry is negative or not finite, a sum is not one, or the token axes differ in length.

    Examples
    --------
    >>> joint = JointDistribution(torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64))
    >>> joint.prefix_probs(1)
    tensor([0.3000, 0.7000], dtype=torch.float64)
    """

    probs: Float[Tensor, "..."]
    horizon: int = field(default=0)

    def __post_init__(self):
        horizon = self.horizon or self.probs.ndim
        object.__setattr__(self, "horizon", horizon)
        if not 1 <= horizon <= self.probs.ndim:
            raise ValueError(
                f"horizon {horizon} for a tensor of {self.probs.ndim} axes: expected 1 to "
                f"{self.probs.ndim}"
            )
        token_axes = self.probs.shape[self.probs.ndim - horizon :]
        if len(set(token_axes)) != 1:
            raise ValueError(
                f"token axes {tuple(token_axes)} differ in length: give horizon= when there are "
                "batch axes"
            )
        total = self.probs.sum(dim=tuple(range(-horizon, 0)), dtype=torch.float64)
        # One pass finds negative, infinite and NaN entries alike; the sum alone would miss a
        # negative one.
        if not (self.probs.numel() == 0 or bool(self.probs.min() >= 0)) or not bool(
            torch.isfinite(total).all()
        ):
            raise ValueError(
                "a joint's probabilities must be finite and non-negative: found a negative or "
                "non-finite entry"
            )
        worst = (total - 1).abs().max().item() if total.numel() else 0.0
        if worst > _SUM_TOLERANCE:
            raise ValueError(
                f"a joint must sum to 1: the sum is off by {worst:.3g}; divide by the sum first"
            )

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"JointDistribution(horizon={self.horizon}, vocab_size={self.vocab_size}{batch})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.probs.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Axes before the token axes."""
        return self.probs.shape[: self.probs.ndim - self.horizon]

    def prefix_probs(self, length: int) -> Float[Tensor, "..."]:
        """Law of the first `length` tokens, (*batch, vocab, …, vocab); ``length = 0`` gives the
        total mass.
        """
        summed = self.horizon - length
        return self.probs.sum(dim=tuple(range(-summed, 0))) if summed else self.probs

    def marginal(self, length: int) -> JointDistribution:
        """The joint of the first `length` tokens: what the shorter horizon's joint is."""
        if not 1 <= length <= self.horizon:
            raise ValueError(f"length {length}: expected 1 to the horizon, {self.horizon}")
        return JointDistribution(self.prefix_probs(length), length)

    def conditional_probs(self, length: int) -> Float[Tensor, "..."]:
        """``p(x_length | x_1 … x_{length-1})``, (*batch, vocab, …, vocab); zero after prefixes of
        zero mass.
        """
        prefix = self.prefix_probs(length - 1).unsqueeze(-1)  # (*batch, vocab, …, 1)
        return ratio(self.prefix_probs(length), prefix, otherwise=0.0)

    def given_first_token(self) -> JointDistribution:
        """The law of the remaining tokens for every first token, (*batch, vocab) batch axes and
        horizon n-1.

        A first token of zero mass gets the mean of the others (the unconditional law): it must be a
        law and matters nowhere.
        """
        if self.horizon < 2:
            raise ValueError(
                "a joint of one token has nothing after the first: use a horizon of at least 2"
            )
        rest = self.horizon - 1
        first = self.prefix_probs(1)  # (*batch, vocab)
        first = first.reshape(*first.shape, *(1,) * rest)  # (*batch, vocab, 1, …, 1)
        fallback = self.probs.sum(dim=-self.horizon, keepdim=True)  # (*batch, 1, vocab, …, vocab)
        given = torch.where(first > 0, ratio(self.probs, first, otherwise=0.0), fallback)
        # Where the first token's mass is subnormal the quotient is rounded away from one.
        return JointDistribution(given / given.sum(dim=tuple(range(-rest, 0)), keepdim=True), rest)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Entropy in nats."""
        return entropy(self.probs.flatten(len(self.batch_shape)))  # over (*batch, sequences)

    def marginals(self) -> list[Float[Tensor, "*batch vocab"]]:
        """The law of each position by itself."""
        axes = range(-self.horizon, 0)
        return [
            self.probs.sum(dim=[a for a in axes if a != axis]) if self.horizon > 1 else self.probs
            for axis in axes
        ]

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors = {"probs": self.probs.contiguous()}
        write_tensors(Path(path), tensors, {"horizon": str(self.horizon)})

    @classmethod
    def load(cls, path: str | Path) -> JointDistribution:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("probs"), int(file.metadata()["horizon"]))
