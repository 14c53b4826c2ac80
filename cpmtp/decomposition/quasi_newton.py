"""L-BFGS for many independent problems at once: each has its own history, scale, step and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.solution import record_passes

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
    curvature: Callable[[Tensor], Tensor],
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
        ``points -> (runs, size)``: a positive guess at the diagonal of each Hessian, up to a
        factor. The history begins from its inverse at every step.
    max_passes : int
        Most evaluations of each run.
    tolerance : float
        A run stops when ten evaluations have gained less than this.

    References
    ----------
    nocedal2006numerical
    """
    alive = torch.arange(len(start), device=start.device)
    points, values, converged = (
        start.clone(),
        start.new_full((len(start),), torch.inf),
        [False] * len(start),
    )
    traces: tuple[list[float], ...] = tuple([] for _ in range(len(start)))
    x = start
    f, g = evaluate(alive, x)
    history, spent = _History([], [], []), [1] * len(start)
    while True:
        points[alive], values[alive] = x, f
        ended = record_passes([traces[run] for run in alive.tolist()], f.tolist(), spent, tolerance)
        for run, end in zip(alive.tolist(), ended, strict=True):
            converged[run] = end
        going = [
            not end and len(traces[run]) <= max_passes
            for end, run in zip(ended, alive.tolist(), strict=True)
        ]
        if not any(going):
            return Minima(points, values, tuple(converged), traces)
        keep = torch.tensor(going, device=start.device)
        alive, x, f, g, history = alive[keep], x[keep], f[keep], g[keep], history.kept(keep)
        direction = history.direction(g, curvature(x))
        new_x, new_f, new_g, spent = _backtrack(evaluate, alive, (x, f, g), direction)
        history = history.extended(new_x - x, new_g - g)
        x, f, g = new_x, new_f, new_g


@dataclass(frozen=True)
class _History:
    """The last steps, gradient changes and their reciprocal products (zero where a pair is of no
    use).
    """

    steps: list[Tensor]
    changes: list[Tensor]
    reciprocals: list[Tensor]

    def kept(self, keep: Tensor) -> _History:
        if bool(keep.all()):
            return self
        return _History(
            *(
                [values[keep] for values in field]
                for field in (self.steps, self.changes, self.reciprocals)
            )
        )

    def extended(self, step: Tensor, change: Tensor) -> _History:
        product = (step * change).sum(1)
        useful = product > 1e-10 * step.norm(dim=1) * change.norm(dim=1)
        reciprocal = torch.where(useful, 1 / torch.where(useful, product, 1.0), 0.0)
        pairs = ([*self.steps, step], [*self.changes, change], [*self.reciprocals, reciprocal])
        return _History(*(field[-_MEMORY:] for field in pairs))

    def direction(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The two-loop recursion; downhill for every run, never longer than the longest step."""
        q, scale = gradient, gradient.new_ones(len(gradient), 1)
        factors = []
        for step, change, reciprocal in zip(
            *map(reversed, (self.steps, self.changes, self.reciprocals)), strict=True
        ):
            factors.append((reciprocal * (step * q).sum(1))[:, None])
            q = q - factors[-1] * change
        for change, reciprocal in zip(self.changes, self.reciprocals, strict=True):
            newest = (reciprocal > 0)[:, None]
            length = (change.square() / curvature).sum(1)
            scale = torch.where(newest, 1 / (reciprocal * length).clamp_min(1e-300)[:, None], scale)
        q = scale * q / curvature
        for step, change, reciprocal, factor in zip(
            self.steps, self.changes, self.reciprocals, reversed(factors), strict=True
        ):
            q = q + step * (factor - (reciprocal * (change * q).sum(1))[:, None])
        uphill = (q * gradient).sum(1, keepdim=True) <= 0
        q = torch.where(uphill, gradient / curvature, q)
        return -q * (_LONGEST_STEP / q.abs().amax(1, keepdim=True).clamp_min(_LONGEST_STEP))


def _backtrack(evaluate, alive: Tensor, point: tuple[Tensor, Tensor, Tensor], direction: Tensor):
    """Shrink each run's step until its value falls enough; a run that finds none stays put."""
    x, f, g = (values.clone() for values in point)
    slope = (direction * g).sum(1)
    searching, size, spent = torch.arange(len(x), device=x.device), torch.ones_like(f), [0] * len(x)
    for _ in range(_MOST_TRIALS):
        trial = point[0][searching] + size[searching, None] * direction[searching]
        value, gradient = evaluate(alive[searching], trial)
        for run in searching.tolist():
            spent[run] += 1
        good = value <= point[1][searching] + _ARMIJO * size[searching] * slope[searching]
        found = searching[good]
        x[found], f[found], g[found] = trial[good], value[good], gradient[good]
        searching = searching[~good]
        if not len(searching):
            break
        size[searching] *= 0.4
    return x, f, g, spent
