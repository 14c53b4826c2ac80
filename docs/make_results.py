"""Writes results.md and its figures from the stored studies: python docs/make_results.py [FOLDER]."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pandas as pd

from cpmtp.latency import memory_bound_latency
from cpmtp.ranking.parts import OUTCOME
from cpmtp.ranking.scores import context_values
from cpmtp.ranking.selection import compare_criteria, needed_ranks, select_rank
from cpmtp.ranking.summary import method_summary, objective_gap
from cpmtp.report.plots import (
    figure_svg,
    plot_against_entropy,
    plot_contexts,
    plot_forecast,
    plot_lines_over_rank,
    plot_losses_over_rank,
    plot_speedup,
    plot_waterfall,
)
from cpmtp.study.running import read_study

STUDIES = Path(__file__).parents[1] / "data" / "studies"
LATENCY = memory_bound_latency(plain_step=0.02, layers=32)


def main(folder: Path) -> None:
    """The page and its figures."""
    reference, manifest = read_study(STUDIES / "reference")
    methods, _ = read_study(STUDIES / "methods")
    anchored = pd.read_parquet(STUDIES / "anchored" / "table.parquet")
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    pages = [
        _introduction(reference, manifest),
        _recommendation(reference, figures),
        _what_rank_follows(reference, figures),
        _objectives(methods, figures),
        _anchoring(reference, anchored, figures),
        _losses(methods, reference, anchored, figures),
        _decoding(figures),
        _LIMITS,
    ]
    (folder / "results.md").write_text(
        "\n".join(page.strip() + "\n" for page in pages), encoding="utf-8"
    )


def _table(frame: pd.DataFrame) -> str:
    rows = [f"| {' | '.join(map(str, row))} |" for row in frame.itertuples(index=False)]
    return "\n".join(
        [f"| {' | '.join(map(str, frame.columns))} |", f"|{' --- |' * len(frame.columns)}", *rows]
    )


def _figure(figures: Path, name: str, title: str, draw, words: str) -> str:
    (figures / f"{name}.svg").write_text(figure_svg(draw, title, name=name), encoding="utf-8")
    return f"![{title}. {words}](figures/{name}.svg)\n\n*{title}. {words}*"


def _introduction(reference: pd.DataFrame, manifest: dict) -> str:
    contexts = reference.groupby("model")["context"].nunique()
    return f"""# Results of the reference study

Which rank does a multi-token head need? For the two embedded base models the joint distribution of the next two and three tokens
was computed exactly at {contexts.iloc[0]} contexts each, sampled from the model itself, and fitted with CP distributions of ranks
{", ".join(map(str, sorted(reference["rank"].unique())))} by expectation-maximisation. Tokens per call are those of lossless block
verification with the first token from the target ({{doc}}`definitions`). Every figure on this page is computed from the stored
tables by `docs/make_results.py`; versions, settings and hashes are in the manifests beside the tables (seed
{manifest["settings"]["seed"]}). Tokens per call are ceilings of a rank up to
the part on learning, where trained heads come in.
"""


def _recommendation(reference: pd.DataFrame, figures: Path) -> str:
    rows, pictures, found = [], [], []
    for model, part in reference.groupby("model"):
        choices = compare_criteria(part, latency=LATENCY)
        best = choices["throughput"]
        row = best.row(best.horizon)
        found.append(
            f"{model}, horizon {best.horizon} with rank {best.rank[best.horizon]} (ceiling {row.tokens_per_call:.2f} tokens per call)"
        )
        for name, choice in choices.items():
            for n in choice.rank:
                row = choice.row(n)
                rows.append(
                    {
                        "model": model,
                        "criterion": "**throughput (the recommendation)**"
                        if choice.horizon == n
                        else _CRITERIA.get(name, name),
                        "n": n,
                        "rank": ("at least " if choice.at_grid_edge[n] else "")
                        + str(choice.rank[n]),
                        "chosen in": f"{choice.frequency[n][choice.rank[n]]:.0%}",
                        "tokens per call": f"{row.tokens_per_call:.2f}",
                        "95 % interval": f"{row.tokens_per_call_low:.2f} to {row.tokens_per_call_high:.2f}",
                        "speedup of the ceiling": f"{row.speedup:.2f}",
                    }
                )
        pictures.append(
            _figure(
                figures,
                f"speedup-{model}",
                f"Predicted speedup, {model}",
                partial(plot_speedup, choices["throughput"].table),
                "By rank and horizon, calls assumed to cost what reading the weights of 32 layers costs; outlined: the fastest in at "
                "least 5 % of resamples.",
            )
        )
    heads = pd.read_parquet(STUDIES / "head" / "waterfall.parquet")
    best = heads.loc[heads.groupby("model")["learned"].idxmax()]
    reached = [f"{100 * row.learned / row.em_fit:.0f} % ({row.model})" for row in best.itertuples()]
    return f"""## The recommendation

