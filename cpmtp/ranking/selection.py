"""Tables in, a choice of rank with its uncertainty out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cpmtp.latency import LatencyModel
from cpmtp.ranking.criteria import (
    CRITERIA,
    hull_choice,
    marginal_choice,
    throughput_choice,
    tolerant_choice,
    tolerated,
)
from cpmtp.resampling import (
    FEW_CLUSTERS,
    Clusters,
    detectable,
    intervals,
    resampling_weights,
    shortfalls,
    standard_errors,
)

TOLERANCE = 0.01
OUTCOME = "tokens_per_call_block_target"
CONTEXT_KEYS = ["model", "domain", "document", "context"]


@dataclass(frozen=True)
class RankChoice:
    """The rank to train, per horizon.

    Attributes
    ----------
    criterion : str
    rank : dict of int to int
        Horizon to rank.
    at_grid_edge : dict of int to bool
        Whether that is the largest rank studied: read it as "at least".
    frequency : dict of int to dict of int to float
        Horizon to rank to the share of bootstrap resamples (of documents) that choose it.
    horizon : int, optional
        The chosen horizon; only ``throughput``, which knows what a call costs, can choose one.
    table : pandas.DataFrame
        One row per (horizon, rank): mean tokens per call with a 95 % interval, the paired shortfall
        to the best rank with its standard error, and whether it is tolerated; with a latency model
        also the predicted speedup with its interval and the share of resamples in which the cell is
        the fastest of all.
    contexts, documents : int
        Units and clusters the choice rests on.
    detectable_gain : dict of int to float
        Horizon to the smallest gain in tokens per call of the next rank over the chosen one (at the
        edge of the grid: of it over the one before) that a paired test at 5 % with a power of 80 %
        finds with these contexts.
    horizon_frequency : dict of int to float
        ``throughput`` only: share of resamples that choose the horizon.
    """

    criterion: str
    rank: dict[int, int]
    at_grid_edge: dict[int, bool]
    frequency: dict[int, dict[int, float]]
    horizon: int | None
    table: pd.DataFrame
    contexts: int
    documents: int
    detectable_gain: dict[int, float] = field(default_factory=dict)
    horizon_frequency: dict[int, float] = field(default_factory=dict)

    @property
    def few_documents(self) -> bool:
        """Whether there are too few clusters for the intervals to keep what they promise."""
        return self.documents < FEW_CLUSTERS

    @property
    def caution(self) -> str:
        """What to know of intervals from few documents; empty where there are enough."""
        if self.documents == 1:
            return (
                "All contexts are from one document: intervals speak of it alone. Study more "
                "documents before you decide."
            )
        if self.few_documents:
            return (
                f"{self.documents} independent documents are few: intervals from so few clusters "
                "are too narrow (with 8, 95 % "
                "intervals covered 87 % of simulated truths). Study more contexts (32 or more) "
                "before you decide."
            )
        return ""

    def row(self, horizon: int) -> pd.Series:
        """The table's row of the choice at a horizon."""
        return self.table.query("horizon == @horizon and rank == @self.rank[@horizon]").iloc[0]

    def sentence(self, horizon: int) -> str:
        """The recommendation for one horizon in words."""
        row = self.row(horizon)
        least = "at least " if self.at_grid_edge[horizon] else ""
        return (
            f"horizon {horizon}: rank {least}{self.rank[horizon]}, {row.tokens_per_call:.2f} "
            "tokens per call "
            f"(95 % interval {row.tokens_per_call_low:.2f} to {row.tokens_per_call_high:.2f}), "
            "chosen in "
            f"{self.frequency[horizon][self.rank[horizon]]:.0%} of resamples"
        )


@dataclass(frozen=True)
class _Scores:
    """One horizon's scores: columns are ranks."""

    horizon: int
    ranks: np.ndarray
    parameters: np.ndarray
    clusters: Clusters


@dataclass(frozen=True)
class _Rule:
    """What a criterion may need."""

    tolerance: float
    latency: LatencyModel | None
    seed: int


