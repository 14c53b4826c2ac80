"""What was found on temperature, on a real model and along the waterfall, each told where its table
is stored.
"""

from __future__ import annotations

import pandas as pd
from page import Page

PROPOSALS = "bounds/proposals.csv"
REAL, TIMES = "real_model/heads_longer.csv", "real_model/decoding_time.csv"
HEAD = "recurrent, 524k"
BY_FORM = "waterfall/summary.csv"
_GATED, _PLAIN = "markov 16 gated", "cp 1"
_MODELS = ("code", "prose")


def temperature_section(page: Page) -> None:
    """Forms, sampled and not, and copying, by temperature."""
    page.heading("What temperature changes")
    _forms_by_temperature(page)
    _copying(page)
    _in_time(page)


def _forms_by_temperature(page: Page) -> None:
    table = page.stored(PROPOSALS)
    fitted = table[table["tokens_per_call_argmax"].notna()]
    count = int(table["contexts"].min())
    gains = gains_by_temperature(table)
    page.say(
        f"Anchored drafts of three tokens under top-k 16, fitted by divergence to {count} contexts of each model at every temperature. "
        f"What the gated chain adds to rank 1 is {_falling(gains)}; at temperature 1 the intervals of that are {_between(table)}.",
        PROPOSALS,
        holds=falls(gains),
    )
    warm = fitted[fitted["temperature"] > 0]
    spread = warm.groupby(["model", "temperature"])["tokens_per_call_argmax"].agg(["min", "max"])
    apart = float((spread["max"] - spread["min"]).max())
    lost = warm["tokens_per_call"] - warm["tokens_per_call_argmax"]
    page.add(
        f"Where the same drafts are not sampled (each proposes its most probable token), forms and ranks lie within {apart:.3f} tokens per call of each other at every "
        f"temperature, and a draft loses {lost.min():.2f} to {lost.max():.2f} by not being sampled above temperature 0: under argmax proposals the ceiling knows no gain of form or rank.",
        PROPOSALS,
        holds=lost.min() > 0 and apart < lost.max(),
    )
    rows = []
    for (model, temperature), part in table.groupby(["model", "temperature"], sort=False):
        by = part.set_index("draft")
        row = {"model": model, "temperature": f"{temperature:g}"}
        for name in fitted["draft"].unique():
            sampled, argmax = by.loc[name, ["tokens_per_call", "tokens_per_call_argmax"]]
            row[name] = f"{sampled:.3f} · {argmax:.3f}"
        rows.append(row | {"best path": f"{by.loc['best path', 'tokens_per_call']:.3f}"})
    page.say("Ceilings in tokens per call, sampled · not sampled:")
    page.table(pd.DataFrame(rows), PROPOSALS)


def _copying(page: Page) -> None:
    table = page.stored(REAL)
    told = []
    for domain, rows in table.groupby("domain"):
        each = ", ".join(
            f"{r.lookup:.2f} and {r.measured:.2f} at temperature {r.temperature:g}"
            for r in rows.sort_values("temperature", ascending=False).itertuples()
        )
        told.append(f"{each} ({domain})")
    page.say(
        "**Copying gains what forms lose.** On SmolLM2-135M-Instruct, prompts of code and of prose, prompt lookup and a recurrent head of 524,288 positions, of the same horizon, earn "
        f"{'; '.join(told)}.",
        REAL,
        holds=_copies_when_cold(table),
    )
    page.add(
        "Prompt lookup ({doc}`real_model`) is a forecast on the same texts, not decoded, and a small model's text goes round in circles at low temperatures, which a larger one's may not."
        ""
    )


def _copies_when_cold(table: pd.DataFrame) -> bool:
    by = table.set_index(["domain", "temperature"]).sort_index()
    falling = all(
        by.loc[domain]["lookup"].is_monotonic_decreasing for domain in table["domain"].unique()
    )
    cold, warm = by.xs(0.0, level="temperature"), by.xs(1.0, level="temperature")
    return (
        falling
        and (cold["lookup"] > cold["measured"]).all()
        and (warm["lookup"] < warm["measured"]).all()
    )


