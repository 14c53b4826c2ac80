"""The exact joint distribution of the next n tokens, as a dense tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.joint_distribution.dense import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.language_model import (
    LanguageModel,
    LogitsLanguageModel,
    PrefixSharingLanguageModel,
)
from cpmtp.sampling_law import SamplingLaw, check_finite

DEFAULT_MAX_BYTES = 4_000_000_000
_NORMALISATION_TOLERANCE = 1e-3
# Next-token probabilities asked for at once: the working set beyond the joint is one float32 copy
# of these, 17 MB, and what the model needs for a pass.
_ENTRIES_AT_ONCE = 1 << 22
_ENTRIES_IN_CACHE = 1 << 15


@takes_what_is_given
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
    """The joint distribution of the next `horizon` tokens: the chain rule, float64.

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
    shape = (len(continuations), lm.vocab_size)
    probs = torch.empty(shape, dtype=torch.float64) if out is None else out
    if isinstance(lm, LogitsLanguageModel):
        start = 0
        for logits in lm.continuation_logits(context, continuations):
            rows = probs[start : start + len(logits)]  # (some, vocab)
            _normalise_into(rows, logits.cpu(), law, of_logits=True)
            start += len(logits)
        return probs
    _normalise_into(probs, _raw_log_probs(lm, context, continuations), law, of_logits=False)
    return probs


def _normalise_into(
    probs: Float[Tensor, "count vocab"],
    raw: Float[Tensor, "count vocab"],
    law: SamplingLaw,
    *,
    of_logits: bool,
) -> None:
    """Fill `probs` with what a law makes of logits, or of log-probabilities, which are checked."""
    # In pieces that stay in the processor's cache from the exponential to the division.
    for piece, target in zip(
        raw.split(_rows_in_cache(raw)), probs.split(_rows_in_cache(raw)), strict=True
    ):
        target.copy_(piece)
        if of_logits:
            target.sub_(target.amax(-1, keepdim=True))  # (some, vocab)
        total = target.exp_().sum(-1, keepdim=True)  # (some, 1)
        if of_logits:
            check_finite(total)
        else:
            _check_total(total.log())
        if law.is_identity:
            target.div_(total)
        else:
            target.copy_(law.process(target / total))


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
    check_finite(log_total)
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
