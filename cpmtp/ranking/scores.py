"""Scores of contexts by horizon and rank, and the table of means that every criterion looks at.

Where joints are truncated, a score is a certified lower bound with an upper one beside it. Ranks
are then compared by the lower bounds, and the intervals of means reach from the lower bounds' lower
end to the upper bounds' upper end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cpmtp.latency import LatencyModel
from cpmtp.ranking.criteria import tolerated
from cpmtp.ranking.parts import CONTEXT_KEYS, usable_rows
from cpmtp.resampling import Clusters, intervals, shortfalls

_PREFIX, _UPPER = "tokens_per_call_", "tokens_per_call_upper_"


@dataclass(frozen=True)
class Scores:
    """One horizon's scores: columns are ranks.

    Attributes
    ----------
    horizon : int
    ranks, parameters : (ranks,) arrays
    clusters : Clusters
        Of the scores; certified lower bounds where the horizon is truncated.
    upper : Clusters, optional
        Of the upper bounds on the same contexts; None where the joints are complete.
    kept_mass : (float, float)
        Probability that the joints hold, mean and smallest over contexts.
    """

    horizon: int
    ranks: np.ndarray
    parameters: np.ndarray
    clusters: Clusters
    upper: Clusters | None = None
    kept_mass: tuple[float, float] = (1.0, 1.0)


def context_values(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Best value any method reached: rows (model, domain, document, context, horizon), columns
    ranks, NaN where none did. A table of several temperatures or kinds of draft has a row for each.

    Raises
    ------
    ValueError
        If a column is missing or no row is usable.
    """
    usable = usable_rows(table, column)
    return usable.pivot_table(
        index=context_keys(table), columns="rank", values=column, aggfunc="max"
    ).sort_index(axis=1)


def context_keys(table: pd.DataFrame) -> list[str]:
    """What identifies a row of `context_values`."""
    kinds = [
        name for name in ("temperature", "anchored") if name in table and table[name].nunique() > 1
    ]
    return [*CONTEXT_KEYS, *kinds, "horizon"]


def scores_of(table: pd.DataFrame, column: str, *, complete: bool = False) -> list[Scores]:
    """Per horizon the contexts that have every rank of it; with `complete` those that have every
    rank of every horizon.

    Raises
    ------
    ValueError
        As of `context_values`, or if a horizon has no context with every rank.
    """
    values = context_values(table, column)
    if complete:
        whole = values.unstack("horizon").dropna(axis=1, how="all").dropna().index
        values = values[values.index.droplevel("horizon").isin(whole)]
    above = column.replace(_PREFIX, _UPPER, 1)
    parts = []
    for horizon in sorted(table.loc[table["status"] != "failed", "horizon"].unique().tolist()):
        scores = values[values.index.get_level_values("horizon") == horizon]
        scores = scores.droplevel("horizon").dropna(axis=1, how="all").dropna()
        if scores.empty:
            raise ValueError(
                f"horizon {horizon}: no context has a usable fit at every rank; look at status "
                "and message"
            )
        rows, ranks = table[table["horizon"] == horizon], scores.columns.to_numpy()
        bounded = column.startswith(_PREFIX) and above in table and _is_truncated(rows)
        upper = _upper_clusters(rows, above, scores) if bounded else None
        clusters, counted = Clusters.of(scores), _parameters(rows, ranks)
        parts.append(Scores(int(horizon), ranks, counted, clusters, upper, _kept_mass(rows)))
    return parts


def _is_truncated(rows: pd.DataFrame) -> bool:
    return "joint" in rows and bool((rows["joint"] == "tree").any())


def _upper_clusters(rows: pd.DataFrame, column: str, scores: pd.DataFrame) -> Clusters:
    """The upper bounds of the same contexts and ranks."""
    values = context_values(rows, column).droplevel("horizon")
    return Clusters.of(values.loc[scores.index, scores.columns])


