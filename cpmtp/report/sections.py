"""What the report says, as blocks that neither know HTML nor Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from cpmtp.latency import LatencyModel, cost_per_million_tokens
from cpmtp.ranking.criteria import throughput_choice
from cpmtp.ranking.selection import (
    OUTCOME,
    RankChoice,
    compare_criteria,
    context_values,
    paired_gains,
)
from cpmtp.ranking.summary import method_summary, survival_by_rank
from cpmtp.report import plots
from cpmtp.report.pilot import LOOKS, PilotPlan, plan_pilot

_COSTS = (0.25, 0.5, 1, 2, 4, 8)
# Between requests throughput varies for more reasons than the contexts of a study show: lengths,
# batches, other users.
_LEAST_VARIATION = 0.3


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "", "strong" or "note"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells as text; `marked` are the indices of rows to stand out, `wide` is said of cells
    with sentences.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture, what it is and what it shows in words; `subject` tells apart pictures of the same
    title.
    """

    title: str
    words: str
    draw: Callable[[Any], object]
    subject: str = ""

    @property
    def name(self) -> str:
        """Title and subject."""
        return f"{self.title} ({self.subject})" if self.subject else self.title


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Text | Table | Figure, ...]
    level: int = 2


@dataclass(frozen=True)
class Economics:
    """What calls cost and whether that was measured."""

    latency: LatencyModel
    source: str
    price: float


@dataclass(frozen=True)
class Subject:
    """One model and kind of contexts: its part of the table and every criterion's choice."""

    title: str
    table: pd.DataFrame
    choices: dict[str, RankChoice]
    economics: Economics

    @classmethod
    def of(cls, title: str, table: pd.DataFrame, economics: Economics) -> Subject:
        """A part of a study's table with every criterion's choice from it."""
        return cls(title, table, compare_criteria(table, latency=economics.latency), economics)

    @property
    def default(self) -> RankChoice:
        """The choice whatever a call costs."""
        return self.choices["tolerance"]

    @property
    def fastest(self) -> RankChoice:
        """The choice of most throughput."""
        return self.choices["throughput"]

    @property
    def best(self) -> tuple[int, int]:
        """Horizon and rank of most throughput."""
        horizon = self.fastest.horizon
        assert horizon is not None  # throughput chooses one
        return horizon, self.fastest.rank[horizon]


def answer(subject: Subject) -> Section:
    """The first screen: which rank and horizon, what it buys, how sure, what would change the
    answer.
    """
    choice, economics = subject.fastest, subject.economics
    horizon, rank = subject.best
    row = choice.row(horizon)
    seconds, plain = float(row.call_seconds), economics.latency.plain_step
    cost = cost_per_million_tokens(row.tokens_per_call / seconds, economics.price)
    before = cost_per_million_tokens(1 / plain, economics.price)
    edge = "at least " if choice.at_grid_edge[horizon] else ""
    blocks: list[Text | Table | Figure] = [
        Text(f"Fastest: horizon {horizon} with rank {edge}{rank}.", "strong"),
        Text(
            f"It buys at most {row.tokens_per_call:.2f} tokens per call (95 % interval "
            f"{row.tokens_per_call_low:.2f} to "
            f"{row.tokens_per_call_high:.2f}), {row.speedup:.2f} times the speed of plain "
            f"decoding ({row.speedup_low:.2f} to "
            f"{row.speedup_high:.2f}), {cost:.2f} per million tokens instead of {before:.2f} at a "
            "price of "
            f"{economics.price:.2f} per device-hour. Calls: {economics.source}."
        ),
        Text(
            f"How sure: horizon {horizon} is the fastest in "
            f"{choice.horizon_frequency[horizon]:.0%} and, at it, rank {rank} in "
            f"{choice.frequency[horizon][rank]:.0%} of resamples of {choice.documents} documents; "
            "a gain below "
            f"{choice.detectable_gain[horizon]:.3f} tokens per call would not be seen with these "
            f"{choice.contexts} contexts. "
            "A learned head stays below a rank's ceiling, so read the figures as upper bounds."
        ),
        Text(f"What would change the answer: {_sensitivity(subject)}."),
        Text(
            "Whatever a call costs (smallest rank within 1 % of the best): "
            + "; ".join(_sentences(subject.default))
            + "."
        ),
    ]
    if choice.caution:
        blocks.append(Text(choice.caution, "note"))
    return Section(subject.title, tuple(blocks), level=2)


