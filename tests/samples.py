"""Sample drafts, tables and manifests that several tests use."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from cpmtp.drafts.cp_distribution import CPDistribution, normalised_cp
from cpmtp.joint_distribution import JointDistribution

RANKS = (1, 2, 4, 8)
MANIFEST = {
    "settings": {
        "contexts": 64,
        "context_length": 8,
        "corpus": ['<script>alert(1)</script>"quoted".txt'],
        "temperature": 1.0,
        "horizons": [3],
        "ranks": [1, 2, 4, 8],
        "methods": ["em", "als"],
        "restarts": 1,
        "seed": 0,
    },
    "versions": {"cpmtp": "0"},
    "models": {"m": {"vocab_size": 6, "sha256": None}},
}


def peaked_joint(
    vocab: int, horizon: int, seed: int = 0, batch: tuple[int, ...] = (), *, power: int = 8
) -> JointDistribution:
    """Joints of independent random entries; the higher the power, the fewer hold most mass."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, *(vocab,) * horizon)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) ** power
    return JointDistribution(
        values / values.sum(dim=tuple(range(-horizon, 0)), keepdim=True), horizon
    )


def random_cp(batch, vocab, horizon, rank, seed=0, dtype=torch.float64) -> CPDistribution:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*batch, rank, generator=generator, dtype=dtype)
    factors = [
        torch.rand(*batch, vocab, rank, generator=generator, dtype=dtype) ** 3
        for _ in range(horizon)
    ]
    return normalised_cp(weights, factors)


def study_table(gain, contexts=64, documents=32, noise=0.05, seed=0, horizon=3) -> pd.DataFrame:
    """A study's table in which rank r reaches ``horizon - gain(r)`` tokens per call plus what is
    common to a context.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for context in range(contexts):
        common = noise * generator.standard_normal()
        for rank in RANKS:
            for method, loss in (("em", 0.0), ("als", 0.1)):
                value = (
                    horizon - gain(rank) - loss + common + 0.1 * noise * generator.standard_normal()
                )
                rows.append(
                    {
                        "model": "m",
                        "domain": "d",
                        "document": str(context % documents),
                        "context": context,
                        "horizon": horizon,
                        "rank": rank,
                        "method": method,
                        "status": "ok",
                        "message": "",
                        "tokens_per_call_block_target": value,
                        "survival_block_target_1": 1.0,
                        "survival_block_target_2": value / horizon,
                        "kl_nats": gain(rank),
                        "total_variation": 0.1,
                        "relative_frobenius": 0.1,
                        "fit_seconds": 1.0,
                    }
                )
    return pd.DataFrame(rows)


def with_trees(
    table: pd.DataFrame, horizons=(3,), width: float = 0.08, kept_mass: float = 0.97
) -> pd.DataFrame:
    """The same table with truncated joints at some horizons: every figure a lower bound with an
    upper one `width` above it.
    """
    tree, column = table["horizon"].isin(horizons), "tokens_per_call_block_target"
    kept = np.where(table["context"] % 2 == 0, kept_mass, kept_mass - 0.02)
    return table.assign(
        joint=np.where(tree, "tree", "dense"),
        kept_mass=np.where(tree, kept, 1.0),
        tokens_per_call_upper_block_target=table[column] + width * tree,
        kl_nats=table["kl_nats"].where(~tree),
    )
