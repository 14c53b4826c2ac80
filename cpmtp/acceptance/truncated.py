"""Acceptance from a truncated joint: a lower and an upper bound that certainly contain the exact
value.

The proof is in ``docs/truncated_joints.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.dense import Thresholds
from cpmtp.acceptance.verification import (
    PrefixMasses,
    accepted_mass,
    check_first_token,
    check_rule,
)
from cpmtp.drafts.protocol import NextTokenReader, is_anchored, next_token_reader
from cpmtp.prefix_tree import PrefixTree
from cpmtp.sampling_law import SamplingLaw

_ENTRIES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class AcceptanceInterval:
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
    tree: PrefixTree,
    draft: Any,
    *,
    rule: str = "block",
    first_token: str = "target",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    context: Int[Tensor, " time"] | None = None,
    epsilon: float = 0.3,
    delta: float = 0.09,
) -> AcceptanceInterval:
    """Bounds of what `implied_acceptance` gives for the whole joint, from the kept prefixes alone.

    The lower bound of ``S_k`` sums the rule's exact terms over the kept prefixes. The upper bound
    adds, for every place where something was left out, the most that can be accepted below it: all
    that is accepted at an unexpanded prefix, and at dropped children their mass under the rule.
    What is added is never more than ``min(1 - P(kept), 1 - Q(kept))`` for ``token``, ``block`` and
    ``coupling``, nor than ``1 - Q(kept)`` for ``typical``; ``greedy`` is exact.

    Parameters
    ----------
    tree : PrefixTree
        The target's law; temperature, top-k and top-p are part of it (see `truncated_joint`).
    draft : CPDistribution, JointDistribution or LanguageModel
        Over the tree's horizon; or anchored: with one batch axis over the first token and horizon
        n-1.
    rule, first_token, temperature, top_k, top_p, context, epsilon, delta
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
    check_rule(rule, temperature=temperature)
    check_first_token(first_token)
    anchored = is_anchored(draft, tree.vocab_size, tree.horizon, first_token=first_token)
    law = SamplingLaw(1.0 if temperature is None else temperature, top_k, top_p)
    told = first_token == "target"
    read = next_token_reader(draft, law, anchored=anchored, told=told, context=context)
    if rule == "greedy":
        return _greedy_interval(tree, read, first_token)
    return _interval(_Walk(tree, read, rule, Thresholds(epsilon, delta)), first_token)


@dataclass(frozen=True)
class _Walk:
    """What stays the same from depth to depth."""

    tree: PrefixTree
    read: NextTokenReader
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
        lost += left_out
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
    for nodes in _pieces(len(owners), tree.vocab_size):
        some = slice(int(ends[nodes.start]), int(ends[nodes.stop]))
        row = torch.arange(nodes.stop - nodes.start).repeat_interleave(counts[nodes])  # (children,)
        q = walk.read(prefixes[nodes])[row, level.tokens[some]]  # (children,)
        p, parent = level.conditionals[some], parents[owners[nodes]]
        threshold = walk.thresholds.of(level.parent_entropies[nodes])  # (nodes,)
        draft[some] = parent.draft[row] * q
        accepted[some] = _accepted(walk.rule, parent[row], p, q, threshold[row])
        left_out += float(_left_out(walk.rule, parent, row, p, q, threshold).sum())
    return PrefixMasses(level.probs, draft, accepted), left_out


def _accepted(rule: str, parent: PrefixMasses, p: Tensor, q: Tensor, threshold: Tensor) -> Tensor:
    """The rule's exact term of each child."""
    if rule == "typical":
        return parent.accepted * q * (p > threshold)
    return accepted_mass(rule, parent, p, q)


def _left_out(
    rule: str, parent: PrefixMasses, row: Tensor, p: Tensor, q: Tensor, threshold: Tensor
) -> Tensor:
    """The most that the rule accepts of each node's dropped children together."""
    p_dropped = (1 - _sum_by(row, p, len(parent.target))).clamp_min(0)  # (nodes,)
    q_dropped = (1 - _sum_by(row, q, len(parent.target))).clamp_min(0)  # (nodes,)
    if rule != "typical":
        return accepted_mass(rule, parent, p_dropped, q_dropped)
    # No dropped child is more probable than a kept sibling, nor than all dropped ones together.
    highest = torch.full_like(p_dropped, torch.inf)
    highest = highest.scatter_reduce(0, row, p, "amin").minimum(p_dropped)  # (nodes,)
    return parent.accepted * q_dropped * (highest > threshold)


def _greedy_interval(
    tree: PrefixTree, read: NextTokenReader, first_token: str
) -> AcceptanceInterval:
    """The greedy path is always kept, so both bounds are the exact value."""
    survival = torch.ones(tree.horizon, dtype=torch.float64)
    path = tree.greedy_path
    for length in range(int(first_token == "target"), tree.horizon):
        survival[length:] *= read(path[None, :length])[0, path[length]]  # (later,)
    return AcceptanceInterval(survival, survival.clone(), "greedy", first_token)


def _sum_by(row: Tensor, values: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=values.dtype).index_add_(0, row, values)


def _pieces(count: int, vocab_size: int) -> Iterator[slice]:
    size = max(_ENTRIES_AT_ONCE // vocab_size, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