def _sentences(choice: RankChoice) -> Iterator[str]:
    for horizon in choice.rank:
        yield choice.sentence(horizon)


def _sensitivity(subject: Subject) -> str:
    """The fastest horizon and rank if a component cost more or less, by the means."""
    cells, latency = subject.fastest.table, subject.economics.latency
    found: dict[tuple[int, int], list[str]] = {}
    for factor in _COSTS:
        changed = replace(latency, per_component=latency.per_component * factor)
        seconds = [
            changed.call_seconds(int(n), int(r))
            for n, r in zip(cells["horizon"], cells["rank"], strict=True)
        ]
        best = cells.iloc[
            int(
                throughput_choice(
                    cells[["tokens_per_call"]].to_numpy().T, pd.Series(seconds).to_numpy()
                )[0]
            )
        ]
        found.setdefault((int(best["horizon"]), int(best["rank"])), []).append(f"{factor:g}")
    others = [
        f"horizon {n}, rank {r} if a component cost {' or '.join(f)} times as much"
        for (n, r), f in found.items()
        if (n, r) != subject.best
    ]
    if not others:
        return (
            f"nothing that was tried: a component may cost {_COSTS[0]:g} to {_COSTS[-1]:g} "
            "times as much"
        )
    return "; ".join(others)


def findings(subject: Subject) -> Iterator[Section]:
    """Tables and figures of one subject."""
    choice, label = subject.fastest, subject.title
    yield Section(label, (), level=2)
    yield Section(
        "Tokens per call by rank", (_rank_table(subject), *_horizon_figures(subject)), level=3
    )
    speedup = Figure(
        "Predicted speedup",
        "Predicted speedup over plain decoding by rank and horizon; outlined cells are the "
        "fastest in at least 5 % of "
        f"resamples (the confidence set of the optimum). Calls: {subject.economics.source}.",
        partial(plots.plot_speedup, choice.table),
        label,
    )
    yield Section("Speed", (speedup, _serving_text(subject)), level=3)
    yield Section(
        "What a higher rank gains, on the same contexts", (_gain_table(subject.table),), level=3
    )
    yield Section(
        "Every criterion's choice", (_criteria_table(subject), Text(_NOT_OFFERED, "note")), level=3
    )
    yield Section(
        "Fits by method", (_method_table(subject.table), *_error_figures(subject)), level=3
    )


_NOT_OFFERED = (
    "Where the criteria disagree, they answer different questions. AIC and BIC are not offered: "
    "they weigh parameters against "
    "the size of a sample, and an exact joint is no sample. Core consistency is not offered: "
    "above the true rank of a "
    "noiseless array it falls without bound, and it says nothing about what a rank is worth."
)


def _rank_table(subject: Subject) -> Table:
    cells, default = subject.fastest.table, subject.default
    rows: list[tuple[str, ...]] = []
    marked = set()
    for n, part in cells.groupby("horizon"):
        for row in part.itertuples():
            if default.rank[n] == row.rank:
                marked.add(len(rows))
            rows.append(
                (
                    f"{n}",
                    f"{row.rank}",
                    f"{row.parameters:,.0f}",
                    f"{row.tokens_per_call:.3f}",
                    f"{row.tokens_per_call_low:.3f} to {row.tokens_per_call_high:.3f}",
                    f"{row.shortfall:.3f} ± {row.shortfall_standard_error:.3f}",
                    f"{row.speedup:.2f}",
                    f"{row.fastest_frequency:.0%}",
                )
            )
        rows.append((f"{n}", "exact draft", "", f"{n:.3f}", "", "", "", ""))
    head = (
        "horizon",
        "rank",
        "parameters",
        "tokens per call",
        "95 % interval",
        "shortfall to best rank",
        "speedup",
        "fastest in",
    )
    return Table(head, tuple(rows), frozenset(marked))