def select_rank(
    table: pd.DataFrame,
    criterion: str = "tolerance",
    *,
    column: str = OUTCOME,
    tolerance: float = TOLERANCE,
    latency: LatencyModel | None = None,
    seed: int = 0,
) -> RankChoice:
    """Choose a rank per horizon from a study's table.

    Every context counts once; its value at a rank is the best any method reached (each fit is a
    rank-r distribution, so the best is the tightest bound on the ceiling). Ranks are compared on
    the same contexts. Contexts of one document are one cluster, of standard errors as of the
    bootstrap. Several models or domains in the table are pooled: select from a part of it for a
    choice per model.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `run_study`.
    criterion : {"tolerance", "marginal_gain", "convex_hull", "throughput"}
        ``tolerance``: the smallest rank whose mean paired shortfall to the best rank is at most
        ``max(one standard error, tolerance * tokens per call of the best)``. ``marginal_gain``: the
        first rank from which a doubling gains less than ``tolerance`` of its tokens per call.
        ``convex_hull``: the elbow of the hull of tokens per call against free parameters.
        ``throughput``: the most tokens per second; the only one that chooses a horizon too.
    column : str
        What is to be high.
    tolerance : float
        Share of tokens per call that is not worth a higher rank.
    latency : LatencyModel, optional
        What a call costs; required by ``throughput``, and with any criterion the table then has the
        predicted speedup.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ValueError
        If the criterion is unknown, ``throughput`` has no latency model, a column is missing, or no
        context has all ranks.

    References
    ----------
    ceulemans2006selecting, efron1987better

    Examples
    --------
    >>> def score(rank):
    ...     return dict(rank=rank, tokens_per_call_block_target=1.9 - 0.4 / rank**5)
    >>> row = dict(model="m", domain="d", horizon=2, method="em", status="ok")
    >>> rows = [
    ...     row | dict(document=str(c), context=c) | score(r)
    ...     for c in range(30) for r in (1, 2, 4)
    ... ]
    >>> select_rank(pd.DataFrame(rows)).rank
    {2: 2}
    >>> latency = LatencyModel(0.01, 0.01, per_component=0.004)
    >>> select_rank(pd.DataFrame(rows), "throughput", latency=latency).rank
    {2: 1}
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}: expected one of {', '.join(CRITERIA)}")
    if criterion == "throughput" and latency is None:
        raise ValueError(
            "criterion 'throughput' needs to know what a call costs: give latency=LatencyModel(...)"
        )
    values = context_values(table, column)
    scores = _scores(table, values, complete=criterion == "throughput")
    return _choice(
        criterion, scores, _rows(scores, tolerance, latency, seed), _Rule(tolerance, latency, seed)
    )


def compare_criteria(
    table: pd.DataFrame,
    *,
    column: str = OUTCOME,
    tolerance: float = TOLERANCE,
    latency: LatencyModel | None = None,
    seed: int = 0,
) -> dict[str, RankChoice]:
    """What every criterion chooses, side by side; ``throughput`` only with a latency model.
    Parameters as of `select_rank`.
    """
    values, rule = context_values(table, column), _Rule(tolerance, latency, seed)
    scores = _scores(table, values)
    rows = _rows(scores, tolerance, latency, seed)
    found = {name: _choice(name, scores, rows, rule) for name in CRITERIA if name != "throughput"}
    if latency is not None:
        whole = _scores(table, values, complete=True)
        same = all(
            np.array_equal(a.clusters.sums, b.clusters.sums)
            for a, b in zip(scores, whole, strict=True)
        )
        found["throughput"] = _choice(
            "throughput", whole, rows if same else _rows(whole, tolerance, latency, seed), rule
        )
    return found


def paired_gains(table: pd.DataFrame, *, column: str = OUTCOME, seed: int = 0) -> pd.DataFrame:
    """What each step of the grid of ranks gains, on the same contexts.

    Returns
    -------
    pandas.DataFrame
        Per (horizon, rank): `next_rank`, the mean `gain` with a 95 % interval (`gain_low`,
        `gain_high`), its `standard_error`, the `share_improved` of contexts that gain more than
        1e-6, and the `detectable_gain`.

    Raises
    ------
    ValueError
        As for `select_rank`.
    """
    rows = []
    values = context_values(table, column)
    for part in _scores(table, values):
        scores = values.xs(part.horizon, level="horizon")[list(part.ranks)].dropna()
        steps = part.clusters.differences(slice(1, None), slice(None, -1))
        if not steps.sums.shape[1]:
            continue
        low, high = intervals(steps, seed)
        error = standard_errors(steps)
        improved = (scores.diff(axis=1).iloc[:, 1:] > 1e-6).mean().to_numpy()
        rows.append(
            pd.DataFrame(
                {
                    "horizon": part.horizon,
                    "rank": part.ranks[:-1],
                    "next_rank": part.ranks[1:],
                    "gain": steps.means(),
                    "gain_low": low,
                    "gain_high": high,
                    "standard_error": error,
                    "share_improved": improved,
                    "detectable_gain": detectable(error, steps.number),
                }
            )
        )
    return (
        pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=["horizon", "rank", "next_rank"])
    )


def needed_ranks(
    table: pd.DataFrame, *, column: str = OUTCOME, tolerance: float = TOLERANCE
) -> pd.DataFrame:
    """Per context and horizon, the smallest rank within `tolerance` of the context's best, and what
    the context is like.

    Returns
    -------
    pandas.DataFrame
        The context's keys, `horizon`, `needed_rank` and, where the table has them, the entropies.
    """
    values = context_values(table, column).dropna()
    best = values.max(axis=1)
    enough = values.ge(best * (1 - tolerance), axis=0)
    needed = enough.idxmax(axis=1).rename("needed_rank").reset_index()
    facts = [
        name
        for name in ("joint_entropy_nats", "first_token_entropy_nats", "total_correlation_nats")
        if name in table
    ]
    keys = [*CONTEXT_KEYS, "horizon"]
    return needed.merge(table[[*keys, *facts]].drop_duplicates(keys), on=keys, how="left")


def context_values(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Best value any method reached: rows (model, domain, document, context, horizon), columns
    ranks, NaN where none did.

    Raises
    ------
    ValueError
        If a column is missing or no row is usable.
    """
    keys = [*CONTEXT_KEYS, "horizon"]
    missing = [name for name in (*keys, "rank", "method", "status", column) if name not in table]
    if missing:
        raise ValueError(
            f"the table has no column {', '.join(missing)}: expected a table of run_study"
        )
    usable = table[(table["status"] != "failed") & table[column].notna()]
    if usable.empty:
        raise ValueError("the table has no usable row: every fit failed; look at the messages")
    return usable.pivot_table(index=keys, columns="rank", values=column, aggfunc="max").sort_index(
        axis=1
    )


