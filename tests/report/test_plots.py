"""Figures: axes in, axes out, legible colours."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cpmtp.report import plots, theme

# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


PALETTES = [
    ((*theme.COLOURS, theme.INK), "#ffffff"),
    ((*theme.DARK_COLOURS, theme.DARK_INK), "#14171b"),
]


@pytest.mark.parametrize(("palette", "page"), PALETTES)
def test_every_colour_stands_out_from_its_page(palette, page):
    assert min(contrast(colour, page) for colour in palette) >= 3


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize(("palette", "page"), PALETTES)
def test_colours_stay_apart_under_the_common_colour_blindnesses(palette, page, blindness):
    seen = [lab(np.array(BLINDNESS[blindness]) @ linear(colour)) for colour in palette]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 15


def test_every_plot_takes_axes_and_returns_them():
    for name, function in inspect.getmembers(plots, inspect.isfunction):
        if name.startswith("plot_"):
            signature = inspect.signature(function)
            assert "ax" in signature.parameters and signature.return_annotation == "Axes", name


def test_a_waterfall_ends_where_the_head_is():
    row = pd.Series(
        dict(
            exact_limit=3.0,
            acceptance_fit=2.8,
            em_fit=2.7,
            learned=2.1,
            learned_low=2.0,
            learned_high=2.2,
        )
    )
    ax = plots.plot_waterfall(row, Figure().add_subplot())
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, [3.0, 0.2, 0.1, 0.6, 2.1])
    np.testing.assert_allclose(heights[0] - sum(heights[1:4]), heights[4])


def test_losses_over_ranks_stack_up_to_the_exact_draft():
    rows = pd.DataFrame(
        dict(
            rank=[4, 1],
            exact_limit=3.0,
            acceptance_fit=[2.8, 2.4],
            em_fit=[2.7, 2.3],
            learned=[2.1, 1.9],
        )
    )
    ax = plots.plot_losses_over_rank(rows, Figure().add_subplot())
    heights = np.array([patch.get_height() for patch in ax.patches]).reshape(4, 2)
    np.testing.assert_allclose(heights[0], [1.9, 2.1])
    np.testing.assert_allclose(heights.sum(0), 3.0)


def test_the_fastest_cells_are_outlined():
    cells = pd.DataFrame(
        dict(
            horizon=[2, 2, 3, 3],
            rank=[1, 2, 1, 2],
            speedup=[1.5, 1.6, 1.8, 2.0],
            fastest_frequency=[0, 0, 0.04, 0.96],
        )
    )
    ax = plots.plot_speedup(cells, Figure().add_subplot())
    assert sum(not patch.get_fill() for patch in ax.patches) == 1
    assert {text.get_text() for text in ax.texts} == {"1.50", "1.60", "1.80", "2.00"}


def test_a_figure_in_a_page_has_no_colour_of_its_own():
    svg = plots.figure_svg(lambda ax: ax.plot([1, 2], color=theme.COLOURS[0]), "a $title$ <b>")
    themed = theme.themed_svg(svg)
    assert "background" in svg and "background" not in themed
    assert themed.count("var(--series-0") >= 1
    assert "a $title$ &lt;b&gt;" in themed
