"""Four ways to choose a rank from a curve of scores; each says what it would choose in every
resample.

Information criteria and core consistency are not among them: an exact joint is no sample, so AIC
and BIC have no sample size to weigh parameters against, and core consistency falls without bound
above the true rank of a noiseless array and says nothing about what a rank is worth.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

CRITERIA = ("tolerance", "marginal_gain", "convex_hull", "throughput")
_ROUNDING = 1e-12
_ALIGNED = 1e-9  # slopes that differ by less belong to one line


def tolerant_choice(
    means: Float[ndarray, "resamples ranks"],
    shortfall: Float[ndarray, "resamples ranks"],
    standard_error: Float[ndarray, "resamples ranks"],
    tolerance: float,
) -> Int[ndarray, " resamples"]:
    """Index of the smallest rank whose shortfall to the best is at most one standard error or
    `tolerance` of the best.

    Examples
    --------
    >>> means = np.array([[2.0, 2.78, 2.8]])
    >>> tolerant_choice(means, 2.8 - means, 0 * means, 0.01)
    array([1])
    """
    return tolerated(means, shortfall, standard_error, tolerance).argmax(1)


def tolerated(
    means: ndarray, shortfall: ndarray, standard_error: ndarray, tolerance: float
) -> ndarray:
    """Which ranks the tolerance allows, (resamples, ranks)."""
    allowed = np.maximum(np.nan_to_num(standard_error), tolerance * means.max(1, keepdims=True))
    return shortfall <= allowed + _ROUNDING


def marginal_choice(
    means: Float[ndarray, "resamples ranks"], ranks: Int[ndarray, " ranks"], tolerance: float
) -> Int[ndarray, " resamples"]:
    """Index of the first rank from which a doubling gains less than `tolerance` of what it has;
    else the last.

    Steps of the grid that are not doublings are brought to one by the logarithm.

    Examples
    --------
    >>> marginal_choice(np.array([[2.0, 2.7, 2.71, 2.9]]), np.array([1, 2, 4, 8]), 0.01)
    array([1])
    """
    gains = np.diff(means, axis=1) / np.diff(np.log2(ranks))
    small = gains < tolerance * means[:, :-1]
    return np.concatenate([small, np.ones((len(means), 1), dtype=bool)], axis=1).argmax(1)


def hull_choice(
    means: Float[ndarray, "resamples ranks"], parameters: Float[ndarray, " ranks"]
) -> Int[ndarray, " resamples"]:
    """Index of the elbow of the convex hull of fit against parameters.

    Among the corners of the upper hull, the one where the slope falls by the largest factor. The
    first corner and the last have a slope on one side only and cannot be elbows; where there is no
    other, the last is taken.

    References
    ----------
    ceulemans2006selecting

    Examples
    --------
    >>> hull_choice(np.array([[2.0, 2.7, 2.75, 2.8]]), np.array([1.0, 2.0, 4.0, 8.0]))
    array([1])
    """
    return np.array([_elbow(curve, parameters) for curve in means], dtype=int)


def _elbow(fit: ndarray, parameters: ndarray) -> int:
    corners: list[int] = []
    for point in range(len(fit)):
        if corners and fit[point] <= fit[corners[-1]] + _ROUNDING:
            continue  # more parameters for no better fit
        while len(corners) > 1:
            before = _slope(fit, parameters, corners[-2], corners[-1])
            if before > _slope(fit, parameters, corners[-1], point) * (1 + _ALIGNED):
                break
            corners.pop()
        corners.append(point)
    if len(corners) < 3:
        return corners[-1]
    slopes = [_slope(fit, parameters, a, b) for a, b in pairwise(corners)]
    falls = [before / after for before, after in pairwise(slopes)]
    return corners[1 + int(np.argmax(falls))]


def _slope(fit: ndarray, parameters: ndarray, left: int, right: int) -> float:
    return (fit[right] - fit[left]) / (parameters[right] - parameters[left])


def throughput_choice(
    means: Float[ndarray, "resamples ranks"], seconds: Float[ndarray, " ranks"]
) -> Int[ndarray, " resamples"]:
    """Index of most tokens per second.

    Examples
    --------
    >>> throughput_choice(np.array([[2.0, 2.5, 2.6]]), np.array([1.0, 1.1, 1.3]))
    array([1])
    """
    return (means / seconds).argmax(1)
