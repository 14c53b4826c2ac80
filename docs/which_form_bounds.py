"""The part of "which form" that is read off the studies of bounds: factors that contexts share,
longer blocks, proposals, a real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cpmtp.resampling import CLUSTER_KEYS, Clusters, intervals

STUDIES = Path(__file__).resolve().parents[1] / "data" / "studies"
MODELS = ("code", "prose")
SHARED = ("cp 1", "cp 2", "cp 8", "markov 16", "markov 16 gated", "markov 64 gated")
SHARED = (*SHARED, "markov_mixture 2, 16 gated", "markov_mixture 4, 16 gated")
REAL = Path("bounds") / "real"
# What grows with the block, and how a reader meets it.
GROWTH = {
    "share won by markov 16": "markov 16 on cp 1",
    "share won by cp 8": "cp 8 on cp 1",
    "markov 16 over cp 8": "markov 16 less cp 8, tokens",
    "hmm 4 over cp 4": "hmm 4 less cp 4, tokens",
    "beyond one token of memory": "all memory less one token's, tokens",
}


def summary(name: str | Path) -> pd.DataFrame:
    """One of the stored summaries."""
    return pd.read_csv(STUDIES / f"{name}.csv")


def said(row: pd.Series, name: str, signed: bool = False, form: str = ".3f") -> str:
    """A mean with its interval."""
    mean, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    sign = "+" if signed else ""
    return f"{mean:{sign}{form}} [{low:{sign}{form}}, {high:{sign}{form}}]"


def row(table: pd.DataFrame, **named) -> pd.Series:
    """The only row of these values."""
    for key, value in named.items():
        table = table[table[key] == value]
    (found,) = (one for _, one in table.iterrows())
    return found


def paired(
    name: str | Path, first: str, second: str, value: str = "tokens_per_call", **named
) -> str:
    """Of one draft less another's in the same contexts."""
    table = pd.read_parquet(STUDIES / f"{name}.parquet")
    for key, wanted in named.items():
        table = table[table[key] == wanted]
    index = [*CLUSTER_KEYS, "context"]
    wide = table.pivot(index=index, columns="draft", values=value)
    clusters = Clusters.of((wide[first] - wide[second]).dropna().to_frame())
    low, high = intervals(clusters, seed=0)
    return f"{clusters.means()[0]:+.3f} [{low[0]:+.3f}, {high[0]:+.3f}]"


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def levels_and_gains(table: pd.DataFrame) -> str:
    """A line per draft of a summary."""
    rows = [
        [one["draft"], said(one, "tokens_per_call"), said(one, "gain", signed=True)]
        for _, one in table.iterrows()
    ]
    return table_of(["draft", "tokens per call", "gain on cp 1"], rows)


def both(say, models=MODELS) -> str:
    """The same said of both models."""
    return "; ".join(f"{model} {say(model)}" for model in models)


def shared_factors() -> Iterator[str]:
    """Factors of contexts, judged on others."""
    told, not_told = summary("bounds/population"), summary("bounds/not_told")
    yield "## Factors that all contexts share"
    yield (
        "A head stores its left and right factors once. Here they are fitted on 24 contexts "
        "(`cpmtp.fit_population`) and judged on others, where all that a head outputs is free: three "
        "tokens, T = 1, the whole distribution, gain on cp 1 in the same contexts; mixtures have the "
        "gated chain's factors of rank 16 and few passes, so that theirs are lower bounds. In "
        "parentheses contexts of each model."
    )
    rows = []
    for name in SHARED:
        cells = [name]
        for table in (told, not_told):
            for model in MODELS:
                one = row(table, model=model, draft=name, horizon=3)
                gain = "" if name == "cp 1" else f", {said(one, 'gain', signed=True)}"
                cells.append(f"{one['tokens_per_call']:.3f}{gain} ({one['contexts']:.0f})")
        rows.append(cells)
    heads = [f"{model}, {way}" for way in ("told", "not told") for model in MODELS]
    yield table_of(["draft", *heads], rows)

    def over(first: str, second: str) -> str:
        return both(lambda m: paired("bounds/population", first, second, model=m))

    yield (
        "Told the first token, a bias that all contexts share is worth less than a second component "
        f"(markov 16 over cp 2: {over('markov 16', 'cp 2')}); with gates of the context's own it is worth "
        f"more at rank 64 (over cp 2: {over('markov 64 gated', 'cp 2')}) and no more than eight components "
        f"(markov 64 gated over cp 8: {over('markov 64 gated', 'cp 8')})."
    )


