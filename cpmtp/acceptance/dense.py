"""The rules' sums over all sequences of a dense joint, position by position.

At position k everything is a table of prefixes of k-1 tokens (rows) by next tokens. Some rows of
both joints are made at a time, serve all rules, and are gone: no rule walks over the joint by
itself, and a draft's joint is never held at its own size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cpmtp.acceptance.options import Thresholds
from cpmtp.acceptance.verification import SUMMED, PrefixMasses, joint_scales
from cpmtp.drafts.prefix_tables import PrefixTable, joints_of_prefixes, row_of, tables_of
from cpmtp.drafts.protocol import Draft
from cpmtp.joint_distribution import JointDistribution
from cpmtp.sampling_law import SamplingLaw, entropy, ratio

# Entries of some rows; a few tensors of this size are alive at a time.
_PIECE = 1 << 16


@dataclass(frozen=True)
class _Tables:
    """Target's and draft's joint of the first k tokens; leading axes: batch, anchored: first token.

    Attributes
    ----------
    p : (*lead, prefixes, vocab) tensor
    q : PrefixTable
    """

    p: Float[Tensor, "*lead prefixes vocab"]
    q: PrefixTable

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of both, some at a time."""
        entries_per_row = self.p.numel() // max(self.p.shape[-2], 1)
        size = max(_PIECE // max(entries_per_row, 1), 1)
        return zip(self.p.split(size, -2), self.q.pieces(size), strict=True)


def survivals(
    joint: JointDistribution,
    draft: Draft,
    rules: tuple[str, ...],
    law: SamplingLaw,
    *,
    told: bool,
    anchored: bool,
    thresholds: Thresholds,
) -> dict[str, Float[Tensor, "*batch horizon"]]:
    """``S_1 … S_n`` of each rule; arguments are taken to fit each other.

    Parameters
    ----------
    law : SamplingLaw
        What the draft's next-token distributions are put through.
    told : bool
        Whether the first token is the target's.
    """
    batch = len(joint.batch_shape)
    joints = joints_of_prefixes(joint.probs, joint.horizon)
    first = joints[1] if told else joints[0].unsqueeze(-1)  # (*batch, prefixes)
    sums = [_rule_sum(rule, first, thresholds) for rule in rules if rule != "greedy"]
    greedy = [_GreedyPath(joints[1], batch, law, told)] if "greedy" in rules else []
    one = [torch.ones_like(joints[0])] if told else []  # the target's own token always survives
    found: dict[str, list[Tensor]] = {rule: list(one) for rule in rules}

    start = 1 + told
    of_target = tables_of(joints, batch + anchored, start)
    of_draft = draft.prefix_tables(joints[1] if told else None, anchored=anchored)
    before = _Before(first, first)
    for length, (p, q) in enumerate(zip(of_target, of_draft, strict=True), start):
        tables = _Tables(p, q)
        longer = _walk(tables, sums, before, batch, law, last=length == joint.horizon)
        for rule_sum in sums:
            found[rule_sum.rule].append(rule_sum.survived)
        for path in greedy:
            found[path.rule].append(path.judged(tables))
        if longer is not None:
            before = _Before(joints[length].flatten(batch), longer)  # (*batch, longer)
    return {rule: torch.stack(values, -1) for rule, values in found.items()}


@dataclass(frozen=True)
class _Before:
    """Target's and draft's masses of the prefixes that are continued, (*batch, prefixes) each."""

    target: Float[Tensor, "*batch prefixes"]
    draft: Float[Tensor, "*batch prefixes"]


def _walk(
    tables: _Tables,
    sums: list[_RuleSum],
    before: _Before,
    batch: int,
    law: SamplingLaw,
    *,
    last: bool,
) -> Float[Tensor, "*batch longer"] | None:
    """One position: every rule sums up what survives; the draft's masses unless it is the last."""
    lead = tables.p.shape[:-1]  # (*lead, prefixes)
    for one in sums:
        one.begin(before, lead)

    grown, start = [], 0
    for p, q in tables.pieces():
        rows = slice(start, start + p.shape[-2])
        start = rows.stop
        if not law.is_identity:
            mass = before.draft.reshape(lead)[..., rows, None]  # (*lead, some, 1)
            q = mass * _processed(q, law)
        for one in sums:
            one.add(rows, p, q, batch, keep=not last)
        if not last:
            grown.append(q)
    if last:
        return None

    for one in sums:
        one.grow(batch)
    return torch.cat(grown, -2).flatten(batch)  # (*batch, longer)


class _RuleSum:
    """What a rule carries from position to position: a number per prefix, (*batch, prefixes)."""

    def __init__(self, rule: str, accepted: Shaped[Tensor, "*batch prefixes"]):
        self.rule = rule
        self.survived = accepted.new_zeros(())
        self._accepted = accepted
        self._kept: list[Tensor] = []
        self._scales: list[Tensor | None] = []

    def begin(self, before: _Before, lead: torch.Size) -> None:
        """Get ready for the continuations of prefixes of these masses."""
        masses = PrefixMasses(before.target, before.draft, self._accepted)
        scales = joint_scales(self.rule, masses)
        self._scales = [s if s is None else s.reshape(lead) for s in scales]  # (*lead, prefixes)
        self.survived, self._kept = before.draft.new_zeros(()), []

    def add(self, rows: slice, p: Tensor, q: Tensor, batch: int, *, keep: bool) -> None:
        """Sum up the continuations of some prefixes, joint masses (*lead, some, vocab)."""
        # (*lead, some, 1)
        of_target, of_draft = (s if s is None else s[..., rows, None] for s in self._scales)
        kept = torch.minimum(_times(of_target, p), _times(of_draft, q))
        self.survived = self.survived + kept.flatten(batch).sum(-1)  # (*batch,)
        if keep:
            self._kept.append(kept)

    def grow(self, batch: int) -> None:
        """Go on to the next position."""
        self._accepted = torch.cat(self._kept, -2).flatten(batch)  # (*batch, longer)


def _times(scale: Tensor | None, values: Tensor) -> Tensor:
    return values if scale is None else values * scale


class _TypicalSum(_RuleSum):
    """The draft's mass where every token of the target's has passed a threshold."""

    def __init__(self, prefixes: Float[Tensor, "*batch prefixes"], thresholds: Thresholds):
        super().__init__("typical", torch.ones_like(prefixes, dtype=torch.bool))
        self._thresholds = thresholds

    def begin(self, before: _Before, lead: torch.Size) -> None:
        """Get ready for the continuations of prefixes of these masses."""
        # (*lead, prefixes)
        self._scales = [before.target.reshape(lead), self._accepted.reshape(lead)]
        self.survived, self._kept = before.draft.new_zeros(()), []

    def add(self, rows: slice, p: Tensor, q: Tensor, batch: int, *, keep: bool) -> None:
        """Sum up the continuations of some prefixes, joint masses (*lead, some, vocab)."""
        # (*lead, some, 1)
        target, passed = (values[..., rows, None] for values in self._scales if values is not None)
        conditional = ratio(p, target, otherwise=0.0)
        threshold = self._thresholds.of(entropy(conditional)).unsqueeze(-1)  # (*lead, some, 1)
        kept = passed & (conditional > threshold)
        # (*batch,)
        self.survived = self.survived + torch.where(kept, q, 0.0).flatten(batch).sum(-1)
        if keep:
            self._kept.append(kept)


def _rule_sum(rule: str, first: Tensor, thresholds: Thresholds) -> _RuleSum:
    return _RuleSum(rule, first) if rule in SUMMED else _TypicalSum(first, thresholds)


class _GreedyPath:
    """The path of the target's argmaxes, and what of it the draft has kept so far."""

    rule = "greedy"

    def __init__(self, first: Tensor, batch: int, law: SamplingLaw, told: bool):
        self._batch, self._law = batch, law
        nothing = torch.zeros_like(first[..., 0], dtype=torch.long)
        self._prefix = first.argmax(-1) if told else nothing  # (*batch,)
        # The first token is the target's argmax, whatever mass the joint gives it.
        mass = first.take_along_dim(self._prefix.unsqueeze(-1), -1).squeeze(-1)  # (*batch,)
        self._mass = mass if told else None
        self._survived = torch.ones_like(first[..., 0])

    def judged(self, tables: _Tables) -> Float[Tensor, "*batch"]:
        """Survival of one more position."""
        p = row_of(tables.p, self._prefix, self._batch).squeeze(-2)  # (*batch, vocab)
        q = tables.q.row(self._prefix, self._batch).squeeze(-2)  # (*batch, vocab)
        token = p.argmax(-1, keepdim=True)
        if self._law.is_identity:
            self._survived = q.take_along_dim(token, -1).squeeze(-1)  # (*batch,)
            found = self._survived if self._mass is None else self._survived / self._mass
        else:
            kept = _processed(q, self._law).take_along_dim(token, -1).squeeze(-1)  # (*batch,)
            self._survived = found = self._survived * kept
        self._prefix = self._prefix * p.shape[-1] + token.squeeze(-1)  # (*batch,)
        return found


def _processed(q: Float[Tensor, "*rows vocab"], law: SamplingLaw) -> Float[Tensor, "*rows vocab"]:
    """Conditionals of rows of a joint, put through the law; zeros where the draft says nothing."""
    total = q.sum(-1, keepdim=True)
    conditional = ratio(q, total, otherwise=1 / q.shape[-1])
    processed = law.process(conditional / conditional.sum(-1, keepdim=True))
    return torch.where(total > 0, processed, 0.0)
