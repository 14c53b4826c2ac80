"""Learning curves with a known law, as tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

PROBES, TARGETS = (8192, 16384, 32768), (131072, 262144)


def damped_curves(
    chance: np.random.Generator,
    *,
    groups: int = 7,
    candidates: int = 5,
    ratio: float = 0.6,
    group_effect: float = 0.06,
    own_effect: float = 0.03,
    noise: float = 0.0,
    seeds: int = 1,
    targets: tuple[int, ...] = TARGETS,
    first: int = 0,
) -> pd.DataFrame:
    """Steps that shrink by a ratio per doubling, of the logarithm of tokens per call.

    The ratio has an effect of the group and one of the candidate; a training's score is off by
    `noise` for its documents (shared by a group's probes, another one for its targets) and by as
    much for its seed.
    """
    budgets, rows = np.array([*PROBES, *targets], dtype=float), []
    x = np.log2(budgets / budgets[0])
    for group in range(first, first + groups):
        of_group = ratio + group_effect * chance.standard_normal()
        step = 0.12 * np.exp(0.2 * chance.standard_normal())
        base = 0.5 + 0.15 * chance.standard_normal()
        documents = dict(zip(("probe", "target"), noise * chance.standard_normal(2), strict=True))
        for rank in range(1, candidates + 1):
            r = float(np.clip(of_group + own_effect * chance.standard_normal(), 0.05, 0.97))
            own = step * (0.7 + 0.1 * rank) * np.exp(0.1 * chance.standard_normal())
            logs = base + 0.02 * rank + own * (1 - r**x) / (1 - r)
            for budget, log in zip(budgets, logs, strict=True):
                role = "probe" if budget <= PROBES[-1] else "target"
                for seed in range(seeds) if role == "probe" else (100,):
                    off = documents[role] + noise * chance.standard_normal()
                    rows.append(
                        {"group": f"g{group}", "form": "cp", "rank": rank, "horizon": 9}
                        | {"seed": seed, "budget": budget, "role": role, "s_doc": noise}
                        | {"tokens_per_call": float(np.exp(log + off))}
                    )
    return pd.DataFrame(rows)
