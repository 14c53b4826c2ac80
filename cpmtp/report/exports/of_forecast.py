"""The table of a forecast: what a head would earn once it is trained, and for which batches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd

from cpmtp.latency import MeasuredLatency
from cpmtp.report.exports.acceptance_table import (
    FORECAST,
    AcceptanceTable,
    DraftedFor,
    never_rising,
    rates_of_lengths,
)
from cpmtp.report.exports.wanted import (
    Wanted,
    by_drafted,
    described,
    ends,
    json_values,
    listed,
)
from cpmtp.report.first_screen.stored_forecast import HeadsForecast

_OWN = "samples of the model itself"
_SIZES = ("form", "rank", "transition_rank", "width", "blocks")


def table_of_forecast(
    found: HeadsForecast, latency: MeasuredLatency | None = None, wanted: Wanted = Wanted()
) -> AcceptanceTable:
    """What a trained head is forecast to earn at the forecast's budget.

    Rates are differences of the tokens per call of its horizons. For the head that the forecast
    chose they are scaled to the answer's tokens per call, from which luck is taken off.

    Parameters
    ----------
    found : HeadsForecast
    latency : MeasuredLatency, optional
        Its step times, for the schedule by batch size.
    wanted : Wanted
        Default of the head: the choice at the load, default the first.

    Raises
    ------
    ValueError
        If nothing was forecast, there is no such head, or the choice needs none.
    """
    if not found.known:
        raise ValueError(f"nothing was forecast: {found.told['status'] or 'the table is empty'}")
    choice = _choice(found, wanted.load)
    rows = _rows_of_head(found, wanted.head or choice["name"], asked=wanted.head is not None)
    name, lengths = rows["option"].iloc[0], rows.set_index("horizon")["tokens_per_call"]
    usual = choice["horizon"] if name == choice["name"] else int(rows["horizon"].iloc[0])
    horizon = wanted.horizon or usual
    if horizon not in lengths:
        raise ValueError(f"no horizon {horizon} of {name!r}: there is {listed(lengths.index)}")
    lengths = lengths[lengths.index <= horizon].sort_index()
    rates = rates_of_lengths(dict(lengths))
    answered = (name, horizon) == (choice["name"], choice["horizon"])
    if answered:
        rates = _scaled(rates, choice["tokens_per_call"][0])
    conditions = _conditions(found, rows[rows["horizon"] == horizon].iloc[0], lengths, latency)
    if answered:
        conditions["mean_length_interval"] = choice["tokens_per_call"][1:]
    return AcceptanceTable(
        rates,
        FORECAST,
        json_values(conditions),
        by_drafted({n: 1 + sum(rates[: n - 1]) for n in lengths.index}),
        () if latency is None else _schedule(found, rows[rows["horizon"] <= horizon], latency),
    )


def _choice(found: HeadsForecast, load: int | None) -> dict[str, Any]:
    if load is None:
        return found.choice
    for choice in found.choices:
        if choice["load"] == load:
            return choice
    known = listed(choice["load"] for choice in found.choices)
    raise ValueError(f"no forecast at load {load}: there is {known}")


def _rows_of_head(found: HeadsForecast, name: str, *, asked: bool) -> pd.DataFrame:
    heads = found.options[found.options["kind"] == "head"]
    rows = heads[heads["option"] == name]
    if rows.empty:
        known = listed(heads["option"])
        told = f"no head {name!r}" if asked else f"{name}, which needs no head, is the fastest"
        raise ValueError(f"{told}: choose one with --head, of {known}")
    return rows


def _scaled(rates: tuple[float, ...], mean_length: float) -> tuple[float, ...]:
    """Rates that add up to a mean length below their own."""
    whole = sum(rates)
    share = min((mean_length - 1) / whole, 1.0) if whole else 1.0
    return never_rising([rate * share for rate in rates])


def _conditions(
    found: HeadsForecast, row: pd.Series, lengths: pd.Series, latency: MeasuredLatency | None
) -> dict[str, Any]:
    settings, told = found.told["settings"], found.told
    model, asked = told.get("model") or {}, told.get("asked") or {}
    return {
        "model": found.model or None,
        "model_sha256": model.get("fingerprint"),
        "draft": described(row.to_dict() | _drafted_tokens(found, row)),
        "horizon": row["horizon"],
        "anchored": row.get("anchored", True),
        "rule": settings.get("rule", "block"),
        "first_token": "target",
        **{name: settings.get(name) for name in ("temperature", "top_k", "top_p")},
        "texts": ", ".join(asked["corpus"]) or _OWN if "corpus" in asked else None,
        "training_positions": found.budget,
        "training_over_longest_probe": found.ahead,
        "forecasts_checked_up_to": told["shapes"].get("farthest"),
        "caution": found.reach or None,
        "rates_from": f"tokens per call of horizons {listed(lengths.index)}",
        "mean_length_interval": ends(row, "tokens_per_call"),
        "interval_confidence": settings.get("confidence"),
        "curves_from": told["shapes"]["groups"],
        "step_times": None if latency is None else latency.where,
        "versions": told.get("versions"),
    }


def _drafted_tokens(found: HeadsForecast, row: pd.Series) -> dict[str, Any]:
    """How many tokens a head can draft, where they are not all."""
    sizes = found.told.get("candidates", {}).get(row["option"], {})
    return {"vocabulary": sizes["vocabulary"]} if sizes.get("vocabulary") else {}


def _schedule(
    found: HeadsForecast, rows: pd.DataFrame, latency: MeasuredLatency
) -> tuple[DraftedFor, ...]:
    """Drafted tokens of most tokens per second at each load; a load stands for the batches up to
    the next one.
    """
    loads = sorted(set(found.told["settings"].get("loads", (found.choice["load"],))))
    drafted = [_fastest(rows, latency, load) for load in loads]
    firsts, lasts = [1, *loads[1:]], [*(load - 1 for load in loads[1:]), loads[-1]]
    parts = list(zip(firsts, lasts, drafted, strict=True))
    groups = (list(same) for _, same in itertools.groupby(parts, key=lambda part: part[2]))
    return tuple(DraftedFor(same[0][0], same[-1][1], same[0][2]) for same in groups)


def _fastest(rows: pd.DataFrame, latency: MeasuredLatency, load: int) -> int:
    """Drafted tokens of the fastest horizon of one head, 0 where plain decoding is."""
    best = (load / latency.plain_seconds(load), 0)
    for _, row in rows.iterrows():
        sizes = {name: _size(row[name]) for name in _SIZES if _known(row, name)}
        horizon = int(row["horizon"])
        seconds = latency.cycle_seconds(sizes | {"horizon": horizon}, load)
        best = max(best, (row["tokens_per_call"] * load / seconds, horizon - 1))
    return best[1]


def _known(row: pd.Series, name: str) -> bool:
    value: Any = row.get(name)
    return isinstance(value, str) or (value is not None and math.isfinite(value))


def _size(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)
