"""Means of clustered contexts with their uncertainty: contexts of one document are drawn together
or not at all.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

RESAMPLES = 2000
FEW_CLUSTERS = 20
_POWER = 0.8
_BLOCK = 5_000_000
CLUSTER_KEYS = ("model", "domain", "document")
# What other libraries call a seed.
SEEDS = ("random_state", "random_seed", "manual_seed", "generator", "rng")

Drawing = TypeVar("Drawing", bound=Callable[..., Any])


@dataclass(frozen=True)
class Clusters:
    """What the resampling needs of a table of scores: one row of sums per document.

    A single document cannot be resampled; its contexts are then drawn one by one, and intervals
    speak of that document alone.

    Attributes
    ----------
    sums : (clusters, columns) float array
        Of the contexts' scores.
    counts : (clusters,) int array
        Contexts in each.
    documents : int
        Documents the contexts come from: the number of clusters, or one.
    """

    sums: Float[ndarray, "clusters columns"]
    counts: Int[ndarray, " clusters"]
    documents: int

    @classmethod
    def of(cls, scores: pd.DataFrame, keys: Sequence[str] = CLUSTER_KEYS) -> Clusters:
        """From one row per context whose index names its document: by default its model, domain and
        document.

        Examples
        --------
        >>> keys = [("m", "d", "a"), ("m", "d", "a"), ("m", "d", "b")]
        >>> index = pd.MultiIndex.from_tuples(keys, names=CLUSTER_KEYS)
        >>> Clusters.of(pd.DataFrame({1: [1.0, 2.0, 4.0]}, index=index)).means()
        array([2.33333333])
        """
        grouped = scores.groupby(level=list(keys))
        if grouped.ngroups == 1:
            return cls(scores.to_numpy(dtype=float), np.ones(len(scores), dtype=int), documents=1)
        return cls(grouped.sum().to_numpy(), grouped.size().to_numpy(), documents=grouped.ngroups)

    @property
    def number(self) -> int:
        """How many clusters there are."""
        return len(self.counts)

    def means(self) -> Float[ndarray, " columns"]:
        """Mean per context."""
        return self.sums.sum(0) / self.counts.sum()

    def resampled_means(
        self, weights: Int[ndarray, "resamples clusters"]
    ) -> Float[ndarray, "resamples columns"]:
        """Mean per context of every resample."""
        return weights @ self.sums / (weights @ self.counts)[:, None]

    def select(self, columns) -> Clusters:
        """The same clusters with some of the columns."""
        return replace(self, sums=self.sums[:, columns])

    def differences(self, high, low) -> Clusters:
        """Paired: columns `high` minus columns `low`."""
        return replace(self, sums=self.sums[:, high] - self.sums[:, low])


def seeded(function: Drawing) -> Drawing:
    """A function that draws resamples: whoever calls its seed by another name is told.

    Examples
    --------
    >>> @seeded
    ... def resampled(table, seed=0):
    ...     return table
    >>> resampled(None, random_state=1)
    Traceback (most recent call last):
    ...
    ValueError: resampled has no option 'random_state': it is called seed here
    """

    @functools.wraps(function)
    def telling(*arguments: Any, **options: Any) -> Any:
        for name in options.keys() & set(SEEDS):
            raise ValueError(f"{function.__name__} has no option {name!r}: it is called seed here")
        return function(*arguments, **options)

    return telling  # type: ignore[return-value]


def resampling_weights(clusters: int, seed: int) -> Int[ndarray, "resamples clusters"]:
    """How often each cluster is drawn."""
    return np.random.default_rng(seed).multinomial(
        clusters, np.full(clusters, 1 / clusters), size=RESAMPLES
    )


def intervals(clusters: Clusters, seed: int, level: float = 0.95) -> tuple[ndarray, ndarray]:
    """Bias-corrected and accelerated bootstrap interval of each column's mean per context.

    Parameters
    ----------
    clusters : Clusters
    seed : int
    level : float
        What the interval is to cover.

    Returns
    -------
    low, high : (columns,) float arrays
        The mean itself where all clusters agree, NaN where there is only one cluster.

    References
    ----------
    efron1987better

    Examples
    --------
    >>> clusters = Clusters(np.arange(30.0)[:, None], np.ones(30, dtype=int), documents=30)
    >>> low, high = intervals(clusters, seed=0)
    >>> bool(low[0] < 14.5 < high[0])
    True
    """
    means = clusters.means()
    if clusters.number < 2:
        return np.full_like(means, np.nan), np.full_like(means, np.nan)
    sums = clusters.sums.T
    counts = np.broadcast_to(clusters.counts.astype(float), sums.shape)
    with warnings.catch_warnings():
        # A column that is the same everywhere has no distribution; its interval is set below.
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (sums, counts),
            lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
            paired=True,
            vectorized=True,
            axis=-1,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return np.where(np.isnan(found.low), means, found.low), np.where(
        np.isnan(found.high), means, found.high
    )


def difference_interval(
    first: Clusters, second: Clusters, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """The same of the difference of two means per context, `second` minus `first`, where the
    documents of one have nothing to do with those of the other.

    Parameters
    ----------
    first, second : Clusters
        Of one column each.
    seed : int
    level : float
        What the interval is to cover.

    Returns
    -------
    low, high : float
        NaN where one of them has only one cluster.

    Examples
    --------
    >>> values, counts = np.arange(30.0)[:, None], np.ones(30, dtype=int)
    >>> first, second = (Clusters(values + more, counts, documents=30) for more in (0, 5))
    >>> low, high = difference_interval(first, second, seed=0)
    >>> bool(low < 5 < high)
    True
    """
    if min(first.number, second.number) < 2:
        return np.nan, np.nan

    def difference(drawn_first, drawn_second, axis: int = -1):
        drawn = ((first, drawn_first), (second, drawn_second))
        means = [c.sums[i, 0].sum(axis) / c.counts[i].sum(axis) for c, i in drawn]
        return means[1] - means[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above, where all clusters agree
        found = stats.bootstrap(
            # Sums and counts of a cluster go together: clusters are drawn by their number.
            (np.arange(first.number), np.arange(second.number)),
            difference,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    itself = float(second.means()[0] - first.means()[0])
    low, high = (itself if np.isnan(end) else float(end) for end in found)
    return low, high


def normal_half_width(standard_error: float, level: float = 0.95) -> float:
    """Half the width of a normal interval: the two-sided quantile times the standard error.

    Examples
    --------
    >>> round(normal_half_width(1.0), 4)
    1.96
    """
    return NormalDist().inv_cdf((1 + level) / 2) * standard_error


def shortfalls(
    clusters: Clusters, weights: Int[ndarray, "resamples clusters"]
) -> tuple[ndarray, ndarray, ndarray]:
    """Means, mean paired shortfalls to the best column, and their cluster-robust standard errors.

    Returns
    -------
    means, shortfall, standard_error : (resamples, columns) float arrays
    """
    parts = np.array_split(weights, max(len(weights) * clusters.sums.size // _BLOCK, 1))
    means, shortfall, error = zip(*(_shortfalls(clusters, part) for part in parts), strict=True)
    return np.concatenate(means), np.concatenate(shortfall), np.concatenate(error)


def _shortfalls(clusters: Clusters, weights: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    sums, counts = clusters.sums, clusters.counts
    means = clusters.resampled_means(weights)
    best = means.argmax(1)
    shortfall = means.max(1, keepdims=True) - means
    # Residual of a cluster's sum of differences around its expectation: the linearised variance of
    # a ratio of sums.
    differences = sums[:, best].T[:, :, None] - sums[None]
    residuals = differences - shortfall[:, None, :] * counts[None, :, None]
    drawn = weights.sum(1)
    correction = drawn / np.maximum(drawn - 1, 1)
    variance = (
        correction[:, None]
        * np.einsum("bc,bcr->br", weights, residuals**2)
        / (weights @ counts)[:, None] ** 2
    )
    return means, shortfall, np.sqrt(variance)


def standard_errors(clusters: Clusters) -> Float[ndarray, " columns"]:
    """Cluster-robust standard error of each column's mean per context."""
    number = clusters.number
    if number < 2:
        return np.full(clusters.sums.shape[1], np.nan)
    residuals = clusters.sums - clusters.means() * clusters.counts[:, None]
    return np.sqrt(number / (number - 1) * (residuals**2).sum(0)) / clusters.counts.sum()


def detectable(standard_error, clusters: int):
    """Smallest difference that a paired test at 5 % finds with a power of 80 %.

    ``(t_{0.975} + t_{0.8}) * standard error`` with one degree of freedom less than there are
    clusters.

    Examples
    --------
    >>> round(float(detectable(0.01, clusters=31)), 4)
    0.029
    """
    if clusters < 2:
        return np.nan * standard_error
    return (stats.t.ppf(0.975, clusters - 1) + stats.t.ppf(_POWER, clusters - 1)) * standard_error
