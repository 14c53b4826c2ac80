"""Trees as targets of a fit: the expectation step, and tokens per call with their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.verification import PrefixMasses, accepted_mass
from cpmtp.decomposition.mixtures import Counts, Mixtures
from cpmtp.decomposition.trees.nodes import Forest, Level
from cpmtp.sampling_law import ratio

# Entries of nodes by components held at once, in each of some five tensors.
_AT_ONCE = 1 << 22
_TINY = 1e-290


@dataclass(frozen=True)
class TreeTargets:
    """Trees, each the target of some runs.

    The objective is ``sum w log(w / Q(prefix))`` over what each node stands for: never above
    ``KL(P || Q)``, because a coarser view of two distributions brings them nearer, and equal to it
    for a tree of everything.

    Attributes
    ----------
    forest : Forest
    owner : (runs,) long tensor
        Which of the trees each run is fitted to.
    """

    forest: Forest
    owner: Int[Tensor, " runs"]

    @classmethod
    def of(cls, forest: Forest) -> TreeTargets:
        """One run per tree."""
        return cls(forest, torch.arange(len(forest)))

    def for_runs(self, owner: Int[Tensor, " runs"]) -> TreeTargets:
        """The same trees for other runs."""
        return replace(self, owner=owner)

    def __getitem__(self, runs) -> TreeTargets:
        if runs.dtype != torch.bool and torch.equal(runs, torch.arange(len(self))):
            return self  # what is laid out for all runs is laid out already
        return replace(self, owner=self.owner[runs])

    def __len__(self) -> int:
        return len(self.owner)

    def expected_counts(self, mixtures: Mixtures) -> Counts:
        """The expectation step for every run, and the objective it started from.

        A node's expected components are those of what it stands for alone and of its children: the
        forward pass multiplies along paths, and the backward pass adds up along them.
        """
        weights, factors = torch.zeros_like(mixtures.weights), torch.zeros_like(mixtures.factors)
        likelihood = torch.zeros_like(weights[:, 0])
        for runs, levels in self._laid_out(mixtures.rank):
            some = mixtures[runs]
            masses = component_masses(levels, some)
            weights[runs], factors[runs], likelihood[runs] = self._counts(
                levels, masses, some, self.forest.roots[self.owner[runs]]
            )
        return Counts(weights, factors, self.forest.negative_entropy[self.owner] - likelihood)

    def _counts(
        self,
        levels: tuple[Level, ...],
        masses: list[Tensor],
        mixtures: Mixtures,
        roots: Float[Tensor, " runs"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts of components, of tokens with components, and ``sum w log Q``."""
        runs, horizon, rank, width = mixtures.factors.shape
        factors = torch.empty(runs, horizon, width, rank, dtype=torch.float64)
        shares, below, likelihood = node_shares(levels, masses, runs)
        for depth, (level, share) in enumerate(zip(levels, shares, strict=True)):
            places = level.owners * width + level.tokens  # (nodes,)
            sums = factors.new_zeros(runs * width, rank).index_add_(0, places, share)
            factors[:, depth] = sums.view(runs, width, rank)  # (runs, width, rank)
        total = mixtures.weights * roots[:, None] + below  # (runs, rank)
        return total, factors.mT, likelihood

    def survival_sums(
        self, mixtures: Mixtures, rule: str, first_token: str
    ) -> Float[Tensor, " runs"]:
        """``S_1 + … + S_n`` of every run, differentiable: exact on complete trees, otherwise what
        the kept prefixes give.
        """
        parts = []
        for runs, levels in self._laid_out(mixtures.rank):
            some = mixtures[runs]
            emitted = emitted_by(levels, some.factors)
            parts.append(survival_sums(levels, some.weights, emitted, rule, first_token))
        return torch.cat(parts)

    def _laid_out(self, rank: int) -> Iterator[tuple[slice, tuple[Level, ...]]]:
        """Some runs at a time and their nodes: as many as stay within the working set."""
        nodes = self.forest.sizes.amax(0).max()  # of the widest level of any tree
        step = max(_AT_ONCE // int(nodes * rank), 1)
        if step >= len(self):
            yield slice(0, len(self)), self._levels
            return
        for start in range(0, len(self), step):
            runs = slice(start, start + step)
            yield runs, self.forest.for_runs(self.owner[runs])

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return self.forest.for_runs(self.owner)


def component_masses(levels: tuple[Level, ...], mixtures: Mixtures) -> list[Tensor]:
    """``w_a prod_i A_i[x_i, a]`` of every node, (nodes, rank) each; first that of the roots."""
    return path_masses(levels, mixtures.weights, emitted_by(levels, mixtures.factors))


def emitted_by(
    levels: tuple[Level, ...], factors: Float[Tensor, "runs horizon rank width"]
) -> list[Tensor]:
    """``A_i[x_i, a]`` of every node, (nodes, rank) each."""
    width, rank, found = factors.shape[-1], factors.shape[2], []
    for level, factor in zip(levels, factors.unbind(1), strict=True):
        table = factor.mT.reshape(-1, rank)  # (runs * width, rank)
        found.append(table.index_select(0, level.owners * width + level.tokens))  # (nodes, rank)
    return found


def path_masses(
    levels: tuple[Level, ...], weights: Float[Tensor, "runs rank"], emitted: list[Tensor]
) -> list[Tensor]:
    """Products of what is emitted along the paths, (nodes, rank) each; first those of the roots."""
    masses = [weights]
    for level, factor in zip(levels, emitted, strict=True):
        masses.append(masses[-1].index_select(0, level.parents) * factor)  # (nodes, rank)
    return masses


def node_shares(
    levels: tuple[Level, ...], masses: list[Tensor], runs: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Expected components of what passes through every node, (nodes, rank) each, those of what
    passes through the roots, and ``sum w log Q`` of every run. The masses are used up.
    """
    likelihood = torch.zeros(runs, dtype=torch.float64)
    shares: list[Tensor] = []
    below = torch.zeros_like(masses[-1])
    for depth in reversed(range(len(levels))):
        level, mass = levels[depth], masses[depth + 1]  # (nodes, rank)
        model = mass.sum(1).clamp_min_(_TINY)  # (nodes,)
        likelihood.index_add_(0, level.owners, level.own * model.log())
        share = mass.mul_((level.own / model)[:, None]).add_(below)  # (nodes, rank)
        shares.append(share)
        below = share.new_zeros(len(masses[depth]), share.shape[1])
        below.index_add_(0, level.parents, share)  # (nodes before, rank)
    return shares[::-1], below, likelihood


def survival_sums(
    levels: tuple[Level, ...],
    weights: Float[Tensor, "runs rank"],
    emitted: list[Tensor],
    rule: str,
    first_token: str,
    carried: Callable[[int, Tensor], Tensor] | None = None,
) -> Float[Tensor, " runs"]:
    """``S_1 + … + S_n`` of every run from what components emit at its nodes, differentiable.

    Parameters
    ----------
    emitted : list of (nodes, rank) tensors
    carried : callable, optional
        Of (depth, masses of the nodes before it): the masses of the components there, where they
        change on the way.
    """
    masses, sums = weights, torch.zeros(len(weights), dtype=torch.float64)
    known = PrefixMasses(*[torch.ones(len(weights), dtype=torch.float64)] * 3)
    for depth, (level, factor) in enumerate(zip(levels, emitted, strict=True)):
        masses = carried(depth, masses) if carried is not None and depth else masses
        parents = masses.index_select(0, level.parents)  # (nodes, rank)
        masses = parents * factor  # (nodes, rank)
        if depth == 0 and first_token == "target":
            # The target gives it: the draft has all its mass there, and knows it.
            total = masses.sum(1, keepdim=True)  # (nodes, 1)
            posterior = ratio(masses, total, otherwise=0.0)
            masses = torch.where(total > 0, posterior, parents) * level.probs[:, None]
            known = PrefixMasses(level.probs, level.probs, level.probs)
            sums = sums + 1.0
            continue
        before = known[level.parents]
        draft = masses.sum(1)  # (nodes,)
        q = ratio(draft, before.draft, otherwise=0.0)  # (nodes,)
        accepted = accepted_mass(rule, before, level.conditionals, q)  # (nodes,)
        known = PrefixMasses(level.probs, draft, accepted)
        sums = sums.index_add(0, level.owners, accepted)
    return sums
