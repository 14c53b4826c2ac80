"""Drafts without a model behind them."""

from __future__ import annotations

import torch

from cpmtp.drafts.cp_distribution import CPDistribution


def random_draft(
    vocab: int, horizon: int, rank: int, seed: int, batch: tuple[int, ...] = ()
) -> CPDistribution:
    generator = torch.Generator().manual_seed(seed)

    def simplex(*shape, dim):
        return (
            torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)
            .mul(1.5)
            .softmax(dim)
        )

    return CPDistribution(
        simplex(rank, dim=-1), [simplex(vocab, rank, dim=-2) for _ in range(horizon)]
    )
