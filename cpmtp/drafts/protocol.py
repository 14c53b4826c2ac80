"""What may be proposed: does it fit, is it anchored, what follows a prefix, its joint as tables.

Everything that takes a draft reads it through these; a new form is a class with these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.drafts.prefix_tables import (
    FullTable,
    PrefixTable,
    broadcast_first,
    joints_of_prefixes,
    picked,
    tables_of,
)
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import LanguageModel
from cpmtp.sampling_law import SamplingLaw, ratio


@runtime_checkable
class Draft(Protocol):
    """A distribution over some tokens to come, with or without batch axes.

    Attributes
    ----------
    vocab_size, horizon : int
    batch_shape : torch.Size
        An anchored draft's last batch axis is the first token's.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def horizon(self) -> int:
        """Tokens it is over; of an anchored draft those after the first."""
        ...

    @property
    def batch_shape(self) -> torch.Size:
        """Axes before the distribution's own."""
        ...

    def __getitem__(self, index) -> Draft:
        """Select along the first batch axes."""
        ...

    def following(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Float[Tensor, "count vocab"]:
        """What a draft without batch axes says of the token after each prefix.

        With `told` the first token is the target's: where the draft gives it no mass, it speaks of
        the others as if that token were unknown.
        """
        ...

    def child_probs(
        self,
        prefixes: Int[Tensor, "count length"],
        row: Int[Tensor, " children"],
        tokens: Int[Tensor, " children"],
        *,
        law: SamplingLaw,
        told: bool,
    ) -> Float[Tensor, " children"]:
        """What a draft without batch axes says of some tokens, put through a law: conditionals
        (float64) of `tokens` after the prefixes that `row` numbers.

        The same as ``law.process(following(prefixes))[row, tokens]``, without that table where the
        draft can do without it.
        """
        ...

    def proposes(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Bool[Tensor, " count"]:
        """Whether anything is drafted after each prefix: if not, `following` is zero there."""
        ...

    def prefix_tables(
        self, first: Float[Tensor, "*batch vocab"] | None, *, anchored: bool
    ) -> Iterator[PrefixTable]:
        """The draft's joint of 1, 2, … tokens as tables of prefixes by next tokens.

        ``Q(x_1:k)``, k from 1; with the target's `first` ``P(x_1) Q(x_2:k | x_1)``, k from 2.
        Tables of an anchored draft have an axis for the first token after the batch's.
        """
        ...


@dataclass(frozen=True)
class JointDraft:
    """A dense joint as a draft.

    Attributes
    ----------
    joint : JointDistribution
    """

    joint: JointDistribution

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.joint.vocab_size

    @property
    def horizon(self) -> int:
        """Tokens it is over."""
        return self.joint.horizon

    @property
    def batch_shape(self) -> torch.Size:
        """Axes before the token axes."""
        return self.joint.batch_shape

    def __getitem__(self, index) -> JointDraft:
        return JointDraft(JointDistribution(self.joint.probs[index], self.horizon))

    def following(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Float[Tensor, "count vocab"]:
        """Conditionals of the joint; see `Draft`."""
        length = prefixes.shape[1]
        if length == 0:
            return _conditionals(self.joint.prefix_probs(1).expand(len(prefixes), -1))
        found = _conditionals(self.joint.prefix_probs(length + 1)[tuple(prefixes.T)])
        excluded = self.joint.prefix_probs(1)[prefixes[:, 0]] == 0  # (count,)
        if told and bool(excluded.any()):
            others = JointDraft(JointDistribution(self.joint.probs.sum(0)))
            found[excluded] = others.following(prefixes[excluded, 1:], told=False)
        return found

    def child_probs(
        self,
        prefixes: Int[Tensor, "count length"],
        row: Int[Tensor, " children"],
        tokens: Int[Tensor, " children"],
        *,
        law: SamplingLaw,
        told: bool,
    ) -> Float[Tensor, " children"]:
        """Read off the conditionals, which are there; see `Draft`."""
        return picked(
            lambda some: law.process(self.following(some, told=told)),
            prefixes,
            row,
            tokens,
            self.vocab_size,
        )

    def proposes(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Bool[Tensor, " count"]:
        """Always something; see `Draft`."""
        return torch.ones(len(prefixes), dtype=torch.bool)

    def prefix_tables(
        self, first: Float[Tensor, "*batch vocab"] | None, *, anchored: bool
    ) -> Iterator[PrefixTable]:
        """The joint itself, reweighted by the target's first token; see `Draft`."""
        lead = len(self.batch_shape)
        if first is None:
            probs, horizon = self.joint.probs, self.horizon
        else:
            probs = self._given(first) if not anchored else self._after(first)
            horizon = self.horizon + anchored
        start = 1 if first is None else 2
        joints = joints_of_prefixes(probs, horizon)
        return (FullTable(table) for table in tables_of(joints, lead, start))

    def _after(self, first: Tensor) -> Tensor:
        """``P(x1) Q_{x1}(x_2:n)`` of an anchored draft."""
        return broadcast_first(first, self.joint.probs) * self.joint.probs

    def _given(self, first: Tensor) -> Tensor:
        """``P(x1) Q(x_2:n | x1)``; after a first token of zero mass the draft's other tokens."""
        own, probs = self.joint.prefix_probs(1), self.joint.probs
        given = broadcast_first(ratio(first, own, otherwise=0.0), probs) * probs
        if bool((own > 0).all()):
            return given
        others = probs.sum(dim=-self.horizon, keepdim=True)
        fallback = broadcast_first(first, probs) * others
        return torch.where(broadcast_first(own > 0, probs), given, fallback)


def _conditionals(rows: Float[Tensor, "count vocab"]) -> Float[Tensor, "count vocab"]:
    rows = rows.double()
    # Beyond an impossible prefix nothing is accepted, so any distribution will do.
    return ratio(rows, rows.sum(-1, keepdim=True), otherwise=1 / rows.shape[-1])


def as_draft(
    proposed: Any, *, context: Int[Tensor, " time"] | None = None, horizon: int | None = None
) -> Draft:
    """Whatever may be proposed as a `Draft`.

    Parameters
    ----------
    proposed : Draft, FitResult, JointDistribution or LanguageModel
    context : (time,) long tensor, optional
        What a language model continues; needed by it only.
    horizon : int, optional
        Tokens a language model's joint is asked for; needed by it only.

    Raises
    ------
    ValueError
        If it is none of these, or a language model comes without a context.
    """
    proposed = getattr(proposed, "distribution", proposed)
    if isinstance(proposed, JointDistribution):
        return JointDraft(proposed)
    if isinstance(proposed, Draft):
        return proposed
    if isinstance(proposed, LanguageModel):
        return JointDraft(exact_joint(proposed, needed_context(context), horizon or 1))
    raise ValueError(
        f"a {type(proposed).__name__} as draft: expected a distribution over the tokens to come, a "
        "fit, a joint, a language model, or what head_draft(lm, head, context) says of a head"
    )


def is_anchored(
    proposed: Any,
    vocab_size: int,
    horizon: int,
    batch_shape: tuple[int, ...] = (),
    *,
    first_token: str = "target",
) -> bool:
    """Whether the draft holds one distribution of the n-1 later tokens for each first token.

    Parameters
    ----------
    vocab_size, horizon, batch_shape
        Of the target's joint.
    first_token : {"target", "draft"}

    Raises
    ------
    ValueError
        If the draft fits the joint neither so nor plainly, or an anchored one is to give the first
        token.
    """
    proposed = getattr(proposed, "distribution", proposed)
    if not isinstance(proposed, JointDistribution | Draft | LanguageModel):
        as_draft(proposed)  # which says what is expected
    if proposed.vocab_size != vocab_size:
        raise ValueError(
            f"a draft over {proposed.vocab_size} tokens for a target over {vocab_size}: they must "
            "share a vocabulary"
        )
    if isinstance(proposed, LanguageModel):
        return False
    own, batch = tuple(proposed.batch_shape), tuple(batch_shape)
    if proposed.horizon == horizon and own == batch:
        return False
    if proposed.horizon != horizon - 1 or own != (*batch, vocab_size):
        raise ValueError(
            f"a draft of horizon {proposed.horizon} and batch axes {own} for a joint of horizon "
            f"{horizon} and batch axes {batch}: expected the same, or an anchored draft of horizon "
            f"{horizon - 1} and batch axes {(*batch, vocab_size)}"
        )
    if first_token == "draft":
        raise ValueError(
            "an anchored draft is told the first token and cannot give it: use first_token='target'"
        )
    return True


def draft_horizon(proposed: Any) -> int | None:
    """Tokens the draft covers, the first one included; None: any number."""
    proposed = getattr(proposed, "distribution", proposed)
    if isinstance(proposed, LanguageModel):
        return None
    if not isinstance(proposed, JointDistribution | Draft):
        as_draft(proposed)  # which says what is expected
    return proposed.horizon + (tuple(proposed.batch_shape) == (proposed.vocab_size,))


def needed_context(context: Tensor | None) -> Tensor:
    """The context, or a ValueError that says why it is needed."""
    if context is None:
        raise ValueError(
            "a draft that is a language model needs context=, the token ids it continues"
        )
    return context
