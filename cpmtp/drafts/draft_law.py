"""What a draft says about the next token after a prefix, whatever kind of draft it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution, conditional_probs
from cpmtp.language_model import LanguageModel
from cpmtp.sampling_law import SamplingLaw

Draft = CPDistribution | JointDistribution | LanguageModel
DraftLaw = Callable[[Tensor], Tensor]


def draft_next_token_law(
    draft: Draft, context: Int[Tensor, " time"] | None, law: SamplingLaw
) -> DraftLaw:
    """A function from prefixes (count, length) to next-token probabilities (count, vocab) of the
    draft, float64.

    Parameters
    ----------
    draft : CPDistribution, JointDistribution or LanguageModel
        The first two over all tokens of the horizon, or, with one batch axis (vocab,), anchored:
        told the first token. They may be conditioned on a first token to which they give no mass;
        then they speak of the others as if it were unknown.
    context : (time,) long tensor, optional
        Needed by a language model only.
    law : SamplingLaw
        What the draft's next-token laws are put through.

    Raises
    ------
    ValueError
        If the draft has other batch axes, or a language model comes without a context.

    Examples
    --------
    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    >>> draft = CPDistribution(half, [torch.eye(2, dtype=torch.float64)] * 2)
    >>> draft_next_token_law(draft, None, SamplingLaw())(torch.tensor([[0], [1]]))
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    if not isinstance(draft, CPDistribution | JointDistribution):
        if context is None:
            raise ValueError(
                "a language model as draft needs the context that the target was given: pass "
                "context="
            )
        return lambda prefixes: conditional_probs(draft, context, prefixes, law)
    if not draft.batch_shape:
        return lambda prefixes: law.process(_law_of_all(draft, prefixes))
    if tuple(draft.batch_shape) != (draft.vocab_size,):
        raise ValueError(
            f"a draft with batch axes {tuple(draft.batch_shape)}: expected none, or one of "
            f"{draft.vocab_size} (one draft per "
            "first token)"
        )
    return lambda prefixes: law.process(_anchored_law(draft, prefixes))


def is_anchored(draft: Draft) -> bool:
    """Whether the draft is told the first token."""
    return isinstance(draft, CPDistribution | JointDistribution) and len(draft.batch_shape) == 1


def draft_horizon(draft: Draft) -> int | None:
    """How many tokens the draft covers, the first one included; None: any number."""
    return (
        draft.horizon + is_anchored(draft)
        if isinstance(draft, CPDistribution | JointDistribution)
        else None
    )


def _law_of_all(draft: CPDistribution | JointDistribution, prefixes: Tensor) -> Tensor:
    if prefixes.shape[1] == 0:
        return _raw_law(draft, prefixes)
    # A first token of the target's that the draft excludes has no posterior: the rest goes on as if
    # it had not been told.
    excluded = _raw_law(draft, prefixes[:1, :0])[0, prefixes[:, 0]] == 0
    if not bool(excluded.any()):
        return _raw_law(draft, prefixes)
    found = torch.empty(len(prefixes), draft.vocab_size, dtype=torch.float64)
    found[~excluded] = _raw_law(draft, prefixes[~excluded])
    found[excluded] = _raw_law(_after_first(draft), prefixes[excluded, 1:])
    return found


def _after_first(draft: CPDistribution | JointDistribution) -> CPDistribution | JointDistribution:
    """The law of the other tokens."""
    if isinstance(draft, CPDistribution):
        return CPDistribution(draft.weights, draft.factors[1:])
    return JointDistribution(draft.probs.sum(0))


def _raw_law(draft: CPDistribution | JointDistribution, prefixes: Tensor) -> Tensor:
    if isinstance(draft, CPDistribution):
        return draft.next_token_probs(prefixes).double()
    joint = draft.prefix_probs(prefixes.shape[1] + 1).double()
    rows = joint[tuple(prefixes.T)] if prefixes.shape[1] else joint.expand(len(prefixes), -1)
    total = rows.sum(-1, keepdim=True)
    # Beyond an impossible prefix nothing is accepted, so any law will do.
    return torch.where(total > 0, rows / torch.where(total > 0, total, 1.0), 1 / draft.vocab_size)


def _anchored_law(draft: CPDistribution | JointDistribution, prefixes: Tensor) -> Tensor:
    if prefixes.shape[1] == 0:
        raise ValueError(
            "an anchored draft says nothing of the first token: it needs first_token='target'"
        )
    found = torch.empty(len(prefixes), draft.vocab_size, dtype=torch.float64)
    for first in prefixes[:, 0].unique().tolist():
        rows = prefixes[:, 0] == first
        given = (
            draft[first]
            if isinstance(draft, CPDistribution)
            else JointDistribution(draft.probs[first])
        )
        found[rows] = _raw_law(given, prefixes[rows, 1:])
    return found


def check_draft(draft: Draft, vocab_size: int, horizon: int, first_token: str) -> None:
    """Refuse a draft over other tokens or of another horizon, and an anchored one that is to give
    the first token.
    """
    if draft.vocab_size != vocab_size:
        raise ValueError(
            f"a draft over {draft.vocab_size} tokens for a target over {vocab_size}: they must "
            "share a vocabulary"
        )
    if first_token not in ("target", "draft"):
        raise ValueError(f"unknown first_token {first_token!r}: expected one of target, draft")
    if is_anchored(draft) and first_token == "draft":
        raise ValueError(
            "an anchored draft is told the first token and cannot give it: use first_token='target'"
        )
    own = draft_horizon(draft)
    if own is not None and own != horizon:
        raise ValueError(
            f"a draft of {own} tokens (the first one included) for a horizon of {horizon}: they "
            "must be the same"
        )
