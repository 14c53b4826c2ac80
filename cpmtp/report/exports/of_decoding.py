"""The table of decoding: what a head was measured to earn."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from cpmtp.report.exports.acceptance_table import (
    MEASURED,
    AcceptanceTable,
    never_rising,
    rates_of_lengths,
)
from cpmtp.report.exports.wanted import ROUNDED, Wanted, described, ends, json_values, listed

_SURVIVED = "measured_survival_"
_TOLD = ("head", "horizon", "anchored", "rule", "temperature", "top_k", "top_p", "batch")


def table_of_decoding(decoding: pd.DataFrame, wanted: Wanted = Wanted()) -> AcceptanceTable:
    """What one head was measured to earn.

    Where the table does not say how often each position survived, every drafted token is taken to
    survive as often, given those before it, as makes the measured mean length come out.

    Parameters
    ----------
    decoding : pandas.DataFrame
        `decoding.parquet` of a study or a validation.
    wanted : Wanted
        Default of the head: the one of most tokens per second where that was measured, else of
        most tokens per call.

    Raises
    ------
    ValueError
        If no row is of what is wanted, or it is not said which of several models is.
    """
    rows = _matching(_decoded(decoding), wanted)
    timed = "tokens_per_second" in rows and rows["tokens_per_second"].notna().any()
    row = rows.loc[rows["tokens_per_second" if timed else "measured"].idxmax()]
    horizon, length = int(row["horizon"]), float(row["measured"])
    counted = [row.get(f"{_SURVIVED}{k}", math.nan) for k in range(2, horizon + 1)]
    by_position = all(map(math.isfinite, counted))
    rates = never_rising(counted) if by_position else rates_of_lengths({horizon: length})
    conditions: dict[str, Any] = {
        "model": row.get("model"),
        "model_sha256": row.get("model_sha256"),
        "draft": described(row),
        "first_token": "target",
        **{name: row.get(name) for name in _TOLD},
        "texts": row.get("domain", row.get("texts")),
        "rates_from": "counts of every position"
        if by_position
        else "the mean length alone: every drafted token survives as often, given those before it",
        "mean_length_measured": length,
        "mean_length_interval": ends(row, "measured"),
        "interval_confidence": 0.95,
    }
    return AcceptanceTable(
        rates, MEASURED, json_values(conditions), {horizon - 1: round(length, ROUNDED)}
    )


def _decoded(decoding: pd.DataFrame) -> pd.DataFrame:
    """Rows of heads, by block verification where that was tried."""
    if not {"measured", "horizon"} <= set(decoding):
        raise ValueError("a table of decoding without the columns measured and horizon")
    rows = decoding.rename(columns={"base": "model"})
    rows = rows[rows["measured"].notna() & rows["horizon"].notna()].reset_index(drop=True)
    block = rows["rule"] == "block" if "rule" in rows else pd.Series(False, index=rows.index)
    return rows[block] if block.any() else rows


def _matching(rows: pd.DataFrame, wanted: Wanted) -> pd.DataFrame:
    asked = {"model": wanted.model, "domain": wanted.domain, "head": wanted.head}
    asked |= {"horizon": wanted.horizon, "rank": wanted.rank, "batch": wanted.load}  # type: ignore[dict-item]
    for column, value in asked.items():
        if value is None:
            continue
        known = listed(rows[column].unique()) if column in rows else ""
        rows = rows[rows[column] == value] if column in rows else rows.iloc[:0]
        if rows.empty:
            raise ValueError(
                f"nothing was decoded with {column} {value!r}: there is {known or 'no such column'}"
            )
    if rows.empty:
        raise ValueError("nothing was decoded with a head")
    if "model" in rows and rows["model"].nunique() > 1:
        raise ValueError(
            "several models were decoded: choose one with --model, of "
            f"{listed(rows['model'].unique())}"
        )
    return rows
