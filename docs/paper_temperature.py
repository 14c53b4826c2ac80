"""What was found on temperature, on a real model and along the waterfall, each told where its table
is stored.
"""

from __future__ import annotations

import pandas as pd
from page import Page

PROPOSALS = "bounds/proposals.csv"
REAL, TIMES = "real_model/heads.csv", "real_model/decoding_time.csv"
BY_FORM = "waterfall/summary.csv"
_GATED, _PLAIN = "markov 16 gated", "cp 1"
_MODELS = ("code", "prose")


def temperature_line(page: Page) -> None:
    """The finding in the abstract."""
    if page.has(PROPOSALS):
        gains = _gains(page.stored(PROPOSALS))
        page.add(
            "* **The lower the temperature, the less the form can bring.** A gated chain's ceiling is above that of rank 1 by "
            f"{_falling(gains)}: at temperature 0 every form can be exact, and only learning is left.",
            PROPOSALS,
            holds=_falls(gains) and gains.iloc[0].abs().max() < 1e-6,
        )
    lookup = _lookup(page.stored(REAL))
    low, high = lookup.iloc[0], lookup.iloc[-1]
    page.add(
        f"* And the more copying brings: on SmolLM2 (code) prompt lookup earns {high['lookup']:.2f} tokens per call at temperature 1 and "
        f"{low['lookup']:.2f} at 0, a head that has hardly been trained {high['measured']:.2f} and {low['measured']:.2f}.",
        REAL,
        holds=low["lookup"] > low["measured"] and high["lookup"] < high["measured"],
    )


def temperature_section(page: Page) -> None:
    """Forms, sampled and not, and copying, by temperature."""
    page.heading("What temperature changes")
    if page.has(PROPOSALS):
        _forms_by_temperature(page)
    _copying(page)


def _forms_by_temperature(page: Page) -> None:
    table = page.stored(PROPOSALS)
    fitted = table[table["tokens_per_call_argmax"].notna()]
    count = int(table["contexts"].min())
    gains = _gains(table)
    page.say(
        f"Anchored drafts of three tokens under top-k 16, fitted by divergence to {count} contexts of each model at every temperature. "
        f"What the gated chain adds to rank 1 is {_falling(gains)}.",
        PROPOSALS,
        holds=_falls(gains),
    )
    warm = fitted[fitted["temperature"] > 0]
    spread = warm.groupby(["model", "temperature"])["tokens_per_call_argmax"].agg(["min", "max"])
    apart = float((spread["max"] - spread["min"]).max())
    lost = warm["tokens_per_call"] - warm["tokens_per_call_argmax"]
    page.add(
        f"Where the same drafts are not sampled (each proposes its most probable token), forms and ranks lie within {apart:.3f} tokens per call of each other at every "
        f"temperature, and a draft loses {lost.min():.2f} to {lost.max():.2f} by not being sampled above temperature 0: servers that propose argmaxes see no gain of form or rank but that of learning.",
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
    lookup = _lookup(page.stored(REAL))
    told = [
        f"{row['lookup']:.2f} at temperature {temperature:g}"
        for temperature, row in lookup[::-1].iterrows()
    ]
    page.say(
        "Copying gains what forms lose. On SmolLM2-135M-Instruct, prompts of code, prompt lookup of the same horizon earns "
        f"{', '.join(told)}; the recurrent head, after few positions, decoded between {lookup['measured'].min():.2f} and {lookup['measured'].max():.2f} at all of them "
        "(prompt lookup is a forecast on the same texts, not decoded; a small model's text goes round in circles at low temperatures; {doc}`real_model`).",
        REAL,
        holds=lookup["lookup"].is_monotonic_decreasing,
    )
    times = page.stored(TIMES)
    stored = times[(times["head"] == "recommended") & (times["batch"] == 1)]
    by = stored.set_index(["model", "temperature"])
    speed, tokens, share = by["speedup"], by["tokens_per_call"], by["verification_share"]
    page.add(
        "In time, the embedded models' stored heads are "
        + " and ".join(
            f"{speed[m, 0.0]:.2f} times ({m}) as fast as plain decoding at temperature 0, {speed[m, 1.0]:.2f} at 1, with {tokens[m, 0.0]:.2f} and "
            f"{tokens[m, 1.0]:.2f} tokens per call"
            for m in _MODELS
        )
        + f"; verification, which only compares tokens at temperature 0, takes {share.xs(0.0, level=1).max():.0%} of a cycle there and {share.xs(1.0, level=1).max():.0%} at 1.",
        TIMES,
        holds=all(speed[m, 0.0] > speed[m, 1.0] for m in _MODELS),
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
        f"Heads of the grid against the joints of {int(table['contexts'].min())} contexts of each model, of three tokens per call: learning loses {least:.2f} and more whatever the form, "
        f"form, rank and objective together {rest:.2f} at most.",
        BY_FORM,
        holds=least > rest,
    )
    kept = table.set_index(["model", "form", "rank"])
    of_rank, of_chain = (
        [kept.loc[(m, *which)] for m in _MODELS] for which in (("cp", 8), ("markov", 1))
    )
    page.add(
        "**What a ceiling promises over rank 1, a chain keeps in good part and components do not**: of "
        + _and(f"{row.acceptance_fit_gain:.2f}" for row in of_chain)
        + f" ({' and '.join(_MODELS)}) the Markov head has "
        + _and(_ranged(row, "learned_gain") for row in of_chain)
        + ", of "
        + _and(f"{row.acceptance_fit_gain:.2f}" for row in of_rank)
        + " rank 8 has "
        + _and(_ranged(row, "learned_gain") for row in of_rank)
        + ", in the same contexts.",
        BY_FORM,
        holds=all(
            c.learned_gain_low > 0 and c.learned_gain > 2 * r.learned_gain
            for c, r in zip(of_chain, of_rank, strict=True)
        ),
    )
    page.table(pd.DataFrame(rows), BY_FORM)


def _and(parts) -> str:
    return " and ".join(parts)


def _ranged(row, name: str, signed: bool = False) -> str:
    """A mean and its interval."""
    mean, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{mean:{'+' if signed else ''}.2f} ({low:.2f} to {high:.2f})"


def _named(row) -> str:
    known = {"markov": f"markov {row.transition_rank}", "recurrent": "recurrent"}
    known["markov_mixture"] = f"mixture {row.rank}, {row.transition_rank}"
    return known.get(row.form, f"{row.form} {row.rank}")


def _gains(table: pd.DataFrame) -> pd.DataFrame:
    """Of the gated chain on rank 1: a row per temperature, rising; a column per model."""
    rows = table[table["draft"] == _GATED]
    return rows.pivot(index="temperature", columns="model", values="gain").sort_index()


def _falls(gains: pd.DataFrame) -> bool:
    return all(gains[model].is_monotonic_increasing for model in _MODELS)


def _falling(gains: pd.DataFrame) -> str:
    return ", ".join(
        f"{row['code']:.2f} (code) and {row['prose']:.2f} (prose) at temperature {temperature:g}"
        for temperature, row in gains[::-1].iterrows()
    )


def _lookup(table: pd.DataFrame) -> pd.DataFrame:
    """Prompt lookup beside what the head decoded, prompts of code: a row per temperature, rising."""
    return table[table["domain"] == "code"].set_index("temperature").sort_index()
