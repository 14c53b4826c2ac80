"""Tables in, a choice of rank with its uncertainty out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

CRITERIA = ("tolerance",)
TOLERANCE = 0.01
_RESAMPLES = 2000
_FEW_CLUSTERS = 20


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
        The chosen horizon; only a criterion that knows what a step costs can choose one.
    table : pandas.DataFrame
        One row per (horizon, rank): mean tokens per call with a 95 % interval, the paired shortfall to the best rank with its
        standard error, and whether it is tolerated.
    contexts, documents : int
        Units and clusters the choice rests on.
    """

    criterion: str
    rank: dict[int, int]
    at_grid_edge: dict[int, bool]
    frequency: dict[int, dict[int, float]]
    horizon: int | None
    table: pd.DataFrame
    contexts: int
    documents: int

    @property
    def few_documents(self) -> bool:
        """Whether there are too few clusters for the intervals to keep what they promise."""
        return self.documents < _FEW_CLUSTERS

    def sentence(self, horizon: int) -> str:
        """The recommendation for one horizon in words."""
        row = self.table.query("horizon == @horizon and rank == @self.rank[@horizon]").iloc[0]
        least = "at least " if self.at_grid_edge[horizon] else ""
        return (
            f"horizon {horizon}: rank {least}{self.rank[horizon]}, {row.tokens_per_call:.2f} tokens per call "
            f"(95 % interval {row.tokens_per_call_low:.2f} to {row.tokens_per_call_high:.2f}), chosen in "
            f"{self.frequency[horizon][self.rank[horizon]]:.0%} of resamples"
        )


def select_rank(
    table: pd.DataFrame,
    criterion: str = "tolerance",
    *,
    column: str = "tokens_per_call_block_target",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> RankChoice:
    """Choose a rank per horizon from a study's table.

    ``tolerance``: the smallest rank whose mean paired shortfall to the best rank is at most
    ``max(one standard error, tolerance * tokens per call of the best)``. Every context counts once; its value at a rank is the
    best any method reached (each fit is a rank-r distribution, so the best is the tightest bound on the ceiling). Contexts of
    one document are one cluster, of the standard error as of the bootstrap. Several models or domains in the table are
    pooled: select from a part of it for a choice per model.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `run_study`.
    criterion : {"tolerance"}
    column : str
        What is to be high.
    tolerance : float
        Share of tokens per call that is not worth a higher rank.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ValueError
        If the criterion is unknown, a column is missing, or no context has all ranks.

    Examples
    --------
    >>> rows = [dict(model="m", domain="d", document=str(c), context=c, horizon=2, rank=r, method="em", status="ok",
    ...              tokens_per_call_block_target=1.9 - 0.4 / r**5 + 0.001 * c) for c in range(30) for r in (1, 2, 4)]
    >>> select_rank(pd.DataFrame(rows)).rank
    {2: 2}
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}: expected one of {', '.join(CRITERIA)}")
    values = context_values(table, column)
    horizons = sorted(values.index.unique("horizon"))
    rank, edge, frequency, rows = {}, {}, {}, []
    for horizon in horizons:
        scores = values.xs(horizon, level="horizon").dropna()
        if scores.empty:
            raise ValueError(f"horizon {horizon}: no context has a usable fit at every rank; look at status and message")
        ranks = scores.columns.to_numpy()
        clusters, counts = _cluster_sums(scores)
        weights = _resampling_weights(len(clusters), seed)
        chosen = _tolerant_choice(clusters, counts, np.ones((1, len(clusters))), tolerance)[0]
        drawn = _tolerant_choice(clusters, counts, weights, tolerance)
        rank[horizon], edge[horizon] = int(ranks[chosen]), bool(chosen == len(ranks) - 1 and len(ranks) > 1)
        frequency[horizon] = {int(r): float((drawn == i).mean()) for i, r in enumerate(ranks)}
        rows.append(_rank_rows(horizon, ranks, clusters, counts, weights, tolerance))
    documents = values.index.droplevel(["horizon", "context"]).nunique()
    contexts = values.index.droplevel("horizon").nunique()
    result = pd.concat(rows, ignore_index=True)
    return RankChoice(criterion, rank, edge, frequency, None, result, contexts, documents)


def context_values(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Best value any method reached: rows (model, domain, document, context, horizon), columns ranks, NaN where none did."""
    keys = ["model", "domain", "document", "context", "horizon"]
    missing = [name for name in (*keys, "rank", "method", "status", column) if name not in table]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}: expected a table of run_study")
    usable = table[(table["status"] != "failed") & table[column].notna()]
    if usable.empty:
        raise ValueError("the table has no usable row: every fit failed; look at the messages")
    return usable.pivot_table(index=keys, columns="rank", values=column, aggfunc="max").sort_index(axis=1)