def _horizon_figures(subject: Subject) -> Iterator[Figure]:
    choice, table = subject.default, subject.table
    block = survival_by_rank(table)
    known = "tokens_per_call_coupling_target" in table
    coupling = survival_by_rank(table, "coupling") if known else block.iloc[:0]
    values = context_values(table, OUTCOME)
    for n, rank in choice.rank.items():
        cells, label = choice.table[choice.table["horizon"] == n], subject.title
        first, last = cells.iloc[0], cells.iloc[-1]
        shown = sorted({int(first["rank"]), rank, int(last["rank"])})
        some = [_only(frame, n, shown) for frame in (block, coupling)]
        scores = values.xs(n, level="horizon").dropna(axis=1, how="all").dropna()
        yield Figure(
            f"Tokens per call against rank, n = {n}",
            f"Tokens per call rise from {first.tokens_per_call:.2f} at rank {first['rank']:.0f} "
            f"to {last.tokens_per_call:.2f} "
            f"at rank {last['rank']:.0f}; an exact draft would give {n}. Recommended by "
            "tolerance: rank "
            f"{'at least ' if choice.at_grid_edge[n] else ''}{rank}.",
            partial(plots.plot_tokens_per_call, cells, recommended=rank, horizon=n),
            label,
        )
        yield Figure(
            f"Survival per position, n = {n}",
            "Probability that the first k tokens of a block are emitted unchanged, mean over "
            "contexts, and dotted the most "
            f"that any verification could reach with the same draft. {_survival_words(some[0])}",
            partial(plots.plot_survival, some[0], ceiling=some[1] if len(some[1]) else None),
            label,
        )
        yield Figure(
            f"Contexts, n = {n}",
            f"One point per context: at rank {shown[0]} from {scores.iloc[:, 0].min():.2f} to "
            f"{scores.iloc[:, 0].max():.2f} "
            f"tokens per call, at rank {shown[-1]} from {scores.iloc[:, -1].min():.2f} to "
            f"{scores.iloc[:, -1].max():.2f}. "
            "Bars: quartiles.",
            partial(plots.plot_contexts, scores),
            label,
        )
        if "joint_entropy_nats" in table:
            points = _entropy_points(table, scores[shown], n)
            yield Figure(
                f"Tokens per call and entropy, n = {n}",
                "Each context's tokens per call against the entropy of its joint: what the target "
                "itself is unsure of is "
                f"harder to draft (rank correlation {_rank_correlation(points, shown[0]):.2f} at "
                f"rank {shown[0]}).",
                partial(plots.plot_against_entropy, points),
                label,
            )


def _only(survival: pd.DataFrame, horizon: int, ranks: list[int]) -> pd.DataFrame:
    return survival[(survival["horizon"] == horizon) & survival["rank"].isin(ranks)]


def _survival_words(survival: pd.DataFrame) -> str:
    last = survival[survival["position"] == survival["position"].max()]
    return (
        "All of the block: "
        + ", ".join(f"{row.survival:.0%} at rank {row.rank}" for row in last.itertuples())
        + "."
    )


def _entropy_points(table: pd.DataFrame, scores: pd.DataFrame, horizon: int) -> pd.DataFrame:
    keys = list(scores.index.names)
    facts = table[table["horizon"] == horizon][[*keys, "joint_entropy_nats"]].drop_duplicates(keys)
    return (
        scores.reset_index()
        .melt(id_vars=keys, var_name="rank", value_name="tokens_per_call")
        .merge(facts, on=keys)
    )


def _rank_correlation(points: pd.DataFrame, rank: int) -> float:
    part = points[points["rank"] == rank]
    return part["joint_entropy_nats"].rank().corr(part["tokens_per_call"].rank())


def _serving_text(subject: Subject) -> Text:
    horizon, rank = subject.best
    survival = _only(survival_by_rank(subject.table), horizon, [rank]).sort_values("position")[
        "survival"
    ]
    return Text(
        "To try the speed before there is a head: a serving benchmark that forces a given "
        "acceptance (vLLM: "
        "rejection_sample_method synthetic) takes the survival of the drafted positions 2 to "
        f"{horizon} of rank {rank} as "
        f"synthetic_acceptance_rates {json.dumps([round(value, 4) for value in survival[1:]])}."
    )


