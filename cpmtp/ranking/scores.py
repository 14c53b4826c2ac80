"""Scores of contexts by horizon and rank, and the table of means that every criterion looks at.

Where joints are truncated, a score is a certified lower bound with an upper one beside it. Ranks
are then compared by the lower bounds, and the intervals of means reach from the lower bounds' lower
end to the upper bounds' upper end.

Where scores are estimated from sampled texts, ranks are compared by the estimates, which rest on
the same texts. Each context has texts of its own, so that resampled documents show how far the
estimates scatter, too. A context of such a horizon whose certified interval was narrow enough
counts by its lower bound, in the upper end by its upper one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cpmtp.latency import LatencyModel
from cpmtp.ranking.criteria import tolerated
from cpmtp.ranking.parts import CONTEXT_KEYS, several_kinds, usable_rows
from cpmtp.resampling import Clusters, intervals, shortfalls

_PREFIX, _LOWER, _UPPER = (f"tokens_per_call_{end}" for end in ("", "lower_", "upper_"))


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
        Of the upper bounds on the same contexts; None where the joints are complete. Of a horizon
        with estimates: the estimates, and the upper bounds of the other contexts.
    ends : pair of (ranks,) arrays, optional
        Where there are estimates: means of their intervals' lower and upper ends.
    kept_mass : (float, float)
        Probability that the joints hold, mean and smallest over contexts.
    """

    horizon: int
    ranks: np.ndarray
    parameters: np.ndarray
    clusters: Clusters
    upper: Clusters | None = None
    ends: tuple[np.ndarray, np.ndarray] | None = None
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
    return [*CONTEXT_KEYS, *several_kinds(table), "horizon"]


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
        upper, ends = None, None
        if bounded:
            certain = rows.assign(**{above: rows[above].where(~sampled_rows(rows), rows[column])})
            upper = Clusters.of(_same_contexts(certain, above, scores))
        if bounded and sampled_rows(rows[rows[column].notna()]).any():
            names = (column.replace(_PREFIX, end, 1) for end in (_LOWER, _UPPER))
            low, high = (_same_contexts(rows, name, scores).mean().to_numpy() for name in names)
            ends = low, high
        known = int(horizon), ranks, _parameters(rows, ranks), Clusters.of(scores)
        parts.append(Scores(*known, upper, ends, _kept_mass(rows)))
    return parts


def sampled_rows(rows: pd.DataFrame) -> pd.Series:
    """Which rows' tokens per call are estimates."""
    return rows.get("computed", pd.Series("", index=rows.index)) == "sampled"


def _is_truncated(rows: pd.DataFrame) -> bool:
    return "joint" in rows and bool((rows["joint"] == "tree").any())


def _same_contexts(rows: pd.DataFrame, column: str, scores: pd.DataFrame) -> pd.DataFrame:
    """Another column of the same contexts and ranks."""
    values = context_values(rows, column).droplevel("horizon")
    return values.loc[scores.index, scores.columns]


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
    upper = means if part.upper is None else part.upper.means()
    if part.upper is not None:
        high = intervals(part.upper, seed)[1]
    if part.ends is not None:
        # Of a single document there is what sampling leaves open alone.
        low, high = (
            np.where(np.isnan(h), e, h) for h, e in zip((low, high), part.ends, strict=True)
        )
    return pd.DataFrame(
        {
            "horizon": part.horizon,
            "rank": part.ranks,
            "parameters": part.parameters,
            "truncated": part.upper is not None and part.ends is None,
            "sampled": part.ends is not None,
            "kept_mass": part.kept_mass[0],
            "kept_mass_lowest": part.kept_mass[1],
            "tokens_per_call": means,
            "tokens_per_call_upper": upper,
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
    >>> tokens_in_words(pd.Series(dict(truncated=False, sampled=True, tokens_per_call=2.7) | ends))
    '2.70 tokens per call (estimated, 95 % interval 2.60 to 2.80)'
    """
    mean = f"{row.tokens_per_call:.2f}"
    notes = []
    if row.get("truncated", False):
        mean = f"between {mean} and {row.tokens_per_call_upper:.2f}"
        notes.append("truncated joints")
    known = np.isfinite(row.tokens_per_call_low) and np.isfinite(row.tokens_per_call_high)
    ends = f"95 % interval {row.tokens_per_call_low:.2f} to {row.tokens_per_call_high:.2f}"
    if row.get("sampled", False):
        ends = f"estimated, {ends}"
    notes.append(ends if known else "a single context gives no interval")
    return f"{mean} tokens per call ({'; '.join(notes)})"
