"""The forecast of trained heads, as `cpmtp forecast` stores it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cpmtp.report.words import multiple

HEAD, LOOKUP, PLAIN = "head", "lookup", "plain"
PLAIN_NAME = "plain decoding"
_ENDS = ("", "_low", "_high")
_PAYS = 0.95


@dataclass(frozen=True)
class HeadsForecast:
    """What trained heads are forecast to earn.

    Attributes
    ----------
    table : pandas.DataFrame
        A row per option (head and horizon, prompt lookup, plain decoding) and budget, at the first
        load; empty where there was not enough to forecast from.
    told : dict
        `settings`, `status`, `shapes`, `choices`, the best option by load, and `worth`, the same
        with no more training than pays.
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
    def model(self) -> str:
        """What the model is called; empty where that is not stored."""
        named = self.told.get("studied_as") or self.told.get("model", {}).get("name")
        return str(named or "")

    @property
    def confidence(self) -> float:
        """Of the ranges."""
        return float(self.told["settings"].get("confidence", 0.9))

    @property
    def asked(self) -> float:
        """Positions of training that the forecast was asked for."""
        return float(self.told["settings"]["budget"])

    @property
    def budget(self) -> float:
        """Positions of training that the answer is for: those asked for, or fewer where more would
        not pay.
        """
        budgets, wanted = self.table["budget"], self.choice["budget"] or self.asked
        enough = budgets[budgets >= wanted]
        return float(enough.min() if len(enough) else budgets.max())

    @property
    def ahead(self) -> float | None:
        """How many times the budget is the longest probe; None where that is not stored."""
        ahead = self.told["shapes"].get("ahead")
        return None if ahead is None else float(ahead) * self.budget / self.asked

    @property
    def probed(self) -> float | None:
        """Positions of the longest probe; None where that is not stored."""
        ahead = self.told["shapes"].get("ahead")
        return self.asked / float(ahead) if ahead else None

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
    def choices(self) -> list[dict[str, Any]]:
        """The best option at every load, without what it owes to luck, with no more training than
        pays.
        """
        return list(self.told.get("worth") or self.told["choices"])

    @property
    def choice(self) -> dict[str, Any]:
        """That at the first load."""
        return self.choices[0]

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

    @property
    def is_far(self) -> bool:
        """Whether the answer is a head, and its budget farther from the probes than forecasts were
        ever checked.
        """
        return self.row["kind"] == HEAD and bool(self.reach)

    @property
    def reach(self) -> str:
        """What is to be said of heads at a budget that is farther from the probes than forecasts
        were ever checked; empty where it is not, or that is not stored.
        """
        tried = self.told["shapes"].get("farthest")
        if not (self.ahead and tried and self.ahead > tried):
            return ""
        return (
            f"The answer is for a training {multiple(self.ahead)} times as long as the longest "
            f"probe; forecasts were compared with real training up to {tried:.0f} times only. Take "
            "the figures as a direction."
        )

    @property
    def another_doubling(self) -> float:
        """Share by which twice the training would raise the tokens per call of the choice; NaN
        where no larger budget was looked at.
        """
        named = self.table["option"] == self.choice["name"]
        rows = self.table[named & (self.table["horizon"] == self.choice["horizon"])]
        later = rows[rows["budget"] > self.budget].sort_values("budget")
        if not len(later):
            return math.nan
        gain = later["tokens_per_call"].iloc[0] / self.row["tokens_per_call"]
        return float(gain) ** (1 / math.log2(later["budget"].iloc[0] / self.budget)) - 1

    @property
    def may_not_pay(self) -> bool:
        """Whether the choice may be no faster than plain decoding: its range reaches so far down, a
        draw in twenty says so, or it is a tie.
        """
        pays = self.choice.get("pays", 1.0)
        return self.speedup[1] <= 1 or pays < _PAYS or PLAIN_NAME in self.choice["ties"]
