"""Whether decoding still accepts what was forecast: what a staged roll-out watches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cpmtp.decoding.stats import GenerationStats
from cpmtp.resampling import normal_half_width

_KEYS = ("model", "rank", "anchored", "rule", "temperature")


def expected_interval(path: str | Path, **keys: object) -> tuple[float, float]:
    """The forecast's interval of tokens per call, from a table (Parquet or CSV) with `forecast_low`
    and `forecast_high`.

    Parameters
    ----------
    path : path
    keys
        Values of `model`, `rank`, `anchored`, `rule`, `temperature`; those that the table has must
        match. `head` decides where a table has several such heads.

    Raises
    ------
    ValueError
        If the file cannot be read, a column is missing, or not exactly one row matches.
    """
    try:
        table = pd.read_csv(path) if Path(path).suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no table of forecasts: {error}") from error
    for name in ("forecast_low", "forecast_high"):
        if name not in table:
            raise ValueError(f"{path} has no column {name}: expected the interval of a forecast")
    used = {name: keys[name] for name in _KEYS if name in table and name in keys}
    for name, value in used.items():
        table = table[table[name] == value]
    if len(table) > 1 and "head" in table and "head" in keys:
        used["head"] = keys["head"]
        table = table[table["head"] == keys["head"]]
    if len(table) != 1:
        raise ValueError(f"{path} has {len(table)} rows for {used}: expected one")
    return float(table["forecast_low"].iloc[0]), float(table["forecast_high"].iloc[0])


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
