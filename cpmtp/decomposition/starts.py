"""Where iterative fits begin."""

from __future__ import annotations

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures
from cpmtp.joint_distribution import JointDistribution

# Share of a start that is the plain marginal: every component can reach every possible token.
_BACKGROUND = 0.02
# Exponential noise to this power: components that differ a lot at the start end in better optima
# (measured against 1, 2, 4).
_SHARPNESS = 3.0
# The same share in starts from fibres.
_FIBRE_BACKGROUND = 0.05
# Entries of the joint drawn from at once.
_AT_ONCE = 1 << 22


def restart_generator(seed: int, restart: int) -> torch.Generator:
    """Random numbers of one restart: the same however many restarts and joints are beside it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + restart) % (1 << 63))


def random_starts(joint: JointDistribution, rank: int, restarts: int, seed: int) -> Mixtures:
    """Equal weights and the joint's marginals, disturbed by exponential noise; (items * restarts)
    runs.

    The noise depends on seed and restart alone, so a joint's fit does not depend on what else is in
    its batch.
    """
    return disturbed_marginals(stacked_marginals(joint), rank, restarts, seed)


def disturbed_marginals(marginals: Tensor, rank: int, restarts: int, seed: int) -> Mixtures:
    """The same from the marginals themselves, (items, horizon, vocab)."""
    items, horizon, vocab = marginals.shape
    shape = (horizon, rank, vocab)
    noise = torch.stack(
        [_exponential(shape, restart_generator(seed, restart)) for restart in range(restarts)]
    )
    disturbed = marginals[:, None, :, None, :] * (noise.to(marginals) ** _SHARPNESS + _BACKGROUND)
    factors = (disturbed / disturbed.sum(-1, keepdim=True)).reshape(items * restarts, *shape)
    return Mixtures(factors.new_full((items * restarts, rank), 1 / rank), factors)


def fibre_starts(joint: JointDistribution, rank: int, restarts: int, seed: int) -> Mixtures:
    """Components around sequences of the joint's own; (items * restarts) runs.

    `rank` sequences are drawn without replacement, with probabilities in proportion to the square
    roots of theirs. Factor i of a component is the law of x_i where all other tokens are as in its
    sequence (the joint's fibre through it), with a little of the marginal. A peaked joint has most
    of its mass in few sequences, and starts from marginals give them to all components alike.
    """
    marginals = stacked_marginals(joint)
    flat = joint.probs.double().reshape(len(marginals), -1)
    generators = [restart_generator(seed, -1 - restart) for restart in range(restarts)]
    parts = [
        _fibres(flat, _drawn_sequences(flat, rank, generator), marginals)
        for generator in generators
    ]
    weights = torch.stack([part.weights for part in parts], 1).flatten(0, 1)
    return Mixtures(weights, torch.stack([part.factors for part in parts], 1).flatten(0, 1))


def _drawn_sequences(flat: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Numbers of `rank` sequences of each item, (items, rank): an exponential race at the square
    roots of their masses.
    """
    keys, numbers = (
        flat.new_empty(len(flat), 0),
        torch.empty(len(flat), 0, dtype=torch.long, device=flat.device),
    )
    for start in range(0, flat.shape[1], _AT_ONCE):
        part = flat[:, start : start + _AT_ONCE]
        times = _exponential((part.shape[1],), generator).to(flat).clamp_min_(1e-12)
        here = (part / times.square()).topk(min(rank, part.shape[1]), 1)
        keys, numbers = (
            torch.cat([keys, here.values], 1),
            torch.cat([numbers, here.indices + start], 1),
        )
    order = keys.topk(min(rank, keys.shape[1]), 1).indices
    # A rank above the number of sequences: some components begin alike.
    return numbers.gather(1, order)[:, torch.arange(rank, device=flat.device) % order.shape[1]]


def _fibres(flat: Tensor, sequences: Tensor, marginals: Tensor) -> Mixtures:
    """One run per item: weights by the roots of the sequences' probabilities, factors along the
    fibres.
    """
    items, horizon, vocab = marginals.shape
    factors = []
    for position in range(horizon):
        stride = vocab ** (horizon - 1 - position)
        without = sequences - sequences // stride % vocab * stride
        index = without[..., None] + stride * torch.arange(vocab, device=flat.device)
        fibre = flat.gather(1, index.flatten(1)).reshape(items, -1, vocab)
        mass, marginal = fibre.sum(-1, keepdim=True), marginals[:, position, None]
        law = torch.where(mass > 0, fibre / torch.where(mass > 0, mass, 1.0), marginal)
        factors.append((1 - _FIBRE_BACKGROUND) * law + _FIBRE_BACKGROUND * marginal)
    stacked = torch.stack(factors, 1)
    roots = flat.gather(1, sequences).sqrt() + 1e-12
    return Mixtures(roots / roots.sum(1, keepdim=True), stacked / stacked.sum(-1, keepdim=True))


def stacked_marginals(joint: JointDistribution) -> Tensor:
    """The law of each position, (items, horizon, vocab), float64, summing to one exactly."""
    stacked = (
        torch.stack(joint.marginals(), -2).double().reshape(-1, joint.horizon, joint.vocab_size)
    )
    return stacked / stacked.sum(-1, keepdim=True)


def marginal_products(joint: JointDistribution, rank: int) -> Mixtures:
    """The product of the marginals, `rank` equal components: the answer of last resort; one run per
    joint.
    """
    return repeated_marginals(stacked_marginals(joint), rank)


def repeated_marginals(marginals: Tensor, rank: int) -> Mixtures:
    """The same from the marginals themselves, (items, horizon, vocab)."""
    factors = marginals[:, :, None].expand(-1, -1, rank, -1).contiguous()
    return Mixtures(factors.new_full((len(factors), rank), 1 / rank), factors)


def _exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return -torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
