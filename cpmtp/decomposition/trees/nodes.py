"""Trees as what a fit runs over: nodes level by level, with ids of each tree's own support.

A node's own mass is that of its prefix less that of its kept children: it stands for everything
that was not kept below it. A tree of everything has all mass at its leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.drafts.support import Support
from cpmtp.prefix_tree import PrefixTree

# The most probable prefixes that a fit looks at one by one; the mass of the others counts for the
# prefixes they extend.
_MOST_NODES = 1 << 18
# Mass below this is what rounding leaves of a prefix whose children are all kept.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Level:
    """The nodes of one length of one or more trees, those of one tree consecutive.

    Attributes
    ----------
    owners : (nodes,) long tensor
        Which tree each is of.
    parents : (nodes,) long tensor
        Its place among the nodes of the level before, of all trees together.
    tokens : (nodes,) long tensor
        Its last token: an id, or a place in its tree's support.
    conditionals, probs, own : (nodes,) tensors
        ``p(x_k | x_<k)``, ``P(x_1:k)``, and the part of it that no kept child has.
    """

    owners: Int[Tensor, " nodes"]
    parents: Int[Tensor, " nodes"]
    tokens: Int[Tensor, " nodes"]
    conditionals: Float[Tensor, " nodes"]
    probs: Float[Tensor, " nodes"]
    own: Float[Tensor, " nodes"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Forest:
    """One or more trees of one horizon, side by side.

    Attributes
    ----------
    levels : tuple of horizon Levels
        Tokens as places in `support`.
    roots : (trees,) tensor
        Mass of everything that is not kept.
    support : Support
        Ids of every tree and position, (trees, size) each.
    """

    levels: tuple[Level, ...]
    roots: Float[Tensor, " trees"]
    support: Support

    @classmethod
    def of(cls, levels: Sequence[Level], roots: Float[Tensor, " trees"], vocab: int) -> Forest:
        """Of levels whose tokens are ids.

        A tree that does not reach a position is given the token that is most probable there among
        all of them.
        """
        ids, local = [], []
        for level in levels:
            keys, place = torch.unique(level.owners * vocab + level.tokens, return_inverse=True)
            tree, token = keys // vocab, keys % vocab  # (ids of all trees,) each, ascending
            sizes = torch.bincount(tree, minlength=len(roots))  # (trees,)
            first = sizes.cumsum(0) - sizes  # (trees,)
            table = torch.full((len(roots), max(int(sizes.max()), 1)), vocab)  # (trees, size)
            table[tree, torch.arange(len(keys)) - first[tree]] = token
            mass = torch.zeros(vocab, dtype=torch.float64).index_add_(0, level.tokens, level.probs)
            table[sizes == 0, 0] = mass.argmax()
            ids.append(table)
            local.append(place - first[level.owners])
        placed = [
            Level(**(vars(level) | {"tokens": tokens}))
            for level, tokens in zip(levels, local, strict=True)
        ]
        return cls(tuple(placed), roots, Support(tuple(ids), vocab))

    def __len__(self) -> int:
        return len(self.roots)

    @property
    def horizon(self) -> int:
        """Number of tokens."""
        return len(self.levels)

    @property
    def width(self) -> int:
        """Places of the widest position."""
        return max(self.support.sizes)

    @cached_property
    def sizes(self) -> Int[Tensor, "levels trees"]:
        """Nodes of each tree by level, that of the roots included."""
        counts = [torch.bincount(level.owners, minlength=len(self)) for level in self.levels]
        return torch.stack([torch.ones_like(counts[0]), *counts])  # (horizon + 1, trees)

    @cached_property
    def negative_entropy(self) -> Float[Tensor, " trees"]:
        """``sum P log P`` over what each node stands for."""
        total = torch.special.xlogy(self.roots, self.roots)  # (trees,)
        for level in self.levels:
            terms = torch.special.xlogy(level.own, level.own)  # (nodes,)
            total = total.index_add(0, level.owners, terms)
        return total

    @cached_property
    def marginals(self) -> Float[Tensor, "trees horizon width"]:
        """The distribution of each position among the prefixes that reach it; zero beyond a tree's
        support.
        """
        rows = []
        for position, level in enumerate(self.levels):
            filled = self.support.filled(position).double()  # (trees, size)
            shape = filled.shape
            sums = torch.zeros(shape.numel(), dtype=torch.float64)
            sums = sums.index_add_(0, level.owners * shape[1] + level.tokens, level.probs)
            sums = sums.view(shape)  # (trees, size)
            sums = torch.where(sums.sum(1, keepdim=True) > 0, sums, filled)
            sums = sums / sums.sum(1, keepdim=True)
            rows.append(torch.nn.functional.pad(sums, (0, self.width - shape[1])))
        return torch.stack(rows, 1)  # (trees, horizon, width)

    def for_runs(self, owner: Int[Tensor, " runs"]) -> tuple[Level, ...]:
        """The levels of as many trees: a copy for each run of the one it is fitted to.

        The owners are then runs.
        """
        starts = self.sizes.cumsum(1) - self.sizes  # (horizon + 1, trees): of each tree's nodes
        copied: list[Level] = []
        shift = torch.arange(len(owner)) - owner  # (runs,): of the roots
        for depth, level in enumerate(self.levels, 1):
            counts = self.sizes[depth, owner]  # (runs,)
            first = counts.cumsum(0) - counts  # (runs,): of each copy's nodes
            runs = torch.arange(len(owner)).repeat_interleave(counts)  # (nodes,)
            nodes = torch.arange(len(runs)) - (first - starts[depth, owner])[runs]  # (nodes,)
            copied.append(
                Level(
                    runs,
                    level.parents[nodes] + shift[runs],
                    level.tokens[nodes],
                    level.conditionals[nodes],
                    level.probs[nodes],
                    level.own[nodes],
                )
            )
            shift = first - starts[depth, owner]  # (runs,)
        return tuple(copied)

    def chosen(self, numbers: Int[Tensor, " chosen"]) -> Forest:
        """Some of the trees by themselves, in this order."""
        ids = []
        for position, table in enumerate(self.support.ids):
            size = int(self.support.filled(position)[numbers].sum(1).max())
            ids.append(table[numbers, :size])  # (chosen, size)
        return Forest(
            self.for_runs(numbers),
            self.roots[numbers],  # (chosen,)
            Support(tuple(ids), self.support.vocab_size),
        )


def merged(forests: Sequence[Forest]) -> Forest:
    """The trees of several forests side by side, in their order."""
    levels = []
    for depth in range(forests[0].horizon):
        trees, nodes, parts = 0, 0, []
        for forest in forests:
            level = forest.levels[depth]
            tokens = forest.support.ids[depth][level.owners, level.tokens]  # (nodes,)
            above = forest.levels[depth - 1] if depth else forest.roots
            fields = {
                "owners": level.owners + trees,
                "parents": level.parents + nodes,
                "tokens": tokens,
            }
            parts.append(Level(**(vars(level) | fields)))
            trees, nodes = trees + len(forest), nodes + len(above)
        names = Level.__dataclass_fields__
        levels.append(
            Level(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
        )
    roots = torch.cat([forest.roots for forest in forests])  # (trees,)
    return Forest.of(levels, roots, forests[0].support.vocab_size)


def tree_forest(tree: PrefixTree, most: int = _MOST_NODES) -> Forest:
    """The kept prefixes of a tree, the least probable ones left out where there are too many.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.prefix_tree import truncated_joint
    >>> tree = truncated_joint(separated_hmm(2, 4), torch.tensor([0]), 2, mass=1.0)
    >>> forest = tree_forest(tree)
    >>> [len(level) for level in forest.levels], round(forest.levels[-1].own.sum().item(), 9)
    ([4, 16], 1.0)
    """
    levels, root = _levels(tree, most)
    return Forest.of(levels, root, tree.vocab_size)


def first_token_forest(
    tree: PrefixTree, noticeable: float, most: int = _MOST_NODES
) -> tuple[Forest, Int[Tensor, " trees"], Float[Tensor, " trees"]]:
    """What follows every first token of more mass than `noticeable` that has kept continuations:
    trees of one token less; those tokens and their probabilities.
    """
    (first, *later), _ = _levels(tree, most)
    return _after_first(first, later, noticeable, tree.vocab_size)


def forest_after_first(forest: Forest) -> tuple[Forest, Float[Tensor, " trees"]]:
    """What follows every first token of a forest of one tree, and their probabilities."""
    support = forest.support
    levels = [
        Level(**(vars(level) | {"tokens": support.ids[depth][level.owners, level.tokens]}))
        for depth, level in enumerate(forest.levels)
    ]
    found, _, mass = _after_first(levels[0], levels[1:], 0.0, support.vocab_size)
    return found, mass


def _after_first(
    first: Level, later: Sequence[Level], noticeable: float, vocab: int
) -> tuple[Forest, Int[Tensor, " trees"], Float[Tensor, " trees"]]:
    """Of one tree's levels, tokens as ids."""
    grown = torch.bincount(later[0].parents, minlength=len(first)) > 0  # (first tokens,)
    noticed = first.probs > min(noticeable, float(first.probs[grown].max()) / 2)  # (first tokens,)
    chosen = (grown & noticed).nonzero().squeeze(1)  # (trees,)
    number = torch.full((len(first),), -1).index_put((chosen,), torch.arange(len(chosen)))
    mass, root = first.probs[chosen], first.own[chosen]  # (trees,) each
    levels, above, place = [], number, number  # trees and places of the nodes before, -1: gone
    for level in later:
        above = owners = above[level.parents]  # (nodes,)
        kept = owners >= 0  # (nodes,)
        share = mass[owners[kept]]  # (nodes,)
        levels.append(
            Level(
                owners[kept],
                place[level.parents[kept]],
                level.tokens[kept],
                level.conditionals[kept],
                level.probs[kept] / share,
                level.own[kept] / share,
            )
        )
        place = torch.where(kept, kept.cumsum(0) - 1, -1)
    forest = Forest.of(levels, root / mass, vocab)
    return forest, first.tokens[chosen], mass


