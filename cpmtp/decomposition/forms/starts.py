"""Where fits of Markov mixtures begin."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.decomposition.forms.chains import IMPOSSIBLE, LOWEST_LOGIT, Chains, chains_of
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.starts import repeated_marginals, restart_generator
from cpmtp.decomposition.trees.neighbours import LEAST_SHARE, TreeGroups, leading

# How far the components that one chain is split into start from each other, in nats: smaller ones
# stay alike for long, larger ones forget the chain (0.3, 1 and 3 tried on code and prose joints).
_SPLIT = 1.0
# The same where several members share the transitions: their chain is nearer to the joint.
_SPLIT_OF_SEVERAL = 0.2
# Trees of more tokens begin from the pairs that occur alone, not from a table of all.
_DENSE_START = 512
# Keeps the factors of tokens that hardly occur small.
_LEAST_ROOT = 1e-4


def one_chain(groups: Groups | TreeGroups, width: int) -> Chains:
    """A chain per group from the logarithms of how much likelier neighbours are than if they were
    independent, cut to the rank that fits best.

    The logarithms are weighted by the roots of the probabilities of both tokens; of a group's
    members their mean.
    """
    owner = torch.arange(len(groups.mass), device=groups.mass.device)
    singles = repeated_marginals(groups.marginals.flatten(0, 1), 1)
    plain = chains_of(singles, groups, owner, width)
    if groups.positions == 1:
        return plain
    if isinstance(groups, TreeGroups) and groups.vocab > _DENSE_START:
        factors = [_sparsely(groups, step, width) for step in range(groups.positions - 1)]
        left, right = (torch.stack(same)[None] for same in zip(*factors, strict=True))
        return replace(plain, left=left, right=right)  # (1, steps, tokens, width) and its mirror
    logs, before, after = _log_ratios(groups)
    before, after = before.sqrt().unsqueeze(-1), after.sqrt().unsqueeze(-2)
    u, s, v = torch.linalg.svd(before * logs * after)  # (groups, steps, vocab, vocab) and s
    width = min(width, s.shape[-1])
    left = u[..., :width] * s[..., None, :width] / (before + _LEAST_ROOT)
    right = v[..., :width, :] / (after + _LEAST_ROOT)
    return replace(plain, left=left, right=right)  # (groups, steps, vocab, width) and its mirror


def one_full_chain(groups: Groups | TreeGroups) -> Chains:
    """The same with a number for every pair of tokens: of a single member the conditionals."""
    plain = one_chain(groups, groups.vocab)
    identity = torch.eye(groups.vocab).to(plain.left)  # (vocab, vocab)
    right = identity.expand_as(plain.right).contiguous()  # (groups, steps, vocab, vocab)
    if groups.mass.shape[1] > 1:
        return replace(plain, left=_log_ratios(groups)[0], right=right)
    pairs = groups.neighbour_laws()[0]  # (groups, steps, vocab, vocab)
    total = pairs.sum(-1, keepdim=True)  # (groups, steps, vocab, 1)
    after = pairs.sum(-2, keepdim=True)  # (groups, steps, 1, vocab)
    law = torch.where(total > 0, pairs / torch.where(total > 0, total, 1.0), after)
    logs = torch.where(law > 0, law.clamp_min(1e-300).log(), IMPOSSIBLE)
    # Every pair's logarithm is in the left factors, so the logits are flat.
    later = torch.where(plain.logits[:, :, 1:] > IMPOSSIBLE, 0.0, plain.logits[:, :, 1:])
    logits = torch.cat([plain.logits[:, :, :1], later], 2)  # (groups, members, positions, …)
    return replace(plain, logits=logits, left=logs, right=right)


def split(
    chain: Chains, rank: int, groups: Groups | TreeGroups, restarts: int, seed: int
) -> Chains:
    """Every chain as a mixture of disturbed copies, once per restart."""
    runs = chain[torch.arange(len(chain.weights)).repeat_interleave(restarts)]
    shape = (
        *chain.logits.shape[1:3],
        rank,
        chain.logits.shape[-1],
    )  # (members, positions, rank, vocab)
    noise = torch.stack(
        [
            torch.randn(shape, generator=restart_generator(seed, restart), dtype=torch.float64)
            for restart in range(restarts)
        ]
    ).repeat(len(chain.weights), 1, 1, 1, 1)  # (runs, members, positions, rank, vocab)
    far = _SPLIT if groups.mass.shape[1] == 1 else _SPLIT_OF_SEVERAL
    noise = far * noise.to(runs.logits)
    logits = torch.where(runs.logits > LOWEST_LOGIT, runs.logits + noise, runs.logits)
    weights = runs.weights.expand(-1, -1, rank).contiguous()  # (runs, members, rank)
    return replace(runs, weights=weights, logits=logits)


def repeated(chain: Chains, rank: int) -> Chains:
    """A chain counted `rank` times: the same distribution."""
    weights = chain.weights.expand(-1, -1, rank).contiguous()  # (runs, members, rank)
    logits = chain.logits.expand(-1, -1, -1, rank, -1).contiguous()
    return replace(chain, weights=weights, logits=logits)


def grown(chains: Chains, rank: int) -> Chains:
    """The same distributions with their last component counted more than once."""
    missing = rank - chains.rank
    more = [missing + 1 if place == chains.rank - 1 else 1 for place in range(chains.rank)]
    index = torch.arange(chains.rank).repeat_interleave(torch.tensor(more))  # (rank,)
    weights = chains.weights[..., index].clone()  # (runs, members, rank)
    weights[..., chains.rank - 1 :] -= math.log(missing + 1)
    return replace(chains, weights=weights, logits=chains.logits[:, :, :, index])


def lifted(
    chains: Chains,
    groups: Groups | TreeGroups,
    owner: Int[Tensor, " runs"],
    tokens: Int[Tensor, " kept"],
) -> Chains:
    """Chains over some tokens as chains over all.

    A left-out token has its marginal probability in every component, beside a kept one of mean
    logit; nothing follows from it, and it follows from nothing.
    """
    marginals = groups.marginals[owner].unsqueeze(3)  # (runs, members, positions, 1, vocab)
    usual = marginals[..., tokens].clamp_min(1e-300).log()  # (…, 1, kept)
    weight = marginals[..., tokens]  # (…, 1, kept)
    level = (weight * (chains.logits - usual)).sum(-1, keepdim=True)  # (…, rank, 1)
    level = level / weight.sum(-1, keepdim=True)
    logits = torch.where(marginals > 0, marginals.clamp_min(1e-17).log() + level, IMPOSSIBLE)
    logits[..., tokens] = chains.logits  # (runs, members, positions, rank, kept)

    runs, steps, _, width = chains.left.shape
    left = chains.left.new_zeros(runs, steps, groups.vocab, width)
    left[..., tokens, :] = chains.left
    right = chains.right.new_zeros(runs, steps, chains.right.shape[2], groups.vocab)
    right[..., tokens] = chains.right
    return replace(chains, logits=logits, left=left, right=right)


def _log_ratios(groups: Groups | TreeGroups) -> tuple[Tensor, Tensor, Tensor]:
    """``log P(u, v) / P(u) P(v)`` of neighbours, (groups, steps, vocab, vocab), and the
    distributions of both, (groups, steps, vocab).
    """
    together, apart = groups.neighbour_laws()  # (groups, steps, vocab, vocab) each
    possible = apart > 0
    share = torch.where(possible, together / torch.where(possible, apart, 1.0), 1.0)
    return (share + LEAST_SHARE).log(), together.sum(-1), together.sum(-2)


def _sparsely(groups: TreeGroups, step: int, width: int) -> tuple[Tensor, Tensor]:
    """Left and right factors of one step from the pairs that occur alone."""
    table, before, after = groups.associations(step)
    u, s, v = leading(table, width, step)
    left = u * s / (before[:, None] + _LEAST_ROOT)  # (tokens, width)
    return left, v / (after + _LEAST_ROOT)
