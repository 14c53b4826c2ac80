"""Acceptance from a truncated joint: a lower and an upper bound that certainly contain the exact
value.

The proof is in ``docs/truncated_joints.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.acceptance.children import ChildReader
from cpmtp.acceptance.options import AcceptanceOptions, Thresholds
from cpmtp.acceptance.verification import PrefixMasses, accepted_mass
from cpmtp.drafts.protocol import is_anchored
from cpmtp.joint_distribution.shown import Shown
from cpmtp.prefix_tree import PrefixTree

# Children judged together: a draft's components are asked for all of them.
_CHILDREN_AT_ONCE = 1 << 18


@dataclass(frozen=True, repr=False)
class AcceptanceInterval(Shown):
    """Bounds of an acceptance profile; see `AcceptanceProfile` for what is bounded.

    Attributes
    ----------
    survival_lower, survival_upper : (horizon,) float64 tensors
        Bounds of the probability that the first k tokens of a block are emitted unchanged.
    rule : str
    first_token : str
        ``"target"`` or ``"draft"``.
    """

    survival_lower: Float[Tensor, " horizon"]
    survival_upper: Float[Tensor, " horizon"]
    rule: str
    first_token: str

    @property
    def tokens_per_call_lower(self) -> float:
        """At least this many tokens are expected per call of the target."""
        return float(self.survival_lower.sum()) + (self.first_token == "draft")

    @property
    def tokens_per_call_upper(self) -> float:
        """At most this many tokens are expected per call of the target."""
        return float(self.survival_upper.sum()) + (self.first_token == "draft")


def certified_acceptance(
    tree: PrefixTree, draft: Any, *, rule: str = "block", **options: Any
) -> AcceptanceInterval:
    """Bounds of what `implied_acceptance` gives for the whole joint, from the kept prefixes alone.

    The lower bound of ``S_k`` sums the rule's exact terms over the kept prefixes. The upper bound
    adds, for every place where something was left out, the most that can be accepted below it: all
    that is accepted at an unexpanded prefix, and at dropped children their mass under the rule.
    What is added is never more than ``min(1 - P(kept), 1 - Q(kept))`` for ``token``, ``block`` and
    ``coupling``, nor than ``1 - Q(kept)`` for ``typical``; ``greedy`` is exact. On a complete tree,
    which has all mass but 1e-9, both bounds are the sum over what is kept.

    Parameters
    ----------
    tree : PrefixTree
        The target's law; temperature, top-k and top-p are part of it (see `truncated_joint`).
    draft : CPDistribution, JointDistribution or LanguageModel
        Over the tree's horizon; or anchored: with one batch axis over the first token and horizon
        n-1.
    rule : {"token", "block", "coupling", "greedy", "typical"}
    **options
        As for `implied_acceptance`.

    Raises
    ------
    ValueError
        If a name is unknown, shapes do not match, an anchored draft is to give the first token,
        ``greedy`` comes with a temperature above 0, or a language model comes without its context.

    References
    ----------
    leviathan2023fast, sun2024block, cai2024medusa

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.prefix_tree import truncated_joint
    >>> lm, context = separated_hmm(2, 8), torch.tensor([0])
    >>> tree = truncated_joint(lm, context, 3, mass=0.8)
    >>> bounds = certified_acceptance(tree, lm, context=context)
    >>> round(bounds.tokens_per_call_lower, 2), round(bounds.tokens_per_call_upper, 2)
    (2.81, 3.0)
    """
    chosen = AcceptanceOptions(**options)
    chosen.check_rule(rule)
    anchored = is_anchored(draft, tree.vocab_size, tree.horizon, first_token=chosen.first_token)
    children = ChildReader.of(
        draft, chosen.law, anchored=anchored, told=chosen.told, context=chosen.context
    )
    if rule == "greedy":
        return _greedy_interval(tree, children, chosen.first_token)
    return _interval(_Walk(tree, children, rule, chosen.thresholds), chosen.first_token)


@dataclass(frozen=True)
class _Walk:
    """What stays the same from depth to depth."""

    tree: PrefixTree
    children: ChildReader
    rule: str
    thresholds: Thresholds


def _interval(walk: _Walk, first_token: str) -> AcceptanceInterval:
    everything = torch.ones(1, dtype=torch.float64)
    kept, lost = PrefixMasses(everything, everything, everything), 0.0
    bounds = [(1.0, 1.0)]
    for length, level in enumerate(walk.tree.levels, 1):
        if length == 1 and first_token == "target":
            kept = PrefixMasses(level.probs, level.probs, level.probs)
            lost = max(1 - float(level.probs.sum()), 0.0)
            bounds.append((1.0, 1.0))
            continue
        kept, left_out = _descend(walk, length, kept)
        lost = 0.0 if walk.tree.is_complete else lost + left_out
        lower = min(float(kept.accepted.sum()), bounds[-1][1])
        bounds.append((lower, min(lower + lost, bounds[-1][1])))
    lowers, uppers = torch.tensor(bounds[1:], dtype=torch.float64).unbind(1)
    return AcceptanceInterval(lowers, uppers, walk.rule, first_token)


def _descend(walk: _Walk, length: int, parents: PrefixMasses) -> tuple[PrefixMasses, float]:
    """One token further: the kept children's masses, and the most accepted where none are kept."""
    tree, level = walk.tree, walk.tree.levels[length - 1]
    owners, counts = level.parents.unique_consecutive(return_counts=True)  # (expanded,) each
    without_children = torch.ones(len(parents.target), dtype=torch.bool)
    without_children[owners] = False
    left_out = float(parents.accepted[without_children].sum())

    prefixes = tree.expanded_prefixes(length - 1)  # (expanded, length - 1)
    draft, accepted = torch.empty_like(level.probs), torch.empty_like(level.probs)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])  # (expanded + 1,)
    for nodes in _pieces(len(owners), int(counts.max())):
        some = slice(int(ends[nodes.start]), int(ends[nodes.stop]))
        row = torch.arange(nodes.stop - nodes.start).repeat_interleave(counts[nodes])  # (children,)
        p, parent = level.conditionals[some], parents[owners[nodes]]
        q, q_total = _drafted(walk, prefixes[nodes], parent.draft > 0, row, level.tokens[some])
        threshold = walk.thresholds.of(level.parent_entropies[nodes])  # (nodes,)
        draft[some] = parent.draft[row] * q
        accepted[some] = _accepted(walk.rule, parent[row], p, q, threshold[row])
        p_dropped = (1 - _sum_by(row, p, len(parent.target))).clamp_min(0)  # (nodes,)
        q_dropped = (q_total - _sum_by(row, q, len(parent.target))).clamp_min(0)  # (nodes,)
        lowest = torch.full_like(p_dropped, torch.inf).scatter_reduce(0, row, p, "amin")  # (nodes,)
        dropped = _Dropped(p_dropped, q_dropped, torch.minimum(lowest, p_dropped))
        left_out += float(_left_out(walk.rule, parent, dropped, threshold).sum())
    return PrefixMasses(level.probs, draft, accepted), left_out


