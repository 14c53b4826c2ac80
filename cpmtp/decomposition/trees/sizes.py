"""Trees of very different sizes are fitted apart: together each would be as wide as the widest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.restarts import Items
from cpmtp.decomposition.trees.targets import TreeTargets

# What one more group costs in every pass, in entries of its factors for one component and position.
_OVERHEAD = 4000


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
    start: Mixtures | None,
    below: Runs | None,
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
