"""Where iterative fits begin."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.joint_distribution import JointDistribution

# Share of a start that is the plain marginal: every component can reach every possible token.
_BACKGROUND = 0.02
# Exponential noise to this power: components that differ a lot at the start end in better optima
# (measured against 1, 2, 4).
_SHARPNESS = 3.0
# The same share in starts from fibres.
_FIBRE_BACKGROUND = 0.05
# How far the halves of a split component start from each other, as the power of exponential noise.
_SPLIT_SHARPNESS = 2.0
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


def disturbed_marginals(
    marginals: Float[Tensor, "items horizon vocab"], rank: int, restarts: int, seed: int
) -> Mixtures:
    """The same from the marginals themselves."""
    items, horizon, vocab = marginals.shape
    shape = (horizon, rank, vocab)
    noise = torch.stack(
        [exponential_noise(shape, restart_generator(seed, restart)) for restart in range(restarts)]
    )  # (restarts, horizon, rank, vocab)
    change = noise.to(marginals) ** _SHARPNESS + _BACKGROUND
    disturbed = marginals[:, None, :, None, :] * change  # (items, restarts, horizon, rank, vocab)
    factors = disturbed / disturbed.sum(-1, keepdim=True)
    factors = factors.reshape(items * restarts, *shape)  # (runs, horizon, rank, vocab)
    return Mixtures(factors.new_full((items * restarts, rank), 1 / rank), factors)


def fibre_starts(joint: JointDistribution, rank: int, restarts: int, seed: int) -> Mixtures:
    """Components around sequences of the joint's own; (items * restarts) runs.

    `rank` sequences are drawn without replacement, with probabilities in proportion to the square
    roots of theirs. Factor i of a component is the distribution of x_i where all other tokens are
    as in its sequence (the joint's fibre through it), with a little of the marginal. A peaked joint
    has most of its mass in few sequences, and starts from marginals give them to all components
    alike.
    """
    marginals = stacked_marginals(joint)
    flat = joint.probs.double().reshape(len(marginals), -1)  # (items, sequences)
    generators = [restart_generator(seed, -1 - restart) for restart in range(restarts)]
    parts = [
        _fibres(flat, _drawn_sequences(flat, rank, generator), marginals)
        for generator in generators
    ]
    return Mixtures(
        torch.stack([part.weights for part in parts], 1).flatten(0, 1),  # (runs, rank)
        torch.stack([part.factors for part in parts], 1).flatten(0, 1),  # (runs, …, vocab)
    )


def _drawn_sequences(
    flat: Float[Tensor, "items sequences"], rank: int, generator: torch.Generator
) -> Int[Tensor, "items rank"]:
    """Numbers of `rank` sequences of each item: an exponential race at the square roots of their
    masses.
    """
    keys = flat.new_empty(len(flat), 0)
    numbers = torch.empty(len(flat), 0, dtype=torch.long, device=flat.device)
    for start in range(0, flat.shape[1], _AT_ONCE):
        part = flat[:, start : start + _AT_ONCE]  # (items, part)
        times = exponential_noise((part.shape[1],), generator).to(flat).clamp_min_(1e-12)  # (part,)
        here = (part / times.square()).topk(min(rank, part.shape[1]), 1)
        keys = torch.cat([keys, here.values], 1)  # (items, so far)
        numbers = torch.cat([numbers, here.indices + start], 1)  # (items, so far)
    order = keys.topk(min(rank, keys.shape[1]), 1).indices  # (items, at most rank)
    # A rank above the number of sequences: some components begin alike.
    again = torch.arange(rank, device=flat.device) % order.shape[1]  # (rank,)
    return numbers.gather(1, order)[:, again]  # (items, rank)


def _fibres(
    flat: Float[Tensor, "items sequences"],
    sequences: Int[Tensor, "items rank"],
    marginals: Float[Tensor, "items horizon vocab"],
) -> Mixtures:
    """One run per item: weights by the roots of the sequences' probabilities, factors along the
    fibres.
    """
    items, horizon, vocab = marginals.shape
    factors = []
    for position in range(horizon):
        stride = vocab ** (horizon - 1 - position)
        without = sequences - sequences // stride % vocab * stride  # (items, rank), token 0 there
        along = stride * torch.arange(vocab, device=flat.device)  # (vocab,)
        index = without[..., None] + along  # (items, rank, vocab)
        fibre = flat.gather(1, index.flatten(1)).reshape(items, -1, vocab)  # (items, rank, vocab)

        factors.append(fibre)
    roots = flat.gather(1, sequences).sqrt() + 1e-12  # (items, rank)
    mixed = mixed_fibres(torch.stack(factors, 1), marginals)  # (items, horizon, rank, vocab)
    return Mixtures(roots / roots.sum(1, keepdim=True), mixed)


def mixed_fibres(
    fibres: Float[Tensor, "items horizon rank vocab"],
    marginals: Float[Tensor, "items horizon vocab"],
) -> Float[Tensor, "items horizon rank vocab"]:
    """Fibres as distributions, with a little of the marginals: those alone where one has no
    mass.
    """
    mass, marginal = fibres.sum(-1, keepdim=True), marginals[:, :, None]  # (…, 1, vocab)
    law = torch.where(mass > 0, fibres / torch.where(mass > 0, mass, 1.0), marginal)
    mixed = (1 - _FIBRE_BACKGROUND) * law + _FIBRE_BACKGROUND * marginal
    return mixed / mixed.sum(-1, keepdim=True)


def grown(mixtures: Mixtures, rank: int, seed: int) -> Mixtures:
    """Components added until there are `rank`: disturbed copies of the heaviest, which give half
    their weight.
    """
    generator, found = restart_generator(seed, rank), mixtures
    while found.rank < rank:
        count = min(rank - found.rank, found.rank)
        shape = (*found.factors.shape[1:2], count, found.factors.shape[-1])
        noise = exponential_noise(shape, generator) ** _SPLIT_SHARPNESS  # (horizon, count, vocab)
        found = _split(found, count, noise.to(mixtures.factors) + _BACKGROUND)
    return found


def doubled(mixtures: Mixtures, rank: int) -> Mixtures:
    """The same distributions with some components counted twice, until there are `rank`."""
    found = mixtures
    while found.rank < rank:
        found = _split(found, min(rank - found.rank, found.rank), found.factors.new_ones(()))
    return found


def _split(mixtures: Mixtures, count: int, change: Tensor) -> Mixtures:
    """The `count` heaviest components halved; the second halves' factors times `change`,
    normalised.
    """
    heaviest = mixtures.weights.topk(count).indices  # (runs, count)
    half = mixtures.weights.gather(1, heaviest) / 2  # (runs, count)
    halved = mixtures.weights.scatter(1, heaviest, half)  # (runs, rank)
    weights = torch.cat([halved, half], 1)  # (runs, rank + count)

    _, horizon, _, vocab = mixtures.factors.shape
    index = heaviest[:, None, :, None].expand(
        -1, horizon, -1, vocab
    )  # (runs, horizon, count, vocab)
    children = mixtures.factors.gather(2, index) * change  # (runs, horizon, count, vocab)
    children = children / children.sum(-1, keepdim=True)
    return Mixtures(weights, torch.cat([mixtures.factors, children], 2))  # (…, rank + count, vocab)


def stacked_marginals(joint: JointDistribution) -> Float[Tensor, "items horizon vocab"]:
    """The distribution of each position, float64, summing to one exactly."""
    stacked = torch.stack(joint.marginals(), -2).double()  # (*batch, horizon, vocab)
    stacked = stacked.reshape(-1, joint.horizon, joint.vocab_size)  # (items, horizon, vocab)
    return stacked / stacked.sum(-1, keepdim=True)


def marginal_products(joint: JointDistribution, rank: int) -> Mixtures:
    """The product of the marginals, `rank` equal components: the answer of last resort; one run per
    joint.
    """
    return repeated_marginals(stacked_marginals(joint), rank)


def repeated_marginals(marginals: Float[Tensor, "items horizon vocab"], rank: int) -> Mixtures:
    """The same from the marginals themselves."""
    factors = marginals[:, :, None].expand(-1, -1, rank, -1)  # (items, horizon, rank, vocab)
    return Mixtures(factors.new_full((len(factors), rank), 1 / rank), factors.contiguous())


def exponential_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent draws of the exponential distribution, float64."""
    return -torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
