"""Mixtures of Markov chains on trees: what they emit at the nodes, expected counts, softmax
regressions, tokens per call.

A table of neighbours runs over the ids of one tree alone. A bias that depends on the token before,
but not on the component, splits off, so that it costs one exponential per pair of tokens and matrix
products for the components (see `Transition`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.descent.gradient import Goal
from cpmtp.decomposition.forms.chains import LEAST_CURVATURE, LEAST_SPREAD, Chains
from cpmtp.decomposition.trees.neighbours import Block, TreeGroups
from cpmtp.decomposition.trees.targets import node_shares, path_masses, survival_sums

_PARTS = ("weights", "logits", "gate", "left", "right")


@dataclass(frozen=True)
class TreeCounts:
    """Expected counts under trees, those of every tree by its mass.

    Attributes
    ----------
    weights : (runs, trees, rank) tensor
    first : (runs, trees, rank, width) tensor
    pairs : tuple of (runs, pairs, rank) tensors
        One per step.
    kl : (runs,) tensor
        Of the chains that were counted; NaN where it was not asked for.
    """

    weights: Float[Tensor, "runs trees rank"]
    first: Float[Tensor, "runs trees rank width"]
    pairs: tuple[Float[Tensor, "runs _ rank"], ...]
    kl: Float[Tensor, " runs"]

    def __getitem__(self, index) -> TreeCounts:
        pairs = tuple(part[index] for part in self.pairs)
        return TreeCounts(self.weights[index], self.first[index], pairs, self.kl[index])


def tree_counts(groups: TreeGroups, chains: Chains) -> TreeCounts:
    """The E step of every run: forward along the paths, backward from the leaves."""
    found = [_counts(groups, chains, run) for run in range(len(chains))]
    weights, first, pairs, kl = zip(*found, strict=True)
    return TreeCounts(
        torch.stack(weights),  # (runs, trees, rank)
        torch.stack(first),  # (runs, trees, rank, width)
        tuple(torch.stack(same) for same in zip(*pairs, strict=True)),  # (runs, pairs, rank) each
        torch.stack(kl),  # (runs,)
    )


def _counts(
    groups: TreeGroups, chains: Chains, run: int
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Of one run: counts of components, of first tokens and of pairs, and the divergence."""
    if chains.rank == 1:
        return _counts_of_one(groups, chains, run)
    forest, mass = groups.forest, groups.mass[0]
    weights = chains.weights[run].softmax(-1)  # (trees, rank)
    emitted = emissions(groups, chains[run : run + 1])
    shares, below, likelihood = node_shares(
        forest.levels, path_masses(forest.levels, weights, emitted), len(forest)
    )
    shares = [
        share * mass[level.owners, None]  # (nodes, rank)
        for share, level in zip(shares, forest.levels, strict=True)
    ]
    total = (weights * forest.roots[:, None] + below) * mass[:, None]  # (trees, rank)
    first, rank = forest.levels[0], chains.rank
    sums = total.new_zeros(len(forest) * forest.width, rank)
    sums.index_add_(0, first.owners * forest.width + first.tokens, shares[0])
    pairs = [
        total.new_zeros(len(here), rank).index_add_(0, here.of_nodes, share)  # (pairs, rank)
        for here, share in zip(groups.pairs, shares[1:], strict=True)
    ]
    kl = groups.negative_entropy[0] - (mass * likelihood).sum()
    return total, sums.view(len(forest), forest.width, rank).mT, pairs, kl


