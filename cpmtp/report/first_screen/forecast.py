"""The forecast of trained heads, as `cpmtp forecast` stores it: the answer, a picture, tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from cpmtp.report import plots
from cpmtp.report.blocks import Figure, Section, Table, Text

TITLE = "Forecast of trained heads"
_HEAD, _LOOKUP, _PLAIN = "head", "lookup", "plain"
_ENDS = ("", "_low", "_high")
_SURE = 0.8
_MOST = 8  # heads in a picture
_MILLION = 1e6 / 3600  # tokens, and hours in a second


@dataclass(frozen=True)
class HeadsForecast:
    """What trained heads are forecast to earn.

    Attributes
    ----------
    table : pandas.DataFrame
        A row per option (head and horizon, prompt lookup, plain decoding) and budget, at the first
        load; empty where there was not enough to forecast from.
    told : dict
        `settings`, `status`, `shapes` and `choices`, the best option by load.
    """

    table: pd.DataFrame = field(repr=False)
    told: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> HeadsForecast:
        """`forecast.parquet` and `forecast.json` of a folder.

        Raises
        ------
        ValueError
            If the folder has none, or they hold something else.
        """
        folder = Path(folder)
        try:
            told = json.loads((folder / "forecast.json").read_text("utf-8"))
            table = pd.read_parquet(folder / "forecast.parquet")
            return cls(table, {k: told[k] for k in ("settings", "status", "shapes")} | told)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(folder)!r}: no forecast ({error}); expected forecast.parquet and "
                "forecast.json, as `cpmtp forecast --out` writes them"
            ) from error

    @property
    def known(self) -> bool:
        """Whether there was enough to forecast from."""
        return not self.told["status"] and len(self.table) > 0

    @property
    def budget(self) -> float:
        """Positions of training that the answer is for."""
        budgets, asked = self.table["budget"], float(self.told["settings"]["budget"])
        enough = budgets[budgets >= asked]
        return float(enough.min() if len(enough) else budgets.max())

    @property
    def options(self) -> pd.DataFrame:
        """Every option at the budget, the fastest first, with both ends of the speedup."""
        rows = self.table[self.table["budget"] == self.budget]
        plain = float(rows.loc[rows["kind"] == _PLAIN, "tokens_per_second"].iloc[0])
        ends = {f"speedup{end}": rows[f"tokens_per_second{end}"] / plain for end in _ENDS}
        return rows.assign(**ends).sort_values("speedup", ascending=False)

    @property
    def candidates(self) -> pd.DataFrame:
        """Every option at its own best horizon."""
        return self.options.drop_duplicates("option")

    @property
    def choice(self) -> dict[str, Any]:
        """The best option at the first load, without what it owes to luck."""
        return self.told["choices"][0]

    @property
    def row(self) -> pd.Series:
        """The row of the choice."""
        named = self.options[self.options["option"] == self.choice["name"]]
        return named[named["horizon"] == self.choice["horizon"]].iloc[0]

    @property
    def plain_seconds(self) -> float:
        """Of a step of plain decoding, all requests together."""
        return float(self.options.loc[self.options["kind"] == _PLAIN, "cycle_seconds"].iloc[0])

    @property
    def speedup(self) -> tuple[float, float, float]:
        """Of the choice over plain decoding: expected, lower and upper end."""
        plain = self.choice["load"] / self.plain_seconds
        mean, low, high = (speed / plain for speed in self.choice["tokens_per_second"])
        return mean, low, high


def forecast_answer(found: HeadsForecast, price: float, models: Sequence[str] = ()) -> Section:
    """The forecast in four lines, cautions above them."""
    named = found.told.get("studied_as")
    title = TITLE if named is None else f"{named} · {TITLE[0].lower()}{TITLE[1:]}"
    if not found.known:
        return Section(title, _not_enough(found, models))
    blocks = [Text(text, "caution") for text in _cautions(found, models)]
    lines = (
        _verdict(found),
        ("Brings", _brings(found, price)),
        ("How sure", _certainty(found)),
        ("Next", _next_step(found, models)),
    )
    blocks += [Text(text, "line", label) for label, text in lines]
    return Section(title, tuple(blocks))


def _not_enough(found: HeadsForecast, models: Sequence[str]) -> tuple[Text, ...]:
    """What is said where probes were too short."""
    why = found.told["status"].removeprefix("not enough for a forecast: ")
    model = f" --model {models[0]}" if len(models) == 1 else ""
    return (
        Text("No recommendation: not enough time to decide.", "line", "Undecided"),
        Text(f"{why[:1].upper()}{why[1:]}.", "line", "Why"),
        Text(
            f"`cpmtp study{model}` with more `--minutes`; ceilings below say what no training can "
            "exceed, not what a head will earn.",
            "line",
            "Next",
        ),
    )


def _verdict(found: HeadsForecast) -> tuple[str, str]:
    choice, row = found.choice, found.row
    if row["kind"] != _HEAD:
        name = "plain decoding" if row["kind"] == _PLAIN else "prompt lookup, which needs none,"
        return "Do not train", f"{name} is the fastest at load {choice['load']}."
    sure = found.speedup[1] > 1 and choice["sure"] >= _SURE
    what = f"{_in_words(row)}, on {choice['budget']:,.0f} positions"
    return ("Train" if sure else "Pilot first"), f"{what}."


def _in_words(row: pd.Series) -> str:
    """A head by form, horizon and ranks."""
    if row["kind"] != _HEAD:
        return {_PLAIN: "plain decoding", _LOOKUP: "prompt lookup"}[row["kind"]]
    ranks = [("rank", "rank"), ("transition_rank", "transition rank")]
    shown = {"cp": ranks[:1], "markov": ranks[1:], "recurrent": []}.get(row["form"], ranks)
    sizes = "".join(f", {name} {row[column]:.0f}" for column, name in shown)
    return f"form {str(row['form']).replace('_', ' ')}, horizon {row['horizon']}{sizes}"


def _brings(found: HeadsForecast, price: float) -> str:
    mean, low, high = found.speedup
    costs = [price * _MILLION / speed for speed in found.choice["tokens_per_second"]]
    plain = price * _MILLION * found.plain_seconds / found.choice["load"]
    words = (
        f"{low:.2f} to {high:.2f} times the speed of plain decoding ({mean:.2f} expected), at "
        f"{costs[2]:.2f} to {costs[1]:.2f} per million tokens instead of {plain:.2f} (price "
        f"{price:.2f} a device-hour)"
    )
    if found.row["kind"] != _HEAD:
        return f"{words}; no training."
    hours = found.choice["device_hours"]
    return f"{words}; training takes about {hours:.2g} device-hours."


def _certainty(found: HeadsForecast) -> str:
    choice = found.choice
    words = f"the fastest in {choice['sure']:.0%} of draws"
    ties = [_tie(name) for name in choice["ties"]]
    if ties:
        more = f" and {len(ties) - 2} more" if len(ties) > 2 else ""
        words += f"; not told apart from {', '.join(ties[:2])}{more}"
    for other in found.told["choices"][1:]:
        if (other["name"], other["horizon"]) != (choice["name"], choice["horizon"]):
            return f"{words}; at load {other['load']} {_tie(other['name'])} instead."
    if choice["overtaken"]:
        name, budget = choice["overtaken"]
        return f"{words}; {name} instead from {budget:,.0f} positions on."
    return f"{words}."


def _tie(name: str) -> str:
    return name.replace("lookup", "prompt lookup") if name.startswith("lookup") else name


def _next_step(found: HeadsForecast, models: Sequence[str]) -> str:
    row, label = found.row, _verdict(found)[0]
    if row["kind"] != _HEAD:
        return "decode that way; a larger budget, another load or a cheaper call could change it."
    model = f" --model {models[0]}" if len(models) == 1 else ""
    sizes = {"rank": "rank", "transition_rank": "transition-rank"}
    given = "".join(
        f" --{option} {row[column]:.0f}"
        for column, option in sizes.items()
        if row[column] > (0 if column == "transition_rank" or row["form"] == "cp" else 1)
    )
    command = (
        f"cpmtp train-head{model} --form {row['form']} --horizon {row['horizon']}{given} "
        f"--positions {found.choice['budget']:.0f}"
    )
    if label == "Train":
        return f"`{command}`, then the pilot plan below."
    return (
        f"more `--minutes` for `cpmtp forecast` narrow this; else `{command}` and the pilot plan."
    )


def _cautions(found: HeadsForecast, models: Sequence[str]) -> Iterator[str]:
    groups = found.told["shapes"]["groups"]
    if len(groups) < 4:
        yield f"Curves are continued by those of {len(groups)} groups only: ranges are wide."
    of = found.told.get("studied_as") or found.told.get("model", {}).get("name")
    if of is None and len(models) > 1:
        yield f"The study is of {len(models)} models; the forecast is of one that it does not name."
    elif of is not None and models and list(models) != [of]:
        yield f"The study is of {', '.join(models)}; the forecast is of {of}."
    rows = found.table[found.table["budget"] == found.budget]
    if rows["too_many"].any():
        yield f"The budget reads the text {rows['passes'].max():.0f} times: give more text."


def forecast_sections(
    found: HeadsForecast, ceilings: pd.DataFrame | None = None
) -> Iterator[Section]:
    """The picture and the tables of a forecast.

    Parameters
    ----------
    found : HeadsForecast
    ceilings : pandas.DataFrame, optional
        `horizon`, `rank` and `tokens_per_call` of the best drafts of form cp.
    """
    load, budget = found.choice["load"], found.budget
    confidence = found.told["settings"].get("confidence", 0.9)
    named = found.told.get("studied_as")
    yield Section(
        TITLE if named is None else f"{TITLE}: {named}",
        (
            Text(
                f"After {budget:,.0f} positions of training, {_requests(load)}; "
                f"{confidence:.0%} intervals. Each head at its own fastest horizon. Slow tenth: "
                "tokens per call that nine of ten requests exceed. In the answer above, what the "
                "best of several forecasts owes to luck is taken off."
            ),
            _options_table(found.candidates, found),
            _picture(found, ceilings),
        ),
    )
    yield Section("By load and budget", (_by_load(found), _by_budget(found)), level=3)
    yield Section(
        "Every head at every horizon", (_options_table(found.options, found),), 3, folded=True
    )


def _requests(load: int) -> str:
    return "one request at a time" if load == 1 else f"{load} requests decoded together"


def _options_table(options: pd.DataFrame, found: HeadsForecast) -> Table:
    rows, marked = [], set()
    best = (found.choice["name"], found.choice["horizon"])
    for place, (_, row) in enumerate(options.iterrows()):
        if (row["option"], row["horizon"]) == best:
            marked.add(place)
        trained = row["kind"] == _HEAD
        rows.append(
            (
                _label(row),
                str(row["horizon"]),
                f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})",
                f"{row['tokens_per_call']:.2f} ({row['tokens_per_call_low']:.2f} to "
                f"{row['tokens_per_call_high']:.2f})",
                f"{row['tenth_percentile']:.2f}",
                f"{row['device_hours']:.2g}" if trained else "",
            )
        )
    head = ("option", "horizon", "times the speed", "tokens per call", "slow tenth", "device-hours")
    return Table(head, tuple(rows), frozenset(marked))


def _label(row: pd.Series) -> str:
    return {_LOOKUP: "prompt lookup", _PLAIN: "plain decoding"}.get(row["kind"], row["option"])


def _picture(found: HeadsForecast, ceilings: pd.DataFrame | None) -> Figure:
    options = found.candidates
    heads = options[options["kind"] == _HEAD].head(_MOST)
    heads = heads.assign(
        label=[f"{row.option}, n = {row.horizon}" for row in heads.itertuples()],
        ceiling=[_ceiling(row, found, ceilings) for _, row in heads.iterrows()],
    )
    lookup = options.loc[options["kind"] == _LOOKUP, "speedup"]
    best = heads.iloc[0]
    ticks = (
        " Ticks: what the best possible draft of that rank gives on the study's contexts."
        if heads["ceiling"].notna().any()
        else ""
    )
    words = (
        f"Times the speed of plain decoding (line at 1) that each head would reach: "
        f"{best['option']} {best['speedup']:.2f} ({best['speedup_low']:.2f} to "
        f"{best['speedup_high']:.2f})"
        + (f", prompt lookup {lookup.iloc[0]:.2f} without training" if len(lookup) else "")
        + f".{ticks}"
    )
    draw = partial(
        plots.plot_head_forecast, heads, lookup=float(lookup.iloc[0]) if len(lookup) else None
    )
    return Figure("What each head would bring", words, draw)


def _ceiling(row: pd.Series, found: HeadsForecast, ceilings: pd.DataFrame | None) -> float:
    """The speedup of the ceiling of a head's form, rank and horizon; NaN where it is not known."""
    if ceilings is None or row["form"] != "cp":
        return math.nan
    same = (ceilings["horizon"] == row["horizon"]) & (ceilings["rank"] == row["rank"])
    if not same.any():
        return math.nan
    tokens = float(ceilings.loc[same, "tokens_per_call"].iloc[0])
    return tokens * found.plain_seconds / float(row["cycle_seconds"])


def _by_load(found: HeadsForecast) -> Table:
    rows = tuple(
        (
            str(one["load"]),
            _tie(one["name"]),
            str(one["horizon"]),
            f"{one['speedup']:.2f}",
            f"{one['tokens_per_call'][0]:.2f}",
            f"{one['sure']:.0%}",
        )
        for one in found.told["choices"]
    )
    head = ("load", "fastest", "horizon", "times the speed", "tokens per call", "sure")
    return Table(head, rows)


def _by_budget(found: HeadsForecast) -> Table:
    rows = []
    for budget, part in found.table.groupby("budget"):
        best = part.loc[part["tokens_per_second"].idxmax()]
        rows.append(
            (
                f"{budget:,.0f}",
                _label(best),
                str(best["horizon"]),
                f"{best['speedup']:.2f}",
                f"{best['tokens_per_call']:.2f}",
            )
        )
    head = ("positions of training", "fastest", "horizon", "times the speed", "tokens per call")
    return Table(head, tuple(rows))
