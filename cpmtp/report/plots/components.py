"""A draft's components as a picture: what `top_tokens` lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from cpmtp.report.plots.theme import COLOURS, INK
from cpmtp.report.words import as_written

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_components(table: pd.DataFrame, ax: Axes, *, most: int = 4) -> Axes:
    """One row per component and position: bars of its tokens' probabilities, each with its token.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `cpmtp.top_tokens`.
    ax : matplotlib.axes.Axes
        About three inches high per component.
    most : int
        Components shown, the heaviest first.

    Raises
    ------
    ValueError
        If the table has no such rows.
    """
    if not len(table) or "component" not in table:
        raise ValueError("no table of components: expected what top_tokens returns")
    shown = table[table["component"] < most]
    positions = int(shown["position"].max())
    for (component, position), rows in shown.groupby(["component", "position"]):
        line, left = int(component) * (positions + 1) + int(position) - 1, 0.0
        for number, row in enumerate(rows.itertuples()):
            share = float(row.probability)  # type: ignore[arg-type]  # of the table
            colour = COLOURS[number % len(COLOURS)]
            ax.barh(line, share, left=left, color=colour, alpha=0.55, edgecolor="white")
            written = as_written(str(row.token)).replace("$", r"\$")
            if share > _ROOM + _LETTER * len(written):
                ax.text(
                    left + share / 2,
                    line,
                    written,
                    ha="center",
                    va="center",
                    color=INK,
                )
            left += share
    first = shown.drop_duplicates("component")
    centres = [int(c) * (positions + 1) + (positions - 1) / 2 for c in first["component"]]
    ax.set_yticks(centres, [f"weight {weight:.2f}" for weight in first["weight"]])
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_xlim(0, 1)
    ax.set_xlabel("probability; one bar per position, from above")
    return ax


_ROOM, _LETTER = 0.03, 0.02  # a bar narrower than its token has no room for it