def _gain_table(table: pd.DataFrame) -> Table:
    gains = paired_gains(table)
    rows = tuple(
        (
            f"{row.horizon}",
            f"{row.rank} → {row.next_rank}",
            f"{row.gain:.4f}",
            f"{row.gain_low:.4f} to {row.gain_high:.4f}",
            f"{row.share_improved:.0%}",
            f"{row.detectable_gain:.4f}",
        )
        for row in gains.itertuples()
    )
    return Table(
        (
            "horizon",
            "rank",
            "gain, tokens per call",
            "95 % interval",
            "contexts improved",
            "smallest gain seen",
        ),
        rows,
    )


def _criteria_table(subject: Subject) -> Table:
    horizons = list(subject.default.rank)
    rows = []
    for name, choice in subject.choices.items():
        cells = [
            f"{'at least ' if choice.at_grid_edge[n] else ''}{choice.rank[n]} "
            f"({choice.frequency[n][choice.rank[n]]:.0%})"
            for n in horizons
        ]
        rows.append((name, *cells, str(choice.horizon) if choice.horizon else "chooses none"))
    return Table(
        ("criterion", *(f"rank at horizon {n} (share of resamples)" for n in horizons), "horizon"),
        tuple(rows),
    )


def _method_table(table: pd.DataFrame) -> Table:
    rows = tuple(
        (
            f"{row.horizon}",
            f"{row.rank}",
            row.method,
            f"{row.kl_nats:.4f}",
            f"{row.total_variation:.4f}",
            f"{row.relative_frobenius:.4f}",
            f"{row.tokens_per_call:.3f}",
            f"{row.fit_seconds:.2f}",
            f"{row.not_converged} of {row.contexts}",
            f"{row.failed}",
        )
        for row in method_summary(table).itertuples()
    )
    head = (
        "horizon",
        "rank",
        "method",
        "KL, nats",
        "total variation",
        "relative Frobenius",
        "tokens per call",
        "seconds",
    )
    return Table((*head, "not converged", "failed"), rows)


def _error_figures(subject: Subject) -> Iterator[Figure]:
    methods = method_summary(subject.table)
    # Truncated joints have no divergences to show.
    known = methods[methods["kl_nats"].notna()]
    table = subject.table
    for n, part in known.groupby("horizon"):
        floor = None  # tables of earlier versions have none
        if "kl_floor_nats" in table:
            floor = table[table["horizon"] == n].groupby("rank")["kl_floor_nats"].median().dropna()
        yield Figure(
            f"Error against rank, n = {n}",
            "KL divergence from the exact joint to each method's fit, median over contexts with "
            "quartiles. A line ends where "
            "the divergence is infinite: the fit gives nothing to what the target can emit. "
            "Nothing goes below the dotted floor.",
            partial(plots.plot_error_against_rank, part, floor=floor),
            subject.title,
        )


def pilot(subject: Subject) -> Section:
    """The plan of a staged roll-out of the fastest choice."""
    horizon, rank = subject.best
    row = subject.fastest.row(horizon)
    scores = context_values(subject.table, OUTCOME).xs(horizon, level="horizon")[rank].dropna()
    seen = float(scores.std() / scores.mean()) if len(scores) > 1 else 0.0
    plan = plan_pilot(
        (
            float(row.tokens_per_call),
            float(row.tokens_per_call_low),
            float(row.tokens_per_call_high),
        ),
        subject.economics.latency,
        horizon=horizon,
        rank=rank,
        price=subject.economics.price,
        variation=max(seen, _LEAST_VARIATION),
    )
    return Section(
        f"{subject.title}: horizon {horizon}, rank {rank}",
        (_pilot_table(plan), *_pilot_texts(plan, seen)),
        level=3,
    )


def _pilot_table(plan: PilotPlan) -> Table:
    def interval(measure) -> str:
        if measure.expected is None:
            return measure.unit
        ends = "" if measure.low is None else f" ({measure.low:.2f} to {measure.high:.2f})"
        return f"{measure.expected:.2f}{ends} {measure.unit}"

    rows = tuple((m.name, m.how, interval(m), m.alarm) for m in plan.measures)
    return Table(("measure", "how", "forecast (95 % interval)", "alarm"), rows, wide=True)


