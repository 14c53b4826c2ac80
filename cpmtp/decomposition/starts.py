"""Where iterative fits begin."""

from __future__ import annotations

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures
from cpmtp.joint_distribution import JointDistribution

# Share of a start that is the plain marginal: every component can reach every possible token.
_BACKGROUND = 0.02
# Exponential noise to this power: components that differ a lot at the start end in better optima (measured against 1, 2, 4).
_SHARPNESS = 3.0


def restart_generator(seed: int, restart: int) -> torch.Generator:
    """Random numbers of one restart: the same whatever the number of restarts and joints beside it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + restart) % (1 << 63))


def random_starts(joint: JointDistribution, rank: int, restarts: int, seed: int) -> Mixtures:
    """Equal weights and the joint's marginals, disturbed by exponential noise; (items * restarts) runs.

    The noise depends on seed and restart alone, so a joint's fit does not depend on what else is in its batch.
    """
    return disturbed_marginals(stacked_marginals(joint), rank, restarts, seed)


def disturbed_marginals(marginals: Tensor, rank: int, restarts: int, seed: int) -> Mixtures:
    """The same from the marginals themselves, (items, horizon, vocab)."""
    items, horizon, vocab = marginals.shape
    shape = (horizon, rank, vocab)
    noise = torch.stack([_exponential(shape, restart_generator(seed, restart)) for restart in range(restarts)])
    disturbed = marginals[:, None, :, None, :] * (noise.to(marginals) ** _SHARPNESS + _BACKGROUND)
    factors = (disturbed / disturbed.sum(-1, keepdim=True)).reshape(items * restarts, *shape)
    return Mixtures(factors.new_full((items * restarts, rank), 1 / rank), factors)


def stacked_marginals(joint: JointDistribution) -> Tensor:
    """The law of each position, (items, horizon, vocab), float64, summing to one exactly."""
    stacked = torch.stack(joint.marginals(), -2).double().reshape(-1, joint.horizon, joint.vocab_size)
    return stacked / stacked.sum(-1, keepdim=True)


def marginal_products(joint: JointDistribution, rank: int) -> Mixtures:
    """The product of the marginals, `rank` equal components: the answer of last resort; one run per joint."""
    return repeated_marginals(stacked_marginals(joint), rank)


def repeated_marginals(marginals: Tensor, rank: int) -> Mixtures:
    """The same from the marginals themselves, (items, horizon, vocab)."""
    factors = marginals[:, :, None].expand(-1, -1, rank, -1).contiguous()
    return Mixtures(factors.new_full((len(factors), rank), 1 / rank), factors)


def _exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return -torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
