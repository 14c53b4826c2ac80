"""Trees as what Markov forms are fitted to: tokens that occur, neighbours that occur, and tables of
neighbours over the ids of each tree alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.restarts import Items
from cpmtp.decomposition.trees.nodes import Forest
from cpmtp.decomposition.trees.targets import TreeTargets

# Entries of a table of neighbours at once.
_AT_ONCE = 1 << 21
# What a pair of neighbours has at least, as a share of what independence would give it.
LEAST_SHARE = 1e-3
# Of the subspace that singular vectors are taken from.
_ITERATIONS = 4


@dataclass(frozen=True)
class Block:
    """Tables of neighbours at one step, of some trees and some of the tokens before.

    Attributes
    ----------
    step : int
        From position `step` to the one after it.
    members : (some,) long tensor
    before, after : (some, rows) and (some, size) long tensors
        Places of tokens among all that occur; any where a row is filled up.
    pairs : (pairs,) long tensor
        Numbers of the step's pairs that lie here.
    cells : (pairs,) long tensor
        Where, in the flattened (some, rows, size).
    """

    step: int
    members: Int[Tensor, " some"]
    before: Int[Tensor, "some rows"]
    after: Int[Tensor, "some size"]
    pairs: Int[Tensor, " pairs"]
    cells: Int[Tensor, " pairs"]


@dataclass(frozen=True)
class Pairs:
    """Distinct neighbours (tree, token before, token after) of one step.

    Attributes
    ----------
    owners, before, after : (pairs,) long tensors
        The tree, and places in its support.
    of_nodes : (nodes,) long tensor
        Each node's pair; nodes are those that the step leads to.
    """

    owners: Int[Tensor, " pairs"]
    before: Int[Tensor, " pairs"]
    after: Int[Tensor, " pairs"]
    of_nodes: Int[Tensor, " nodes"]

    def __len__(self) -> int:
        return len(self.owners)


@dataclass(frozen=True)
class TreeGroups:
    """One group whose members are trees: what `Groups` is for dense joints.

    Attributes
    ----------
    forest : Forest
    mass : (1, trees) tensor
        What each tree counts for; sums to one.
    """

    forest: Forest
    mass: Float[Tensor, "1 trees"]

    @property
    def positions(self) -> int:
        """Number of modelled tokens."""
        return self.forest.horizon

    @property
    def vocab(self) -> int:
        """Number of tokens that occur anywhere."""
        return len(self.tokens)

    @cached_property
    def items(self) -> Items:
        """The trees by themselves."""
        return Items(TreeTargets.of(self.forest))

    @cached_property
    def tokens(self) -> Int[Tensor, " tokens"]:
        """Ids that occur at any position of any tree, ascending."""
        ids = torch.cat([ids.flatten() for ids in self.forest.support.ids])
        ids = ids.unique()
        return ids[ids < self.forest.support.vocab_size]  # (tokens,)

    @cached_property
    def places(self) -> tuple[Int[Tensor, "trees _"], ...]:
        """Of every position's ids among `tokens`; where a row is filled up, any."""
        last = len(self.tokens) - 1
        return tuple(
            torch.searchsorted(self.tokens, ids.contiguous()).clamp_max(last)  # (trees, size)
            for ids in self.forest.support.ids
        )

    @cached_property
    def marginals(self) -> Float[Tensor, "1 trees positions width"]:
        """The distribution of every position."""
        return self.forest.marginals[None]

    @cached_property
    def negative_entropy(self) -> Float[Tensor, " 1"]:
        """Mean of the trees' ``sum w log w``."""
        return (self.mass[0] * self.forest.negative_entropy).sum()[None]

    @property
    def chain_floor(self) -> Float[Tensor, " 1"]:
        """Nothing is below zero."""
        return torch.zeros_like(self.mass[:, 0])

    @cached_property
    def pairs(self) -> tuple[Pairs, ...]:
        """The neighbours of every step."""
        found, width = [], self.forest.width
        levels = self.forest.levels
        for before, level in pairwise(levels):
            last = before.tokens[level.parents]  # (nodes,)
            keys = (level.owners * width + last) * width + level.tokens  # (nodes,)
            distinct, number = keys.unique(return_inverse=True)
            rows = distinct // width  # (pairs,)
            found.append(Pairs(rows // width, rows % width, distinct % width, number))
        return tuple(found)

    @cached_property
    def shares_of_one(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Expected counts of one component, times the trees' masses: of first tokens, (trees,
        width), and of every step's pairs, (pairs,).
        """
        first, *later = self.forest.levels
        mass = self.mass[0]  # (trees,)
        sums = torch.zeros(len(mass) * self.forest.width, dtype=torch.float64)
        places = first.owners * self.forest.width + first.tokens  # (nodes,)
        sums.index_add_(0, places, first.probs * mass[first.owners])
        counts = []
        for level, pairs in zip(later, self.pairs, strict=True):
            total = torch.zeros(len(pairs), dtype=torch.float64)
            counts.append(
                total.index_add_(0, pairs.of_nodes, level.probs * mass[level.owners])  # (pairs,)
            )
        return sums.view(len(mass), -1), tuple(counts)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every step's tables, as many trees at a time as stay within the working set."""
        return tuple(block for step in range(self.positions - 1) for block in self._blocks_of(step))

    @cached_property
    def occurrences(self) -> tuple[Tensor, ...]:
        """Marginals of every position as sparse (trees, tokens) matrices."""
        found = []
        for position, places in enumerate(self.places):
            filled = self.forest.support.filled(position)  # (trees, size)
            owners, place = filled.nonzero().unbind(1)  # (entries,) each
            values = self.forest.marginals[owners, position, place]  # (entries,)
            index = torch.stack([owners, places[owners, place]])  # (2, entries)
            shape = (len(self.forest), self.vocab)
            found.append(torch.sparse_coo_tensor(index, values, shape, check_invariants=False))
        return tuple(matrix.coalesce() for matrix in found)

    def sizes(self, position: int) -> Int[Tensor, " trees"]:
        """Number of ids of every tree at a position."""
        return self.forest.support.filled(position).sum(1)  # (trees,)

    def neighbour_laws(self) -> tuple[Tensor, Tensor]:
        """See `Groups.neighbour_laws`; over the tokens that occur."""
        together, apart = [], []
        for step in range(self.positions - 1):
            left, right = self.occurrences[step], self.occurrences[step + 1]
            weighted = self.mass[0, :, None] * left.to_dense()  # (trees, tokens)
            apart.append(weighted.mT @ right.to_dense())  # (tokens, tokens)
            together.append(self._together(step).to_dense())  # (tokens, tokens)
        return torch.stack(together)[None], torch.stack(apart)[None]  # (1, steps, tokens, tokens)

    def _together(self, step: int) -> Tensor:
        """Probability of every pair of neighbours, sparse (tokens, tokens)."""
        index = torch.stack(self._token_places(step))  # (2, pairs)
        values, shape = self.shares_of_one[1][step], (self.vocab, self.vocab)
        return torch.sparse_coo_tensor(index, values, shape, check_invariants=False).coalesce()

    def associations(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """``log P(u, v) / P(u) P(v)`` of the pairs that occur, weighted by the roots of both
        probabilities, sparse (tokens, tokens), and these roots.
        """
        pairs, counts = self.pairs[step], self.shares_of_one[1][step]
        u, v = self._token_places(step)
        sums = torch.zeros(2, self.vocab, dtype=torch.float64)
        before = sums[0].index_add(0, u, counts).sqrt()  # (tokens,)
        after = sums[1].index_add(0, v, counts).sqrt()  # (tokens,)
        apart = self.mass[0, pairs.owners] * self._alone(pairs, step)  # (pairs,)
        table = torch.stack([counts, apart], 1)  # (pairs, 2)
        shape = (self.vocab, self.vocab, 2)
        both = torch.sparse_coo_tensor(
            torch.stack([u, v]), table, shape, check_invariants=False
        ).coalesce()
        row, column = both.indices().unbind(0)  # (distinct,) each
        joint, alone = both.values().unbind(1)  # (distinct,) each
        logs = (joint / alone.clamp_min(1e-300) + LEAST_SHARE).log()  # (distinct,)
        values = before[row] * logs * after[column]  # (distinct,)
        found = torch.sparse_coo_tensor(
            both.indices(), values, shape[:2], is_coalesced=True, check_invariants=False
        )
        return found, before, after

    def _alone(self, pairs: Pairs, step: int) -> Float[Tensor, " pairs"]:
        """``P(u) P(v)`` of every pair in its own tree."""
        marginals = self.forest.marginals
        first = marginals[pairs.owners, step, pairs.before]  # (pairs,)
        return first * marginals[pairs.owners, step + 1, pairs.after]

    def _token_places(self, step: int) -> tuple[Tensor, Tensor]:
        """Of a step's pairs: the places of both tokens among all that occur."""
        pairs = self.pairs[step]
        before, after = self.places[step], self.places[step + 1]
        return before[pairs.owners, pairs.before], after[pairs.owners, pairs.after]

    def _blocks_of(self, step: int) -> Iterator[Block]:
        pairs = self.pairs[step]
        rows, columns = self.sizes(step), self.sizes(step + 1)  # (trees,) each
        starts = torch.searchsorted(pairs.owners, torch.arange(len(self.forest) + 1))
        order = (rows * columns).argsort(stable=True)  # (trees,)
        for members in _together(order, rows, columns):
            height, width = int(rows[members].max()), int(columns[members].max())
            spans = [torch.arange(*starts[m : m + 2].tolist()) for m in members.tolist()]
            number = torch.cat(spans)  # (pairs here,)
            owner = torch.arange(len(members)).repeat_interleave(
                torch.tensor([len(span) for span in spans])
            )  # (pairs here,)
            high = max(_AT_ONCE // width, 1) if len(members) == 1 else height
            for top in range(0, height, high):
                here = min(high, height - top)
                row = pairs.before[number] - top  # (pairs here,)
                inside = (row >= 0) & (row < here)  # (pairs here,)
                cells = (owner * here + row) * width + pairs.after[number]  # (pairs here,)
                yield Block(
                    step,
                    members,
                    self.places[step][members, top : top + here],
                    self.places[step + 1][members, :width],
                    number[inside],
                    cells[inside],
                )


def _together(
    order: Int[Tensor, " trees"], rows: Int[Tensor, " trees"], columns: Int[Tensor, " trees"]
) -> Iterator[Int[Tensor, " some"]]:
    """Trees in turn, as many as fit a table of the working set's size."""
    chosen: list[int] = []
    height = width = 0
    for member, row, column in zip(
        order.tolist(), rows[order].tolist(), columns[order].tolist(), strict=True
    ):
        tall, wide = max(height, row), max(width, column)
        if chosen and (len(chosen) + 1) * tall * wide > _AT_ONCE:
            yield torch.tensor(chosen)
            chosen, tall, wide = [], row, column
        chosen.append(member)
        height, width = tall, wide
    yield torch.tensor(chosen)


def leading(
    matrix: Tensor, width: int, seed: int
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " width"], Float[Tensor, "width columns"]]:
    """The largest singular values of a sparse matrix and their vectors, by subspace iteration."""
    generator = torch.Generator().manual_seed(seed)
    count = min(width + 8, *matrix.shape)
    shape = (matrix.shape[1], count)
    basis = torch.randn(shape, generator=generator, dtype=torch.float64)  # (columns, count)
    turned = matrix.mT.coalesce()
    for _ in range(_ITERATIONS):
        image = torch.linalg.qr(torch.sparse.mm(matrix, basis)).Q  # (rows, count)
        basis = torch.linalg.qr(torch.sparse.mm(turned, image)).Q  # (columns, count)
    u, s, v = torch.linalg.svd(torch.sparse.mm(matrix, basis), full_matrices=False)
    return u[:, :width], s[:width], (v @ basis.mT)[:width]  # (width, columns)
