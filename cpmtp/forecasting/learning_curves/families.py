"""Shapes of learning curves: what a score becomes when the budget grows.

A curve is a score (tokens per call, its logarithm, or a loss) at several budgets, each reached by a
training of its own with its full learning-rate decay. Every family has one *shared* parameter or
shape, taken from other curves, and two numbers of the curve's own, which its probes give. With x
the log2 of the budget:

========  =========================================================================================
family    score at x
========  =========================================================================================
damped    ``y + s sum_{j<=d} ratio^j``: the last step per doubling, damped by `ratio` from doubling
          to doubling; through the last two probes
power     ``A - D ratio^x``, which is ``A - D B^-beta`` with ``beta = -log2 ratio``; least squares
          over all probes, A at most the horizon
borrowed  ``a + s h(x)`` with h learned from other curves, which may accelerate before they slow
          down; least squares over all probes
========  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike

RATIOS = np.linspace(0.0, 1.0, 101)
_SWEEPS = 60
_LARGEST_TAIL = 0.95


def damped_trend(
    budgets: Float[ndarray, " probes"],
    values: Float[ndarray, "*batch probes"],
    at: float,
    ratio: float | Float[ndarray, " ratios"],
) -> Float[ndarray, "..."]:
    """The last two probes' trend, damped by `ratio` per doubling.

    With e doublings between them and d after them the score grows by their difference times
    ``ratio^e (1 - ratio^d) / (1 - ratio^e)``; for e = 1 that is ``sum_{j<=d} ratio^j``. A ratio of
    0 keeps the last score, one of 1 goes straight on.

    Parameters
    ----------
    budgets : (probes,) float array
        Positions, ascending; at least two.
    values : (*batch, probes) float array
    at : float
        The budget wanted.
    ratio : float or (ratios,) float array

    Returns
    -------
    (*batch,) or (ratios, *batch) float array

    Examples
    --------
    >>> probes, scores = np.array([150.0, 300.0]), np.array([2.03, 2.30])
    >>> round(float(damped_trend(probes, scores, 1200.0, 0.6)), 3)
    2.559
    """
    between, ahead = float(np.log2(budgets[-1] / budgets[-2])), float(np.log2(at / budgets[-1]))
    factor = damped_factor(np.asarray(ratio, dtype=float), between, ahead)
    step = values[..., -1] - values[..., -2]
    # (ratios, *batch)
    return np.asarray(values[..., -1] + factor.reshape(factor.shape + (1,) * np.ndim(step)) * step)


def damped_factor(ratio: Float[ndarray, "..."], between: float, ahead: float) -> ndarray:
    """By how many of the last steps a damped trend goes on: ``r^e (1 - r^d) / (1 - r^e)``."""
    inside = np.asarray(np.clip(ratio, 0.0, 1.0 - 1e-12))
    going = inside**between * (1 - inside**ahead) / (1 - inside**between)
    return np.where(np.asarray(ratio) >= 1, ahead / between, going)


def power_law(
    budgets: Float[ndarray, " probes"],
    values: Float[ndarray, "*batch probes"],
    at: float,
    ratio: float | Float[ndarray, " ratios"],
    *,
    most: float,
) -> Float[ndarray, "..."]:
    """``A - D ratio^x`` by least squares over all probes, A at most `most`.

    A ratio outside (0, 1) is taken to be just inside.

    Parameters
    ----------
    budgets, values, at, ratio
        As of `damped_trend`; the values are tokens per call.
    most : float
        The horizon: what no training exceeds.

    Returns
    -------
    (*batch,) or (ratios, *batch) float array

    Examples
    --------
    >>> budgets = np.array([1.0, 2.0, 4.0])
    >>> found = power_law(budgets, 3 - 0.5**np.log2(budgets), 16.0, 0.5, most=4)
    >>> round(float(found), 6)
    2.9375
    """
    inside = np.asarray(np.clip(np.asarray(ratio, dtype=float), 0.01, 0.99))
    x = np.log2(budgets / budgets[-1])
    falling = inside[..., None] ** x  # (ratios, probes)
    centred = falling - falling.mean(-1, keepdims=True)
    # (ratios, *batch)
    slope = np.tensordot(centred, values, (-1, -1)) / _like(values, (centred**2).sum(-1))
    level = values.mean(-1) - slope * _like(values, falling.mean(-1))
    # Where the level is beyond what can be, it is what can be, and the slope goes through it.
    bound = np.tensordot(falling, values - most, (-1, -1)) / _like(values, (falling**2).sum(-1))
    beyond = level > most
    level, slope = np.where(beyond, most, level), np.where(beyond, bound, slope)
    return np.asarray(level + slope * _like(values, inside ** np.log2(at / budgets[-1])))


def _like(values: ndarray, numbers: ArrayLike) -> ndarray:
    """Numbers (ratios,) with an axis for each of a batch's: (ratios, 1, …)."""
    return np.asarray(numbers).reshape(np.shape(numbers) + (1,) * (values.ndim - 1))


