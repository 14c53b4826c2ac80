"""Whether decoding still accepts what was forecast: what a staged roll-out watches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cpmtp.decoding.stats import GenerationStats
from cpmtp.resampling import normal_half_width

_KEYS = ("model", "rank", "horizon", "anchored", "rule", "temperature", "top_k", "top_p")
# How the target was sampled for a forecast that does not say.
_UNSAID = {"temperature": 1.0, "top_k": None, "top_p": None}


def expected_interval(path: str | Path, **keys: object) -> tuple[float, float]:
    """The forecast's interval of tokens per call, from a table (Parquet or CSV) with `forecast_low`
    and `forecast_high`.

    Parameters
    ----------
    path : path
    keys
        Values of `model`, `rank`, `horizon`, `anchored`, `rule`, `temperature`, `top_k`, `top_p`;
        those that the table has must match. A table that says nothing of temperature, top-k or
        top-p was made at temperature 1 without truncation. `head` decides where a table has several
        such heads.

    Raises
    ------
    ValueError
        If the file cannot be read, a column is missing, not exactly one row matches, or the
        forecast was made under another temperature or truncation.
    """
    try:
        table = pd.read_csv(path) if Path(path).suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no table of forecasts: {error}") from error
    for name in ("forecast_low", "forecast_high"):
        if name not in table:
            raise ValueError(f"{path} has no column {name}: expected the interval of a forecast")
    if keys.get("top_p") == 1:
        keys["top_p"] = None
    for name, usual in _UNSAID.items():
        if name not in table and keys.get(name, usual) != usual:
            raise ValueError(
                f"{path} has no column {name}: its forecasts are of temperature 1 without top-k or "
                f"top-p and say nothing of {name} {keys[name]}; forecast under the same"
            )
    used = {name: keys[name] for name in _KEYS if name in table and name in keys}
    for name, value in used.items():
        table = table[table[name].isna() if value is None else table[name] == value]
    if len(table) > 1 and "head" in table and "head" in keys:
        used["head"] = keys["head"]
        table = table[table["head"] == keys["head"]]
    if len(table) != 1:
        raise ValueError(f"{path} has {len(table)} rows for {used}: expected one")
    return float(table["forecast_low"].iloc[0]), float(table["forecast_high"].iloc[0])


def drift_report(stats: GenerationStats, low: float, high: float) -> str:
    """One line on whether decoding keeps the forecast: a warning of drift, or that there is none.

    Examples
    --------
    >>> stats = GenerationStats(101, (90, 10), 1.1, (1.1,), 1.0, {}, (), 110)
    >>> drift_report(stats, 1.0, 1.2)
    'tokens per call within the forecast of 1.000 to 1.200'
    """
    if not sum(stats.accepted_counts):
        return "nothing to compare with the forecast: no cycle was run"
    warning = drift_warning(stats, low, high)
    return (
        f"drift: {warning}"
        if warning
        else (f"tokens per call within the forecast of {low:.3f} to {high:.3f}")
    )


def drift_warning(stats: GenerationStats, low: float, high: float) -> str | None:
    """What is wrong where the measured tokens per call, with their own uncertainty, lie outside the
    forecast's interval.

    The uncertainty is the half-width of a 95 % interval over cycles; cycles of one text are alike,
    so that short runs warn too early rather than too late.

    Examples
    --------
    >>> stats = GenerationStats(101, (90, 10), 1.1, (1.1,), 1.0, {}, (), 110)
    >>> drift_warning(stats, 1.0, 1.2) is None
    True
    >>> drift_warning(stats, 1.5, 1.7)
    'tokens per call 1.100 ± 0.059 over 100 cycles, below the forecast of 1.500 to 1.700'
    """
    counts = np.asarray(stats.accepted_counts, dtype=float)
    cycles = counts.sum()
    if not cycles:
        return None
    emitted = np.arange(1, len(counts) + 1)
    mean = float(counts @ emitted / cycles)
    half = normal_half_width(float(np.sqrt(counts @ (emitted - mean) ** 2 / cycles / cycles)))
    if mean + half >= low and mean - half <= high:
        return None
    side = "below" if mean < low else "above"
    return (
        f"tokens per call {mean:.3f} ± {half:.3f} over {int(cycles)} cycles, {side} the "
        f"forecast of {low:.3f} to {high:.3f}"
    )