def _in_time(page: Page) -> None:
    times = page.stored(TIMES)
    real = times[times["head"] == HEAD]
    alone, four = (real[real["batch"] == batch]["speedup"] for batch in (1, 4))
    running = real[real["batch"] == 4]["full_speedup"]
    page.say(
        f"**In time** that head decodes {alone.min():.2f} to {alone.max():.2f} times as fast as plain decoding, one request at a time, and {four.min():.2f} to {four.max():.2f} times with four requests together, whose rows "
        f"wait for the slowest (over the cycles in which all four run, {running.min():.2f} to {running.max():.2f}): here a batch of four that ends together is better decoded plainly.",
        TIMES,
        holds=alone.min() > 1 > four.max(),
    )
    stored = times[
        times["head"].isin(["recommended", "recommended (EPYC)"]) & (times["batch"] == 1)
    ]
    cold, warm = (stored[stored["temperature"] == t]["speedup"] for t in (0.0, 1.0))
    page.add(
        f"The embedded models' stored heads of rank 8 come to {cold.min():.2f} to {cold.max():.2f} times at temperature 0 and {warm.min():.2f} to {warm.max():.2f} at 1, on two processors: "
        "a speed is one processor's, tokens per call are not.",
        TIMES,
        holds=cold.max() > warm.max(),
    )


def forms_lost_section(page: Page) -> None:
    """Where tokens are lost by heads of every form."""
    table = page.stored(BY_FORM)
    rows = [
        {
            "model": r.model,
            "head": _named(r),
            "lost to form and rank": f"{r.rank_gap:.2f}",
            "to the objective": f"{r.objective_gap:.2f}",
            "to learning": _ranged(r, "learning_gap"),
            "trained head": _ranged(r, "learned"),
            "ceiling above cp 1": _ranged(r, "acceptance_fit_gain", signed=True),
            "head above cp 1": _ranged(r, "learned_gain", signed=True),
        }
        for r in table.itertuples()
    ]
    least = table["learning_gap"].min()
    rest = (table["rank_gap"] + table["objective_gap"]).max()
    page.heading("Where tokens are lost, by form")
    page.say(
        f"Heads of {_positions(table)} positions against the joints of {int(table['contexts'].min())} contexts of each model, of three tokens per call: learning loses {least:.2f} and more whatever the form, "
        f"form, rank and objective together {rest:.2f} at most.",
        BY_FORM,
        holds=least > rest,
    )
    kept = table.set_index(["model", "form", "rank"])
    of_rank, of_chain = (
        [kept.loc[(m, *which)] for m in _MODELS] for which in (("cp", 8), ("markov", 1))
    )
    page.add(
        "**Of what a ceiling promises over rank 1, so short a training gives a chain a good part and components little**: of "
        + " and ".join(f"{row.acceptance_fit_gain:.2f}" for row in of_chain)
        + f" ({' and '.join(_MODELS)}) the Markov head has "
        + " and ".join(_ranged(row, "learned_gain") for row in of_chain)
        + ", of "
        + " and ".join(f"{row.acceptance_fit_gain:.2f}" for row in of_rank)
        + " rank 8 has "
        + " and ".join(_ranged(row, "learned_gain") for row in of_rank)
        + ", in the same contexts.",
        BY_FORM,
        holds=all(
            c.learned_gain_low > 0 and c.learned_gain > 2 * r.learned_gain
            for c, r in zip(of_chain, of_rank, strict=True)
        ),
    )
    page.table(pd.DataFrame(rows), BY_FORM)


def _ranged(row, name: str, signed: bool = False) -> str:
    """A mean and its interval."""
    mean, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{mean:{'+' if signed else ''}.2f} ({low:.2f} to {high:.2f})"


def _positions(table: pd.DataFrame) -> str:
    """Of the heads' training, which their names tell: `code-128k-…`."""
    budgets = table["head"].str.extract(r"-(\d+)k-", expand=False).astype(int).unique()
    return " and ".join(f"{budget * 1024:,}" for budget in sorted(budgets))


def _named(row) -> str:
    known = {"markov": f"markov {row.transition_rank}", "recurrent": "recurrent"}
    known["markov_mixture"] = f"mixture {row.rank}, {row.transition_rank}"
    return known.get(row.form, f"{row.form} {row.rank}")


def gains_by_temperature(table: pd.DataFrame) -> pd.DataFrame:
    """Of the gated chain on rank 1: a row per temperature, rising; a column per model."""
    rows = table[table["draft"] == _GATED]
    return rows.pivot(index="temperature", columns="model", values="gain").sort_index()


def falls(gains: pd.DataFrame) -> bool:
    """Whether they are the smaller the lower the temperature, for each model."""
    return all(gains[model].is_monotonic_increasing for model in _MODELS)


def _between(table: pd.DataFrame) -> str:
    rows = table[(table["draft"] == _GATED) & (table["temperature"] == 1)].set_index("model")
    return " and ".join(
        f"{rows.loc[m, 'gain_low']:.2f} to {rows.loc[m, 'gain_high']:.2f} ({m})" for m in _MODELS
    )


def _falling(gains: pd.DataFrame) -> str:
    return ", ".join(
        f"{row['code']:.2f} (code) and {row['prose']:.2f} (prose) at temperature {temperature:g}"
        for temperature, row in gains[::-1].iterrows()
    )
