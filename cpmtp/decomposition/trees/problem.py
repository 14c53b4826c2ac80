"""What is fitted of a tree, and the answer to the caller; trees of very different sizes are fitted
apart: together each would be as wide as the widest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.fit_result import FitResult
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.restarts import Items, Plan
from cpmtp.decomposition.trees.anchored import FirstTokenDrafts
from cpmtp.decomposition.trees.nodes import Forest, first_token_forest, tree_forest
from cpmtp.decomposition.trees.targets import TreeTargets
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.support import Support
from cpmtp.joint_distribution import DEFAULT_MAX_BYTES
from cpmtp.prefix_tree import PrefixTree

# What one more group of trees costs in every pass, in entries of its factors for one component and
# position.
_OVERHEAD = 4000
# Starts of one restart that are held together, and as much again of counts.
_STARTS = 8


@dataclass(frozen=True)
class TreeProblem:
    """The tree itself or, anchored, what follows each first token of noticeable mass, over the ids
    that occur there.

    Attributes
    ----------
    items : Items
    first_tokens, mass : (items,) tensors, optional
        Anchored only: those tokens and their probabilities.
    """

    items: Items
    first_tokens: Int[Tensor, " items"] | None = None
    mass: Float[Tensor, " items"] | None = None

    @classmethod
    def of(cls, tree: PrefixTree, noticeable: float | None) -> TreeProblem:
        """Of a tree; anchored, where there is a mass from which first tokens count."""
        if noticeable is None:
            return cls(Items(TreeTargets.of(tree_forest(tree))))
        forest, tokens, mass = first_token_forest(tree, noticeable)
        return cls(Items(TreeTargets.of(forest)), tokens, mass)

    def check(self, rank: int) -> None:
        """Refuse a rank whose starts would outgrow memory.

        Raises
        ------
        ValueError
            With the size, the limit and what to do.
        """
        trees, _, width = self.forest.marginals.shape
        needed = _STARTS * 8 * rank * trees * self.forest.horizon * width
        if needed > DEFAULT_MAX_BYTES:
            raise ValueError(
                f"fits of rank {rank} to {trees} trees over up to {width} tokens need "
                f"{needed / 1e9:.3g} GB; the limit is {DEFAULT_MAX_BYTES / 1e9:.3g} GB: lower the "
                f"rank{', or fit it unanchored' if self.mass is not None else ''}"
            )

    @property
    def forest(self) -> Forest:
        """The trees that are fitted."""
        assert isinstance(self.items.joints, TreeTargets)
        return self.items.joints.forest

    def plan(self, plan: Plan) -> Plan:
        """For the items what `plan` is for the tree."""
        if self.mass is None:
            return plan
        # What follows a known first token is all the draft's.
        return replace(plan, goal=replace(plan.goal, first_token="draft"))

    def mixtures(self, found: FitResult) -> Mixtures:
        """A fit's answers to the items.

        Raises
        ------
        ValueError
            If it is a fit of another tree.
        """
        draft: Any = found.distribution
        if isinstance(draft, FirstTokenDrafts):
            support = self.forest.support
            draft = draft.entries[torch.arange(len(draft.first_tokens))]
        else:
            support = self.forest.support[0]
        own = draft.support
        if own is None or not all(map(torch.equal, own.ids, support.ids)):
            raise ValueError("starts of another tree: expected fits of this one, anchored alike")
        columns = torch.stack(
            [
                torch.nn.functional.pad(factor.mT, (0, self.forest.width - factor.shape[-2]))
                for factor in draft.factors
            ],
            -3,
        )  # (*items, horizon, rank, width)
        factors = columns.reshape(len(self.forest), *columns.shape[-3:])
        return Mixtures(draft.weights.reshape(len(self.forest), -1), factors)  # (items, rank), …

    def result(self, solved: Solved, method: str, started: float) -> FitResult:
        """The answer to the caller."""
        draft = self._draft(solved.best.mixtures)
        if self.mass is not None:
            solved = _pooled(solved, self.mass, -1.0 if method == "acceptance" else 0.0)
        return FitResult.of(
            solved, method, batch_shape=(), first_tokens=None, started=started, draft=draft
        )

    def _draft(self, mixtures: Mixtures) -> CPDistribution | FirstTokenDrafts:
        """The distributions of the items."""
        support = self.forest.support
        # What a gradient leaves of places that only fill up goes to the others.
        columns = [
            _cleaned(mixtures.factors[:, i, :, :size], support.filled(i)).mT
            for i, size in enumerate(support.sizes)
        ]  # (items, size, rank) each
        if self.first_tokens is None:
            one = tuple(column[0] for column in columns)
            return CPDistribution(mixtures.weights[0], one, support[0])
        others, ids = zip(*[self._others(i) for i in range(len(columns))], strict=True)
        rank = mixtures.rank
        entries = CPDistribution(
            torch.cat([mixtures.weights, mixtures.weights.new_full((1, rank), 1 / rank)]),
            [
                torch.cat([column, other[None, :, None].expand(1, -1, rank)])
                for column, other in zip(columns, others, strict=True)
            ],
            Support(tuple(map(torch.cat, zip(support.ids, ids, strict=True))), support.vocab_size),
        )
        return FirstTokenDrafts(entries, self.first_tokens)

    def _others(self, position: int) -> tuple[Float[Tensor, " size"], Int[Tensor, "1 size"]]:
        """What stands for all other first tokens: the most probable tokens of the position."""
        assert self.mass is not None
        ids, vocab = self.forest.support.ids[position], self.forest.support.vocab_size
        size = ids.shape[1]
        sums = torch.zeros(vocab + 1, dtype=torch.float64)
        sums.index_add_(
            0,
            ids.flatten(),
            (self.forest.marginals[:, position, :size] * self.mass[:, None]).flatten(),
        )
        some = sums[:vocab].topk(size).indices.sort().values  # (size,)
        probs = sums[some]  # (size,)
        return probs / probs.sum(), some[None]


def _cleaned(
    factors: Float[Tensor, "items rank size"], filled: Tensor
) -> Float[Tensor, "items rank size"]:
    kept = factors * filled[:, None]  # (items, rank, size)
    return kept / kept.sum(-1, keepdim=True)


def _pooled(solved: Solved, mass: Float[Tensor, " items"], origin: float) -> Solved:
    """One answer from those of the first tokens, weighted by their mass; tokens that are not among
    them count as `origin`.
    """
    best = solved.best

    def averaged(values: Tensor) -> Tensor:
        share = mass.view(-1, *(1,) * (values.ndim - 1))  # (items, 1, …)
        return (share * (values - origin)).sum(0, keepdim=True) + origin

    one = Runs(
        best.mixtures[:1],
        objective=averaged(best.objective),
        converged=best.converged.all(0, keepdim=True),
        iterations=best.iterations.amax(0, keepdim=True),
        failures=("",),
        traces=((),),
        raw=best.raw[:1],
    )
    matches = (mass @ solved.matches / mass.sum())[None]  # (1, restarts)
    return Solved(one, averaged(solved.objectives), matches)


@dataclass(frozen=True)
class Group:
    """Some trees of a forest by themselves.

    Attributes
    ----------
    numbers : (trees,) long tensor
        Which of the forest's they are.
    items : Items
    """

    numbers: Int[Tensor, " trees"]
    items: Items


def groups_by_width(items: Items) -> tuple[Group, ...]:
    """All trees of some items in groups of similar width; dense joints in one."""
    joints, all_together = items.joints, (Group(torch.arange(len(items)), items),)
    if not isinstance(joints, TreeTargets):
        return all_together
    support = joints.forest.support
    filled = [support.filled(position).sum(1) for position in range(len(support.sizes))]
    widths, order = torch.stack(filled).amax(0).sort(descending=True)  # (trees,) each
    numbers = [order[some].sort().values for some in _alike(widths.tolist())]  # (trees,) each
    if len(numbers) == 1:
        return all_together
    return tuple(Group(some, Items(TreeTargets.of(joints.forest.chosen(some)))) for some in numbers)


def _alike(widths: Sequence[int], begin: int = 0) -> list[slice]:
    """Descending widths cut where that saves more padding than another group costs.

    Examples
    --------
    >>> _alike([5000, 4900, 40, 40, 40])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    count = len(widths)
    saved = [(count - cut) * (widths[0] - widths[cut]) for cut in range(1, count)]
    if not saved or max(saved) <= _OVERHEAD:
        return [slice(begin, begin + count)]
    cut = 1 + saved.index(max(saved))
    return _alike(widths[:cut], begin) + _alike(widths[cut:], begin + cut)


def solved_apart(
    groups: Sequence[Group],
    work: Callable[[Items, Mixtures | None, Runs | None], Solved],
    start: Mixtures | None = None,
    below: Runs | None = None,
) -> Solved:
    """What `work` finds of each group, in the forest's order.

    Parameters
    ----------
    work : callable
        ``(items, their starts, their runs of a lower rank) -> what was found``.
    start, below : Mixtures, Runs, optional
        Of all trees.
    """
    if len(groups) == 1:
        return work(groups[0].items, start, below)
    parts = []
    for group in groups:
        width = group.items.marginals.shape[-1]
        own = None if start is None else start[group.numbers].of_width(width)
        lower = None if below is None else below[group.numbers].of_width(width)
        parts.append(work(group.items, own, lower))
    widest = max(group.items.marginals.shape[-1] for group in groups)
    order = torch.cat([group.numbers for group in groups]).argsort()  # (trees,)
    return Solved.joined(parts, order, widest)