def _levels(tree: PrefixTree, most: int) -> tuple[list[Level], Float[Tensor, " 1"]]:
    """The noticeable nodes of one tree, tokens as ids, and the mass of everything else."""
    probs = torch.cat([level.probs for level in tree.levels])  # (all prefixes,)
    # Prefixes are at least as probable as what extends them, so a threshold keeps whole paths.
    least = probs.topk(most).values[-1] if len(probs) > most else 0.0
    levels: list[Level] = []
    before = root = torch.ones(1, dtype=torch.float64)
    place = torch.zeros(1, dtype=torch.long)
    for level in tree.levels:
        kept = level.probs >= least  # (nodes,)
        # Best-first trees list the children of a node together, but nodes in order of expansion.
        order = place[level.parents].argsort(stable=True)
        order = order[kept[order]]  # (kept,)
        parents = place[level.parents[order]]  # (kept,)
        here = level.probs[order]  # (kept,)
        left = before.index_add(0, parents, -here)  # (nodes before,)
        left = torch.where(left > _ROUNDING, left, 0.0)
        if levels:
            levels[-1] = Level(**(vars(levels[-1]) | {"own": left}))
        else:
            root = left
        tokens, conditionals = level.tokens[order], level.conditionals[order]
        levels.append(Level(torch.zeros_like(parents), parents, tokens, conditionals, here, here))
        place = torch.full_like(level.parents, -1).index_put((order,), torch.arange(len(order)))
        before = here
    return levels, root
