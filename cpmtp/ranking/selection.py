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
)
from cpmtp.ranking.parts import OUTCOME, require_one_part
from cpmtp.ranking.scores import (
    Scores,
    context_keys,
    context_values,
    rank_table,
    scores_of,
    tokens_in_words,
)
from cpmtp.resampling import (
    FEW_CLUSTERS,
    detectable,
    intervals,
    resampling_weights,
    seeded,
    shortfalls,
    standard_errors,
)

TOLERANCE = 0.01


@dataclass(frozen=True)
class RankChoice:
    """A rank per horizon by one criterion, and how sure that is.

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
        the fastest of all. Where joints are `truncated` the mean is that of certified lower bounds,
        with the upper bounds' mean beside it (`tokens_per_call_upper`, elsewhere the same number),
        an interval that holds both, and the probability that the joints hold (`kept_mass`,
        `kept_mass_lowest`: mean and smallest over contexts). Where tokens per call of any context
        were estimated from samples, the horizon is `sampled`, not `truncated`.
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
    frequency: dict[int, dict[int, float]] = field(repr=False)
    horizon: int | None
    table: pd.DataFrame = field(repr=False)
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
        """What was found at one horizon, in words.

        ``tolerance`` finds where the ceiling saturates: whether that rank pays depends on what a
        call costs, which only ``throughput`` knows.
        """
        rank = f"rank {'at least ' if self.at_grid_edge[horizon] else ''}{self.rank[horizon]}"
        found = {
            "tolerance": f"ceiling saturates at {rank}",
            "throughput": f"fastest at {rank}",
        }.get(self.criterion, f"{rank} by {self.criterion}")
        share = 100 * self.frequency[horizon][self.rank[horizon]]
        sure = f", chosen in {share:.0f} % of resamples"
        known = f"horizon {horizon}: {found}, {tokens_in_words(self.row(horizon))}"
        return known + (sure if self.contexts > 1 else "")


@dataclass(frozen=True)
class _Rule:
    """What a criterion may need."""

    tolerance: float
    latency: LatencyModel | None
    seed: int


@seeded
def select_rank(
    table: pd.DataFrame,
    criterion: str = "tolerance",
    *,
    column: str = OUTCOME,
    tolerance: float = TOLERANCE,
    latency: LatencyModel | None = None,
    seed: int = 0,
    pooled: bool = False,
) -> RankChoice:
    """Choose a rank per horizon from a study's table.

    Every context counts once; its value at a rank is the best any method reached (each fit is a
    rank-r distribution, so the best is the tightest bound on the ceiling). Ranks are compared on
    the same contexts, and where joints are truncated by their certified lower bounds or, `sampled`,
    by estimates from the same texts. Contexts of
    one document are one cluster, of standard errors as of the bootstrap. A choice is made for one
    model, domain, temperature and kind of draft: `table_parts` has the parts of a table.

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
    pooled : bool
        Take the contexts of several models, domains, temperatures or kinds of draft together.

    Raises
    ------
    ValueError
        If the criterion is unknown, ``throughput`` has no latency model, a column is missing, no
        context has all ranks, or the table has several parts and they are not to be pooled.

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
    require_one_part(table, pooled=pooled)
    scores = scores_of(table, column, complete=criterion == "throughput")
    rows = rank_table(scores, tolerance, latency, seed)
    return _choice(criterion, scores, rows, _Rule(tolerance, latency, seed))


@seeded
def compare_criteria(
    table: pd.DataFrame,
    *,
    column: str = OUTCOME,
    tolerance: float = TOLERANCE,
    latency: LatencyModel | None = None,
    seed: int = 0,
    pooled: bool = False,
) -> dict[str, RankChoice]:
    """What every criterion chooses, side by side; ``throughput`` only with a latency model.
    Parameters and errors as of `select_rank`.
    """
    require_one_part(table, pooled=pooled)
    scores, rule = scores_of(table, column), _Rule(tolerance, latency, seed)
    rows = rank_table(scores, tolerance, latency, seed)
    found = {name: _choice(name, scores, rows, rule) for name in CRITERIA if name != "throughput"}
    if latency is not None:
        whole = scores_of(table, column, complete=True)
        same = all(
            np.array_equal(a.clusters.sums, b.clusters.sums)
            for a, b in zip(scores, whole, strict=True)
        )
        rows = rows if same else rank_table(whole, tolerance, latency, seed)
        found["throughput"] = _choice("throughput", whole, rows, rule)
    return found


@seeded
def paired_gains(
    table: pd.DataFrame, *, column: str = OUTCOME, seed: int = 0, pooled: bool = False
) -> pd.DataFrame:
    """What each step of the grid of ranks gains, on the same contexts; where joints are truncated,
    the difference of the lower bounds.

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
    require_one_part(table, pooled=pooled)
    rows = []
    values = context_values(table, column)
    for part in scores_of(table, column):
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
    table: pd.DataFrame,
    *,
    column: str = OUTCOME,
    tolerance: float = TOLERANCE,
    pooled: bool = False,
) -> pd.DataFrame:
    """Per context and horizon, the smallest rank within `tolerance` of the context's best, and what
    the context is like.

    Returns
    -------
    pandas.DataFrame
        The context's keys, `horizon`, `needed_rank` and, where the table has them, the entropies.

    Raises
    ------
    ValueError
        As for `select_rank`.
    """
    require_one_part(table, pooled=pooled)
    values = context_values(table, column).dropna()
    best = values.max(axis=1)
    enough = values.ge(best * (1 - tolerance), axis=0)
    needed = enough.idxmax(axis=1).rename("needed_rank").reset_index()
    facts = [
        name
        for name in ("joint_entropy_nats", "first_token_entropy_nats", "total_correlation_nats")
        if name in table
    ]
    keys = context_keys(table)
    return needed.merge(table[[*keys, *facts]].drop_duplicates(keys), on=keys, how="left")


def _choice(criterion: str, scores: list[Scores], rows: pd.DataFrame, rule: _Rule) -> RankChoice:
    """One criterion's choice at every horizon, and how often resamples choose the same."""
    rank, edge, frequency, gains = {}, {}, {}, {}
    for part in scores:
        weights = resampling_weights(part.clusters.number, rule.seed)
        chosen = int(
            _choose(part, np.ones((1, part.clusters.number), dtype=int), criterion, rule)[0]
        )
        drawn = _choose(part, weights, criterion, rule)
        last = len(part.ranks) - 1
        rank[part.horizon] = int(part.ranks[chosen])
        edge[part.horizon] = chosen == last and last > 0
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


def _choose(part: Scores, weights: np.ndarray, criterion: str, rule: _Rule) -> np.ndarray:
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


def _detectable_gain(part: Scores, chosen: int) -> float:
    if len(part.ranks) < 2:
        return float("nan")
    low = min(chosen, len(part.ranks) - 2)
    step = part.clusters.differences([low + 1], [low])
    return float(detectable(standard_errors(step)[0], step.number))


def _fastest(
    scores: list[Scores], latency: LatencyModel, seed: int
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
