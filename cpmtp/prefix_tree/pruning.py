"""A tree without its least probable sequences: what a fit need not look at."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpmtp.prefix_tree.tree import PrefixTree


def pruned(tree: PrefixTree, unkept: float) -> PrefixTree:
    """The tree without its least probable sequences of full length, as long as those that are left
    out, dropped or never kept, have at most `unkept` together.

    The greedy path stays. Shorter prefixes all stay: a fit's work is at the leaves.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.prefix_tree import complete_joint
    >>> tree = complete_joint(separated_hmm(2, 8), torch.tensor([0]), 3)
    >>> small = pruned(tree, 0.05)
    >>> len(tree.levels[-1]), len(small.levels[-1]) < 512, bool(small.mass[-1] >= 0.95)
    (512, True, True)
    """
    last = tree.levels[-1]
    dropped = unkept - (1 - float(last.probs.sum()))
    if dropped <= 0:
        return tree
    kept = noticeable(last.probs, dropped)
    kept |= _is_greedy(tree)

    # parents of which no child is left count as not expanded
    _, place = last.parents.unique_consecutive(return_inverse=True)  # (nodes,)
    with_children = torch.zeros(len(last.parent_entropies), dtype=torch.bool)
    with_children[place[kept]] = True
    names = ("parents", "tokens", "conditionals", "probs")
    fields = {name: getattr(last, name)[kept] for name in names}
    leaves = replace(last, **fields, parent_entropies=last.parent_entropies[with_children])
    return replace(tree, levels=(*tree.levels[:-1], leaves))


def noticeable(probs: Float[Tensor, " nodes"], unkept: float) -> Bool[Tensor, " nodes"]:
    """Which nodes stay when the least probable ones go, as long as they have less than `unkept`."""
    ascending, order = probs.sort()
    kept = torch.empty(len(probs), dtype=torch.bool)
    kept[order] = ascending.cumsum(0) > unkept
    return kept


def _is_greedy(tree: PrefixTree) -> Bool[Tensor, " nodes"]:
    """Which sequence is the greedy path."""
    node = torch.zeros((), dtype=torch.long)
    here = torch.zeros(len(tree.levels[-1]), dtype=torch.bool)
    for level, token in zip(tree.levels, tree.greedy_path, strict=True):
        here = (level.parents == node) & (level.tokens == token)  # (nodes,)
        node = here.int().argmax()
    return here