def _drafted(
    walk: _Walk, prefixes: Tensor, live: Tensor, row: Tensor, tokens: Tensor
) -> tuple[Float[Tensor, " children"], Float[Tensor, " nodes"]]:
    """The draft's conditionals of children, and all that it gives after each node; none where no
    draft gets to.
    """
    where = live.cumsum(0) - 1  # a live node's place among them
    asked = live[row]  # (children,)
    q = torch.zeros(len(row), dtype=torch.float64)
    q[asked] = walk.children.probs(prefixes[live], where[row[asked]], tokens[asked])
    total = torch.zeros(len(live), dtype=torch.float64)
    total[live] = walk.children.proposes(prefixes[live]).double()
    return q, total


def _accepted(rule: str, parent: PrefixMasses, p: Tensor, q: Tensor, threshold: Tensor) -> Tensor:
    """The rule's exact term of each child."""
    if rule == "typical":
        return parent.accepted * q * (p > threshold)
    return accepted_mass(rule, parent, p, q)


@dataclass(frozen=True)
class _Dropped:
    """A node's dropped children together.

    Attributes
    ----------
    p, q : (nodes,) tensors
        Their conditional mass under target and draft.
    highest : (nodes,) tensor
        The most probable one has no more: no kept sibling has less, nor have all of them together.
    """

    p: Float[Tensor, " nodes"]
    q: Float[Tensor, " nodes"]
    highest: Float[Tensor, " nodes"]


def _left_out(rule: str, parent: PrefixMasses, dropped: _Dropped, threshold: Tensor) -> Tensor:
    """The most that the rule accepts of each node's dropped children together."""
    if rule != "typical":
        return accepted_mass(rule, parent, dropped.p, dropped.q)
    return parent.accepted * dropped.q * (dropped.highest > threshold)


def _greedy_interval(
    tree: PrefixTree, children: ChildReader, first_token: str
) -> AcceptanceInterval:
    """The greedy path is always kept, so both bounds are the exact value."""
    survival = torch.ones(tree.horizon, dtype=torch.float64)
    path = tree.greedy_path
    for length in range(int(first_token == "target"), tree.horizon):
        here = children.probs(
            path[None, :length], torch.zeros(1, dtype=torch.long), path[length, None]
        )
        survival[length:] *= here  # (later,)
    return AcceptanceInterval(survival, survival.clone(), "greedy", first_token)


def _sum_by(row: Tensor, values: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=values.dtype).index_add_(0, row, values)


def _pieces(count: int, most_children: int) -> Iterator[slice]:
    size = max(_CHILDREN_AT_ONCE // most_children, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
