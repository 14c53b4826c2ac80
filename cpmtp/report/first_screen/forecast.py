"""The forecast of trained heads, as `cpmtp forecast` stores it, and the answer from it in four
lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cpmtp.report.blocks import Section, Text
from cpmtp.report.words import served_as

TITLE = "Forecast of trained heads"
HEAD, LOOKUP, PLAIN = "head", "lookup", "plain"
_ENDS = ("", "_low", "_high")
_SURE = 0.8
_FEW_GROUPS = 4  # fewer say little of how far a forecast is off
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
    def confidence(self) -> float:
        """Of the ranges."""
        return float(self.told["settings"].get("confidence", 0.9))

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
        plain = float(rows.loc[rows["kind"] == PLAIN, "tokens_per_second"].iloc[0])
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
        return float(self.options.loc[self.options["kind"] == PLAIN, "cycle_seconds"].iloc[0])

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
    settings = found.told["settings"]
    served = {
        name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings
    }
    title += served_as(**served)
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
    if row["kind"] != HEAD:
        name = "plain decoding" if row["kind"] == PLAIN else "prompt lookup, which needs none,"
        return "Do not train", f"{name} is the fastest with {requests(choice['load'])}."
    sure = found.speedup[1] > 1 and choice["sure"] >= _SURE
    what = f"{_in_words(row)}, trained on {positions(choice['budget'])}"
    return ("Train" if sure else "Pilot first"), f"{what}."


def _in_words(row: pd.Series) -> str:
    """A head by form, ranks and horizon."""
    ranks = [("rank", "rank"), ("transition_rank", "transition rank")]
    shown = {"cp": ranks[:1], "markov": ranks[1:], "recurrent": []}.get(row["form"], ranks)
    sizes = " and ".join(f"{name} {row[column]:.0f}" for column, name in shown)
    form = str(row["form"]).replace("_", " ").replace("markov", "Markov")
    return f"a {form} head{' of ' * bool(sizes)}{sizes}, horizon {row['horizon']}"


def positions(number: float) -> str:
    """Training positions as a reader takes them in.

    Examples
    --------
    >>> positions(9_306_112), positions(50e6), positions(72_704), positions(640)
    ('9.3 million positions', '50 million positions', '73 thousand positions', '640 positions')
    """
    for unit, name in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= unit:
            shown = f"{number / unit:.1f}" if number < 10 * unit else f"{number / unit:.0f}"
            return f"{shown.removesuffix('.0')}{name} positions"
    return f"{number:.0f} positions"


def requests(load: int) -> str:
    """A load in words."""
    return "one request at a time" if load == 1 else f"{load} requests decoded together"


def _brings(found: HeadsForecast, price: float) -> str:
    mean, low, high = found.speedup
    if found.row["kind"] == PLAIN:
        return _brings_nothing(found, price)
    costs = [price * _MILLION / speed for speed in found.choice["tokens_per_second"]]
    plain = price * _MILLION * found.plain_seconds / found.choice["load"]
    words = (
        f"{low:.2f} to {high:.2f} times the speed of plain decoding ({found.confidence:.0%} "
        f"range, {mean:.2f} expected), at {costs[2]:.2f} to {costs[1]:.2f} per million tokens "
        f"instead of {plain:.2f} (price {price:.2f} a device-hour)"
    )
    if found.row["kind"] != HEAD:
        return f"{words}; no training."
    return f"{words}; training: {device_hours(found.choice['device_hours'])}."


def _brings_nothing(found: HeadsForecast, price: float) -> str:
    plain = price * _MILLION * found.plain_seconds / found.choice["load"]
    words = f"no option is forecast to be faster; {plain:.2f} per million tokens as now"
    others = found.candidates[found.candidates["kind"] == HEAD]
    if len(others):
        best = others.iloc[0]
        words += (
            f". The best head, {best['option']}: {best['speedup_low']:.2f} to "
            f"{best['speedup_high']:.2f} times the speed"
        )
    return f"{words}."


def device_hours(hours: float) -> str:
    """Two digits, and one hour is one.

    Examples
    --------
    >>> device_hours(1.034), device_hours(1.454), device_hours(0.002)
    ('1 device-hour', '1.5 device-hours', '0.002 device-hours')
    """
    shown = f"{hours:.2g}" if hours < 100 else f"{hours:,.0f}"
    return f"{shown} device-hour{'' if shown == '1' else 's'}"


def _certainty(found: HeadsForecast) -> str:
    choice = found.choice
    words = f"{choice['sure']:.0%} likely the fastest of what was tried"
    # Whether it pays at all is asked before which head pays most.
    ties = sorted(map(option_name, choice["ties"]), key=lambda name: name != "plain decoding")
    if ties:
        more = f" and {len(ties) - 2} more" if len(ties) > 2 else ""
        words += f"; a tie with {', '.join(ties[:2])}{more}"
    return f"{words}. Could change it: {', '.join(_changes(found))}."


def _changes(found: HeadsForecast) -> Iterator[str]:
    choice = found.choice
    for other in found.told["choices"][1:]:
        if (other["name"], other["horizon"]) != (choice["name"], choice["horizon"]):
            yield f"{requests(other['load'])} ({option_name(other['name'])})"
            break
    if choice["overtaken"]:
        name, budget = choice["overtaken"]
        yield f"{positions(budget)} or more ({option_name(name)})"
    model = found.told.get("model", {})
    device = f" (times are of {model['device']}, {model['dtype']})" if "device" in model else ""
    yield f"another device{device}"
    yield "other text"


def option_name(name: str) -> str:
    """An option as a reader meets it."""
    return name.replace("lookup", "prompt lookup") if name.startswith("lookup") else name


def _next_step(found: HeadsForecast, models: Sequence[str]) -> str:
    row, label = found.row, _verdict(found)[0]
    if row["kind"] != HEAD:
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
    first = "" if label == "Train" else "; longer probes (`--minutes`) narrow the range first"
    return f"`{command}`, then the pilot plan below{first}."


def _cautions(found: HeadsForecast, models: Sequence[str]) -> Iterator[str]:
    shapes = found.told["shapes"]
    groups, ahead, tried = len(shapes["groups"]), shapes.get("ahead"), shapes.get("farthest")
    if found.row["kind"] == HEAD and ahead and tried and ahead > tried:
        yield (
            f"The budget is {ahead:,.0f} times the longest probe; forecasts were checked at up to "
            f"{tried:.0f} times only, on {groups} kinds of model and text."
        )
    elif groups < _FEW_GROUPS:
        yield f"Forecasts were checked on {groups} kinds of model and text only: ranges are wide."
    of = found.told.get("studied_as") or found.told.get("model", {}).get("name")
    if of is None and len(models) > 1:
        yield f"The study is of {len(models)} models; the forecast is of one that it does not name."
    elif of is not None and models and list(models) != [of]:
        yield f"The study is of {', '.join(models)}; the forecast is of {of}."
    rows = found.table[found.table["budget"] == found.budget]
    if rows["too_many"].any():
        yield f"The budget reads the text {rows['passes'].max():.0f} times: give more text."