Most tokens per second, if a component costs one more matrix of d × d per position on a 32-layer model (an assumption, not a measurement)
and drafts are not told the first token:
{"; ".join(found)}.
A trained head stays below a ceiling; the best ones here reach {" and ".join(reached)} of theirs (further down).

{_table(pd.DataFrame(rows))}

The criteria disagree, and the disagreement says something. At three tokens every doubling up to rank 64 still gains more than 1 %, so
`tolerance` and `marginal_gain` end at the edge of the grid: the exact joints of these models have no small rank, and their ceilings do not
saturate. Which rank is best depends on what a component costs, which only `throughput` knows; it stays far below.
`convex_hull` looks for an elbow in a curve that hardly has one at n = 3: rank 32 in a third of resamples of code, rank 2 in prose.

{(chr(10) * 2).join(pictures)}
"""


_CRITERIA = {"tolerance": "tolerance (where the ceiling saturates)"}


def _what_rank_follows(reference: pd.DataFrame, figures: Path) -> str:
    needed = needed_ranks(reference, pooled=True)
    summary = (
        needed.groupby(["model", "horizon"])["needed_rank"]
        .describe()[["25%", "50%", "75%"]]
        .astype(int)
        .reset_index()
    )
    summary.columns = ["model", "n", "lower quartile", "median rank", "upper quartile"]
    facts = ["joint_entropy_nats", "first_token_entropy_nats", "total_correlation_nats"]
    correlations = []
    for (model, n), part in needed.groupby(["model", "horizon"]):
        ranked = part[["needed_rank", *facts]].rank().corr()["needed_rank"]
        correlations.append(
            {"model": model, "n": n}
            | {name[:-5].replace("_", " "): f"{ranked[name]:.2f}" for name in facts}
        )
    values = context_values(reference, OUTCOME).xs(3, level="horizon")[[1, 8, 64]]
    points = values.reset_index().melt(
        id_vars=["model", "domain", "document", "context"],
        var_name="rank",
        value_name="tokens_per_call",
    )
    three = needed[needed["horizon"] == 3][["model", "context", "joint_entropy_nats"]]
    points = points.merge(three, on=["model", "context"])
    return f"""## What the needed rank follows