def longer_blocks() -> Iterator[str]:
    """What grows with the block."""
    growth = summary("bounds/growth")
    growth = growth[growth["of"] == "all"]
    yield "## Longer blocks"
    yield (
        "Told the first token, factors a context's own, complete joints under top-k 4: what a form adds "
        "to cp 1 as a share of its tokens per call, and differences in tokens per call. *One token of "
        "memory* is the full chain: the joint's own distribution of each token given the one before."
    )
    rows = []
    for model in MODELS:
        for horizon in sorted(growth["horizon"].unique()):
            cells = []
            for figure in GROWTH:
                one = row(growth, model=model, horizon=horizon, figure=figure)
                share = figure.startswith("share")
                cells.append(said(one, "mean", signed=True, form=".0%" if share else ".3f"))
            rows.append([model, f"{horizon}", f"{one['contexts']:.0f}", *cells])
    yield table_of(["model", "tokens", "contexts", *GROWTH.values()], rows)
    yield (
        "So the gain of a transition grows with the block. Components and hidden states of as many are "
        "the same up to four tokens (three modelled) and part after that; eight components fall behind the "
        "transition from six tokens on; memory beyond one token of it is worth little at four tokens and "
        "tenths of a token at six. The longest block has few contexts, other ones: it is to be read by "
        "itself."
    )


def proposals() -> Iterator[str]:
    """Sampled and not."""
    table = summary("bounds/proposals")
    yield "## Sampled drafts and argmaxes"
    yield (
        "Three tokens under top-k 16, told the first token, the same fits proposed by sampling and by their "
        f"argmax token by token ({table['contexts'].min():.0f} contexts per model). At temperature 0 every draft "
        "earns all three tokens."
    )
    drafts = ("cp 1", "cp 4", "markov 16", "markov 16 gated")
    rows = []
    for model in MODELS:
        for temperature in sorted(table["temperature"].unique()):
            for name in drafts:
                one = row(table, model=model, temperature=temperature, draft=name)
                path = row(table, model=model, temperature=temperature, draft="best path")
                cells = [f"{one['tokens_per_call']:.3f}", said(one, "gain", signed=True)]
                argmax = f"{one['tokens_per_call_argmax']:.3f}"
                best = f"{path['tokens_per_call']:.3f}"
                rows.append([model, f"{temperature:g}", name, *cells, argmax, best])
    head = ["model", "T", "draft", "sampled", "gain on cp 1", "argmax", "best path"]
    yield table_of(head, [cells for cells in rows if cells[1] != "0"])


