"""Which draft of a folder an export is of, and the conditions that are written beside its rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

ROUNDED = 6


@dataclass(frozen=True)
class Wanted:
    """Which draft; what is None is chosen: the recommended one, or the fastest that was measured.

    Attributes
    ----------
    model, domain : str, optional
    head : str, optional
        A forecast's option, such as ``"markov 64"``, or a decoded head's name.
    horizon, rank, load : int, optional
    """

    model: str | None = None
    domain: str | None = None
    head: str | None = None
    horizon: int | None = None
    rank: int | None = None
    load: int | None = None


def described(row: Mapping[str, Any] | pd.Series) -> str:
    """A draft in words: its form and ranks, as far as they are known.

    Examples
    --------
    >>> described({"form": "markov", "rank": 1.0, "transition_rank": 64.0})
    'markov, rank 1, transition rank 64'
    """
    known = [str(row.get("form") or "cp").replace("_", " ")]
    for column in ("rank", "transition_rank", "width", "blocks", "vocabulary"):
        value = row.get(column)
        if value is not None and math.isfinite(value) and (value > 0 or column == "rank"):
            known.append(f"{column.replace('_', ' ')} {value:.0f}")
    return ", ".join(known)


def ends(row: Mapping[str, Any] | pd.Series, name: str) -> list[float | None]:
    """Both ends of a column's interval.

    Examples
    --------
    >>> ends({"measured_low": 2.0, "measured_high": 2.5}, "measured")
    [2.0, 2.5]
    """
    return [row.get(f"{name}{end}") for end in ("_low", "_high")]


def by_drafted(lengths: Mapping[Any, float]) -> dict[int, float]:
    """Mean lengths by the number of drafted tokens, from those by horizon."""
    return {int(n) - 1: round(float(length), ROUNDED) for n, length in lengths.items() if n > 1}


def listed(values: Iterable[Any]) -> str:
    """Values side by side, each once."""
    return ", ".join(dict.fromkeys(map(str, values)))


def json_values(found: Any) -> Any:
    """The same with numbers, texts and lists as JSON has them; what is not a number is None.

    Examples
    --------
    >>> json_values({"a": float("nan"), "b": (1, "x"), "c": pd.Series([2]).iloc[0]})
    {'a': None, 'b': [1, 'x'], 'c': 2}
    """
    if isinstance(found, Mapping):
        return {str(key): json_values(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [json_values(value) for value in found]
    plain = found.item() if hasattr(found, "item") else found
    if isinstance(plain, float):
        return round(plain, ROUNDED) if math.isfinite(plain) else None
    return plain if plain is None or isinstance(plain, (bool, int, str)) else str(plain)
