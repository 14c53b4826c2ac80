"""What was found on the forecast before training: its errors, the choice by it, and three heads
trained and decoded after they had been forecast.
"""

from __future__ import annotations

import pandas as pd
from page import Page

BACKTEST, CHOICES = "backtest/backtest.parquet", "backtest/choices.parquet"
DIFFERENT = 0.03  # share of tokens per second from which a choice matters
WITHIN = 0.05  # what a forecast of a head was to keep
END_TO_END = tuple(f"end_to_end/{name}/measured.parquet" for name in ("code", "prose", "smollm2"))


def judged(page: Page) -> pd.DataFrame:
    """Forecasts of four tokens of groups that were left out, from all of their probes."""
    table = page.stored(BACKTEST)
    table = table[(table["left_out"] == "group") & (table["horizon"] == 4)]
    return table[table["probes"] == "all probes"]


def errors(page: Page) -> pd.Series:
    """Relative, of every judged forecast."""
    table = judged(page)
    return (table["forecast"] / table["truth"] - 1).abs()


def straight_errors(page: Page) -> pd.Series:
    """Relative, of a straight line through the last two probes."""
    table = judged(page)
    return (table["straight"] / table["truth"] - 1).abs()


def choice_losses(page: Page) -> pd.Series:
    """Share of the best candidate's tokens per second that each rule of choosing gives away where
    candidates differ: the mean over groups.
    """
    table = page.stored(CHOICES)
    table = table[(table["probes"] == "all probes") & (table["spread"] > DIFFERENT)]
    return table.groupby(["group", "rule"])["loss"].mean().groupby("rule").mean()


def backtest_section(page: Page) -> None:
    """Forecasts of heads that were not trained yet, held against those that then were."""
    table, error, straight = judged(page), errors(page), straight_errors(page)
    groups = table["group"].nunique()
    page.heading("The forecast before training")
    page.say(
        f"Curves of {groups} groups (a model with a kind of text), each forecast by shapes from the others only. **Levels are forecast as well as was hoped** (3 % in the median and 8 % in nine of ten at eight "
        f"times the probe), by a method that was thought of with all groups but the real model's in view: over all {len(table)} forecasts the median error is {error.median():.1%}, nine in ten are below {error.quantile(0.9):.1%}.",
        BACKTEST,
        holds=error.median() < 0.03 and error.quantile(0.9) < 0.08,
    )
    page.add(
        f"A straight line through the last two probes is off by {straight.median():.1%} and {straight.quantile(0.9):.1%}.",
        BACKTEST,
        holds=straight.median() > error.median() and straight.quantile(0.9) > error.quantile(0.9),
    )
    signed = table.assign(error=table["forecast"] / table["truth"] - 1)
    means = signed.groupby("group")["error"].mean()
    page.add(
        f"The forecasts of one group err alike, on average from {means.min():+.1%} to {means.max():+.1%} by group: {len(table)} forecasts are {groups} independent trials rather than {len(table)}.",
        BACKTEST,
    )
    least = table.groupby("group")["inside"].mean()
    page.add(
        f"Of their 90 % intervals {table['inside'].mean():.0%} hold the truth, {least.min():.0%} in the group where the fewest do; "
        f"with the scale of the error known from {groups - 1} other groups only, they err on the wide side.",
        BACKTEST,
        holds=table["inside"].mean() > 0.9 and least.min() > 0.5,
    )
    page.table(_by_times(table, error), BACKTEST)
    _choice(page)
    _end_to_end(page)


def _by_times(table: pd.DataFrame, error: pd.Series) -> pd.DataFrame:
    rows = []
    for times, part in error.groupby(table["times"]):
        apart = table.loc[part.index]
        others = apart[~apart["reference"]]
        off = (others["difference"] - others["true_difference"]).abs()
        rows.append(
            {
                "times the largest probe": f"{times:.0f}",
                "forecasts": len(part),
                "error, median": f"{part.median():.1%}",
                "error, 90 % below": f"{part.quantile(0.9):.1%}",
                "difference to cp 1 off by, median": f"{off.median():.3f}",
                "inside the 90 % interval": f"{apart['inside'].mean():.0%}",
            }
        )
    return pd.DataFrame(rows)


def _choice(page: Page) -> None:
    losses = choice_losses(page).drop("forecast")
    mine = choice_losses(page)["forecast"]
    ties = losses.index[losses <= mine]
    rest = losses[losses > mine].sort_values()
    found = (
        "**The choice is not shown to be worth a forecast.**" if len(ties) else "**The choice.**"
    )
    why = (
        "; the recurrent head is best in all of these groups"
        if losses["always recurrent"] == 0
        else ""
    )
    page.say(
        f"{found} Taking the candidate of most forecast tokens per second gives away {mine:.2%} of the best one's, where the candidates differ by more than {DIFFERENT:.0%}. No more is given away by "
        f"{len(ties)} naive rules ({', '.join(sorted(ties))}{why}); others give away {', '.join(f'{loss:.1%} ({rule})' for rule, loss in rest.items())}. "
        "What a forecast adds is the level, and at which load plain decoding or prompt lookup is better.",
        CHOICES,
        holds=len(rest) > 0,
    )


def _each(rows: pd.DataFrame, values: pd.Series, form: str) -> str:
    told = [f"{form.format(v)} ({m})" for m, v in zip(rows["model"], values, strict=True)]
    return f"{', '.join(told[:-1])} and {told[-1]}"


def _end_to_end(page: Page) -> None:
    rows = pd.concat([page.stored(name) for name in END_TO_END], ignore_index=True)
    rows["model"] = rows["model"].replace("smollm2", "SmolLM2, code")
    off = rows["decoded"] / rows["forecast"] - 1
    speed = rows["decoded_speedup"] / rows["forecast_speedup"] - 1
    kept = [(each.abs() < WITHIN).sum() for each in (off, speed)]
    page.say(
        f"**Three heads were forecast, the forecast written down, the head trained and decoded.** Tokens per call came out {_each(rows, off, '{:+.1%}')} beside what was forecast, times plain decoding "
        f"{_each(rows, speed, '{:+.1%}')}: within {WITHIN:.0%} are {kept[0]} and {kept[1]} of {len(rows)}. "
        "Each is one head and one machine, and step times of a small model drift by more than that from one minute to the next ({doc}`log`).",
        *END_TO_END,
    )
    page.table(
        pd.DataFrame(
            {
                "model": rows["model"],
                "head": rows["option"],
                "positions": rows["budget"].map("{:,.0f}".format),
                "tokens per call, forecast": [
                    f"{r.forecast:.2f} [{r.forecast_low:.2f}, {r.forecast_high:.2f}]"
                    for r in rows.itertuples()
                ],
                "decoded": [f"{r.decoded:.2f} ± {r.decoded_error:.2f}" for r in rows.itertuples()],
                "times plain decoding, forecast": rows["forecast_speedup"].map("{:.2f}".format),
                "measured": rows["decoded_speedup"].map("{:.2f}".format),
            }
        ),
        *END_TO_END,
    )