def _kept_mass(rows: pd.DataFrame) -> tuple[float, float]:
    if not _is_truncated(rows) or "kept_mass" not in rows:
        return 1.0, 1.0
    kept = rows.drop_duplicates(context_keys(rows))["kept_mass"].dropna()
    return float(kept.mean()), float(kept.min())


def _parameters(rows: pd.DataFrame, ranks: np.ndarray) -> np.ndarray:
    """Free parameters at each rank; in proportion to the rank where they are not counted."""
    if "parameters" not in rows:
        return ranks.astype(float)
    counted = rows.groupby("rank")["parameters"].median().reindex(ranks).to_numpy()
    return ranks.astype(float) if np.isnan(counted).any() else counted


def rank_table(
    scores: list[Scores], tolerance: float, latency: LatencyModel | None, seed: int
) -> pd.DataFrame:
    """One row per horizon and rank; its columns are described in `RankChoice`."""
    rows = pd.concat([_rank_rows(part, tolerance, seed) for part in scores], ignore_index=True)
    return rows if latency is None else _with_speedup(rows, latency)


def _rank_rows(part: Scores, tolerance: float, seed: int) -> pd.DataFrame:
    arrays = shortfalls(part.clusters, np.ones((1, part.clusters.number), dtype=int))
    means, shortfall, error = (array[0] for array in arrays)
    low, high = intervals(part.clusters, seed)
    if part.upper is not None:
        high = intervals(part.upper, seed)[1]
    return pd.DataFrame(
        {
            "horizon": part.horizon,
            "rank": part.ranks,
            "parameters": part.parameters,
            "truncated": part.upper is not None,
            "kept_mass": part.kept_mass[0],
            "kept_mass_lowest": part.kept_mass[1],
            "tokens_per_call": means,
            "tokens_per_call_upper": means if part.upper is None else part.upper.means(),
            "tokens_per_call_low": low,
            "tokens_per_call_high": high,
            "shortfall": shortfall,
            "shortfall_standard_error": error,
            "tolerated": tolerated(*arrays, tolerance)[0],
        }
    )


def _with_speedup(rows: pd.DataFrame, latency: LatencyModel) -> pd.DataFrame:
    """Predicted speedup over plain decoding; a call's time is taken as known."""
    seconds = np.array(
        [
            latency.call_seconds(int(n), int(r))
            for n, r in zip(rows["horizon"], rows["rank"], strict=True)
        ]
    )
    scaled = {
        f"speedup{end}": rows[f"tokens_per_call{end}"] * latency.plain_step / seconds
        for end in ("", "_upper", "_low", "_high")
    }
    return rows.assign(call_seconds=seconds, **scaled)


def tokens_in_words(row: pd.Series) -> str:
    """A row of `rank_table` in words: the mean, or both bounds of it, with its interval.

    Examples
    --------
    >>> ends = dict(tokens_per_call_low=2.6, tokens_per_call_high=2.8)
    >>> tokens_in_words(pd.Series(dict(truncated=False, tokens_per_call=2.7) | ends))
    '2.70 tokens per call (95 % interval 2.60 to 2.80)'
    >>> bounds = dict(truncated=True, tokens_per_call=2.68, tokens_per_call_upper=2.75)
    >>> tokens_in_words(pd.Series(bounds | ends))
    'between 2.68 and 2.75 tokens per call (truncated joints; 95 % interval 2.60 to 2.80)'
    """
    mean = f"{row.tokens_per_call:.2f}"
    notes = []
    if row.get("truncated", False):
        mean = f"between {mean} and {row.tokens_per_call_upper:.2f}"
        notes.append("truncated joints")
    known = np.isfinite(row.tokens_per_call_low) and np.isfinite(row.tokens_per_call_high)
    ends = f"95 % interval {row.tokens_per_call_low:.2f} to {row.tokens_per_call_high:.2f}"
    notes.append(ends if known else "a single context gives no interval")
    return f"{mean} tokens per call ({'; '.join(notes)})"
