"""What was found, as a short paper: the answer first, every figure from a stored table."""

from __future__ import annotations

import itertools
from functools import partial

import pandas as pd
from page import Page

from cpmtp.latency import memory_bound_latency
from cpmtp.ranking.parts import OUTCOME
from cpmtp.ranking.selection import compare_criteria, needed_ranks
from cpmtp.ranking.summary import method_summary, objective_gap
from cpmtp.report.plots import plot_forecast, plot_lines_over_rank, plot_losses_over_rank

MODELS = ("code", "prose")
LATENCY = memory_bound_latency(plain_step=0.02, layers=32)
REFERENCE, ANCHORED, METHODS = "reference", "anchored/table.parquet", "methods"
FORMS, LEVELS = "forms/summary.csv", "curves/levels.csv"
FIRST, WINNERS = "curves/first_position.csv", "curves/winners.csv"
LONGER, ALIKE = "curves/longer.csv", "learning_rank/learning_rank.csv"
AXIS = "vocabulary/axis.csv"
WATERFALL, DECODING = "head/waterfall.parquet", "head/decoding.parquet"
POPULATION, REAL_POPULATION = "bounds/population.csv", "bounds/real/population.csv"
LONGER_REAL = "real_model/heads_longer.csv"


def both(values: dict[str, float], form: str = "{:.2f}") -> str:
    """A figure of each model, as `2.31 (code) and 2.60 (prose)`."""
    return " and ".join(f"{form.format(values[model])} ({model})" for model in MODELS)


def by_model(table: pd.DataFrame, column: str) -> dict[str, float]:
    """A column of a table with one row per model."""
    rows = table.set_index("model")[column]
    return {model: float(rows[model]) for model in MODELS}


def candidate(table: pd.DataFrame, name: str, column: str) -> dict[str, float]:
    """A candidate's column at the largest budget."""
    rows = table[(table["candidate"] == name) & (table["budget"] == table["budget"].max())]
    return by_model(rows, column)


def draft(table: pd.DataFrame, name: str, column: str) -> dict[str, float]:
    """A draft's column in the study of forms."""
    return by_model(table[table["draft"] == name], column)


