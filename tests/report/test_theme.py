"""Colours: legible, apart from each other, and left to the page."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest

from cpmtp.report import plots
from cpmtp.report.plots import theme

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


def test_a_figure_in_a_page_has_no_colour_of_its_own():
    svg = plots.figure_svg(lambda ax: ax.plot([1, 2], color=theme.COLOURS[0]), "a $title$ <b>")
    themed = theme.themed_svg(svg)
    assert "background" in svg and "background" not in themed
    assert themed.count("var(--series-0") >= 1
    assert "a $title$ &lt;b&gt;" in themed


def test_the_style_leaves_a_notebook_showing_its_figures():
    before = matplotlib.is_interactive()
    try:
        matplotlib.interactive(False)
        size = matplotlib.rcParams["font.size"]
        with plots.house_style():
            matplotlib.interactive(True)  # as a notebook's first figure does
        assert matplotlib.is_interactive() and matplotlib.rcParams["font.size"] == size
    finally:
        matplotlib.interactive(before)
