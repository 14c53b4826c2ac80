"""Figures: tables in, axes out; nothing is computed here. The only user of matplotlib.

Every function draws on the axes it is given and returns them.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under every common colour blindness; markers repeat what colours say.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_error_against_rank(summary: pd.DataFrame, ax: Axes) -> Axes:
    """Median KL divergence per method over ranks, quartiles as bands; one horizon's rows of `method_summary`."""
    for i, (method, rows) in enumerate(summary.groupby("method")):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        floor = 1e-6  # a logarithmic axis has no zero
        ax.plot(rows["rank"], rows["kl_nats"].clip(lower=floor), color=colour, marker=marker, label=method)
        low, high = rows["kl_nats_low"].clip(lower=floor), rows["kl_nats_high"].clip(lower=floor)
        ax.fill_between(rows["rank"], low, high, color=colour, alpha=0.15, linewidth=0)
    _rank_axis(ax, summary["rank"])
    ax.set_yscale("log")
    ax.set_ylabel("KL divergence, nats (median, quartiles)")
    ax.legend(frameon=False)
    return ax


def plot_tokens_per_call(choice: pd.DataFrame, ax: Axes, *, recommended: int, horizon: int) -> Axes:
    """Mean tokens per call over ranks with 95 % band, the horizon as ceiling and the recommended rank marked."""
    ax.fill_between(choice["rank"], choice["tokens_per_call_low"], choice["tokens_per_call_high"], color=COLOURS[0], alpha=0.2)
    ax.plot(choice["rank"], choice["tokens_per_call"], color=COLOURS[0], marker="o", label="best fit (mean, 95 % band)")
    ax.axhline(horizon, color=COLOURS[6], linestyle=":", label="exact draft")
    ax.axvline(recommended, color=COLOURS[1], linestyle="--", label=f"recommended rank {recommended}")
    _rank_axis(ax, choice["rank"])
    ax.set_ylabel("tokens per call")
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_survival(survival: pd.DataFrame, ax: Axes) -> Axes:
    """Mean survival per position, a line per rank; one horizon's rows of `survival_by_rank`."""
    for i, (rank, rows) in enumerate(survival.groupby("rank")):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(rows["position"], rows["survival"], label=f"rank {rank}", color=colour, marker=marker)
    ax.set_xticks(sorted(survival["position"].unique()))
    ax.set_xlabel("position in the block")
    ax.set_ylabel("survival (mean)")
    ax.set_ylim(top=1.02)
    ax.legend(frameon=False, fontsize="small")
    return ax


def figure_svg(draw: Callable[[Axes], object], title: str) -> str:
    """One figure as an SVG element to stand in a page."""
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        ax = figure.add_subplot()
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.grid(alpha=0.25)
        draw(ax)
        ax.set_title(title, loc="left", fontsize=11)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _rank_axis(ax: Axes, ranks: pd.Series) -> None:
    ticks = sorted(ranks.unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(rank) for rank in ticks])
    ax.minorticks_off()
    ax.set_xlabel("rank")
