"""Fits of Markov mixtures to groups of joints: EM, L-BFGS on the divergence, tokens per call."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.descent.quasi_newton import Minima, minimise
from cpmtp.decomposition.descent.squarem import Sweeps, swept
from cpmtp.decomposition.forms.chains import (
    IMPOSSIBLE,
    LOWEST_LOGIT,
    ChainCounts,
    Chains,
    chain_counts,
    chain_curvature,
    surprise,
)
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.trees.chains import (
    TreeCounts,
    tree_counts,
    tree_curvature,
    tree_surprise,
)
from cpmtp.decomposition.trees.neighbours import TreeGroups

# Evaluations of the softmax regressions in every M step.
_INNER_PASSES = 5
# Entries of tables of neighbours that softmax regressions hold at once.
_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Problem:
    """Which groups the runs of a fit belong to, and what of their parameters is free.

    Attributes
    ----------
    groups : Groups
    owner : (runs,) long tensor
    like : Chains
        As many runs, for shapes and for what is not free.
    free : tuple of str
        Names of the free parts.
    """

    groups: Groups | TreeGroups
    owner: Int[Tensor, " runs"]
    like: Chains
    free: tuple[str, ...]

    def chains(self, runs: Tensor, vectors: Tensor) -> Chains:
        """Vectors of some runs as chains."""
        return self.like[runs].unpacked(vectors, self.free)

    def counts(
        self, runs: Tensor, chains: Chains, *, with_kl: bool = True
    ) -> ChainCounts | TreeCounts:
        """The E step, see `chain_counts`."""
        if isinstance(self.groups, TreeGroups):
            return tree_counts(self.groups, chains)
        return chain_counts(self.groups, self.owner[runs], chains, with_kl=with_kl)

    def curvature(self, runs: Tensor, vectors: Tensor) -> Float[Tensor, "runs size"]:
        """See `chain_curvature`."""
        chains = self.chains(runs, vectors)
        if isinstance(self.groups, TreeGroups):
            return tree_curvature(self.groups, chains).packed(self.free)
        return chain_curvature(self.groups, self.owner[runs], chains).packed(self.free)

    def slope(
        self, runs: Tensor, vectors: Tensor, counts: ChainCounts | TreeCounts
    ) -> tuple[Float[Tensor, " runs"], Float[Tensor, "runs size"]]:
        """See `surprise`."""
        chains = self.chains(runs, vectors)
        if isinstance(self.groups, TreeGroups):
            assert isinstance(counts, TreeCounts)
            value, gradient = tree_surprise(self.groups, counts, chains, self.free)
        else:
            assert isinstance(counts, ChainCounts)
            value, gradient = _surprise_in_parts(counts, chains)
        return value, gradient.packed(self.free)


def _surprise_in_parts(
    counts: ChainCounts, chains: Chains
) -> tuple[Float[Tensor, " runs"], Chains]:
    """`surprise`, of many members some at a time."""
    members, entries = chains.weights.shape[1], counts.pairs[:, 0].numel()
    wide = max(_AT_ONCE // max(entries, 1), 1)
    if wide >= members:
        return surprise(counts, chains)
    found = [
        surprise(counts.of_members(some), chains.of_members(some))
        for some in (slice(at, at + wide) for at in range(0, members, wide))
    ]
    values, gradients = zip(*found, strict=True)
    every = [
        torch.cat([getattr(part, name) for part in gradients], 1)
        for name in ("weights", "logits", "gate")
    ]  # (runs, members, …) each
    shared = [
        torch.stack([getattr(part, name) for part in gradients]).sum(0)
        for name in ("left", "right")
    ]  # (runs, steps, …) each
    return torch.stack(values).sum(0), Chains(*every, *shared)


def em(problem: Problem, *, max_passes: int, tolerance: float) -> tuple[Chains, Minima]:
    """Fit every run from where `problem.like` is.

    E step: expected counts of components, first tokens and pairs of neighbours. M step: weights and
    first tokens in closed form, the rest by a few steps of softmax regression on the counts, none
    of which raises them. One component's counts are those of the target: the regressions are then
    the whole fit.
    """
    if problem.like.rank == 1:
        return gradient(problem, max_passes=max_passes, tolerance=tolerance)

    def count(runs: Tensor, vectors: Tensor, with_kl: bool) -> ChainCounts | TreeCounts:
        return problem.counts(runs, problem.chains(runs, vectors), with_kl=with_kl)

    def maximise(runs: Tensor, vectors: Tensor, counts: ChainCounts | TreeCounts) -> Tensor:
        start = _closed_form(problem.chains(runs, vectors), counts).packed(problem.free)
        return minimise(
            lambda some, x: problem.slope(runs[some], x, counts[some]),
            start,
            curvature=lambda some, x: problem.curvature(runs[some], x),
            max_passes=_INNER_PASSES,
            tolerance=0.0,
        ).points

    sweeps = Sweeps(count, maximise, problem.curvature)
    start = problem.like.packed(problem.free)
    found = swept(sweeps, start, max_passes=max_passes, tolerance=tolerance)
    return problem.like.unpacked(found.points, problem.free), found


def gradient(problem: Problem, *, max_passes: int, tolerance: float) -> tuple[Chains, Minima]:
    """The same by L-BFGS on the divergence itself: its gradient is the counts' (EM's identity)."""
    of_target = None
    if problem.like.rank == 1:
        everything = torch.arange(len(problem.like), device=problem.owner.device)
        of_target = problem.counts(everything, problem.like)
        base = problem.groups.negative_entropy[problem.owner]  # (runs,)

    def evaluate(some: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        if of_target is not None:
            value, slope = problem.slope(some, vectors, of_target[some])
            return base[some] + value, slope
        chains = problem.chains(some, vectors)
        counts = problem.counts(some, chains)
        return counts.kl, problem.slope(some, vectors, counts)[1]

    found = minimise(
        evaluate,
        problem.like.packed(problem.free),
        curvature=problem.curvature,
        max_passes=max_passes,
        tolerance=tolerance,
    )
    return problem.like.unpacked(found.points, problem.free), found


def _closed_form(chains: Chains, counts: ChainCounts | TreeCounts) -> Chains:
    """Weights and first tokens in the proportions of their counts."""
    lowest = math.exp(LOWEST_LOGIT)
    total = counts.first.sum(-1, keepdim=True)  # (runs, members, rank, 1)
    share = counts.first / torch.where(total > 0, total, 1.0)  # (runs, members, rank, vocab)
    first = share.clamp_min(lowest).log()  # (runs, members, rank, vocab)
    start = chains.logits[:, :, 0]  # (runs, members, rank, vocab)
    first = torch.where((start > IMPOSSIBLE) & (total > 0), first, start)
    logits = torch.cat([first.unsqueeze(2), chains.logits[:, :, 1:]], 2)
    mass = counts.weights.sum(-1, keepdim=True)  # (runs, members, 1)
    weights = counts.weights / torch.where(mass > 0, mass, 1.0)  # (runs, members, rank)
    return replace(chains, weights=weights.clamp_min(lowest).log(), logits=logits)
