"""Expectation-maximisation over vectors of parameters, extrapolated and never rising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpmtp.decomposition.descent.quasi_newton import Minima
from cpmtp.decomposition.mixtures import descend

# Sweeps before the first extrapolation, and the longest that is tried first.
BURN_IN = 2
FIRST_STEP_LIMIT = 4.0


class ExpectedCounts(Protocol):
    """What an E step finds of some runs."""

    @property
    def kl(self) -> Tensor:
        """Divergence of each run, (runs,)."""
        ...

    def __getitem__(self, index): ...


C = TypeVar("C", bound=ExpectedCounts)


@dataclass(frozen=True)
class Sweeps(Generic[C]):
    """The steps of an EM over vectors; the first argument of each is the numbers of the runs.

    Attributes
    ----------
    count : callable
        ``(runs, vectors, with_kl) -> counts``: the E step.
    maximise : callable
        ``(runs, vectors, counts) -> vectors``: a better place for these counts.
    spread : callable
        ``(runs, vectors) -> (runs, size)``: what a step in each parameter matters.
    """

    count: Callable[[Tensor, Tensor, bool], C]
    maximise: Callable[[Tensor, Tensor, C], Tensor]
    spread: Callable[[Tensor, Tensor], Tensor]


def swept(
    sweeps: Sweeps, start: Float[Tensor, "runs size"], *, max_passes: int, tolerance: float
) -> Minima:
    """Two sweeps ``x0 -> x1 -> x2`` and then the point beyond them, kept where it is not worse.

    The point is ``x0 + 2 s (x1 - x0) + s^2 (x2 - 2 x1 + x0)``, ``s = |x1 - x0| / |x2 - 2 x1 +
    x0|``; where it is above x0, x2 is taken.

    Parameters
    ----------
    max_passes : int
        Most E steps of each run, rejected extrapolations included.
    tolerance : float
        In nats: a run stops when ten E steps have gained less than this.

    References
    ----------
    varadhan2008squarem
    """

    def advance(alive: Tensor, point: _Point) -> tuple[_Point, list[int]]:
        if point.rounds >= BURN_IN:
            return _extrapolated(sweeps, alive, point)
        x = sweeps.maximise(alive, point.x, point.counts)
        counts = sweeps.count(alive, x, True)
        return _Point(x, counts, point.step_limit, point.rounds + 1), [1] * len(alive)

    limit = start.new_full((len(start),), FIRST_STEP_LIMIT)
    everything = torch.arange(len(start), device=start.device)
    begin = _Point(start, sweeps.count(everything, start, True), limit, 0)
    found = descend(begin, advance, max_passes=max_passes, tolerance=tolerance)
    points = torch.cat([end.x for end in found.ends])[found.order]  # (runs, size)
    values = torch.cat([end.values for end in found.ends])[found.order]  # (runs,)
    return Minima(points, values, tuple(found.converged.tolist()), found.traces)


@dataclass(frozen=True)
class _Point:
    """Where some runs are, and how far each may extrapolate."""

    x: Float[Tensor, "runs size"]
    counts: Any
    step_limit: Float[Tensor, " runs"]
    rounds: int

    @property
    def values(self) -> Float[Tensor, " runs"]:
        return self.counts.kl

    def __getitem__(self, runs: Tensor) -> _Point:
        return _Point(self.x[runs], self.counts[runs], self.step_limit[runs], self.rounds)


def _extrapolated(sweeps: Sweeps, alive: Tensor, point: _Point) -> tuple[_Point, list[int]]:
    """Where the runs are next, and the E steps this took each."""
    once = sweeps.maximise(alive, point.x, point.counts)
    twice = sweeps.maximise(alive, once, sweeps.count(alive, once, False))

    first, bend = once - point.x, twice - 2 * once + point.x  # (runs, size)
    weight = sweeps.spread(alive, once)  # (runs, size)
    lengths = [(weight * change.square()).sum(1) for change in (first, bend)]
    ratio = (lengths[0] / lengths[1].clamp_min(1e-300)).sqrt()  # (runs,)
    step = ratio.clamp_min(1.0).minimum(point.step_limit)  # (runs,)
    s = step[:, None]  # (runs, 1)
    x = point.x + 2 * s * first + s.square() * bend  # (runs, size)

    counts = sweeps.count(alive, x, True)
    risen = ~(counts.kl <= point.values)  # (runs,)
    limit = limits_after(risen, step, point.step_limit)
    spent = [3 if up else 2 for up in risen.tolist()]
    if bool(risen.any()):
        # All runs are counted again where any has risen: counts of two sizes do not mix.
        x = torch.where(risen[:, None], twice, x)  # (runs, size)
        counts = sweeps.count(alive, x, True)
    return _Point(x, counts, limit, point.rounds + 1), spent


def limits_after(
    risen: Bool[Tensor, " runs"], step: Float[Tensor, " runs"], limit: Float[Tensor, " runs"]
) -> Float[Tensor, " runs"]:
    """How far each run may extrapolate next: steps that reach their limit and help may grow, steps
    that do not help must shrink.
    """
    grown = torch.where(step >= limit, 4 * limit, limit)  # (runs,)
    return torch.where(risen, (limit / 4).clamp_min(2.0), grown)
