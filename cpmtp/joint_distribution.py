"""The exact joint distribution of the next n tokens, as a dense tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cpmtp.language_model import LanguageModel, PrefixSharingLanguageModel
from cpmtp.sampling_law import SamplingLaw, entropy, ratio

DEFAULT_MAX_BYTES = 4_000_000_000
_SUM_TOLERANCE = 1e-6
_NORMALISATION_TOLERANCE = 1e-3
# Next-token probabilities asked for at once: the working set beyond the joint is one float32 copy
# of these, 17 MB, and what the model needs for a pass.
_ENTRIES_AT_ONCE = 1 << 22
_ENTRIES_IN_CACHE = 1 << 15


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
        """Write to a safetensors file."""
        save_file({"probs": self.probs.contiguous()}, path, {"horizon": str(self.horizon)})

    @classmethod
    def load(cls, path: str | Path) -> JointDistribution:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("probs"), int(file.metadata()["horizon"]))


def exact_joint(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    horizon: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Callable[[int], None] | None = None,
) -> JointDistribution:
    """The joint law of the next `horizon` tokens: the chain rule over every prefix, float64.

    Parameters
    ----------
    lm : LanguageModel
    context : (time,) long tensor
        Token ids so far; may be empty where the model allows it.
    horizon : int
    temperature, top_k, top_p
        Part of the law: applied to every conditional.
    max_bytes : int
        Largest joint allowed, in bytes (``vocab_size ** horizon * 8``).
    progress : callable, optional
        Called with the number of prefixes evaluated since the last call.

    Raises
    ------
    ValueError
        If top-k exceeds the vocabulary, the horizon is below 1, the joint would exceed `max_bytes`
        (before any is allocated), a context token is not in the vocabulary, context and horizon
        exceed the model's window, or the model returns something that is no distribution.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> exact_joint(separated_hmm(2, 4), torch.tensor([0]), 3).probs.shape
    torch.Size([4, 4, 4])
    """
    law = SamplingLaw(temperature, top_k, top_p)
    law.check_vocabulary(lm.vocab_size)
    check_joint_size(lm.vocab_size, horizon, max_bytes)
    check_context(lm, context, horizon)
    vocab = lm.vocab_size
    joint = torch.ones(1, dtype=torch.float64)
    size = prefixes_at_once(vocab)
    for depth in range(horizon):
        grown = torch.empty(len(joint), vocab, dtype=torch.float64)
        for start in range(0, len(joint), size):
            stop = min(start + size, len(joint))
            conditional_probs(
                lm, context, grid_rows(start, stop, vocab, depth), law, out=grown[start:stop]
            )
            grown[start:stop].mul_(joint[start:stop, None])  # (some, vocab)
            if progress:
                progress(stop - start)
        joint = grown.view(-1)  # (sequences,)
    return JointDistribution(joint.view((vocab,) * horizon))  # (vocab, …, vocab)


def prefixes_at_once(vocab_size: int) -> int:
    """How many next-token laws to ask for at once: whole groups of siblings where they fit into the
    working set.
    """
    size = max(_ENTRIES_AT_ONCE // vocab_size, 1)
    return max(size // vocab_size, 1) * vocab_size if size >= vocab_size else size


def grid_rows(start: int, stop: int, vocab: int, depth: int) -> Int[Tensor, "rows depth"]:
    """Rows `start` to `stop` of all sequences of `depth` tokens in lexicographic order."""
    index = torch.arange(start, stop)
    places = vocab ** torch.arange(depth - 1, -1, -1)
    return index[:, None] // places % vocab


def conditional_probs(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    continuations: Int[Tensor, "count length"],
    law: SamplingLaw,
    *,
    out: Float[Tensor, "count vocab"] | None = None,
) -> Float[Tensor, "count vocab"]:
    """Processed next-token probabilities after `context` and each continuation, checked and
    normalised, float64.

    Written into `out` where it is given: a joint is filled without a second copy of it.
    """
    raw = _raw_log_probs(lm, context, continuations)
    probs = torch.empty(raw.shape, dtype=torch.float64) if out is None else out
    # In pieces that stay in the processor's cache from the exponential to the division.
    for piece, target in zip(
        raw.split(_rows_in_cache(raw)), probs.split(_rows_in_cache(raw)), strict=True
    ):
        total = target.copy_(piece).exp_().sum(-1, keepdim=True)
        _check_total(total.log())
        if law.is_identity:
            target.div_(total)
        else:
            target.copy_(law.process(target / total))
    return probs


def conditional_log_probs(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    continuations: Int[Tensor, "count length"],
    law: SamplingLaw,
) -> Float[Tensor, "count vocab"]:
    """The same as log-probabilities (nats); removed tokens have ``-inf``."""
    return law.process_log_probs(next_token_log_probs(lm, context, continuations))


def next_token_log_probs(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    continuations: Int[Tensor, "count length"],
) -> Float[Tensor, "count vocab"]:
    """The model's own, unprocessed: checked and normalised, float64."""
    return checked_log_probs(_raw_log_probs(lm, context, continuations))


