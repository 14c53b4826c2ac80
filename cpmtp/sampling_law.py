"""Probability vectors: temperature, top-k and top-p, the tokens they leave, entropy, division,
drawing by inversion.

The maps are equal to transformers' processors in its order (temperature, top-k, top-p), ties
included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Entries of a row that are looked at together when its largest are sought: a power of two.
_GROUP = 64
# Entries turned into float64 at once: few enough to stay in a processor's cache; elsewhere more.
_EXACT_AT_ONCE, _EXACT_ON_DEVICE = 1 << 19, 1 << 24


@dataclass(frozen=True)
class KeptTokens:
    """The most probable tokens of some processed distributions.

    Attributes
    ----------
    tokens : (count, kept) long tensor
        Ascending in each row; beyond a row's own tokens the vocabulary's size.
    probs : (count, kept) float64 tensor
        Their probabilities; zero beyond a row's own tokens.
    entropies : (count,) float64 tensor
        Of the whole distributions in nats, tokens that are not among these included.
    """

    tokens: Int[Tensor, "count kept"]
    probs: Float[Tensor, "count kept"]
    entropies: Float[Tensor, " count"]

    @classmethod
    def joined(cls, pieces: list[KeptTokens], vocab_size: int) -> KeptTokens:
        """All rows of several, on the CPU."""
        width = max((piece.tokens.shape[1] for piece in pieces), default=0)

        def padded(values: Tensor, fill: float) -> Tensor:
            short = width - values.shape[1]
            return torch.nn.functional.pad(values, (0, short), value=fill).cpu()  # (some, width)

        return cls(
            torch.cat([padded(piece.tokens, vocab_size) for piece in pieces]),
            torch.cat([padded(piece.probs, 0.0) for piece in pieces]),
            torch.cat([piece.entropies.cpu() for piece in pieces]),
        )


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

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a top-k above the number of tokens: it would keep them all without saying so.

        Raises
        ------
        ValueError
            With both numbers.
        """
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(
                f"top_k {self.top_k} over a vocabulary of {vocab_size} tokens: expected at most "
                f"{vocab_size}, or none to keep all tokens"
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
        return self._removed(log_probs / self.temperature).log_softmax(-1)

    def of_logits(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Logits, of any height, to probabilities of their precision, at least single.

        Examples
        --------
        >>> SamplingLaw(temperature=2.0).of_logits(torch.tensor([1.0, 1.0]) + 7)
        tensor([0.5000, 0.5000])
        """
        dtype = exact_dtype(logits)
        if self.is_identity:
            return logits.softmax(-1, dtype)
        if self.temperature == 0:
            one_hot = torch.zeros_like(logits, dtype=dtype)
            return one_hot.scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        return self._removed(logits.to(dtype) / self.temperature).softmax(-1)

    def _removed(self, scores: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Scores at the law's temperature, ``-inf`` where a token is removed."""
        if self.top_k is not None:
            scores = _remove_below_top_k(scores, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            scores = _remove_outside_top_p(scores, self.top_p)
        return scores

    @property
    def most_tokens(self) -> int | None:
        """Tokens that stay, ties aside; None: as many as there are."""
        return 1 if self.temperature == 0 else self.top_k

    def kept_tokens(self, logits: Float[Tensor, "count vocab"], most: int) -> KeptTokens:
        """The `most` most probable tokens of each row under this law, in exact arithmetic.

        Where the law keeps few tokens these alone are looked at in float64, and the rest of a row
        is only compared: its cost hardly depends on the vocabulary.

        Parameters
        ----------
        logits : (count, vocab) tensor
            Finite but for ``-inf``; log-probabilities are logits, too.
        most : int

        Raises
        ------
        ValueError
            If a row's largest logit is not a finite number.

        Examples
        --------
        >>> law = SamplingLaw(top_k=2)
        >>> kept = law.kept_tokens(torch.tensor([[0.2, 0.5, 0.3]]).log(), most=10)
        >>> kept.tokens, kept.probs
        (tensor([[1, 2]]), tensor([[0.6250, 0.3750]], dtype=torch.float64))
        """
        if self.most_tokens is None:
            entries = _EXACT_AT_ONCE if logits.device.type == "cpu" else _EXACT_ON_DEVICE
            rows = max(entries // logits.shape[1], 1)
            pieces = [self._most_probable(piece, most) for piece in logits.split(rows)]
            return KeptTokens(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        tokens = _tokens_of_largest(logits, min(self.most_tokens, logits.shape[1]))  # (count, kept)
        inside = tokens < logits.shape[1]
        scores = logits.gather(1, tokens.clamp_max(logits.shape[1] - 1)).double()  # (count, kept)
        probs = self.process_log_probs(scores.masked_fill(~inside, -math.inf)).exp()
        probs = probs.masked_fill(~inside, 0.0)  # (count, kept)
        entropies = entropy(probs)
        if probs.shape[1] > most:
            probs, place = probs.topk(most)  # (count, most)
            tokens, order = tokens.gather(1, place).sort(1)  # (count, most)
            probs = probs.gather(1, order)  # (count, most)
        return KeptTokens(tokens, probs, entropies)

    def _most_probable(self, logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, probabilities and entropies of rows of which any number of tokens may stay."""
        check_finite(logits.amax(-1))
        scores = logits.double()
        scores = scores - scores.logsumexp(-1, keepdim=True)  # (count, vocab)
        probs = self.process_log_probs(scores).exp()  # (count, vocab)
        values, tokens = probs.topk(min(most, probs.shape[1]))  # (count, most)
        tokens, order = tokens.sort(1)  # (count, most)
        return tokens, values.gather(1, order), entropy(probs)


def _tokens_of_largest(
    logits: Float[Tensor, "count vocab"], count: int
) -> Int[Tensor, "count kept"]:
    """Ids of all entries not below each row's `count`-th largest, ascending; padded with the
    vocabulary's size.

    Looked for in groups of entries: those with the `count` largest maxima hold as many entries that
    are no smaller than any of the others.
    """
    vocab = logits.shape[1]
    group = _GROUP if vocab >= 2 * _GROUP * count else 1
    groups = vocab // group
    whole = logits[:, : groups * group]  # (count, group * groups): a group's entries lie apart
    rest = logits[:, groups * group :]  # (count, fewer than a group)
    maxima = whole
    while maxima.shape[1] > groups:
        half = maxima.shape[1] // 2
        maxima = torch.maximum(maxima[:, :half], maxima[:, half:])  # (count, half)
    whole = whole.unflatten(1, (group, groups))  # (count, group, groups)
    best = maxima.topk(count).indices  # (count, best)
    found = whole.gather(2, best[:, None].expand(-1, group, -1)).flatten(1)  # (count, …)
    top = torch.cat([found, rest], 1).topk(count).values  # (count, count)
    check_finite(top[:, 0])

    row, column = (maxima >= top[:, -1:]).nonzero().unbind(1)  # (candidate groups,) each
    hit, place = (whole[row, :, column] >= top[row, -1:]).nonzero().unbind(1)  # (kept,) each
    last, beyond = (rest >= top[:, -1:]).nonzero().unbind(1)  # (kept beyond the groups,) each
    row = torch.cat([row[hit], last])  # (all kept,)
    token = torch.cat([place * groups + column[hit], groups * group + beyond])  # (all kept,)
    order = (row * vocab + token).argsort()
    row, token = row[order], token[order]  # (all kept,) each
    sizes = torch.bincount(row, minlength=len(logits))  # (count,)
    place = (
        torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    )  # (all kept,)
    kept = torch.full((len(logits), int(sizes.max())), vocab, device=row.device)
    kept[row, place] = token
    return kept


def exact_dtype(values: Tensor) -> torch.dtype:
    """What probabilities made of these numbers are computed in: single precision, or wider."""
    return torch.promote_types(values.dtype, torch.float32)


def check_finite(values: Tensor) -> None:
    """Refuse sums or largest ones of logits that are no numbers.

    Raises
    ------
    ValueError
        Saying what a model returned.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "the model returned NaN or infinite logits: check its weights and the context"
        )


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
    # In double precision: single sums round at 1e-7, more than many tokens have.
    totals = probs.cumsum(-1, dtype=torch.float64)
    total = totals[..., -1:]  # (*batch, 1)
    # Strictly below the total, so that the first entry whose sum exceeds it has mass.
    # (*batch,)
    found = torch.searchsorted(totals, uniform.unsqueeze(-1) * total, right=True).squeeze(-1)
    return torch.minimum(found, torch.searchsorted(totals, total.contiguous()).squeeze(-1))