def _scores(table: pd.DataFrame, values: pd.DataFrame, *, complete: bool = False) -> list[_Scores]:
    """Per horizon the contexts that have every rank of it; with `complete` those that have every
    rank of every horizon.
    """
    if complete:
        whole = values.unstack("horizon").dropna(axis=1, how="all").dropna().index
        values = values[values.index.droplevel("horizon").isin(whole)]
    parts = []
    for horizon in sorted(table.loc[table["status"] != "failed", "horizon"].unique().tolist()):
        at = values.index.get_level_values("horizon") == horizon
        scores = values[at].droplevel("horizon").dropna(axis=1, how="all").dropna()
        if scores.empty:
            raise ValueError(
                f"horizon {horizon}: no context has a usable fit at every rank; look at status "
                "and message"
            )
        ranks = scores.columns.to_numpy()
        parts.append(
            _Scores(int(horizon), ranks, _parameters(table, horizon, ranks), Clusters.of(scores))
        )
    return parts


def _choice(criterion: str, scores: list[_Scores], rows: pd.DataFrame, rule: _Rule) -> RankChoice:
    """One criterion's choice at every horizon, and how often resamples choose the same."""
    rank, edge, frequency, gains = {}, {}, {}, {}
    for part in scores:
        weights = resampling_weights(part.clusters.number, rule.seed)
        chosen = int(
            _choose(part, np.ones((1, part.clusters.number), dtype=int), criterion, rule)[0]
        )
        drawn = _choose(part, weights, criterion, rule)
        last = len(part.ranks) - 1
        rank[part.horizon], edge[part.horizon] = (
            int(part.ranks[chosen]),
            chosen == last and last > 0,
        )
        frequency[part.horizon] = {
            int(r): float((drawn == i).mean()) for i, r in enumerate(part.ranks)
        }
        gains[part.horizon] = _detectable_gain(part, chosen)
    horizon: int | None = None
    horizons: dict[int, float] = {}
    if criterion == "throughput" and rule.latency is not None:
        share, horizons, horizon = _fastest(scores, rule.latency, rule.seed)
        rows = rows.assign(fastest_frequency=share)
    contexts = max(int(part.clusters.counts.sum()) for part in scores)
    documents = max(part.clusters.documents for part in scores)
    return RankChoice(
        criterion, rank, edge, frequency, horizon, rows, contexts, documents, gains, horizons
    )