def every(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether the first is above the second for each model."""
    return all(first[model] > second[model] for model in MODELS)


def more(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """By how much the first is above the second, for each model."""
    return {model: first[model] - second[model] for model in MODELS}


def of_three(table: pd.DataFrame, name: str) -> dict[str, float]:
    """Tokens per call of a candidate's first three positions at the largest budget."""
    parts = [candidate(table, name, f"survival_{k}") for k in (2, 3)]
    return {model: 1 + sum(part[model] for part in parts) for model in MODELS}


def best_heads(page: Page) -> pd.DataFrame:
    """The head of most tokens per call of each model."""
    table = page.stored(WATERFALL)
    return table.loc[table.groupby("model")["learned"].idxmax()]


def setting(page: Page) -> None:
    """What was computed, and how to read a figure."""
    reference = page.study(REFERENCE)
    contexts = reference.groupby("model")["context"].nunique()
    ranks = ", ".join(map(str, sorted(reference["rank"].unique())))
    page.heading("What was computed")
    page.say(
        f"For each of two small models (Python code, English prose) the joint distribution of the next two and three tokens "
        f"was computed exactly at {contexts.iloc[0]} contexts sampled from the model itself, and fitted at "
        f"ranks {ranks}.",
        REFERENCE,
    )
    page.add(
        "*Tokens per call* are those that one forward pass of the model emits under lossless block verification, the "
        "first token from the model itself ({doc}`definitions`). A *ceiling* is what the best draft of a form and rank earns when it is "
        "fitted to each single context; a trained head has to find such drafts from a hidden state. "
        "*Told the first token* (anchored) is said of drafts that know the token just emitted, as all recent drafters do."
    )
    page.add(
        "Every number here is computed by `docs/make_results.py` from tables in `data/studies`; a test changes those "
        "tables and requires every sentence to change with them, or to fail. Intervals are 95 %, over documents (of trained heads: 64 texts, which all heads write after the same prompts); "
        "they hold neither the scatter of a second training nor the choice among settings."
    )


def rank_section(page: Page) -> None:
    """Ceilings of a rank: where they saturate, what the throughput of a call would choose."""
    reference, rows, found = page.study(REFERENCE), [], []
    for model in MODELS:
        choices = compare_criteria(reference[reference["model"] == model], latency=LATENCY)
        best = choices["throughput"]
        cell = best.row(best.horizon)
        found.append(
            f"horizon {best.horizon} with rank {best.rank[best.horizon]} for {model} "
            f"(ceiling {cell.tokens_per_call:.2f})"
        )
        for name, choice in choices.items():
            for n in choice.rank:
                cell = choice.row(n)
                edge = "at least " if choice.at_grid_edge[n] else ""
                low, high = cell.tokens_per_call_low, cell.tokens_per_call_high
                rows.append(
                    {
                        "model": model,
                        "criterion": _CRITERIA[name],
                        "horizon": n,
                        "rank": f"{edge}{choice.rank[n]}",
                        "chosen in": f"{choice.frequency[n][choice.rank[n]]:.0%}",
                        "tokens per call": f"{cell.tokens_per_call:.2f} ({low:.2f} to {high:.2f})",
                    }
                )
    page.heading("What a rank could bring")
    page.say(
        "Drafts that are not told the first token, calls assumed to cost what a device pays that only reads weights: most tokens per second at "
        f"{' and '.join(found)}.",
        REFERENCE,
    )
    edges = [row for row in rows if row["horizon"] == 3 and row["rank"].startswith("at least")]
    page.add(
        "Which rank is best depends on what a component costs: at three tokens the ceiling of "
        f"{' and '.join(dict.fromkeys(r['model'] for r in edges))} still rises at the largest rank tried, so that criteria "
        "without costs end there.",
        REFERENCE,
        holds=edges,
    )
    page.table(pd.DataFrame(rows), REFERENCE)
    needed = needed_ranks(reference, pooled=True)
    three = needed[needed["horizon"] == 3]
    medians = three.groupby("model")["needed_rank"].median()
    ranked = {
        m: part[["needed_rank", "joint_entropy_nats"]].rank().corr().iloc[0, 1]
        for m, part in three.groupby("model")
    }
    page.say(
        "Single contexts differ: the rank that one needs for 1 % of its best is, in the median, "
        f"{both(medians, '{:.0f}')}, and grows with the uncertainty of the next tokens (Spearman correlation with the entropy of the joint "
        f"{both(ranked)}).",
        REFERENCE,
        holds=min(ranked.values()) > 0,
    )
    summary = method_summary(page.study(METHODS), pooled=True)
    three = summary[summary["horizon"] == 3]
    wide = three.pivot(index="rank", columns="method", values="tokens_per_call")
    gap = objective_gap(page.study(METHODS))
    gap = gap[gap["horizon"] == 3].groupby("rank")["lost_to_objective"].mean()
    page.say(
        f"What is fitted matters most at small ranks: fitting tokens per call itself instead of the divergence adds {gap[1]:.2f} at rank 1 and "
        f"{gap[32]:.3f} at rank 32.",
        METHODS,
        holds=gap[1] > gap[32],
    )
    page.add(
        f"Least squares (`als`) earns {wide.loc[4, 'als']:.2f} at rank 4 and {wide.loc[32, 'als']:.2f} at rank 32: it gives no mass to sequences that "
        "the model can emit.",
        METHODS,
        holds=wide.loc[32, "als"] < wide.loc[4, "als"],
    )
    page.table(wide.map("{:.3f}".format).reset_index(), METHODS)
    page.figure(
        "methods",
        "Tokens per call by method, n = 3",
        "Mean of both models.",
        partial(
            plot_lines_over_rank,
            three,
            by="method",
            value="tokens_per_call",
            label="tokens per call",
        ),
    )


_CRITERIA = {
    "throughput": "**most tokens per second (the recommendation)**",
    "tolerance": "where the ceiling saturates",
    "marginal_gain": "last doubling that gains 1 %",
    "convex_hull": "elbow of the hull",
}


def told_section(page: Page) -> None:
    """What knowing the first token is worth."""
    told, reference = page.stored(ANCHORED), page.study(REFERENCE)
    keys = told[["model", "context", "horizon"]].drop_duplicates()
    means = [
        table.groupby(["model", "rank"])[OUTCOME].mean().unstack("model")
        for table in (told, reference.merge(keys))
    ]
    rows = []
    for model in MODELS:
        for rank, value in means[0][model].items():
            enough = means[1].index[means[1][model] >= value]
            rows.append(
                {
                    "model": model,
                    "rank": rank,
                    "told the first token": f"{value:.3f}",
                    "not told, same rank": f"{means[1].loc[rank, model]:.3f}",
                    "not told, rank that reaches it": str(min(enough)) if len(enough) else "none",
                }
            )
    reached = {m: next(r for r in rows if r["model"] == m and r["rank"] == 1) for m in MODELS}
    page.heading("What knowing the first token is worth")
    page.say(
        "Rank 1 that is told the first token earns as much as rank "
        + both({m: r["not told, rank that reaches it"] for m, r in reached.items()}, "{}")
        + " that is not.",
        ANCHORED,
        REFERENCE,
    )
    page.add(
        "It is free: decoding keeps the correction token of a cycle, and the next draft begins after it. All heads below are told."
    )
    page.table(pd.DataFrame(rows), ANCHORED, REFERENCE)


def vocabulary_section(page: Page) -> None:
    """What a larger vocabulary changes."""
    table = page.stored(AXIS)
    page.heading("A larger vocabulary")

    def figure(of: str, name: str, told: str) -> str:
        row = table[
            (table["contexts of"] == of) & (table["figure"] == name) & (table["draft"] == told)
        ].iloc[0]
        return f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    names = {
        "rank 16 over rank 1, told": ("rank 16 over rank 1", "told"),
        "rank 16 over rank 1, not told": ("rank 16 over rank 1", "not told"),
        "told over not told, rank 1": ("told over not told, rank 1", "both"),
        "lost at rank 8, told": ("lost at rank 8", "told"),
    }
    firsts = table.drop_duplicates("contexts of").sort_values("vocabulary", kind="stable")
    rows = [
        {"contexts of": one["contexts of"].replace("-135M-Instruct.Q4_1.gguf", "")}
        | {"tokens": f"{one['vocabulary']:,}", "contexts": one["contexts"]}
        | {name: figure(one["contexts of"], *key) for name, key in names.items()}
        for one in firsts.to_dict("records")
    ]
    enough = table[table["figure"].str.startswith("smallest rank") & (table["draft"] == "told")]
    small = enough[enough["vocabulary"] == enough["vocabulary"].min()]["mean"].max()
    large = enough[enough["vocabulary"] == enough["vocabulary"].max()]["mean"].min()
    page.say(
        "Three tokens, temperature 1, fits by em; over more than 104 tokens under top-k 50. Told the first token, a rank of "
        f"{small:.0f} is within 1 % of rank 16 at the smallest vocabulary, and none below {large:.0f}, the largest tried, at the largest: the same orders, "
        "but components are worth more. Models and texts differ along with the vocabulary, so it is not shown that it is the cause.",
        AXIS,
        holds=large > small,
    )
    page.table(pd.DataFrame(rows), AXIS)


def forms_section(page: Page) -> None:
    """Ceilings of every form."""
    forms = page.stored(FORMS)
    shown = pd.DataFrame(
        {
            "model": forms["model"],
            "draft": forms["draft"].str.replace("_", " "),
            "tokens per call": [
                f"{r.tokens_per_call:.3f} ({r.tokens_per_call_low:.3f} to {r.tokens_per_call_high:.3f})"
                for r in forms.itertuples()
            ],
            "more than cp 1, same contexts": [
                ""
                if r.draft == "cp 1"
                else f"{r.gain:+.3f} ({r.gain_low:+.3f} to {r.gain_high:+.3f})"
                for r in forms.itertuples()
            ],
        }
    )
    count = int(forms["contexts"].min())
    page.heading("What a form could bring")
    gated, shared, eight = (
        draft(forms, n, "tokens_per_call") for n in ("markov 16 gated", "markov full", "cp 8")
    )
    page.say(
        f"Drafts of three tokens told the first, fitted by divergence to {count} contexts of each model. "
        f"A chain whose correction is gated by the context, transition rank 16, stands at {both(gated, '{:.3f}')}, eight components at "
        f"{both(eight, '{:.3f}')}; without gates even a full table of corrections stays at {both(shared, '{:.3f}')}.",
        FORMS,
        holds=every(gated, eight) and every(gated, shared),
    )
    wide, narrow = draft(forms, "markov 64 gated", "gain"), draft(forms, "markov 16 gated", "gain")
    page.add(
        f"A transition rank of 64 instead of 16 adds {both({m: wide[m] - narrow[m] for m in MODELS}, '{:+.3f}')}.",
        FORMS,
    )
    shared = page.stored(POPULATION)
    chain, gate, two, components = (
        draft(shared, n, "tokens_per_call")
        for n in ("markov 16", "markov 64 gated", "cp 2", "cp 8")
    )
    page.add(
        f"**These factors are each context's own, which no head has.** With factors that all contexts share, judged on contexts they were not fitted to, the order is another: without gates rank 16 stands at {both(chain, '{:.3f}')}, "
        f"below two components ({both(two, '{:.3f}')}); rank 64 with gates at {both(gate, '{:.3f}')}, below eight ({both(components, '{:.3f}')}; {{doc}}`which_form`).",
        POPULATION,
        holds=every(two, chain) and every(components, gate),
    )
    page.table(shown, FORMS)


def learning_section(page: Page) -> None:
    """What trained heads reach of it."""
    levels, table = page.stored(LEVELS), page.stored(WATERFALL)
    best = best_heads(page)
    page.heading("What training reaches of it")
    share = {m: float(v) for m, v in by_model(best, "share_of_ceiling").items()}
    drafted = {
        m: (by_model(best, "learned")[m] - 1) / (by_model(best, "em_fit")[m] - 1) for m in MODELS
    }  # the first token is the target's own
    lost = {m: by_model(best, "em_fit")[m] - by_model(best, "learned")[m] for m in MODELS}
    page.say(
        f"The best stored heads reach {both(share, '{:.0%}')} of their ceiling over three tokens (token verification), {both(drafted, '{:.0%}')} of what it drafts, since the first token is the model's own; learning loses "
        f"{both(lost)} tokens per call, more than any rank or objective does.",
        WATERFALL,
        holds=all(
            lost[m]
            > max(
                3 - by_model(best, "acceptance_fit")[m],
                by_model(best, "acceptance_fit")[m] - by_model(best, "em_fit")[m],
            )
            for m in MODELS
        ),
    )
    alike = table[table["anchored"] & (table["head"] != "recommended")]
    spread = alike.groupby("model")["learned"].agg(lambda earned: earned.max() - earned.min())
    page.add(
        f"After a short training, the same for every rank, heads of ranks 1 to 16 lie within {both(spread)} of each other, in no order of their ranks.",
        WATERFALL,
        holds=not alike.groupby("model")["learned"]
        .apply(lambda e: e.is_monotonic_increasing)
        .any(),
    )
    for model, rows in table[table["anchored"]].groupby("model"):
        page.figure(
            f"losses-{model}-anchored",
            f"{model}: what is learned, and what is lost",
            "Heads told the first token, three tokens. The second bar of rank 8 is the stored head, trained longer on a larger trunk.",
            partial(plot_losses_over_rank, rows),
        )
    last = levels[levels["budget"] == levels["budget"].max()]
    last = last.sort_values(["model", "tokens_per_call"])
    shown = pd.DataFrame(
        {
            "model": last["model"],
            "head": last["candidate"].map(plainly),
            "tokens per call": [
                f"{r.tokens_per_call:.3f} ({r.tokens_per_call_low:.3f} to {r.tokens_per_call_high:.3f})"
                for r in last.itertuples()
            ],
            "more than cp 1, same texts": [
                ""
                if r.candidate == "cp 1"
                else f"{r.gain:+.3f} ({r.gain_low:+.3f} to {r.gain_high:+.3f})"
                for r in last.itertuples()
            ],
            "parameters": last["parameters"].map("{:,}".format),
            "training, s": last["training_seconds"].map("{:.0f}".format),
            "a draft, ms": last["draft_milliseconds"].map(lambda v: "" if v != v else f"{v:.2f}"),
        }
    )
    budget, seeds = int(last["budget"].max()), int(last["seeds"].min())
    page.say(
        f"The grid: heads of four tokens, every form on the same trunk, at equal training ({budget * 1024:,} positions of own samples, "
        f"{'one seed' if seeds == 1 else f'mean of {seeds} seeds'}, the learning rate of each form chosen on the smallest budget).",
        LEVELS,
    )
    page.table(shown, LEVELS)
    page.say("Who wins depends on what is held equal, from little to much (*or*: not told apart):")
    page.table(_winners(page.stored(WINNERS)), WINNERS)
    wide = {m: candidate(levels, "recurrent, wide", "gain")[m] for m in MODELS}
    small = candidate(levels, "recurrent", "gain")
    page.say(
        f"A wider trunk adds {both({m: wide[m] - small[m] for m in MODELS})} to the recurrent head, more than any doubling of a rank does.",
        LEVELS,
        holds=all(wide[m] - small[m] > step for m in MODELS for step in _doublings(levels, m)),
    )
    told = [
        f"{plainly(row.head)} of {row.model} {row.tokens_per_call:.3f} ({row.tokens_per_call_low:.3f} to {row.tokens_per_call_high:.3f})"
        for row in page.stored(LONGER).rename(columns={"name": "head"}).itertuples()
    ]
    page.add(
        f"After {int(page.stored(LONGER)['positions'].max()):,} positions: {'; '.join(told)}; no other head was trained for so long.",
        LONGER,
    )
    for model in MODELS:
        page.figure(
            f"curves-{model}",
            f"{model}: tokens per call by training",
            "Mean of the seeds, one seed at the largest budget; bars are 95 % intervals over documents.",
            None,
        )


def plainly(name: str) -> str:
    """`recurrent, wide` as a reader says it."""
    return f"wide {name.removesuffix(', wide')}" if name.endswith(", wide") else name


def _winner(row: pd.Series) -> str:
    level = [] if row["tied"] != row["tied"] else row["tied"].split("; ")
    return " or ".join(map(plainly, [row["best"], *level]))


def _doublings(levels: pd.DataFrame, model: str) -> list[float]:
    """What each doubling of the rank of form cp adds at the largest budget."""
    earned = [
        candidate(levels, f"cp {rank}", "tokens_per_call")[model] for rank in (1, 2, 4, 8, 16)
    ]
    return [b - a for a, b in itertools.pairwise(earned)]


def _winners(winners: pd.DataFrame) -> pd.DataFrame:
    """Who is best as more and more of something is spent, a row per model."""
    rows = []
    for (equal, model), part in winners.groupby(["equal", "model"], sort=False):
        best = part.sort_values("value").apply(_winner, axis=1)
        told = ", then ".join(dict.fromkeys(best))
        rows.append({"held equal": _EQUAL[equal], "model": model, "best": told})
    return pd.DataFrame(rows).sort_values("held equal", kind="stable")


_EQUAL = {
    "positions": "positions",
    "training seconds": "training time on this machine",
    "draft milliseconds": "draft time, largest budget",
}


def decoding_section(page: Page) -> None:
    """Forecast against decoding."""
    cells = page.stored(DECODING)
    block = cells[cells["rule"] == "block"]
    inside = (
        (cells["forecast_low"] <= cells["measured_high"])
        & (cells["measured_low"] <= cells["forecast_high"])
    ).mean()
    plain = cells["plain_forecast"] / cells["measured"] - 1
    error = (cells["forecast"] / cells["measured"] - 1).abs()
    gains = cells.pivot(index=["model", "head"], columns="rule", values="measured")
    over = gains["block"] / gains["token"] - 1
    page.heading("Forecast and decoding")
    page.say(
        f"What a *trained* head will earn is known before decoding. {len(block)} heads of the embedded models in lossless decoding by both rules: the forecast is off by {error.mean():.1%} on average and {error.max():.1%} at most, and its interval and that of the "
        f"measurement overlap in {inside:.0%} of cells.",
        DECODING,
    )
    real = page.stored(LONGER_REAL)
    missed = (real["tokens_per_call"] / real["measured"] - 1).abs()
    page.add(
        f"On SmolLM2-135M, {len(real)} cells of temperature and kind of prompt, it is off by {missed.mean():.1%} on average and {missed.max():.1%} at most, where decoding itself is measured to {(real['measured_error'] / real['measured']).mean():.1%}.",
        LONGER_REAL,
    )
    page.add(
        f"Counting all positions alike, as a study over contexts does, promises {plain.mean():.1%} too much on average: a cycle ends where drafting is "
        "hard, and the next one begins there.",
        DECODING,
        holds=plain.mean() > 0,
    )
    page.add(
        f"Block verification earns {over.min():.1%} to {over.max():.1%} more than token verification with the same head.",
        DECODING,
    )
    page.figure(
        "decoding",
        "Tokens per call, forecast and measured",
        "Every head of both models, block verification, four tokens at most.",
        partial(plot_forecast, block),
    )
    best = block.loc[block.groupby("model")["measured"].idxmax()]
    rows = pd.concat([block[block["head"].isin(["r1-anchored", "r16-anchored"])], best])
    page.table(
        pd.DataFrame(
            {
                "model": rows["model"],
                "head": [
                    f"cp {r}{', trained longer' if h == 'recommended' else ''}"
                    for r, h in zip(rows["rank"], rows["head"], strict=True)
                ],
                "forecast": rows["forecast"].map("{:.3f}".format),
                "measured": [
                    f"{r.measured:.3f} ({r.measured_low:.3f} to {r.measured_high:.3f})"
                    for r in rows.itertuples()
                ],
            }
        ).sort_values("model", kind="stable"),
        DECODING,
    )


def puzzles_section(page: Page) -> None:
    """What published observations are explained by."""
    forms, first, levels = page.stored(FORMS), page.stored(FIRST), page.stored(LEVELS)
    reference = page.study(REFERENCE)
    three = reference[reference["horizon"] == 3].groupby("rank")[OUTCOME].mean()
    page.heading("Published puzzles")
    lost = -first[first["budget"] == first["budget"].max()]["difference"]
    page.say(
        "**Rank up, acceptance flat** (an independent re-run of the CP paper on a frozen base). Two causes are seen here. The first position suffers: at the "
        f"largest budget S₂ of every higher rank on the same trunk is {lost.min():.3f} to {lost.max():.3f} below that of rank 1.",
        FIRST,
        holds=lost.min() > 0,
    )
    alike = page.stored(ALIKE)
    alike = alike[alike["variant"] == "cp 8 apart 0.1"].set_index("model")
    first_gain, all_gain = (
        {m: float(alike.loc[m, f"{name}_less_usual"]) for m in MODELS}
        for name in ("survival_2", "tokens")
    )
    least = alike[["survival_2_less_usual_low", "tokens_less_usual_low"]].min().min()
    page.add(
        f"Components that begin alike win {both(first_gain, '{:.3f}')} of it back after 131,072 positions and add {both(all_gain, '{:.3f}')} tokens per call, "
        "which heads are trained with now; the grid's were not.",
        ALIKE,
        holds=least > 0,
    )
    budgets = sorted(levels["budget"].unique())
    gain, short = (
        by_model(levels[(levels["candidate"] == "cp 4") & (levels["budget"] == b)], "gain")
        for b in (budgets[-1], budgets[-2])
    )
    page.add(
        f"And rank needs training: rank 4 gains {both(short)} after {budgets[-2] * 1024:,} positions, {both(gain)} after {budgets[-1] * 1024:,}. "
        "Who stops early sees a flat line.",
        LEVELS,
        holds=every(gain, short),
    )
    steps = [f"{three[b] - three[a]:.2f}" for a, b in ((1, 2), (4, 8), (16, 32))]
    page.say(
        "**CP saturates in its rank** (MTPC: accepted tokens rise little beyond rank 32). Ceilings do so too: from rank 1 to 2, 4 to 8 and 16 to 32 they gain "
        f"{', '.join(steps[:2])} and {steps[2]} tokens per call, not told the first token.",
        REFERENCE,
        holds=three[2] - three[1] > three[8] - three[4] > three[32] - three[16],
    )
    wide, narrow = draft(forms, "markov 64 gated", "gain"), draft(forms, "markov 16 gated", "gain")
    most = max(wide[m] - narrow[m] for m in MODELS)
    page.say(
        "**A transition rank of 256 that nobody chose** (DSpark, DFlash 2). Over 104 tokens and three positions a gated correction of rank 64 adds at most "
        f"{most:.3f} to one of rank 16, with factors of each context's own.",
        FORMS,
    )
    real = page.stored(REAL_POPULATION).set_index("draft")
    ranks = ("16", "64", "256")
    told = ", ".join(f"{real.loc[f'markov {k}', 'gain']:.2f}" for k in ranks)
    page.add(
        f"Over 49,152 tokens (SmolLM2, {int(real.loc['markov 256', 'contexts'])} contexts, factors from text, no gates) ranks 16, 64 and 256 gain {told} on rank 1 of form cp; but "
        "more text still brings the larger ranks nearer to the joint ({doc}`which_form`), so that where the rank saturates is not shown.",
        REAL_POPULATION,
    )
    path = draft(forms, "best path", "tokens_per_call")
    plainest = draft(forms, "cp 1", "tokens_per_call")
    page.say(
        "**More gain at temperature 1 than at 0, and joint drafts that lose under greedy decoding.** A draft that proposes one path can be the best path "
        f"in every form and rank, which earns {both(path)} here at temperature 1, where rank 1, sampled, has a ceiling of {both(plainest)}: components and corrections "
        "pay through sampling. At temperature 0 the target is one path, and what is left is how well a head learns it.",
        FORMS,
        holds=every(plainest, path),
    )


LIMITS = """## What this does not show

* **Scale.** The comparison of forms is of two models of 1.6 million parameters over 104 tokens, mostly characters. Ceilings, curves of three heads and decoding
  of a 135M model stand beside them; nothing larger was run, and no model of billions.
* **More training.** The grid ends far below what one trains for use. Curves still rise there, leads still change, and the largest budget has one seed.
* **Other drafters.** All heads are this library's own on one trunk. No published drafter (EAGLE, Medusa, DFlash, an MTP module with its own weights) was run
  beside them; `recurrent over text` is built as they are, and is forecast, not decoded with.
* **Engines and accelerators.** Times are of this library's loop on two cores of a CPU. A serving engine's kernels, batching and drafters are its own: measure its step curve.
* **Trees and adaptive lengths.** One path of a fixed length is drafted and verified. Trees of drafts, and stopping by confidence, change what a position is worth.
* **Long blocks, trained.** Heads draft four tokens, of a real model six at most. Published blocks have 7 to 16. Ceilings were computed up to eight tokens ({doc}`which_form`), of few contexts.
* **Low temperatures, trained.** Ceilings at low temperatures are stored, heads trained for them are not: the grid is at temperature 1.
* **Drafts that are not sampled, trained.** What argmax proposals lose is said of ceilings. How much of it a trained head loses was not measured."""
