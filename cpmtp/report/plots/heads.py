"""Figures of heads: forecast, trained, decoded with. Tables in, axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cpmtp.report.plots.study import PALETTE, series
from cpmtp.report.plots.theme import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_SHARE = 0.36  # of the height of the axes


def plot_head_forecast(heads: pd.DataFrame, ax: Axes, *, lookup: float | None = None) -> Axes:
    """What each head would earn: a point with its interval, its ceiling as a tick, plain decoding
    and prompt lookup as lines.

    Parameters
    ----------
    heads : pandas.DataFrame
        A row per candidate, the fastest first: `label`, `speedup` over plain decoding with `_low`
        and `_high`, and `ceiling`, the same of its best possible draft (NaN: not known).
    lookup : float, optional
        Speedup of prompt lookup.
    """
    places = np.arange(len(heads))
    ends = half_widths(heads, "speedup")
    point: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "linestyle": "", "capsize": 3}
    ax.errorbar(heads["speedup"], places, xerr=ends, label="forecast, interval", **point)
    known = heads["ceiling"].notna().to_numpy()
    if known.any():
        tick: dict[str, Any] = {"color": INK, "marker": "|", "markersize": 14, "linestyle": ""}
        ax.plot(heads["ceiling"][known], places[known], label="ceiling", **tick)
    # Down to the last candidate only: the legend has the rows below it to itself.
    rows = [-0.6, len(heads) - 0.4]
    ax.plot([1.0] * 2, rows, color=INK, linestyle="-", linewidth=1, label="plain decoding")
    if lookup is not None:
        line: dict[str, Any] = {"color": COLOURS[1], "linestyle": "--", "linewidth": 1}
        ax.plot([lookup] * 2, rows, label="prompt lookup", **line)
    ax.set_yticks(places, heads["label"])
    ax.set_ylim((len(heads) + 0.2) / (1 - _LEGEND_SHARE) - 0.6, -0.6)
    ax.set_xlabel("times the speed of plain decoding", loc="right")
    ax.legend(loc="lower right")
    return ax


def plot_waterfall(row: pd.Series, ax: Axes) -> Axes:
    """Where tokens per call are lost, from an exact draft to a learned head.

    Parameters
    ----------
    row : pandas.Series
        `exact_limit`, `acceptance_fit`, `em_fit`, `learned`, in tokens per call; `learned_low`,
        `learned_high` if known.
    """
    names = ["exact draft", "lost to rank", "lost to objective", "lost to learning", "learned head"]
    levels = [row["exact_limit"], row["acceptance_fit"], row["em_fit"], row["learned"]]
    ax.bar(0, levels[0], color=INK, alpha=0.35)
    for i in range(3):
        lost = levels[i] - levels[i + 1]
        ax.bar(
            i + 1,
            lost,
            bottom=levels[i + 1],
            color=COLOURS[1 + i],
            hatch="//" if lost < 0 else None,
        )
        ax.text(i + 1, max(levels[i], levels[i + 1]), f"{-lost:+.2f}", ha="center", va="bottom")
    error = None
    if "learned_low" in row and pd.notna(row["learned_low"]):
        error = [[row["learned"] - row["learned_low"]], [row["learned_high"] - row["learned"]]]
    ax.bar(4, levels[3], color=COLOURS[0], yerr=error, capsize=4, ecolor=INK)
    for x, level in ((0, levels[0]), (4, levels[3])):
        ax.text(x, level / 2, f"{level:.2f}", ha="center", va="center")
    ax.set_xticks(range(5), ["\n".join(name.rsplit(" ", 1)) for name in names])
    ax.set_ylabel("tokens per call")
    return ax


def plot_losses_over_rank(table: pd.DataFrame, ax: Axes) -> Axes:
    """The same for several ranks side by side: what is learned at the bottom, above it what is lost
    to what.

    Parameters
    ----------
    table : pandas.DataFrame
        A row per rank: `rank`, `exact_limit`, `acceptance_fit`, `em_fit`, `learned`; the last with
        `_low` and `_high` if known.
    """
    table = table.sort_values("rank")
    places = range(len(table))
    ax.bar(
        places,
        table["learned"],
        color=COLOURS[0],
        label="learned head",
        yerr=half_widths(table, "learned"),
        ecolor=INK,
    )
    low = table["learned"]
    for i, (name, level) in enumerate(
        (("learning", "em_fit"), ("objective", "acceptance_fit"), ("rank", "exact_limit"))
    ):
        high = np.maximum(table[level], low)
        ax.bar(places, high - low, bottom=low, color=COLOURS[3 - i], label=f"lost to {name}")
        low = high
    ax.set_xticks(places, table["rank"].astype(str))
    ax.set_xlabel("rank")
    ax.set_ylabel("tokens per call")
    # Above the bars, where nothing is drawn.
    ax.set_ylim(0, 1.25 * float(table["exact_limit"].max()))
    ax.legend(ncols=2, loc="upper left")
    return ax


def plot_forecast(decoding: pd.DataFrame, ax: Axes) -> Axes:
    """Measured against forecast tokens per call, intervals as bars, equality as a line.

    Parameters
    ----------
    decoding : pandas.DataFrame
        `forecast`, `measured`, each with `_low` and `_high`; `rank` if there are several.
    """
    groups = decoding.groupby("rank") if "rank" in decoding else [("", decoding)]
    for i, (rank, rows) in enumerate(groups):
        across, up = half_widths(rows, "forecast"), half_widths(rows, "measured")
        style = series(i) | {"linestyle": "", "elinewidth": 1, "label": f"rank {rank}"}
        ax.errorbar(rows["forecast"], rows["measured"], xerr=across, yerr=up, **style)
    ends = [
        decoding[["forecast", "measured"]].min().min(),
        decoding[["forecast", "measured"]].max().max(),
    ]
    ax.plot(ends, ends, color=INK, linestyle=":", label="equal")
    ax.set_xlabel("forecast tokens per call")
    ax.set_ylabel("measured tokens per call")
    ax.legend()
    return ax


def plot_step_times(steps: pd.DataFrame, ax: Axes) -> Axes:
    """What a call spends its time on, stacked: columns `label` and one per part in seconds."""
    left = np.zeros(len(steps))
    for i, part in enumerate(name for name in steps.columns if name != "label"):
        seconds = steps[part].to_numpy() * 1e3
        ax.barh(
            range(len(steps)),
            seconds,
            left=left,
            color=PALETTE[i % len(PALETTE)],
            label=part.removesuffix("_seconds"),
        )
        left += seconds
    ax.set_yticks(range(len(steps)), steps["label"])
    ax.set_xlabel("milliseconds per call")
    ax.set_xlim(0, 1.6 * max(left, default=1.0))  # the legend stands beside the bars
    ax.legend(loc="center right")
    return ax


def half_widths(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Distances to both ends of an interval, (2, rows); zero where there is none."""
    low, high = (
        rows[f"{name}_{end}"] if f"{name}_{end}" in rows else rows[name] for end in ("low", "high")
    )
    return np.abs([rows[name] - low, high - rows[name]])


