"""Columns as a reader is to meet them: names in words, a value and its interval in one cell."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from cpmtp.report.blocks import Table

_NAMES = {
    "domain": "contexts from",
    "anchored": "told the first token",
    "exact_limit": "exact draft",
    "acceptance_fit": "ceiling: best fit for acceptance",
    "em_fit": "best fit by divergence",
    "learned": "trained head",
    "contexts_of_acceptance_fit": "contexts of the best fit",
    "share_of_ceiling": "share of its ceiling",
    "plain_forecast": "forecast, positions alike",
    "measured": "measured in decoding",
    "label": "call",
    "latency_p50": "latency, median",
    "latency_p95": "latency, 95th percentile",
}
_ENDS = ("_low", "_high")
_UNITS = {"seconds": "s", "bytes": "bytes", "nats": "nats", "hours": "h"}


def named(column: str) -> str:
    """A column's name in words, with its unit after a comma.

    Examples
    --------
    >>> named("acceptance_fit"), named("target_seconds"), named("tokens_per_second")
    ('ceiling: best fit for acceptance', 'target, s', 'tokens per second')
    """
    if column in _NAMES:
        return _NAMES[column]
    *words, last = str(column).split("_")
    if words and last in _UNITS and words[-1] != "per":
        return f"{' '.join(words)}, {_UNITS[last]}"
    return " ".join((*words, last))


def served_as(
    temperature: float = 1.0, top_k: float | None = None, top_p: float | None = None
) -> str:
    """What the target is sampled with, where that is not the usual; begins with a comma.

    Examples
    --------
    >>> served_as(0.7, 50), served_as()
    (', temperature 0.7, top-k 50', '')
    """
    told = [f"temperature {temperature:g}"] if temperature != 1 else []
    told += [
        f"top-{name} {value:g}"
        for name, value in (("k", top_k), ("p", top_p))
        if value is not None and not pd.isna(value)
    ]
    return "".join(f", {words}" for words in told)


def readable(table: pd.DataFrame) -> Table:
    """A table for reading: columns named in words, intervals beside their values.

    Examples
    --------
    >>> rows = pd.DataFrame(dict(rank=[4], learned=[2.4], learned_low=[2.3], learned_high=[2.5]))
    >>> found = readable(rows)
    >>> found.head, found.rows
    (('rank', 'trained head (interval)'), (('4', '2.4 (2.3 to 2.5)'),))
    """
    columns = dict(_columns(table))
    rows = tuple(zip(*columns.values(), strict=True))
    return Table(tuple(columns), rows)


def _columns(table: pd.DataFrame) -> Iterator[tuple[str, list[str]]]:
    ends = {f"{name}{end}" for name in table.columns for end in _ENDS if name + end in table}
    for name in table.columns:
        if name in ends:
            continue
        values = [cell(value) for value in table[name]]
        if {name + end for end in _ENDS} <= set(table.columns):
            low, high = ([cell(value) for value in table[name + end]] for end in _ENDS)
            values = [
                f"{mean} ({a} to {b})" if a and b else mean
                for mean, a, b in zip(values, low, high, strict=True)
            ]
            yield f"{named(name)} (interval)", values
        else:
            yield named(name), values


def cell(value: object) -> str:
    """A value in a table; nothing where it is not known.

    Examples
    --------
    >>> cell(0.123456), cell(123456.0), cell(True), cell(None), cell(float("nan"))
    ('0.123', '123456', 'yes', '', '')
    """
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if str(value) in ("True", "False"):
        return "yes" if str(value) == "True" else "no"
    return "" if value is None else str(value)