def _counts_of_one(
    groups: TreeGroups, chains: Chains, run: int
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Of one component: the trees' own neighbours, whatever the chain is."""
    first, pairs = groups.shares_of_one
    counts = [part[:, None] for part in pairs]  # (pairs, 1)
    weights = groups.mass[0, :, None]  # (trees, 1)
    one = TreeCounts(
        weights[None],  # (1, trees, 1)
        first[None, :, None],  # (1, trees, 1, width)
        tuple(part[None] for part in counts),  # (1, pairs, 1)
        first.new_zeros(1),
    )
    value, _ = tree_surprise(groups, one, chains[run : run + 1], ())
    return weights, first[:, None], counts, groups.negative_entropy[0] + value[0]


def emissions(groups: TreeGroups, chains: Chains) -> list[Tensor]:
    """What every component of a single run emits at every node, (nodes, rank) each,
    differentiable.
    """
    forest = groups.forest
    first = chains.logits[0, :, 0].softmax(-1).mT.flatten(0, 1)  # (trees * width, rank)
    level = forest.levels[0]
    found = [first.index_select(0, level.owners * forest.width + level.tokens)]  # (nodes, rank)
    tables: list[list[Tensor]] = [[] for _ in groups.pairs]
    order: list[list[Tensor]] = [[] for _ in groups.pairs]
    for block in groups.blocks:
        tables[block.step].append(_log_emission(block, chains))
        order[block.step].append(block.pairs)
    for pairs, table, number in zip(groups.pairs, tables, order, strict=True):
        back = torch.cat(number).argsort()  # (pairs,)
        every = torch.cat(table).exp()  # (pairs, rank)
        found.append(every.index_select(0, back[pairs.of_nodes]))  # (nodes, rank)
    return found


def _log_emission(block: Block, chains: Chains) -> Float[Tensor, "pairs rank"]:
    """Log-probabilities of a block's pairs in every component of a single run."""
    step, members, size = block.step, block.members, block.after.shape[1]
    logits = chains.logits[0, members, step + 1, :, :size]  # (some, rank, size)
    gate = chains.gate[0, members, step]  # (some, width)
    gated = chains.left[0, step][block.before] * gate[:, None]  # (some, rows, width)
    right = chains.right[0, step].mT[block.after]  # (some, size, width)
    bias = gated @ right.mT  # (some, rows, size)

    highest = bias.detach().amax(-1, keepdim=True)  # (some, rows, 1)
    top = logits.detach().amax(-1, keepdim=True)  # (some, rank, 1)
    total = (bias - highest).exp() @ (logits - top).exp().mT  # (some, rows, rank)
    normaliser = total.clamp_min(1e-300).log() + highest + top.mT  # (some, rows, rank)

    row, place = block.cells // size, block.cells % size  # (pairs,) each
    member = row // block.before.shape[1]  # (pairs,)
    found = logits.mT[member, place] + bias.flatten()[block.cells][:, None]  # (pairs, rank)
    return found - normaliser.flatten(0, 1)[row]


def tree_surprise(
    groups: TreeGroups, counts: TreeCounts, chains: Chains, free: tuple[str, ...]
) -> tuple[Float[Tensor, " runs"], Chains]:
    """``-sum counts log table`` and its gradient in the free parameters, zero in the others."""
    found = [_surprise(groups, counts[[run]], chains[[run]], free) for run in range(len(chains))]
    values, gradients = zip(*found, strict=True)
    return torch.stack(values), Chains.joined(list(gradients))


def _surprise(
    groups: TreeGroups, counts: TreeCounts, chains: Chains, free: tuple[str, ...]
) -> tuple[Tensor, Chains]:
    """The same of one run, a table of neighbours at a time."""
    parts = {name: getattr(chains, name).detach() for name in _PARTS}
    leaves = {name: parts[name].requires_grad_() for name in free}
    chains = Chains(**(parts | leaves))
    slopes = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    value = chains.weights.new_zeros(())
    for term in _terms(groups, counts, chains):
        value = value - term.detach()
        if not term.requires_grad:
            continue
        found = torch.autograd.grad(term, list(leaves.values()), allow_unused=True)
        for name, slope in zip(leaves, found, strict=True):
            if slope is not None:
                slopes[name] -= slope
    zeros = {name: torch.zeros_like(part) for name, part in parts.items() if name not in slopes}
    return value, Chains(**(zeros | slopes))


def _terms(groups: TreeGroups, counts: TreeCounts, chains: Chains) -> Iterator[Tensor]:
    """Sums of counts times logarithms; each has a tape of its own."""
    yield (counts.weights * chains.weights.log_softmax(-1)).sum()
    yield (counts.first * chains.logits[:, :, 0].log_softmax(-1)).sum()
    for block in groups.blocks:
        yield (counts.pairs[block.step][0, block.pairs] * _log_emission(block, chains)).sum()


def tree_curvature(groups: TreeGroups, chains: Chains) -> Chains:
    """See `chain_curvature`."""
    mass, marginals = groups.mass, groups.marginals
    weights = mass.unsqueeze(-1) * chains.weights.softmax(-1)  # (runs, trees, rank)
    tokens = (chains.logits.softmax(-1) + marginals.unsqueeze(3)) / 2
    logits = weights[:, :, None, :, None] * tokens  # (runs, trees, positions, rank, width)
    parts = [_factor_curvature(groups, chains[[run]]) for run in range(len(chains))]
    gate, left, right = (torch.cat(same) for same in zip(*parts, strict=True))
    found = (weights, logits, gate, left, right)
    return Chains(*(part.clamp_min(LEAST_CURVATURE) for part in found))


def _factor_curvature(groups: TreeGroups, chains: Chains) -> tuple[Tensor, Tensor, Tensor]:
    """Of gates, left and right factors of a single run."""
    mass, found = groups.mass[0][:, None], []
    if groups.positions == 1:
        return chains.gate, chains.left, chains.right  # of no numbers
    for step in range(groups.positions - 1):
        before, after = groups.occurrences[step], groups.occurrences[step + 1]
        gates = chains.gate[0, :, step].square()  # (trees, width)
        to = torch.sparse.mm(after, chains.right[0, step].square().mT)  # (trees, width)
        of = mass * torch.sparse.mm(before, chains.left[0, step].square())  # (trees, width)
        # (tokens, width)
        by_left = torch.sparse.mm(before.mT, mass * (gates * to + LEAST_SPREAD))
        by_right = torch.sparse.mm(after.mT, gates * of + LEAST_SPREAD * mass)  # (tokens, width)
        found.append((of * to, by_left, by_right.mT))
    gate, left, right = (torch.stack(same) for same in zip(*found, strict=True))
    return gate.transpose(0, 1)[None], left[None], right[None]  # (1, trees, steps, width), …


def tree_tokens_lost(
    groups: TreeGroups, chains: Chains, goal: Goal
) -> tuple[Float[Tensor, " runs"], Chains]:
    """Minus the tokens per call of every run, trees by their masses, and its gradient."""
    values, gradients = [], []
    for run in range(len(chains)):
        leaves = [getattr(chains, name)[[run]].detach().requires_grad_() for name in _PARTS]
        one = Chains(*leaves)
        earned = survival_sums(
            groups.forest.levels,
            one.weights[0].softmax(-1),
            emissions(groups, one),
            goal.rule,
            goal.first_token,
        )  # (trees,)
        # A draft that gives the first token earns the target's own token after the block as well.
        lost = -(groups.mass[0] * (earned + float(goal.first_token == "draft"))).sum()
        values.append(lost.detach())
        slopes = [torch.zeros_like(leaf) for leaf in leaves]
        if lost.requires_grad:
            found = torch.autograd.grad(lost, leaves, allow_unused=True)
            slopes = [a if b is None else b for a, b in zip(slopes, found, strict=True)]
        gradients.append(Chains(*slopes))
    return torch.stack(values), Chains.joined(gradients)
