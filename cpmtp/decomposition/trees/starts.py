"""Where fits to trees begin, beside disturbed marginals: around sequences of a tree's own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.decomposition.starts import exponential_noise, mixed_fibres, restart_generator
from cpmtp.decomposition.trees.nodes import Forest


def tree_fibre_starts(forest: Forest, rank: int, restarts: int, seed: int) -> Mixtures:
    """What `fibre_starts` are to dense joints; (trees * restarts) runs.

    A fibre is the distribution of one token where all others are as in a drawn sequence; sequences
    are drawn among the nodes of full length.
    """
    paths = _paths(forest)
    parts = []
    for restart in range(restarts):
        generator = restart_generator(seed, -1 - restart)
        drawn = _drawn_nodes(forest, rank, generator)  # (trees, rank)
        parts.append(_around(forest, paths, drawn))
    return Mixtures(
        torch.stack([part.weights for part in parts], 1).flatten(0, 1),  # (runs, rank)
        torch.stack([part.factors for part in parts], 1).flatten(0, 1),  # (runs, …, width)
    )


def _paths(forest: Forest) -> Int[Tensor, "nodes horizon"]:
    """The tokens of every node of full length, as places in the support."""
    position = torch.arange(len(forest.levels[-1]))
    columns = []
    for level in reversed(forest.levels):
        columns.append(level.tokens[position])
        position = level.parents[position]
    return torch.stack(columns[::-1], 1)  # (nodes, horizon)


def _drawn_nodes(
    forest: Forest, rank: int, generator: torch.Generator
) -> Int[Tensor, "trees rank"]:
    """`rank` nodes of full length of each tree: an exponential race at the square roots of their
    masses; a tree of fewer has some several times, one of none has -1.
    """
    last = forest.levels[-1]
    race = exponential_noise((len(last),), generator).clamp_min_(1e-12)  # (nodes,)
    order = (race.square() / last.probs.clamp_min(1e-300)).argsort()
    order = order[last.owners[order].argsort(stable=True)]  # (nodes,), the first of each tree best
    counts = forest.sizes[-1]  # (trees,)
    first = counts.cumsum(0) - counts  # (trees,)
    turn = torch.arange(rank) % counts.clamp_min(1)[:, None]  # (trees, rank)
    place = (first[:, None] + turn).clamp_max(len(last) - 1)  # (trees, rank)
    return torch.where(counts[:, None] > 0, order[place], -1)


def _around(
    forest: Forest, paths: Int[Tensor, "nodes horizon"], drawn: Int[Tensor, "trees rank"]
) -> Mixtures:
    """One run per tree: weights by the roots of the drawn sequences' probabilities, factors along
    the fibres.
    """
    last, rank, width = forest.levels[-1], drawn.shape[1], forest.width
    centres = paths[drawn]  # (trees, rank, horizon)
    differs = torch.zeros(len(last), rank, dtype=torch.long)  # positions at which a path differs
    unlike = []
    for position in range(forest.horizon):
        token = paths[:, position, None]  # (nodes, 1)
        here = token != centres[last.owners, :, position]  # (nodes, rank)
        differs += here
        unlike.append(here)
    laws = []
    for position, here in enumerate(unlike):
        on_fibre = differs == here.long()  # (nodes, rank): alike everywhere else
        places = last.owners * width + paths[:, position]  # (nodes,)
        sums = torch.zeros(len(forest) * width, rank, dtype=torch.float64)
        sums.index_add_(0, places, on_fibre * last.probs[:, None])
        laws.append(sums.view(len(forest), width, rank).mT)  # (trees, rank, width)
    roots = torch.where(drawn >= 0, last.probs[drawn], 0.0).sqrt() + 1e-12  # (trees, rank)
    factors = mixed_fibres(torch.stack(laws, 1), forest.marginals)
    return Mixtures(_normalised(roots), factors)


def _normalised(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return values / values.sum(1, keepdim=True)
