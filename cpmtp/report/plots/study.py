"""Figures in one house style: tables in, axes out; nothing is computed here. The only user of
matplotlib.

Every ``plot_`` function draws on the axes it is given and returns them. Colours stay apart under
the common colour blindnesses (the tests measure it), and markers and line styles say the same once
more.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import StrMethodFormatter

from cpmtp.report.plots.theme import COLOURS, INK, ON_WHITE, STYLE, own_names

MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
PALETTE = (*COLOURS, INK)
_SIZE = (4.8, 3.3)
_MARGINS = (0.15, 0.15, 0.82, 0.75)  # left, bottom, width, height of the axes
_MOST_POINTS = 150
_LEGEND_ROOM = 0.6  # of the height of what is drawn
_LETTER, _LEFT_LABEL = 0.1, 0.08  # inches of a letter; share of the width for the axis' name
_KL_FLOOR = 1e-6  # a logarithmic axis has no zero


@contextmanager
def house_style() -> Iterator[None]:
    """The style as a context: ``with house_style(): figure, ax = plt.subplots()``."""
    with matplotlib.rc_context(STYLE):
        yield
        shown = matplotlib.is_interactive()
    # A notebook's first figure turns this on, and without it no later figure would be shown.
    matplotlib.interactive(shown)


def plot_error_against_rank(
    summary: pd.DataFrame, ax: Axes, *, floor: pd.Series | None = None
) -> Axes:
    """Median KL divergence per method over ranks, quartiles as bands; one horizon's rows of
    `method_summary`. `floor`, by rank, is what no draft goes below.
    """
    for i, (method, rows) in enumerate(summary.groupby("method")):
        ax.plot(rows["rank"], rows["kl_nats"].clip(lower=_KL_FLOOR), label=method, **series(i))
        low, high = (
            rows["kl_nats_low"].clip(lower=_KL_FLOOR),
            rows["kl_nats_high"].clip(lower=_KL_FLOOR),
        )
        ax.fill_between(
            rows["rank"], low, high, color=PALETTE[i % len(PALETTE)], alpha=0.15, linewidth=0
        )
    _rank_axis(ax, summary["rank"])
    ax.set_yscale("log")
    if floor is not None and len(floor):
        # At high ranks it falls far below all fits, which would be squeezed above it.
        limits = ax.get_ylim()
        ax.plot(floor.index, floor.clip(lower=_KL_FLOOR), label="floor", color=INK, linestyle=":")
        ax.set_ylim(limits)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.minorticks_off()
    ax.set_ylabel("KL divergence, nats")
    ax.legend()
    return ax


def plot_tokens_per_call(
    choice: pd.DataFrame, ax: Axes, *, recommended: int | None, horizon: int, name: str = ""
) -> Axes:
    """Mean tokens per call over ranks with 95 % band, the horizon as what an exact draft gives, and
    the recommended rank ringed if it is of this horizon.

    Parameters
    ----------
    choice : pandas.DataFrame
        One horizon's rows of a choice's table; where they are `truncated` the means are lower
        bounds and the upper ones are drawn beside them.
    recommended : int, optional
    horizon : int
    name : str
        What the ringed rank is called; default: recommended.
    """
    truncated = "truncated" in choice and bool(choice["truncated"].any())
    ax.fill_between(
        choice["rank"],
        choice["tokens_per_call_low"],
        choice["tokens_per_call_high"],
        color=COLOURS[0],
        alpha=0.2,
    )
    sampled = "sampled" in choice and bool(choice["sampled"].any())
    what = "lower bound" if truncated else "estimate of best fit" if sampled else "best fit"
    label = f"{what} (mean, 95 % band)"
    ax.plot(choice["rank"], choice["tokens_per_call"], label=label, **series(0))
    if truncated:
        upper = series(2) | {"linestyle": "--", "marker": ""}
        ax.plot(choice["rank"], choice["tokens_per_call_upper"], label="upper bound", **upper)
    ax.axhline(horizon, color=INK, linestyle=":", label="exact draft")
    if recommended is not None:
        at = choice[choice["rank"] == recommended]
        ring = series(0) | {"color": COLOURS[1], "markersize": 13, "linestyle": ""}
        label = name or f"recommended rank {recommended}"
        ax.plot(at["rank"], at["tokens_per_call"], fillstyle="none", label=label, **ring)
    _rank_axis(ax, choice["rank"])
    ax.set_ylabel("tokens per call")
    _legend_below(ax)
    return ax


def plot_survival(survival: pd.DataFrame, ax: Axes, *, ceiling: pd.DataFrame | None = None) -> Axes:
    """Mean survival per position, a line per rank, and dotted what no verification could exceed;
    rows of `survival_by_rank`.
    """
    for i, (rank, rows) in enumerate(survival.groupby("rank")):
        ax.plot(rows["position"], rows["survival"], label=f"rank {rank}", **series(i))
        if ceiling is not None:
            above = ceiling[ceiling["rank"] == rank]
            label = "coupling ceiling" if i == 0 else None
            ax.plot(
                above["position"],
                above["survival"],
                color=PALETTE[i % len(PALETTE)],
                linestyle=":",
                label=label,
            )
    ax.set_xticks(sorted(survival["position"].unique()))
    ax.set_xlabel("position in the block")
    ax.set_ylabel("survival (mean)")
    ax.set_ylim(top=1.02)
    ax.legend()
    return ax


def plot_speedup(cells: pd.DataFrame, ax: Axes, *, confident: float = 0.05) -> Axes:
    """Predicted speedup over rank and horizon; cells that are the fastest in at least `confident`
    of resamples are outlined.

    Parameters
    ----------
    cells : pandas.DataFrame
        Table of a ``throughput`` choice.
    """
    ranks, horizons = sorted(cells["rank"].unique()), sorted(cells["horizon"].unique())
    low, high = cells["speedup"].min(), cells["speedup"].max()
    for row in cells.itertuples():
        x, y = ranks.index(row.rank), horizons.index(row.horizon)
        # A tint of the page, so that the figure's ink is legible on it in either theme.
        tint = 0.05 + 0.5 * (row.speedup - low) / max(high - low, 1e-9)
        ax.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=COLOURS[0], alpha=tint, linewidth=0)
        )
        if row.fastest_frequency >= confident:
            ax.add_patch(
                Rectangle(
                    (x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=COLOURS[1], linewidth=2
                )
            )
        ax.text(x, y, f"{row.speedup:.2f}", ha="center", va="center")
    ax.set_xlim(-0.5, len(ranks) - 0.5)
    ax.set_ylim(-0.5, len(horizons) - 0.5)
    ax.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    ax.set_yticks(range(len(horizons)), [str(horizon) for horizon in horizons])
    ax.set_xlabel("rank")
    ax.set_ylabel("horizon")
    ax.grid(False)
    return ax


def plot_contexts(values: pd.DataFrame, ax: Axes) -> Axes:
    """One point per context and rank, some hundred where there are more; median and quartiles of
    all beside.

    Parameters
    ----------
    values : pandas.DataFrame
        `context_values` of one horizon: a row per context, a column per rank.
    """
    for i, rank in enumerate(values.columns):
        scores = np.sort(values[rank].to_numpy())
        points = scores[:: max(len(scores) // _MOST_POINTS, 1)]
        across = i + np.linspace(-0.22, 0.12, len(points))
        ax.plot(across, points, linestyle="", marker="o", markersize=3, alpha=0.5, color=COLOURS[0])
        quartiles = np.nanpercentile(scores, [25, 50, 75])
        ax.plot([i + 0.27] * 2, quartiles[[0, 2]], color=COLOURS[1], linewidth=3)
        ax.plot([i + 0.27], quartiles[1:2], color=COLOURS[1], marker="D", markersize=6)
    ax.set_xticks(range(len(values.columns)), [str(rank) for rank in values.columns])
    ax.set_xlabel("rank")
    ax.set_ylabel("tokens per call of a context")
    return ax


def plot_against_entropy(contexts: pd.DataFrame, ax: Axes) -> Axes:
    """Tokens per call of each context against the entropy of its joint, one marker per rank.

    Parameters
    ----------
    contexts : pandas.DataFrame
        Columns `rank`, `joint_entropy_nats`, `tokens_per_call`.
    """
    for i, (rank, rows) in enumerate(contexts.groupby("rank")):
        style = series(i) | {"linestyle": "", "markersize": 4, "alpha": 0.7}
        ax.plot(rows["joint_entropy_nats"], rows["tokens_per_call"], label=f"rank {rank}", **style)
    ax.set_xlabel("entropy of the joint, nats")
    ax.set_ylabel("tokens per call")
    ax.legend()
    return ax


def plot_lines_over_rank(table: pd.DataFrame, ax: Axes, *, by: str, value: str, label: str) -> Axes:
    """`value` over ranks, a line per `by`, with a band where the table has `value_low` and
    `value_high`.
    """
    for i, (name, rows) in enumerate(table.groupby(by, sort=False)):
        ax.plot(rows["rank"], rows[value], label=str(name), **series(i))
        if f"{value}_low" in rows:
            band = (rows[f"{value}_low"], rows[f"{value}_high"])
            ax.fill_between(
                rows["rank"], *band, color=PALETTE[i % len(PALETTE)], alpha=0.15, linewidth=0
            )
    _rank_axis(ax, table["rank"])
    ax.set_ylabel(label)
    ax.legend()
    return ax


def framed(draw: Callable[[Axes], object], title: str, size: tuple[float, float] = _SIZE) -> Figure:
    """A figure of `size` inches with its title, drawn on by `draw`; in the style that is set."""
    figure = Figure(figsize=size, facecolor="none")
    # Fixed margins: an automatic layout measures every text several times, and took half of a
    # report's time.
    ax = figure.add_axes(_MARGINS, facecolor="none")
    draw(ax)
    ax.set_title(title, y=1.0, parse_math=False)  # a dollar sign begins no formula
    # Names at the left take the room that they need, and the axes give it.
    widest = max((len(t.get_text()) for t in ax.get_yticklabels()), default=0)
    left = min(
        max(_MARGINS[0], _LETTER * widest / size[0] + _LEFT_LABEL * bool(ax.get_ylabel())), 0.5
    )
    ax.set_position((left, _MARGINS[1], _MARGINS[0] + _MARGINS[2] - left, _MARGINS[3]))
    return figure


def figure_svg(
    draw: Callable[[Axes], object],
    title: str,
    *,
    name: str | None = None,
    size: tuple[float, float] = _SIZE,
) -> str:
    """One figure as an SVG element on white.

    Parameters
    ----------
    draw : callable
        Draws on the axes it is given.
    title : str
        Stands above the axes.
    name : str, optional
        Keeps names inside the SVG apart from those of other figures in the page; default: the
        title.
    size : tuple of float
        Inches.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name or title}):
        figure = framed(draw, title, size)
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"(font: [^';\"]*?px )[^;\"]*", r"\1sans-serif", text)
    return own_names(text, name or title).replace("<svg ", f"<svg {ON_WHITE} ", 1)


def _legend_below(ax: Axes) -> None:
    """A legend under all that is drawn, which is lifted for it."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - _LEGEND_ROOM * (high - low), high)
    ax.legend(loc="lower right")


def series(index: int) -> dict[str, Any]:
    """Colour, marker and line of the `index`-th series."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markersize": 5,
    }


def _rank_axis(ax: Axes, ranks: pd.Series) -> None:
    ticks = sorted(ranks.unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(rank) for rank in ticks])
    ax.minorticks_off()
    ax.set_xlabel("rank")
