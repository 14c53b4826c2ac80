"""Columns as a reader is to meet them: names in words, a value and its interval in one cell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pandas as pd
from markupsafe import Markup, escape

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
_SEEN = {"\\": "\\\\", "\n": "⏎", "\t": "⇥", " ": "␣"}
_UNIT_AFTER = r"(?<=\d) (?=(?:%|[kMG]B|ms|s)(?!\w))"
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


def memory(number: float) -> str:
    """Bytes as a reader takes them in.

    Examples
    --------
    >>> memory(2_804_740), memory(1.26e9), memory(512)
    ('2.8 MB', '1.3 GB', '0.5 kB')
    """
    unit, name = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB")) if number >= pair[0]), (1e3, "kB")
    )
    shown = number / unit
    return f"{shown:.1f} {name}" if shown < 10 else f"{shown:,.0f} {name}"


def percent(share: float) -> str:
    """A share as whole percent.

    Examples
    --------
    >>> percent(0.897), percent(1.0)
    ('90 %', '100 %')
    """
    return f"{100 * share:.0f} %"


def three_digits(number: float) -> str:
    """A measured quantity with no more digits than it is known to.

    Examples
    --------
    >>> three_digits(715.34), three_digits(37.58), three_digits(1.4), three_digits(0.97)
    ('715', '37.6', '1.40', '0.97')
    >>> three_digits(12345.6), three_digits(0.01234)
    ('12,346', '0.0123')
    """
    before = math.floor(math.log10(abs(number))) if number else 0
    return f"{number:,.{max(0, 2 - before) if before != -1 else 2}f}"


def as_written(text: str) -> str:
    r"""Text of tokens, with blanks, line ends and whatever has no sign of its own to be seen.

    Examples
    --------
    >>> as_written("a b" + chr(10) + chr(7))
    'a␣b⏎\\x07'
    """
    return "".join(_SEEN.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in str(text))


def multiple(number: float) -> str:
    """How many times: a digit after the point where it is small.

    Examples
    --------
    >>> multiple(8.26), multiple(8.0), multiple(2537.4)
    ('8.3', '8', '2,537')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}".removesuffix(".0")


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


def with_code(text: str) -> Markup:
    """Escaped text in which what stands between backticks is code; a command may be broken before
    an option, never inside one.

    Examples
    --------
    >>> with_code("`a` < b")
    Markup('<code>a</code> &lt; b')
    >>> with_code("`cpmtp study --rank 4`")
    Markup('<code class="command"><span>cpmtp study</span> <span>--rank 4</span></code>')
    """
    return Markup(re.sub(r"`([^`]+)`", _code, unbroken(text)))


def unbroken(text: str) -> Markup:
    """Escaped text in which no line ends between a number and its unit.

    Examples
    --------
    >>> unbroken("2 % of 3 MB") == "2\N{NO-BREAK SPACE}% of 3\N{NO-BREAK SPACE}MB"
    True
    """
    return Markup(re.sub(_UNIT_AFTER, "\N{NO-BREAK SPACE}", str(escape(text))))


def _code(found: re.Match[str]) -> str:
    text = found[1]
    if not text.startswith("cpmtp "):
        return f"<code>{text}</code>"
    parts = "</span> <span>".join(re.split(r" (?=--)", text))
    return f'<code class="command"><span>{parts}</span></code>'


def shortened(title: str, most: int = 36) -> str:
    """A title for a list of contents: words of its middle are left out where it is long.

    Examples
    --------
    >>> shortened("Diagnosis: code · contexts from own samples")
    'Diagnosis: code, own samples'
    >>> shortened("Diagnosis: folder/of-a-model-with-a-long-name · contexts from prose")
    'Diagnosis: folder/…a-long-name, prose'
    """
    title = title.replace(" · contexts from ", ", ")
    if len(title) <= most:
        return title
    half = most // 2
    first = re.match(r".*[\W_]|.*", title[:half])
    last = re.search(r"(?<=[\W_])\w.*|.*", title[-half:])
    assert first and last  # either pattern has an alternative that is always there
    return f"{first[0].rstrip()}…{last[0]}"
