"""L-BFGS for many independent problems at once: each has its own history, scale, step and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.mixtures import descend

_MEMORY = 10
_ARMIJO = 1e-4
_MOST_TRIALS = 12
# Logits beyond this per step jump across the optimum's neighbourhood.
_LONGEST_STEP = 4.0


@dataclass(frozen=True)
class Minima:
    """Best points found: (runs, size), values (runs,), whether each stopped gaining, and its values
    after every pass.
    """

    points: Float[Tensor, "runs size"]
    values: Float[Tensor, " runs"]
    converged: tuple[bool, ...]
    traces: tuple[list[float], ...]


def minimise(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Float[Tensor, "runs size"],
    *,
    curvature: Callable[[Tensor, Tensor], Tensor],
    max_passes: int,
    tolerance: float,
) -> Minima:
    """Minimise every row's function by L-BFGS with backtracking; values never rise.

    Parameters
    ----------
    evaluate : callable
        ``(runs, points) -> (values, gradients)`` for the given run numbers, each run on its own.
    start : (runs, size) tensor
    curvature : callable
        ``(runs, points) -> (runs, size)``: a positive guess at the diagonal of each Hessian, up
        to a factor. The history begins from its inverse at every step.
    max_passes : int
        Most evaluations of each run.
    tolerance : float
        A run stops when ten evaluations have gained less than this.

    References
    ----------
    nocedal2006numerical
    """

    def advance(alive: Tensor, point: _Point) -> tuple[_Point, list[int]]:
        direction = point.history.direction(point.gradient, curvature(alive, point.x))
        new, spent = _backtracked(evaluate, alive, point, direction)
        history = point.history.extended(new.x - point.x, new.gradient - point.gradient)
        return replace(new, history=history), spent

    begin = _Point(start, *evaluate(torch.arange(len(start), device=start.device), start))
    found = descend(begin, advance, max_passes=max_passes, tolerance=tolerance)
    points = torch.cat([end.x for end in found.ends])[found.order]  # (runs, size)
    values = torch.cat([end.values for end in found.ends])[found.order]  # (runs,)
    return Minima(points, values, tuple(found.converged.tolist()), found.traces)


@dataclass(frozen=True)
class _History:
    """The last steps, gradient changes and their reciprocal products (zero where a pair is of no
    use).
    """

    steps: tuple[Float[Tensor, "runs size"], ...] = ()
    changes: tuple[Float[Tensor, "runs size"], ...] = ()
    reciprocals: tuple[Float[Tensor, " runs"], ...] = ()

    def __getitem__(self, runs: Tensor) -> _History:
        fields = (self.steps, self.changes, self.reciprocals)
        return _History(*(tuple(values[runs] for values in field) for field in fields))

    def extended(self, step: Tensor, change: Tensor) -> _History:
        """One pair more, and without the oldest where there are too many."""
        product = (step * change).sum(1)  # (runs,)
        useful = product > 1e-10 * step.norm(dim=1) * change.norm(dim=1)  # (runs,)
        reciprocal = torch.where(useful, 1 / torch.where(useful, product, 1.0), 0.0)
        pairs = ((*self.steps, step), (*self.changes, change), (*self.reciprocals, reciprocal))
        return _History(*(field[-_MEMORY:] for field in pairs))

    def direction(self, gradient: Tensor, curvature: Tensor) -> Float[Tensor, "runs size"]:
        """The two-loop recursion; downhill for every run, never longer than the longest step."""
        pairs = list(zip(self.steps, self.changes, self.reciprocals, strict=True))
        q, factors = gradient, []
        for step, change, reciprocal in reversed(pairs):
            factors.append((reciprocal * (step * q).sum(1))[:, None])  # (runs, 1)
            q = q - factors[-1] * change  # (runs, size)

        scale = gradient.new_ones(len(gradient), 1)
        for _, change, reciprocal in pairs:
            newest = (reciprocal > 0)[:, None]  # (runs, 1)
            length = (change.square() / curvature).sum(1)  # (runs,)
            fitting = 1 / (reciprocal * length).clamp_min(1e-300)[:, None]  # (runs, 1)
            scale = torch.where(newest, fitting, scale)
        q = scale * q / curvature  # (runs, size)

        for (step, change, reciprocal), factor in zip(pairs, reversed(factors), strict=True):
            against = (reciprocal * (change * q).sum(1))[:, None]  # (runs, 1)
            q = q + step * (factor - against)  # (runs, size)

        uphill = (q * gradient).sum(1, keepdim=True) <= 0  # (runs, 1)
        q = torch.where(uphill, gradient / curvature, q)
        return -q * (_LONGEST_STEP / q.abs().amax(1, keepdim=True).clamp_min(_LONGEST_STEP))


@dataclass(frozen=True)
class _Point:
    """Where some runs are, and how they came there."""

    x: Float[Tensor, "runs size"]
    values: Float[Tensor, " runs"]
    gradient: Float[Tensor, "runs size"]
    history: _History = _History()

    def __getitem__(self, runs: Tensor) -> _Point:
        return _Point(self.x[runs], self.values[runs], self.gradient[runs], self.history[runs])


def _backtracked(
    evaluate, alive: Tensor, point: _Point, direction: Float[Tensor, "runs size"]
) -> tuple[_Point, list[int]]:
    """Each run's step shrunk until its value falls enough, and the evaluations this took; a run
    that finds none stays put.
    """
    x, values, gradient = point.x.clone(), point.values.clone(), point.gradient.clone()
    slope = (direction * gradient).sum(1)  # (runs,)
    searching = torch.arange(len(x), device=x.device)  # (searching,)
    size, spent = torch.ones_like(values), [0] * len(x)
    for _ in range(_MOST_TRIALS):
        trial = point.x[searching] + size[searching, None] * direction[searching]
        value, slopes = evaluate(alive[searching], trial)  # (searching,), (searching, size)
        for run in searching.tolist():
            spent[run] += 1

        enough = point.values[searching] + _ARMIJO * size[searching] * slope[searching]
        good = value <= enough  # (searching,)
        found = searching[good]
        x[found], values[found], gradient[found] = trial[good], value[good], slopes[good]

        searching = searching[~good]
        if not len(searching):
            break
        size[searching] *= 0.4
    return replace(point, x=x, values=values, gradient=gradient), spent