def plot_speed_by_budget(rows: pd.DataFrame, ax: Axes, *, budget: float) -> Axes:
    """What more training brings: a line per head, the range of the first as a band.

    Parameters
    ----------
    rows : pandas.DataFrame
        `option`, `budget`, and `speedup` over plain decoding with `_low` and `_high`; the fastest
        head first at the budget.
    budget : float
        Marked.
    """
    at = rows[rows["budget"] == budget].sort_values("speedup", ascending=False)
    for i, name in enumerate(at["option"]):
        own = rows[rows["option"] == name].sort_values("budget")
        ax.plot(own["budget"], own["speedup"], label=name, **series(i))
        if i == 0:
            ends = own["speedup_low"], own["speedup_high"]
            ax.fill_between(own["budget"], *ends, color=COLOURS[0], alpha=0.15, linewidth=0)
    ax.axhline(1.0, color=INK, linewidth=1)
    ax.set_xscale("log")
    ax.set_xlabel("positions of training")
    ax.set_ylabel("times the speed")
    low, high = float(rows["speedup_low"].min()), float(rows["speedup_high"].max())
    bottom = min(low, 1.0) - 0.05
    ax.plot([budget] * 2, [bottom, high], color=INK, linestyle=":", linewidth=1)
    # The legend stands above all that is drawn.
    ax.set_ylim(bottom, high + 0.35 * (high - low) + 0.05)
    ax.legend(ncols=2, loc="upper left")
    return ax


def plot_losses_by_head(heads: pd.DataFrame, ax: Axes) -> Axes:
    """A bar per head of an exact draft's tokens per call: earned, lost to learning, lost to form
    and rank.

    Parameters
    ----------
    heads : pandas.DataFrame
        `label`, `tokens_per_call`, `horizon`, and `ceiling` (NaN: not known, then both losses are
        one).
    """
    places = np.arange(len(heads))
    learned, exact = heads["tokens_per_call"].to_numpy(), heads["horizon"].to_numpy(dtype=float)
    ceiling = np.clip(heads["ceiling"].to_numpy(dtype=float), learned, exact)
    known = ~np.isnan(ceiling)
    ax.barh(places, learned, color=COLOURS[0], label="trained head")
    if known.any():
        lost = np.where(known, ceiling - learned, 0.0)
        ax.barh(places, lost, left=learned, color=COLOURS[1], label="lost to learning")
        rest = np.where(known, exact - ceiling, 0.0)
        left = np.where(known, ceiling, learned)
        ax.barh(places, rest, left=left, color=COLOURS[3], label="lost to form and rank")
    if not known.all():
        lost = np.where(known, 0.0, exact - learned)
        ax.barh(places, lost, left=learned, color=INK, alpha=0.2, label="lost, not told to what")
    ax.set_axisbelow(True)
    ax.set_yticks(places, heads["label"])
    ax.set_ylim((len(heads) - 0.4) / (1 - _LEGEND_SHARE), -0.6)
    ax.set_xlabel("tokens per call")
    ax.legend(ncols=2, loc="lower left")
    return ax
