"""Forms side by side: what each earns, and what it takes of a head's outputs, store and time."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cpmtp.ranking.parts import CONTEXT_KEYS, OUTCOME, best_fits, require_one_part
from cpmtp.ranking.selection import TOLERANCE, select_rank
from cpmtp.resampling import Clusters, intervals

_CANDIDATE = ["form", "transition_rank", "rank"]
# What may be equal when candidates are compared.
COSTS = ("free_numbers", "shared_numbers", "serial_steps")


def form_summary(
    table: pd.DataFrame, column: str = OUTCOME, *, seed: int = 0, tolerance: float = TOLERANCE
) -> pd.DataFrame:
    """Every form, transition rank and rank of a study, on the contexts that have them all.

    Parameters
    ----------
    table : pandas.DataFrame
        Of one model, domain, temperature and kind of draft (anchored or not), several horizons.
    column : str
        What is to be high.

    Returns
    -------
    pandas.DataFrame
        One row per horizon, form, transition rank and rank: `tokens_per_call` with its 95 %
        interval (`_low`, `_high`), `gain` on the cheapest candidate (fewest free, then shared
        numbers) in the same contexts with its interval, `free_numbers`, `shared_numbers`,
        `serial_steps`, `contexts`; `saturated`: whether `select_rank` by tolerance chooses this
        rank of the form; and by each cost whether nothing that costs as little earns more:
        `best_at_free_numbers`, `best_at_shared_numbers`, `best_at_serial_steps`.

    Raises
    ------
    ValueError
        If the table holds several models, domains, temperatures or kinds of draft, or no context
        has every candidate.
    """
    require_one_part(table.drop(columns=["form", "transition_rank"]), pooled=False)
    rows = best_fits(table, column=column)
    parts = [
        _of_horizon(int(horizon), part, column, seed) for horizon, part in rows.groupby("horizon")
    ]
    found = pd.concat(parts, ignore_index=True)
    chosen = {
        (form, width, horizon, rank)
        for (form, width), part in table.groupby(["form", "transition_rank"], sort=False)
        if (part["status"] != "failed").any()
        for horizon, rank in select_rank(
            part, column=column, seed=seed, tolerance=tolerance
        ).rank.items()
    }
    keys = zip(
        found["form"], found["transition_rank"], found["horizon"], found["rank"], strict=True
    )
    return found.assign(saturated=[key in chosen for key in keys])


def _of_horizon(horizon: int, rows: pd.DataFrame, column: str, seed: int) -> pd.DataFrame:
    """Of the candidates of one horizon, in the table's order."""
    wide = rows.pivot_table(index=CONTEXT_KEYS, columns=_CANDIDATE, values=column, sort=False)
    wide = wide.dropna()
    if wide.empty:
        raise ValueError(
            f"horizon {horizon}: no context has a usable fit of every form; look at status and "
            "message"
        )
    costs = rows.groupby(_CANDIDATE, sort=False)[list(COSTS)].median().reindex(wide.columns)
    order = np.lexsort([costs["shared_numbers"], costs["free_numbers"]])
    cheapest = wide.iloc[:, order[0]]
    found = costs.reset_index()
    found.insert(0, "horizon", horizon)
    gains = wide.sub(cheapest, axis=0)
    for name, scores in (("tokens_per_call", wide), ("gain", gains)):
        clusters = Clusters.of(scores)
        low, high = intervals(clusters, seed)
        found[name], found[f"{name}_low"], found[f"{name}_high"] = clusters.means(), low, high
    for cost in COSTS:
        found[f"best_at_{cost}"] = _best_at(found[cost].to_numpy(), found["tokens_per_call"])
    return found.assign(contexts=len(wide))


def _best_at(cost: np.ndarray, earned: pd.Series) -> np.ndarray:
    """Whether nothing that costs as little earns more."""
    values = earned.to_numpy()
    return np.array(
        [not (values[cost <= own] > value).any() for own, value in zip(cost, values, strict=True)]
    )