def checked_log_probs(raw: Float[Tensor, "count vocab"]) -> Float[Tensor, "count vocab"]:
    """Float64 log-probabilities that sum to one exactly, or a ValueError that says what the model
    returned.
    """
    total = raw.double().logsumexp(-1, keepdim=True)
    _check_total(total)
    return raw.double() - total


def _raw_log_probs(lm: LanguageModel, context: Tensor, continuations: Tensor) -> Tensor:
    if isinstance(lm, PrefixSharingLanguageModel):
        raw = lm.continuation_log_probs(context, continuations)
    else:
        raw = lm.next_token_log_probs(  # (count, vocab)
            torch.cat([context.expand(len(continuations), -1), continuations], dim=1)
        )
    expected = (len(continuations), lm.vocab_size)
    if tuple(raw.shape) != expected:
        raise ValueError(
            f"the model returned log-probabilities of shape {tuple(raw.shape)}: expected {expected}"
        )
    return raw.cpu()


def _check_total(log_total: Tensor) -> None:
    if not bool(torch.isfinite(log_total).all()):
        raise ValueError(
            "the model returned NaN or infinite logits: check its weights and the context"
        )
    worst = log_total.abs().max().item()
    if worst > _NORMALISATION_TOLERANCE:
        raise ValueError(
            f"the model's log-probabilities are not normalised (log of the sum is {worst:.3g}): "
            "apply log_softmax"
        )


def _rows_in_cache(raw: Tensor) -> int:
    return max(_ENTRIES_IN_CACHE // raw.shape[1], 1)


def check_joint_size(vocab_size: int, horizon: int, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Refuse a horizon below 1 and a joint above the limit.

    Raises
    ------
    ValueError
        With the size, the limit and what to do.
    """
    if horizon < 1:
        raise ValueError(f"horizon {horizon}: expected at least 1")
    needed = 8 * vocab_size**horizon
    if needed > max_bytes:
        raise ValueError(
            f"horizon {horizon} over {vocab_size} tokens needs {_gigabytes(needed)}; the limit is "
            f"{_gigabytes(max_bytes)}: "
            "lower the horizon or use truncated_joint"
        )


def check_context(lm: LanguageModel, context: Tensor, horizon: int) -> None:
    """Refuse a context that is no token sequence of this model, or too long for it."""
    if context.ndim != 1 or context.is_floating_point():
        raise ValueError(
            f"context of shape {tuple(context.shape)} and {context.dtype}: expected a 1-D tensor "
            "of token ids"
        )
    if len(context) and not 0 <= int(context.min()) <= int(context.max()) < lm.vocab_size:
        raise ValueError(
            f"context tokens must be in [0, {lm.vocab_size}): got {int(context.min())} to "
            f"{int(context.max())}"
        )
    window = getattr(lm, "max_context", None)
    if window is not None and len(context) + horizon - 1 > window:
        raise ValueError(
            f"a context of {len(context)} tokens and horizon {horizon} run past the model's "
            f"{window} positions: "
            f"keep at most {window - horizon + 1} tokens of context"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"