def _parameters(table: pd.DataFrame, horizon: int, ranks: np.ndarray) -> np.ndarray:
    """Free parameters at each rank; in proportion to the rank where they are not counted."""
    if "parameters" not in table:
        return ranks.astype(float)
    counted = (
        table[table["horizon"] == horizon]
        .groupby("rank")["parameters"]
        .median()
        .reindex(ranks)
        .to_numpy()
    )
    return ranks.astype(float) if np.isnan(counted).any() else counted


def _choose(part: _Scores, weights: np.ndarray, criterion: str, rule: _Rule) -> np.ndarray:
    """Index of the chosen rank, (resamples,)."""
    if criterion == "tolerance":
        return tolerant_choice(*shortfalls(part.clusters, weights), rule.tolerance)
    means = part.clusters.resampled_means(weights)
    if criterion == "marginal_gain":
        return marginal_choice(means, part.ranks, rule.tolerance)
    if criterion == "convex_hull" or rule.latency is None:
        return hull_choice(means, part.parameters)
    return throughput_choice(means, _seconds(part.horizon, part.ranks, rule.latency))


def _seconds(horizon: int, ranks: np.ndarray, latency: LatencyModel) -> np.ndarray:
    return np.array([latency.call_seconds(horizon, int(rank)) for rank in ranks])


def _detectable_gain(part: _Scores, chosen: int) -> float:
    if len(part.ranks) < 2:
        return float("nan")
    low = min(chosen, len(part.ranks) - 2)
    step = part.clusters.differences([low + 1], [low])
    return float(detectable(standard_errors(step)[0], step.number))


def _rows(
    scores: list[_Scores], tolerance: float, latency: LatencyModel | None, seed: int
) -> pd.DataFrame:
    rows = pd.concat([_rank_rows(part, tolerance, seed) for part in scores], ignore_index=True)
    return rows if latency is None else _with_speedup(rows, latency)


def _rank_rows(part: _Scores, tolerance: float, seed: int) -> pd.DataFrame:
    arrays = shortfalls(part.clusters, np.ones((1, part.clusters.number), dtype=int))
    means, shortfall, error = (array[0] for array in arrays)
    low, high = intervals(part.clusters, seed)
    return pd.DataFrame(
        {
            "horizon": part.horizon,
            "rank": part.ranks,
            "parameters": part.parameters,
            "tokens_per_call": means,
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
        for end in ("", "_low", "_high")
    }
    return rows.assign(call_seconds=seconds, **scaled)


def _fastest(
    scores: list[_Scores], latency: LatencyModel, seed: int
) -> tuple[np.ndarray, dict[int, float], int]:
    """Share of resamples in which each (horizon, rank) is the fastest, the same per horizon, and
    the fastest horizon.
    """
    weights = resampling_weights(scores[0].clusters.number, seed)
    seconds = np.concatenate([_seconds(part.horizon, part.ranks, latency) for part in scores])
    horizons = np.concatenate([np.full(len(part.ranks), part.horizon) for part in scores])
    drawn = np.concatenate([part.clusters.resampled_means(weights) for part in scores], axis=1)
    winners = throughput_choice(drawn, seconds)
    share = np.bincount(winners, minlength=len(seconds)) / len(winners)
    means = np.concatenate([part.clusters.means() for part in scores])
    best = int(throughput_choice(means[None], seconds)[0])
    return (
        share,
        {int(n): float(share[horizons == n].sum()) for n in np.unique(horizons)},
        int(horizons[best]),
    )
