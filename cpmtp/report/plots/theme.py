"""The figures' style and colours, on a light page and on a dark one."""

from __future__ import annotations

import re
from typing import Any

# On a light page, and what the same series is on a dark one.
COLOURS = ("#0072b2", "#e05a10", "#00a05a", "#a1225d", "#825021")
DARK_COLOURS = ("#56b4e9", "#d86d3c", "#00e07a", "#c49ab0", "#ebb71f")
INK, DARK_INK = "#1b1f24", "#e6e9ec"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
ON_WHITE = 'style="background: #fff"'


def themed_svg(svg: str) -> str:
    """A figure of `figure_svg` whose colours and ground are left to the page's style sheet
    (`theme_css`).
    """
    svg = svg.replace(f"{ON_WHITE} ", "", 1)
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{i}, {colour})")
    return svg.replace(INK, f"var(--figure-ink, {INK})")


def theme_css() -> tuple[str, str]:
    """Custom properties of the figures' colours on a light page and on a dark one."""
    light = "".join(f" --series-{i}: {colour};" for i, colour in enumerate(COLOURS))
    dark = "".join(f" --series-{i}: {colour};" for i, colour in enumerate(DARK_COLOURS))
    return f"--figure-ink: {INK};{light}", f"--figure-ink: {DARK_INK};{dark}"


def own_names(svg: str, name: str) -> str:
    """Ids that nothing refers to are dropped, the others made the figure's own: a page holds many
    figures.
    """
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{slug}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r"(url\(|href=\")#", rf"\1#{slug}-", svg)