@dataclass(frozen=True)
class Profile:
    """A shape that other curves had: ``y(x) = a + s h(x)``.

    Attributes
    ----------
    doublings : (points,) float array
        log2 of budgets, ascending.
    heights : (points,) float array
        h there; linear between, beyond the last one damped by the last two steps' ratio.
    """

    doublings: Float[ndarray, " points"]
    heights: Float[ndarray, " points"]

    @classmethod
    def of(cls, curves: Sequence[tuple[ndarray, ndarray]]) -> Profile:
        """The shape common to curves of (budgets, scores), by alternating least squares.

        Parameters
        ----------
        curves : sequence of ((points,) array, (points,) array)
            At least two points each; budgets may differ from curve to curve.

        Raises
        ------
        ValueError
            If no curve has three points: two are a line, which has no shape.
        """
        if not any(len(budgets) >= 3 for budgets, _ in curves):
            raise ValueError("no curve has three budgets: a shape cannot be borrowed from any")
        budgets = np.unique(np.concatenate([b for b, _ in curves]))
        table = np.full((len(curves), len(budgets)), np.nan)
        for row, (points, scores) in enumerate(curves):
            table[row, np.searchsorted(budgets, points)] = scores
        known = np.isfinite(table)
        seen = np.where(known, table, 0.0)  # (curves, points)
        heights = np.log2(budgets) - np.log2(budgets).mean()
        for _ in range(_SWEEPS):
            level, slope = _lines(seen, known, heights)
            weight = known * slope[:, None]  # (curves, points)
            heights = (weight * (seen - level[:, None])).sum(0) / np.maximum(
                (weight**2 * known).sum(0), 1e-300
            )
            spread = heights.std() or 1.0
            heights = (heights - heights.mean()) / spread
        return cls(
            np.log2(budgets), heights if _lines(seen, known, heights)[1].sum() > 0 else -heights
        )

    def height(self, budgets: ndarray) -> ndarray:
        """The shape at any budgets."""
        x, grid, heights = np.log2(budgets), self.doublings, self.heights
        found = np.interp(x, grid, heights)
        below = heights[0] + (x - grid[0]) * (heights[1] - heights[0]) / (grid[1] - grid[0])
        last = grid[-1] - grid[-2]
        step = heights[-1] - heights[-2]
        before = (
            (heights[-2] - heights[-3]) / (grid[-2] - grid[-3]) if len(grid) > 2 else step / last
        )
        tail = float(np.clip(step / last / before, 0.0, _LARGEST_TAIL)) if before > 0 else 0.0
        factor = np.array(
            [damped_factor(np.asarray(tail), last, max(d, 0.0)) for d in x - grid[-1]]
        )
        return np.where(
            x < grid[0], below, np.where(x > grid[-1], heights[-1] + factor * step, found)
        )

    def extrapolate(
        self, budgets: Float[ndarray, " probes"], values: Float[ndarray, "*batch probes"], at: float
    ) -> Float[ndarray, "..."]:
        """The curve with this shape nearest to the probes, at another budget: (*batch,)."""
        heights = self.height(np.append(budgets, at))
        known, wanted = heights[:-1], heights[-1]
        centred = known - known.mean()
        slope = values @ centred / max(float((centred**2).sum()), 1e-300)  # (*batch,)
        return np.asarray(values.mean(-1) + slope * (wanted - known.mean()))


def _lines(seen: ndarray, known: ndarray, heights: ndarray) -> tuple[ndarray, ndarray]:
    """Level and slope of every curve over the heights it was seen at, (curves,) each."""
    count = known.sum(1)
    mean = (known * heights).sum(1) / count
    centred = known * (heights - mean[:, None])  # (curves, points)
    slope = (centred * seen).sum(1) / np.maximum((centred**2).sum(1), 1e-300)
    return seen.sum(1) / count - slope * mean, slope
