"""Joints that a form holds exactly."""

from __future__ import annotations

import torch

from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.joint_distribution import JointDistribution


def _normal(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def markov_mixture(seed: int, vocab: int, horizon: int, rank: int, width: int) -> MarkovMixture:
    steps = horizon - 1
    weights, logits, left, right = _normal(
        seed, (rank,), (horizon, rank, vocab), (steps, vocab, width), (steps, width, vocab)
    )
    return MarkovMixture(weights.softmax(-1), 1.5 * logits, left, 1.5 * right)


def hidden_markov(seed: int, vocab: int, horizon: int, rank: int) -> HMMDistribution:
    weights, moves, tokens = _normal(
        seed, (rank,), (horizon - 1, rank, rank), (horizon, vocab, rank)
    )
    factors = (2 * tokens).softmax(1).unbind(0)
    return HMMDistribution(weights.softmax(-1), (2 * moves).softmax(-1), factors)


def joints(drafts: list) -> JointDistribution:
    """One joint per draft, along one batch axis."""
    tables = torch.stack([draft.to_tensor() for draft in drafts])  # (drafts, vocab, …, vocab)
    total = tables.flatten(1).sum(1)  # (drafts,)
    shape = (-1, *(1,) * drafts[0].horizon)
    return JointDistribution(tables / total.reshape(shape), drafts[0].horizon)