The rank that one context needs (the smallest on the grid within 1 % of that context's best):

{_table(summary)}

From two tokens to three the median rank grows four times in prose and at least five times in code, where it ends at the edge of the
grid; code needs a higher rank than prose. Within a domain it follows how uncertain the target is, its rank correlation with

{_table(pd.DataFrame(correlations))}

{
        _figure(
            figures,
            "entropy",
            "Tokens per call and entropy, n = 3",
            partial(plot_against_entropy, points),
            "Below one nat rank 1 is close to an exact draft at most contexts; a higher rank pays at the uncertain ones.",
        )
    }

{
        _figure(
            figures,
            "contexts",
            "Contexts, n = 3",
            partial(plot_contexts, context_values(reference, OUTCOME).xs(3, level="horizon")),
            "One point per context of both domains; bars are quartiles. The gain is at the hard contexts; the easy ones have nothing to gain.",
        )
    }
"""


def _objectives(methods: pd.DataFrame, figures: Path) -> str:
    summary = method_summary(methods, pooled=True)
    three = summary[summary["horizon"] == 3]
    wide = (
        three.pivot(index="rank", columns="method", values="tokens_per_call")
        .map("{:.3f}".format)
        .reset_index()
    )
    gap = objective_gap(methods)
    gap = gap[gap["horizon"] == 3].groupby("rank")["lost_to_objective"].mean()
    drawn = partial(
        plot_lines_over_rank,
        three,
        by="method",
        value="tokens_per_call",
        label="tokens per call (mean)",
    )
    part = methods[methods["horizon"] == 3]
    high = part[part["rank"] >= 8]
    infinite = (high["kl_nats"] == float("inf")).groupby(high["method"]).mean()
    shares = (part["status"] == "not_converged").groupby(part["method"]).mean()
    stopped = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
    return f"""## Which objective wins

Six methods on twelve contexts per domain (n = 3, mean tokens per call of both domains):

{_table(wide)}

{
        _figure(
            figures,
            "methods",
            "Tokens per call by method, n = 3",
            drawn,
            "Projected least squares (als) falls from rank 4 on; the others rise and draw together.",
        )
    }

Fitting tokens per call itself wins at every rank, by {gap[1]:.2f} over `em` at rank 1, {
        gap[4]:.3f} at rank 4 and {gap[32]:.3f} at
rank 32: the objective matters most at small ranks. Least squares projected to a distribution gives zero to sequences that the
target can emit (infinite divergence at {
        infinite["als"]:.0%} of fits of rank 8 and more) and falls with rank; its non-negative
form `hals` is close to `em` in tokens per call, with infinite divergence at {
        infinite["hals"]:.0%}. Many runs of `gradient`, `hals`,
`mu` and `acceptance` stopped at the last pass allowed by default ({
        stopped
    }): more passes would raise them.
"""


def _shared(reference: pd.DataFrame, anchored: pd.DataFrame) -> pd.DataFrame:
    """Both kinds on the contexts that both have, with intervals."""
    keys = anchored[["model", "context", "horizon"]].drop_duplicates()
    parts = []
    for kind, table in (("unanchored", reference.merge(keys)), ("anchored", anchored)):
        for model, part in table.groupby("model"):
            cells = select_rank(part).table
            parts.append(cells.assign(model=model, kind=kind, draft=f"{model}, {kind}"))
    return pd.concat(parts, ignore_index=True)


def _anchoring(reference: pd.DataFrame, anchored: pd.DataFrame, figures: Path) -> str:
    cells = _shared(reference, anchored)
    rows = []
    for model, part in cells.groupby("model"):
        plain = part[part["kind"] == "unanchored"]
        for row in part[part["kind"] == "anchored"].itertuples():
            enough = plain[plain["tokens_per_call"] >= row.tokens_per_call]["rank"]
            rows.append(
                {
                    "model": model,
                    "anchored rank": row.rank,
                    "tokens per call": f"{row.tokens_per_call:.3f}",
                    "95 % interval": f"{row.tokens_per_call_low:.3f} to {row.tokens_per_call_high:.3f}",
                    "unanchored at that rank": f"{plain[plain['rank'] == row.rank]['tokens_per_call'].iloc[0]:.3f}",
                    "unanchored rank that reaches it": str(enough.min())
                    if len(enough)
                    else "above 64",
                }
            )
    drawn = partial(
        plot_lines_over_rank, cells, by="draft", value="tokens_per_call", label="tokens per call"
    )
    count = anchored.groupby("model")["context"].nunique().iloc[0]
    stopped = (anchored["status"] == "not_converged").mean()
    return f"""## What anchoring is worth

A draft that is told the first token (it is known before the draft is made) has a CP distribution of its own after each first token. On
{count} contexts per domain, n = 3:

{_table(pd.DataFrame(rows))}

{_figure(figures, "anchoring", "Anchored and unanchored, n = 3", drawn, "Means with 95 % bands.")}

Anchored rank 1 is worth an unanchored rank between 4 and 8, anchored rank 2 one between 8 and 32, anchored rank 8 more than any that was
tried. {stopped:.0%} of the anchored fits stopped at the last pass allowed for at least one first token, so their ceilings are, if
anything, higher. The comparison is one of ceilings and not of parameters: an anchored fit has about V times as many. A head
shares them through the embedding of the first token, and what remains of the gain after learning is another question.
"""


def _losses(
    methods: pd.DataFrame, reference: pd.DataFrame, anchored: pd.DataFrame, figures: Path
) -> str:
    gap = objective_gap(methods)
    three = gap[gap["horizon"] == 3][
        [
            "model",
            "rank",
            "acceptance_fit",
            "em_fit",
            "lost_to_rank",
            "lost_to_objective",
            "contexts",
        ]
    ]
    shown = three.round(3).rename(columns=lambda name: name.replace("_", " "))
    stored = STUDIES / "head" / "waterfall.parquet"
    if not stored.is_file():
        learned = "The last step, learning, needs trained heads; no table of theirs is stored yet."
        return f"## Where tokens per call are lost\n\n{_table(shown)}\n\nRank loses most, the objective little. {learned}\n"
    waterfall = pd.read_parquet(stored)
    pictures = [
        _figure(
            figures,
            f"losses-{model}-{'anchored' if anchored else 'unanchored'}",
            f"{model}, three tokens, {'anchored' if anchored else 'unanchored'} heads",
            partial(plot_losses_over_rank, rows),
            "What heads of each rank have learned, and what is lost to learning, to the objective and to the rank. A second bar of a rank "
            "is the recommended head, trained longer.",
        )
        for (model, anchored), rows in waterfall.groupby(["model", "anchored"])
    ]
    pictures += [
        _figure(
            figures,
            f"waterfall-{row['model']}",
            f"{row['model']}: the best head, rank {row['rank']}{', anchored' if row['anchored'] else ''}",
            partial(plot_waterfall, row),
            "From an exact draft to the learned head, n = 3.",
        )
        for _, row in waterfall.loc[waterfall.groupby("model")["learned"].idxmax()].iterrows()
    ]
    told = _table(waterfall.drop(columns=["domain", "horizon", "rule", "exact_limit"]).round(3))
    return (
        f"## Where tokens per call are lost\n\n{_table(shown)}\n\n{_LEARNED}\n{told}\n\n"
        + "\n\n".join(pictures)
        + "\n"
    )


def _decoding(figures: Path) -> str:
    cells = pd.read_parquet(STUDIES / "head" / "decoding.parquet")
    block = cells[cells["rule"] == "block"]
    shown = pd.DataFrame(
        {
            "model": block["model"],
            "head": block["head"],
            "measured": block["measured"].map("{:.3f}".format),
            "95 % interval": [
                f"{low:.3f} to {high:.3f}"
                for low, high in zip(block["measured_low"], block["measured_high"], strict=True)
            ],
            "forecast": block["forecast"].map("{:.3f}".format),
            "off by": (block["forecast"] / block["measured"] - 1).map("{:+.1%}".format),
            "all positions alike": block["plain_forecast"].map("{:.3f}".format),
            "that is off by": (block["plain_forecast"] / block["measured"] - 1).map(
                "{:+.1%}".format
            ),
        }
    )
    inside = (
        (cells["forecast_low"] <= cells["measured_high"])
        & (cells["measured_low"] <= cells["forecast_high"])
    ).mean()
    gains = cells.pivot(index=["model", "head"], columns="rule", values="measured")
    over = gains["block"] / gains["token"] - 1
    wrong = (cells["forecast"] / cells["measured"] - 1).abs()
    plain = cells["plain_forecast"] / cells["measured"] - 1
    figure = _figure(
        figures,
        "decoding",
        "Tokens per call, forecast and measured",
        partial(plot_forecast, block),
        "Every head of both models in lossless decoding, block verification, four tokens at most.",
    )
    return f"""## Forecast and decoding

Every head in real decoding: 192 prompts of 64 tokens drawn from the model itself, 160 new tokens each, temperature 1. The forecast
needs no decoding with the head: it weighs the positions of plainly decoded text by the probability that a cycle starts there.

{_table(shown)}

{figure}

Forecast and measurement have overlapping intervals in {inside:.0%} of all cells (both rules); the forecast is off by {wrong.mean():.1%}
on average and {wrong.max():.1%} at most. Counting all positions alike, as a study over contexts does, promises {plain.mean():.1%} too
much on average and up to {plain.max():.1%}: cycles end where drafting is hard, and the next one begins there. Block verification earns
{over.min():.1%} to {over.max():.1%} more than token verification with the same head.
"""


_LEARNED = """The learned heads, on the 32 first contexts of the reference study: token verification, the first token from the
target, the first three of the heads' four tokens. A fit of the same rank to each context's own exact joint, made for acceptance
or by expectation-maximisation, is what the head is measured against; intervals are BCa over contexts. Heads whose name is a
rank were trained alike, in 400 (code) and 300 (prose) steps of 4 windows; `recipe.json` beside each stored head tells the rest.
"""


_LIMITS = """## What this does not show

* Two small models of about 1.6 million parameters over 104 tokens; ranks of large models with large vocabularies may differ.
* Horizons 2 and 3: a dense joint of four tokens over this vocabulary takes 0.9 GB, and its fits some ten times that.
* One random start per fit; at n = 3 and rank 64 one fit in five stopped at the last pass allowed. Those ceilings are a little low.
* Ceilings are fits to one context each. A head has to find them from a hidden state.
* The speedups rest on an assumed latency model that reads weights and does nothing else.
"""


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