def _pilot_texts(plan: PilotPlan, seen: float) -> Iterator[Text]:
    paid = plan.tokens_per_training_hour
    pays = (
        f"after {paid / 1e6:.1f} million tokens for every device-hour of it"
        if math.isfinite(paid)
        else "never"
    )
    yield Text(
        f"Sample: {plan.requests_per_arm:,} requests in each arm show half of the forecast gain "
        "in throughput (two-sided 5 %, "
        f"power 80 %, coefficient of variation {plan.variation:.2f}; the study's contexts vary by "
        f"{seen:.2f}, traffic by more: "
        "measure it in a week with the same decoding in both arms and scale the number by its "
        "square). "
        f"{plan.edit_requests_per_arm:,} in each arm exclude that people edit three points more "
        "often than 20 %."
    )
    yield Text(
        f"Stopping rule: {LOOKS} equally spaced looks; stop for a difference where |z| exceeds "
        f"{', '.join(map(str, plan.bounds))} (O'Brien and Fleming, 5 % in all); stop for futility "
        "where at half-time the "
        "interval of the measured speedup lies below half of the forecast gain; stop at once on "
        "an alarm. Break-even: "
        f"{plan.break_even:.2f} tokens per call. The head's training has paid for itself {pays}."
    )


def learned_sections(
    waterfall: pd.DataFrame | None, decoding: pd.DataFrame | None, step_times: pd.DataFrame | None
) -> Iterator[Section]:
    """What the learned head reached; each part only where its table is there."""
    if waterfall is not None and len(waterfall):
        yield Section("Where tokens per call are lost", tuple(_waterfall_blocks(waterfall)))
    if decoding is not None and len(decoding):
        words = (
            f"Measured against forecast tokens per call of {len(decoding)} runs; mean difference "
            f"{(decoding['measured'] - decoding['forecast']).mean():+.3f}. On the dotted line the "
            "forecast is right."
        )
        yield Section(
            "Forecast against measurement",
            (
                _plain_table(decoding),
                Figure("Forecast and measurement", words, partial(plots.plot_forecast, decoding)),
            ),
        )
    if step_times is not None and len(step_times):
        yield Section(
            "What a call spends its time on",
            (
                _plain_table(step_times),
                Figure(
                    "Time of a call",
                    "Milliseconds per call, by part.",
                    partial(plots.plot_step_times, step_times),
                ),
            ),
        )


def _waterfall_blocks(waterfall: pd.DataFrame) -> Iterator[Table | Figure]:
    yield _plain_table(waterfall)
    waterfall = waterfall.assign(anchored=waterfall.get("anchored", False))
    for (model, horizon, anchored), rows in waterfall.groupby(
        ["model", "horizon", "anchored"], sort=False
    ):
        kind = "anchored" if anchored else "unanchored"
        yield Figure(
            f"Losses by rank, n = {horizon}, {kind}",
            "What a head of each rank has learned, and what is lost to learning, to the objective "
            "and to the rank.",
            partial(plots.plot_losses_over_rank, rows),
            str(model),
        )
    for _, row in waterfall.loc[
        waterfall.groupby(["model", "horizon"], sort=False)["learned"].idxmax()
    ].iterrows():
        yield Figure(
            f"The best head, n = {row['horizon']}, rank "
            f"{row['rank']}{', anchored' if row['anchored'] else ''}",
            f"Of {row['exact_limit']:.2f} tokens per call, "
            f"{row['exact_limit'] - row['acceptance_fit']:.2f} are lost to rank, "
            f"{row['acceptance_fit'] - row['em_fit']:.2f} to the objective and "
            f"{row['em_fit'] - row['learned']:.2f} to "
            f"learning; the learned head has {row['learned']:.2f}.",
            partial(plots.plot_waterfall, row),
            str(row["model"]),
        )


def _plain_table(table: pd.DataFrame) -> Table:
    def cell(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = tuple(tuple(cell(value) for value in row) for row in table.itertuples(index=False))
    return Table(tuple(str(name).replace("_", " ") for name in table.columns), rows)