def _cluster_sums(scores: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Sums (cluster, rank) and numbers of contexts (cluster,)."""
    grouped = scores.groupby(level=["model", "domain", "document"])
    return grouped.sum().to_numpy(), grouped.size().to_numpy()


def _resampling_weights(clusters: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn, (resample, cluster)."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=_RESAMPLES)


def _means(clusters: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean per context (resample, rank)."""
    return weights @ clusters / (weights @ counts)[:, None]


def _shortfalls(clusters, counts, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, mean paired shortfalls to the best rank, and their cluster-robust standard errors, each (resample, rank)."""
    means = _means(clusters, counts, weights)
    best = means.argmax(1)
    shortfall = means.max(1, keepdims=True) - means
    # Residual of a cluster's sum of differences around its expectation: the linearised variance of a ratio of sums.
    differences = clusters[:, best].T[:, :, None] - clusters[None]
    residuals = differences - shortfall[:, None, :] * counts[None, :, None]
    drawn = weights.sum(1)
    correction = drawn / np.maximum(drawn - 1, 1)
    variance = correction[:, None] * np.einsum("bc,bcr->br", weights, residuals**2) / (weights @ counts)[:, None] ** 2
    return means, shortfall, np.sqrt(variance)


def _tolerant_choice(clusters, counts, weights, tolerance: float) -> np.ndarray:
    """Index of the smallest tolerated rank, (resample,)."""
    chosen = []
    for part in np.array_split(weights, max(len(weights) * clusters.size // 5_000_000, 1)):
        means, shortfall, error = _shortfalls(clusters, counts, part)
        allowed = np.maximum(error, tolerance * means.max(1, keepdims=True))
        chosen.append((shortfall <= allowed + 1e-12).argmax(1))
    return np.concatenate(chosen)


def _rank_rows(horizon, ranks, clusters, counts, weights, tolerance: float) -> pd.DataFrame:
    means, shortfall, error = (a[0] for a in _shortfalls(clusters, counts, np.ones((1, len(clusters)))))
    low, high = np.percentile(_means(clusters, counts, weights), [2.5, 97.5], axis=0)
    return pd.DataFrame(
        {
            "horizon": horizon,
            "rank": ranks,
            "tokens_per_call": means,
            "tokens_per_call_low": low,
            "tokens_per_call_high": high,
            "shortfall": shortfall,
            "shortfall_standard_error": error,
            "tolerated": shortfall <= np.maximum(error, tolerance * means.max()) + 1e-12,
        }
    )


def method_summary(table: pd.DataFrame, column: str = "tokens_per_call_block_target") -> pd.DataFrame:
    """Per (horizon, rank, method): medians and quartiles of the errors, the mean of `column`, failures and seconds."""
    usable = table.assign(failed=table["status"] == "failed", not_converged=table["status"] == "not_converged")
    grouped = usable.groupby(["horizon", "rank", "method"])
    summary = grouped.agg(
        contexts=("context", "size"),
        failed=("failed", "sum"),
        not_converged=("not_converged", "sum"),
        kl_nats=("kl_nats", lambda v: v.quantile(0.5, interpolation="lower")),
        # Without interpolation: a squared-error fit that misses what P has is infinitely far from it.
        kl_nats_low=("kl_nats", lambda v: v.quantile(0.25, interpolation="lower")),
        kl_nats_high=("kl_nats", lambda v: v.quantile(0.75, interpolation="higher")),
        total_variation=("total_variation", "median"),
        relative_frobenius=("relative_frobenius", "median"),
        tokens_per_call=(column, "mean"),
        fit_seconds=("fit_seconds", "median"),
    )
    return summary.reset_index()


def survival_by_rank(table: pd.DataFrame, rule: str = "block", first_token: str = "target") -> pd.DataFrame:
    """Mean survival per (horizon, rank, position), each context represented by its best method."""
    column = f"tokens_per_call_{rule}_{first_token}"
    usable = table[(table["status"] != "failed") & table[column].notna()]
    keys = ["model", "domain", "document", "context", "horizon", "rank"]
    best = usable.loc[usable.groupby(keys)[column].idxmax()]
    prefix = f"survival_{rule}_{first_token}_"
    positions = [name for name in best if name.startswith(prefix)]
    means = best.groupby(["horizon", "rank"])[positions].mean()
    long = means.rename(columns=lambda name: int(name.removeprefix(prefix))).rename_axis(columns="position").stack()
    return long.dropna().rename("survival").reset_index()
