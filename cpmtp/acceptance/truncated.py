"""Acceptance from a truncated joint: a lower and an upper bound that certainly contain the exact
value.

The proof is in ``docs/truncated_joints.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.drafts.draft_law import Draft, DraftLaw, check_draft, draft_next_token_law
from cpmtp.prefix_tree import PrefixTree
from cpmtp.sampling_law import SamplingLaw

_RULES = ("token", "block", "coupling", "greedy", "typical")
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


@dataclass(frozen=True)
class _Kept:
    """Kept prefixes of one length, or some of them: the target's and the draft's probability, and
    what the rule accepts.
    """

    target: Tensor
    draft: Tensor
    accepted: Tensor

    def __getitem__(self, index: Tensor) -> _Kept:
        return _Kept(self.target[index], self.draft[index], self.accepted[index])


def certified_acceptance(
    tree: PrefixTree,
    draft: Draft,
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
    if rule not in _RULES:
        raise ValueError(f"unknown rule {rule!r}: expected one of {', '.join(_RULES)}")
    if rule == "greedy" and temperature is not None and temperature > 0:
        raise ValueError(
            f"rule 'greedy' at temperature {temperature}: it is lossless at temperature 0 only; "
            "use token or block"
        )
    check_draft(draft, tree.vocab_size, tree.horizon, first_token)
    law = SamplingLaw(1.0 if temperature is None else temperature, top_k, top_p)
    draft_law = draft_next_token_law(draft, context, law)
    if rule == "greedy":
        return _greedy_interval(tree, draft_law, first_token)
    return _interval(_Walk(tree, draft_law, rule, epsilon, delta), first_token)


@dataclass(frozen=True)
class _Walk:
    """What stays the same from depth to depth."""

    tree: PrefixTree
    draft_law: DraftLaw
    rule: str
    epsilon: float
    delta: float

    def threshold(self, entropies: Tensor) -> Tensor:
        """The highest probability that the typical rule rejects."""
        return (self.delta * torch.exp(-entropies)).clamp_max(self.epsilon)


def _interval(walk: _Walk, first_token: str) -> AcceptanceInterval:
    everything = torch.ones(1, dtype=torch.float64)
    kept, lost, bounds = _Kept(everything, everything, everything), 0.0, [(1.0, 1.0)]
    for length, level in enumerate(walk.tree.levels, 1):
        if length == 1 and first_token == "target":
            kept, lost = (
                _Kept(level.probs, level.probs, level.probs),
                max(1 - float(level.probs.sum()), 0.0),
            )
            bounds.append((1.0, 1.0))
            continue
        kept, left_out = _descend(walk, length, kept)
        lost += left_out
        lower = min(float(kept.accepted.sum()), bounds[-1][1])
        bounds.append((lower, min(lower + lost, bounds[-1][1])))
    lowers, uppers = torch.tensor(bounds[1:], dtype=torch.float64).unbind(1)
    return AcceptanceInterval(lowers, uppers, walk.rule, first_token)


def _descend(walk: _Walk, length: int, parents: _Kept) -> tuple[_Kept, float]:
    """One token further: what is known of the kept children, and the most that is accepted where
    none are kept.
    """
    tree, level = walk.tree, walk.tree.levels[length - 1]
    owners, counts = level.parents.unique_consecutive(return_counts=True)
    without_children = torch.ones(len(parents.target), dtype=torch.bool)
    without_children[owners] = False
    left_out = float(parents.accepted[without_children].sum())
    prefixes = tree.expanded_prefixes(length - 1)
    draft, accepted = torch.empty_like(level.probs), torch.empty_like(level.probs)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    for nodes in _pieces(len(owners), tree.vocab_size):
        some = slice(int(ends[nodes.start]), int(ends[nodes.stop]))
        row = torch.arange(nodes.stop - nodes.start).repeat_interleave(counts[nodes])
        q = walk.draft_law(prefixes[nodes])[row, level.tokens[some]]
        p, parent = level.conditionals[some], parents[owners[nodes]]
        threshold = walk.threshold(level.parent_entropies[nodes])
        draft[some] = parent.draft[row] * q
        accepted[some] = _accepted(walk.rule, parent[row], p, q, threshold[row])
        left_out += float(_left_out(walk.rule, parent, row, p, q, threshold).sum())
    return _Kept(level.probs, draft, accepted), left_out


def _accepted(rule: str, parent: _Kept, p: Tensor, q: Tensor, threshold: Tensor) -> Tensor:
    """The rule's exact term of each child."""
    if rule == "token":
        return parent.accepted * torch.minimum(p, q)
    if rule == "block":
        return torch.minimum(parent.draft * q, parent.accepted * p)
    if rule == "coupling":
        return torch.minimum(parent.target * p, parent.draft * q)
    return parent.accepted * q * (p > threshold)


def _left_out(
    rule: str, parent: _Kept, row: Tensor, p: Tensor, q: Tensor, threshold: Tensor
) -> Tensor:
    """The most that the rule accepts of each node's dropped children together."""
    p_dropped = (1 - _sum_by(row, p, len(parent.target))).clamp_min(0)
    q_dropped = (1 - _sum_by(row, q, len(parent.target))).clamp_min(0)
    if rule == "token":
        return parent.accepted * torch.minimum(p_dropped, q_dropped)
    if rule == "block":
        return torch.minimum(parent.draft * q_dropped, parent.accepted * p_dropped)
    if rule == "coupling":
        return torch.minimum(parent.target * p_dropped, parent.draft * q_dropped)
    # No dropped child is more probable than a kept sibling, nor than all dropped ones together.
    highest = (
        torch.full_like(p_dropped, torch.inf).scatter_reduce(0, row, p, "amin").minimum(p_dropped)
    )
    return parent.accepted * q_dropped * (highest > threshold)


def _greedy_interval(tree: PrefixTree, draft_law: DraftLaw, first_token: str) -> AcceptanceInterval:
    """The greedy path is always kept, so both bounds are the exact value."""
    survival = torch.ones(tree.horizon, dtype=torch.float64)
    path = tree.greedy_path
    for length in range(int(first_token == "target"), tree.horizon):
        survival[length:] *= draft_law(path[None, :length])[0, path[length]]
    return AcceptanceInterval(survival, survival.clone(), "greedy", first_token)


def _sum_by(row: Tensor, values: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=values.dtype).index_add_(0, row, values)


def _pieces(count: int, vocab_size: int) -> Iterator[slice]:
    size = max(_ENTRIES_AT_ONCE // vocab_size, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
