"""The expectation step on a truncated joint: sums over kept n-grams instead of matrix products with
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.mixtures import Counts, Mixtures
from cpmtp.prefix_tree import PrefixTree

# The most probable prefixes that a fit looks at one by one; the mass of the others counts for the
# prefixes they extend.
_MOST_CELLS = 1 << 17
_CELLS_AT_ONCE = 1 << 14
_TINY = 1e-290
# Mass below this is what rounding leaves of a prefix whose children are all kept.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Cells:
    """A distribution over prefixes of mixed lengths: each stands for all its continuations that are
    not listed themselves.

    Attributes
    ----------
    tokens : (cells, horizon) long tensor
        Beyond a prefix's end: the vocabulary's size, a token that every factor gives 1.
    weights : (cells,) tensor
        Target probabilities; they sum to one.
    """

    tokens: Int[Tensor, "cells horizon"]
    weights: Float[Tensor, " cells"]


@dataclass(frozen=True)
class TreeTargets:
    """Truncated joints as targets of a fit.

    The objective is ``sum_cells w log(w / Q(prefix))``: never above ``KL(P || Q)``, because a
    coarser view of two distributions brings them nearer, and equal to it for a tree of everything.

    Attributes
    ----------
    items : tuple of Cells
        One truncated joint each.
    owner : (runs,) long tensor
        Which of them each run is fitted to.
    vocab : int
    """

    items: tuple[Cells, ...]
    owner: Int[Tensor, " runs"]
    vocab: int

    @classmethod
    def of(cls, items: tuple[Cells, ...], vocab: int) -> TreeTargets:
        """One run per item."""
        return cls(items, torch.arange(len(items)), vocab)

    def for_runs(self, owner: Int[Tensor, " runs"]) -> TreeTargets:
        """The same truncated joints for other runs."""
        return replace(self, owner=owner)

    def __getitem__(self, runs) -> TreeTargets:
        return replace(self, owner=self.owner[runs])

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def marginals(self) -> Float[Tensor, "items horizon vocab"]:
        """The distribution of each position."""
        return torch.stack([cell_marginals(item, self.vocab) for item in self.items])

    def expected_counts(self, mixtures: Mixtures) -> Counts:
        """The expectation step for every run, and the objective it started from."""
        runs = zip(self.owner.tolist(), mixtures.weights, mixtures.factors, strict=True)
        counted = [_cell_counts(self.items[item], *mixture) for item, *mixture in runs]
        weights, factors, kl = zip(*counted, strict=True)
        return Counts(
            torch.stack(weights),  # (runs, rank)
            torch.stack(factors),  # (runs, horizon, rank, vocab)
            torch.stack(kl),  # (runs,)
        )


def _cell_counts(
    cells: Cells, weights: Float[Tensor, " rank"], factors: Float[Tensor, "horizon rank vocab"]
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "horizon rank vocab"], Float[Tensor, ""]]:
    """Expected counts of one mixture's components and tokens, and its divergence from the cells."""
    # A token's probabilities in all components lie side by side; the token beyond the end has ones.
    by_token = factors.mT  # (horizon, vocab, rank)
    columns = torch.cat(
        [by_token, torch.ones_like(by_token[:, :1])], 1
    )  # (horizon, vocab + 1, rank)
    pulls, totals = torch.zeros_like(columns), torch.zeros_like(weights)
    log_likelihood = 0.0

    parts = zip(
        cells.tokens.split(_CELLS_AT_ONCE), cells.weights.split(_CELLS_AT_ONCE), strict=True
    )
    for tokens, mass in parts:
        share = weights.expand(len(tokens), -1).clone()  # (cells, rank)
        for column, token in zip(columns, tokens.T, strict=True):
            share *= column.index_select(0, token)  # (cells, rank)
        model = share.sum(1).clamp_min_(_TINY)  # (cells,)
        log_likelihood += float(mass @ model.log())

        share *= (mass / model)[:, None]  # (cells, rank)
        totals += share.sum(0)  # (rank,)
        for pull, token in zip(pulls, tokens.T, strict=True):
            pull.index_add_(0, token, share)  # (vocab + 1, rank)

    negative_entropy = float(torch.special.xlogy(cells.weights, cells.weights).sum())
    kl = torch.tensor(negative_entropy - log_likelihood, dtype=weights.dtype)
    return totals, pulls[:, :-1].mT, kl  # (rank,), (horizon, rank, vocab), ()


def tree_cells(tree: PrefixTree, most: int = _MOST_CELLS) -> Cells:
    """The kept prefixes of a tree as cells: each with its probability less that of its own kept
    continuations.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.prefix_tree import truncated_joint
    >>> cells = tree_cells(truncated_joint(separated_hmm(2, 4), torch.tensor([0]), 2, mass=1.0))
    >>> cells.tokens.shape, round(cells.weights.sum().item(), 9)
    (torch.Size([16, 2]), 1.0)
    """
    probs = torch.cat([level.probs for level in tree.levels])  # (all prefixes,)
    # Prefixes are at least as probable as what extends them, so a threshold keeps whole paths.
    least = probs.topk(most).values[-1] if len(probs) > most else 0.0
    lengths = range(1, tree.horizon + 1)
    tokens = [_padded(tree.prefixes(length), tree) for length in (0, *lengths)]
    left = [torch.ones(1, dtype=torch.float64), *(level.probs.clone() for level in tree.levels)]
    listed = [torch.ones(1, dtype=torch.bool), *(level.probs >= least for level in tree.levels)]
    for length, level in zip(lengths, tree.levels, strict=True):
        some = listed[length]
        left[length - 1].index_add_(0, level.parents[some], -level.probs[some])  # (parents,)

    # (listed prefixes,) and (listed prefixes, horizon)
    weight = torch.cat([values[some] for values, some in zip(left, listed, strict=True)])
    cells = torch.cat([values[some] for values, some in zip(tokens, listed, strict=True)])
    return Cells(cells[weight > _ROUNDING], weight[weight > _ROUNDING])


def first_token_cells(cells: Cells, first: int) -> Cells:
    """The distribution of what follows one first token."""
    some = cells.tokens[:, 0] == first
    weights = cells.weights[some]
    return Cells(cells.tokens[some, 1:], weights / weights.sum())


def cell_marginals(cells: Cells, vocab: int) -> Float[Tensor, "horizon vocab"]:
    """The distribution of each position among the cells that reach it; uniform where none does."""
    sums = cells.weights.new_zeros(cells.tokens.shape[1], vocab + 1)
    for row, token in zip(sums, cells.tokens.T, strict=True):
        row.index_add_(0, token, cells.weights)  # (vocab + 1,)
    total = sums[:, :-1].sum(1, keepdim=True)  # (horizon, 1)
    return torch.where(total > 0, sums[:, :-1] / torch.where(total > 0, total, 1.0), 1 / vocab)


def _padded(prefixes: Tensor, tree: PrefixTree) -> Tensor:
    missing = tree.horizon - prefixes.shape[1]
    return torch.nn.functional.pad(prefixes, (0, missing), value=tree.vocab_size)
