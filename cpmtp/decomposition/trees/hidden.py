"""Hidden Markov distributions on trees: divergences and tokens per call, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.descent.gradient import Goal
from cpmtp.decomposition.trees.nodes import Forest, Level
from cpmtp.decomposition.trees.targets import emitted_by, survival_sums

# Entries of nodes by states that a tape holds at once.
_AT_ONCE = 1 << 22
_TINY = 1e-290


@dataclass(frozen=True)
class HiddenTrees:
    """Trees, each the target of some runs.

    Attributes
    ----------
    forest : Forest
    """

    forest: Forest

    @property
    def entries(self) -> int:
        """Nodes of the widest tree: what a pass over it costs."""
        return int(self.forest.sizes.sum(0).max())

    def divergence(
        self,
        weights: Float[Tensor, "runs rank"],
        transitions: Float[Tensor, "runs steps rank rank2"],
        factors: Float[Tensor, "runs positions rank width"],
        owner: Int[Tensor, " runs"],
    ) -> Float[Tensor, " runs"]:
        """``sum w log(w / Q(prefix))`` of every run against its owner's tree, in nats."""
        found = []
        for runs, levels in self._laid_out(owner, weights.shape[1]):
            emitted, carried = (
                emitted_by(levels, factors[runs]),
                _carried(levels, transitions[runs]),
            )
            masses, likelihood = weights[runs], torch.zeros_like(weights[runs, 0])
            for depth, (level, factor) in enumerate(zip(levels, emitted, strict=True)):
                masses = carried(depth, masses) if depth else masses
                masses = masses.index_select(0, level.parents) * factor  # (nodes, rank)
                terms = level.own * masses.sum(1).clamp_min(_TINY).log()  # (nodes,)
                likelihood = likelihood.index_add(0, level.owners, terms)
            found.append(self.forest.negative_entropy[owner[runs]] - likelihood)
        return torch.cat(found)

    def tokens_lost(
        self,
        weights: Float[Tensor, "runs rank"],
        transitions: Float[Tensor, "runs steps rank rank2"],
        factors: Float[Tensor, "runs positions rank width"],
        owner: Int[Tensor, " runs"],
        goal: Goal,
    ) -> Float[Tensor, " runs"]:
        """Minus the tokens per call of every run: of what is not complete, what the kept prefixes
        give.
        """
        found = []
        for runs, levels in self._laid_out(owner, weights.shape[1]):
            emitted, carried = (
                emitted_by(levels, factors[runs]),
                _carried(levels, transitions[runs]),
            )
            how = (goal.rule, goal.first_token, carried)
            found.append(survival_sums(levels, weights[runs], emitted, *how))
        return -torch.cat(found) - float(goal.first_token == "draft")

    def _laid_out(
        self, owner: Int[Tensor, " runs"], rank: int
    ) -> Iterator[tuple[slice, tuple[Level, ...]]]:
        """Some runs at a time with copies of their trees."""
        step = max(_AT_ONCE // (self.entries * rank), 1)
        for start in range(0, len(owner), step):
            runs = slice(start, start + step)
            yield runs, self.forest.for_runs(owner[runs])


def _carried(
    levels: tuple[Level, ...], transitions: Float[Tensor, "runs steps rank rank2"]
) -> Callable[[int, Tensor], Tensor]:
    """Masses of the states after a move, from those of the nodes before a depth."""

    def carried(depth: int, masses: Tensor) -> Tensor:
        moves = transitions[levels[depth - 1].owners, depth - 1]  # (nodes, rank, rank)
        return (masses.unsqueeze(1) @ moves).squeeze(1)  # (nodes, rank)

    return carried