def real_vocabulary() -> Iterator[str]:
    """SmolLM2, as far as it was computed."""
    found = [REAL / stage for stage in ("population", "curve")]
    found = [name for name in found if (STUDIES / f"{name}.csv").exists()]
    if not found:
        return
    source = found[0]
    table = summary(source)
    raw = pd.read_parquet(STUDIES / f"{source}.parquet")
    contexts = int(table["contexts"].max())
    yield "## A vocabulary of 49,152"
    yield (
        f"SmolLM2-135M-Instruct in bfloat16 on {contexts} contexts of 96 tokens, sources of the standard library and "
        "its documentation in turn, none of them among the texts the factors come from: three tokens "
        "under top-k 50, told the first, block rule. Left and right factors come from positions of text: "
        "at each the model's four likeliest next tokens, and what follows each of them, normalised over "
        "the sixteen likeliest and the position's own support; the logits of each position are free."
    )
    shown = table[~table["draft"].str.contains(" of |, few first|, unembedding")]
    rows = []
    for one in shown.to_dict("records"):
        gain = "" if one["draft"] == "cp 1" else said(pd.Series(one), "gain", signed=True)
        level = said(pd.Series(one), "tokens_per_call")
        count = f"{one['contexts']:.0f}"
        rows.append([f"{one['temperature']:g}", one["draft"], count, level, gain])
    yield table_of(["T", "draft", "contexts", "tokens per call", "gain on cp 1"], rows)

    single = raw[raw["temperature"] == 1.0]
    single = single[single["positions"].notna() & ~single["draft"].str.contains(",")]
    positions = sorted(int(count) for count in single["positions"].unique() if count)
    names = {
        (width, count): single[
            (single["transition_rank"] == width) & (single["positions"] == count)
        ]
        for width in sorted(int(k) for k in single["transition_rank"].unique() if k)
        for count in positions
    }
    rows = []
    for width in sorted({width for width, _ in names}):
        cells = [f"{width}"]
        for count in positions:
            own = names[width, count]["draft"].unique()
            if not len(own):
                cells.append("")
                continue
            one = row(table, temperature=1.0, draft=own[0])
            gain = "" if pd.isna(one["gain"]) else f"; {said(one, 'gain', signed=True)}"
            cells.append(f"{one['kl_nats']:.3f}{gain}")
        rows.append(cells)
    yield (
        "Chains without gates, by the rank of their factors and the positions of text they come from: "
        "divergence in nats, and gain on cp 1 where it was computed "
        f"(cp 1: {row(table, temperature=1.0, draft='cp 1')['kl_nats']:.3f})."
    )
    yield table_of(["k", *[f"{count:,} positions" for count in positions]], rows)
    last, before = positions[-1], positions[-2]
    flat = []
    for width in (16, 64):
        draft, fewer = f"markov {width}", f"markov {width} of {before}"
        more = paired(source, draft, fewer, "kl_nats", temperature=1.0)
        flat.append(f"{more} at k = {width}")
    top = paired(source, "markov 256", "markov 64", "kl_nats", temperature=1.0)
    yield (
        f"In nats, from {before:,} to {last:,} positions: {'; '.join(flat)}. From k = 64 to 256 at {last:,} positions: "
        f"{top}. Saturation in k can be claimed only where more positions change nothing."
    )
    rows = []
    for name in ("cp 1", "markov 16"):
        free, through = f"{name}, few first", f"{name}, unembedding"
        cells = [
            said(row(table, temperature=1.0, draft=each), "tokens_per_call")
            for each in (free, through)
        ]
        rows.append([name, *cells, paired(source, through, free, temperature=1.0)])
    yield (
        "What a head can output: logits that are the unembedding's products with one vector of 576 numbers "
        "for each first token and position, beside any logits (first tokens of less than a hundredth "
        "earn one token in both)."
    )
    yield table_of(["draft", "any logits", "through the unembedding", "difference"], rows)
    yield from _of_contexts()


def _of_contexts() -> Iterator[str]:
    """A lower temperature, factors of few contexts, and longer blocks."""
    if (STUDIES / f"{REAL / 'cooler'}.csv").exists():
        table = summary(REAL / "cooler")
        yield (
            f"At temperature {table['temperature'].max():g}, under top-k 50 as well, factors a context's own "
            f"({table['contexts'].max():.0f} contexts; few passes of the larger fits, so lower bounds):"
        )
        yield levels_and_gains(table)
    if (STUDIES / f"{REAL / 'others'}.csv").exists():
        table = summary(REAL / "others")
        yield (
            "Gated factors of rank 64 from 48 contexts themselves, under top-k 16, judged on "
            f"{table['contexts'].max():.0f} others, beside those from text:"
        )
        yield levels_and_gains(table)
    if (STUDIES / f"{REAL / 'growth'}.csv").exists():
        growth = summary(REAL / "growth")
        growth = growth[growth["of"] == "all"]
        rows = []
        for horizon in sorted(growth["horizon"].unique()):
            own = growth[growth["horizon"] == horizon].set_index("figure")
            cells = [
                said(own.loc[name], "mean", True, ".0%" if name.startswith("share") else ".3f")
                for name in GROWTH
            ]
            rows.append([f"{horizon}", f"{own['contexts'].iloc[0]:.0f}", *cells])
        yield "Its longer blocks under top-k 4, as above:"
        yield table_of(["tokens", "contexts", *GROWTH.values()], rows)
