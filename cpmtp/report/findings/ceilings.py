"""Tables and figures of what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import pandas as pd

from cpmtp.ranking.parts import OUTCOME
from cpmtp.ranking.scores import context_values
from cpmtp.ranking.selection import paired_gains
from cpmtp.ranking.summary import method_summary, survival_by_rank
from cpmtp.report import plots
from cpmtp.report.blocks import Figure, Section, Table, Text
from cpmtp.report.first_screen.answer import details
from cpmtp.report.subject import Subject
from cpmtp.report.words import percent

_WOULD_SHOW = (
    "Gain that would show: the smallest that a test on so many documents (paired, at 5 %) finds "
    "four times in five; a gain below it may have gone unseen."
)


def findings(subject: Subject, *, folded: bool = False) -> Iterator[Section]:
    """Tables and figures of one subject; `folded` leaves all but the words for who wants them."""
    answers = subject.extras.heads is None  # else a forecast does
    yield Section(subject.title if answers else f"Diagnosis: {subject.title}", details(subject))
    yield Section(
        "Tokens per call by rank",
        (_rank_table(subject), _rank_note(subject), *_horizon_figures(subject)),
        level=3,
        folded=folded,
    )
    if answers:
        yield Section("Speed", (_speedup(subject), _serving_text(subject)), level=3, folded=folded)
    gains: list[Table | Text] = [_gain_table(subject.table), Text(_WOULD_SHOW, "note")]
    if subject.truncated:
        told = ", ".join(map(str, subject.truncated))
        note = f"Horizon {told} is truncated: its gains are differences of lower bounds."
        gains.append(Text(note, "note"))
    if subject.sampled:
        told = ", ".join(map(str, subject.sampled))
        note = f"Horizon {told}: gains are differences of estimates from the same sampled texts."
        gains.append(Text(note, "note"))
    title = "What a higher rank gains, on the same contexts"
    yield Section(title, tuple(gains), level=3, folded=folded)
    criteria = (_criteria_table(subject), Text(_NOT_OFFERED, "note"))
    yield Section("Every criterion's choice", criteria, level=3, folded=folded or not answers)
    fits: tuple[Table | Figure, ...] = (_method_table(subject.table), *_error_figures(subject))
    yield Section("Fits by method", fits, level=3, folded=True)


def _speedup(subject: Subject) -> Figure:
    bounds = ", from lower bounds where joints are truncated" if subject.truncated else ""
    words = (
        f"Predicted speedup over plain decoding by rank and horizon{bounds}, "
        f"{subject.share.words}; outlined cells are the fastest in at least 5 % of resamples (the "
        f"confidence set of the choice). Calls: {subject.economics.source}."
    )
    draw = partial(plots.plot_speedup, subject.learned_cells)
    return Figure("Predicted speedup", words, draw, subject.title)


_NOT_OFFERED = (
    "Where the criteria disagree, they answer different questions. Only throughput knows what a "
    "call costs. AIC and BIC are not offered: they weigh parameters "
    "against the size of a sample, and an exact joint is no sample. Core consistency is not "
    "offered: above the true rank of a noiseless array it falls without bound, and it says nothing "
    "about what a rank is worth."
)


def _rank_table(subject: Subject) -> Table:
    cells, answers = subject.learned_cells, subject.extras.heads is None
    rows: list[tuple[str, ...]] = []
    marked = set()
    for n, part in cells.groupby("horizon"):
        for row in part.itertuples():
            if answers and (row.horizon, row.rank) == subject.best:
                marked.add(len(rows))
            upper = f" to {row.tokens_per_call_upper:.3f}" if row.truncated else ""
            speed = (f"{row.speedup:.2f}", percent(row.fastest_frequency))
            rows.append(
                (
                    f"{n}",
                    f"{row.rank}",
                    *(speed if answers else ()),
                    f"{row.tokens_per_call:.3f}{upper}",
                    _interval(row.tokens_per_call_low, row.tokens_per_call_high),
                    f"{row.shortfall:.3f} ± {row.shortfall_standard_error:.3f}",
                    f"{row.parameters:,.0f}",
                )
            )
        empty = ("", "") if answers else ()
        rows.append((f"{n}", "exact draft", *empty, f"{n:.3f}", "", "", ""))
    head = (
        *("horizon", "rank"),
        *(("times the speed", "fastest in") if answers else ()),
        *("ceiling", "95 % interval", "shortfall to best rank", "numbers in a fit"),
    )
    return Table(head, tuple(rows), frozenset(marked))


def _rank_note(subject: Subject) -> Text:
    bounds = ", certified lower to upper bound where truncated" if subject.truncated else ""
    if subject.sampled:
        bounds += f", estimated (95 % interval) at horizon {', '.join(map(str, subject.sampled))}"
    own = (
        f"Ceiling: tokens per call of the best fit{bounds}. Numbers in a fit: free "
        "numbers of the fit to one context; they do not say how large a head is."
    )
    if subject.extras.heads is None:
        own = (
            f"Times the speed: of plain decoding, {subject.share.words}. Fastest in: share of "
            f"resamples. {own} Bold: {_BOLD[subject.marked_as]}."
        )
    return Text(own, "note")


_BOLD = {"recommended": "the recommendation", "fastest by ceilings": "the fastest by ceilings"}


def _interval(low: float, high: float, digits: int = 3) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}" if pd.notna(low) and pd.notna(high) else ""


def _horizon_figures(subject: Subject) -> Iterator[Figure]:
    table, label = subject.table, subject.title
    block = survival_by_rank(table)
    # Samples say nothing of the coupling.
    known = table.get("tokens_per_call_coupling_target", pd.Series(dtype=float)).notna().any()
    coupling = survival_by_rank(table, "coupling") if known else block.iloc[:0]
    values = context_values(table, OUTCOME)
    for n, saturated in subject.saturation.rank.items():
        truncated = n in subject.truncated
        cells = subject.saturation.table.query("horizon == @n")
        recommended = subject.best[1] if n == subject.best[0] else None
        ranks = {int(cells["rank"].min()), saturated, int(cells["rank"].max())}
        shown = sorted(ranks | {subject.recommended.rank[n]})
        estimated = n in subject.sampled
        # A truncated joint gives a lower bound of the coupling's survival, which bounds nothing.
        some = _only(block, n, shown)
        most = coupling.iloc[:0] if truncated or estimated else _only(coupling, n, shown)
        way = ", certified lower bounds" if truncated else ", estimated" if estimated else ""
        scores = values.xs(n, level="horizon").dropna(axis=1, how="all").dropna()
        yield Figure(
            f"Tokens per call against rank, n = {n}",
            _ceilings_in_words(subject, n),
            partial(
                plots.plot_tokens_per_call,
                cells,
                recommended=recommended,
                horizon=n,
                name=f"{subject.marked_as}: rank {recommended}",
            ),
            label,
        )
        yield Figure(
            f"Survival per position, n = {n}",
            _survival_in_words(some, bounded=len(most) > 0, way=way),
            partial(plots.plot_survival, some, ceiling=most if len(most) else None),
            label,
        )
        yield Figure(
            f"Contexts, n = {n}",
            f"One point per context{way}: at rank "
            f"{shown[0]} from {scores.iloc[:, 0].min():.2f} to {scores.iloc[:, 0].max():.2f} "
            f"tokens per call, at rank {shown[-1]} from {scores.iloc[:, -1].min():.2f} to "
            f"{scores.iloc[:, -1].max():.2f}. Bars: quartiles.",
            partial(plots.plot_contexts, scores),
            label,
        )
        points = _entropy_points(table, scores[shown], n)
        if len(points):
            correlation = _rank_correlation(points, shown[0])
            told = f" (rank correlation {correlation:.2f} at rank {shown[0]})"
            yield Figure(
                f"Tokens per call and entropy, n = {n}",
                "Each context's tokens per call against the entropy of its joint: what the target "
                f"itself is unsure of is harder to draft{told if pd.notna(correlation) else ''}.",
                partial(plots.plot_against_entropy, points),
                label,
            )


def _ceilings_in_words(subject: Subject, horizon: int) -> str:
    cells = subject.saturation.table.query("horizon == @horizon")
    first, last = cells.iloc[0], cells.iloc[-1]
    what = "Ceilings"
    if horizon in subject.truncated:
        mean, _ = subject.truncated[horizon]
        what = (
            f"Certified lower bounds of ceilings, with upper bounds dashed (truncated joints that "
            f"hold {100 * mean:.1f} % of the probability): tokens per call"
        )
    if horizon in subject.sampled:
        what = "Ceilings, estimated from sampled texts (95 % band): tokens per call"
    recommended = (
        f"{subject.marked_as.capitalize()}: rank {subject.best[1]}."
        if horizon == subject.best[0]
        else f"{_BOLD[subject.marked_as].capitalize()} is {subject.headline}; at this horizon rank "
        f"{subject.recommended.rank[horizon]} is the fastest."
    )
    edge = "at least " if subject.saturation.at_grid_edge[horizon] else ""
    return (
        f"{what} rise from {first.tokens_per_call:.2f} at rank {first['rank']:.0f} to "
        f"{last.tokens_per_call:.2f} at rank {last['rank']:.0f}; an exact draft would give "
        f"{horizon}. {recommended} The ceiling saturates at rank {edge}"
        f"{subject.saturation.rank[horizon]}."
    )


def _only(survival: pd.DataFrame, horizon: int, ranks: list[int]) -> pd.DataFrame:
    return survival[(survival["horizon"] == horizon) & survival["rank"].isin(ranks)]


def _survival_in_words(survival: pd.DataFrame, *, bounded: bool, way: str) -> str:
    last = survival[survival["position"] == survival["position"].max()]
    whole = ", ".join(f"{percent(row.survival)} at rank {row.rank}" for row in last.itertuples())
    dotted = (
        ", and dotted the most that any verification could reach with the same draft"
        if bounded
        else ""
    )
    return (
        "Probability that the first k tokens of a block are emitted unchanged, mean over "
        f"contexts{way}{dotted}. All of the block: {whole}."
    )


def _entropy_points(table: pd.DataFrame, scores: pd.DataFrame, horizon: int) -> pd.DataFrame:
    """A row per context and rank; none where entropies are not known, as of truncated joints."""
    if "joint_entropy_nats" not in table:
        return pd.DataFrame()
    keys = list(scores.index.names)
    facts = table[table["horizon"] == horizon][[*keys, "joint_entropy_nats"]].drop_duplicates(keys)
    return (
        scores.reset_index()
        .melt(id_vars=keys, var_name="rank", value_name="tokens_per_call")
        .merge(facts.dropna(), on=keys)
    )


def _rank_correlation(points: pd.DataFrame, rank: int) -> float:
    part = points[points["rank"] == rank]
    ranks = part[["joint_entropy_nats", "tokens_per_call"]].rank()
    # Of one context, or of contexts that are all alike, there is none.
    return ranks.corr().iloc[0, 1] if (ranks.nunique() > 1).all() else float("nan")


def _serving_text(subject: Subject) -> Text:
    horizon, rank = subject.best
    survival = _only(survival_by_rank(subject.table), horizon, [rank]).sort_values("position")
    drafted = survival["survival"].to_numpy()[1:]
    forecast = subject.forecast.tokens_per_call
    # Ceilings scaled down, each drafted position alike, to what a head is forecast to earn.
    rates = drafted * (forecast - 1) / drafted.sum() if drafted.sum() else drafted
    return Text(
        "To try the speed before there is a head: a serving benchmark that forces a given "
        "acceptance (vLLM: rejection_sample_method synthetic) takes the survival of the drafted "
        f"positions 2 to {horizon} of rank {rank}, scaled to {forecast:.2f} tokens per call, as "
        "synthetic_acceptance_rates "
        f"{json.dumps([round(float(min(rate, 1.0)), 4) for rate in rates])}."
    )


def _gain_table(table: pd.DataFrame) -> Table:
    gains = paired_gains(table)
    rows = tuple(
        (
            f"{row.horizon}",
            f"{row.rank} → {row.next_rank}",
            f"{row.gain:.4f}",
            _interval(row.gain_low, row.gain_high, 4),
            percent(row.share_improved),
            _number(row.detectable_gain, 4),
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
            "gain that would show",
        ),
        rows,
    )


def _number(value: float, digits: int) -> str:
    """Nothing where it is not known."""
    return f"{value:.{digits}f}" if pd.notna(value) else ""


def _criterion(name: str, subject: Subject) -> str:
    fastest = f"throughput: {_BOLD[subject.marked_as]}"
    known = {"tolerance": "tolerance: where the ceiling saturates", "throughput": fastest}
    return known.get(name, name.replace("_", " "))


def _criteria_table(subject: Subject) -> Table:
    horizons = list(subject.saturation.rank)
    rows = []
    for name, choice in subject.choices.items():
        cells = [
            f"{'at least ' if choice.at_grid_edge[n] else ''}{choice.rank[n]} "
            f"({percent(choice.frequency[n][choice.rank[n]])})"
            for n in horizons
        ]
        horizon = str(choice.horizon) if choice.horizon else "chooses none"
        rows.append((_criterion(name, subject), *cells, horizon))
    marked = frozenset({list(subject.choices).index("throughput")})
    names = (f"rank at horizon {n} (share of resamples)" for n in horizons)
    return Table(("criterion", *names, "horizon"), tuple(rows), marked)


def _method_table(table: pd.DataFrame) -> Table:
    rows = tuple(
        (
            f"{row.horizon}",
            f"{row.rank}",
            row.method,
            f"{row.not_converged} of {row.contexts}",
            f"{row.failed}",
            _number(row.kl_nats, 4),
            _number(row.total_variation, 4),
            _number(row.relative_frobenius, 4),
            _number(row.tokens_per_call, 3),
            _number(row.fit_seconds, 2),
        )
        for row in method_summary(table).itertuples()
    )
    head = (
        "horizon",
        "rank",
        "method",
        "not converged",
        "failed",
        "KL, nats",
        "total variation",
        "relative Frobenius",
        "tokens per call",
        "seconds",
    )
    return Table(head, rows)


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
            "quartiles as a band. A line ends where "
            "the divergence is infinite: the fit gives nothing to what the target can emit. "
            "Nothing goes below the dotted floor.",
            partial(plots.plot_error_against_rank, part, floor=floor),
            subject.title,
        )
