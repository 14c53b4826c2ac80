"""A learning curve's shape with what all curves share of it, fitted to curves whose ends are known.

Levels and differences to a reference candidate have shapes of their own; a candidate's level is the
reference's plus the difference, so that a table never says two things.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from cpmtp.forecasting.learning_curves.families import (
    RATIOS,
    Profile,
    damped_trend,
    power_law,
)
from cpmtp.forecasting.learning_curves.losses import LossCurve
from cpmtp.forecasting.learning_curves.tasks import Tasks, short_name

# Family and the scale it is taken on.
LEVELS = (
    ("damped", "log"),
    ("damped", "tokens"),
    ("power", "tokens"),
    ("borrowed", "log"),
    ("loss", "log"),
)
DIFFERENCES = (("damped", "difference"), ("levels", "difference"))
_STEP = 1e-5


@dataclass(frozen=True)
class Shape:
    """A family with what its curves share.

    Attributes
    ----------
    family : {"damped", "power", "borrowed", "loss", "levels"}
        ``loss``: by way of the loss, see `cpmtp.forecasting.learning_curves.losses`; ``levels``, of
        differences: those of the forecast levels.
    scale : {"log", "tokens", "difference"}
    ratio : float
        Per doubling, of damped trends and power laws; of losses that of other groups.
    profile : Profile, optional
    curve : LossCurve, optional
    """

    family: str
    scale: str
    ratio: float = 0.0
    profile: Profile | None = None
    curve: LossCurve | None = None

    @property
    def words(self) -> str:
        """As a table shows it."""
        told = f" {self.ratio:.2f}" if self.family in ("damped", "power", "loss") else ""
        return f"{self.family}{told} ({self.scale})"

    def values(
        self,
        tasks: Tasks,
        logs: Float[ndarray, "*batch tasks probes"],
        ratio: float | Float[ndarray, " ratios"] | None = None,
        losses: Float[ndarray, "*batch tasks probes"] | None = None,
    ) -> Float[ndarray, "..."]:
        """Forecasts at the tasks' budget from probes' values (and losses) in the place of the
        tasks' own.

        Logarithms of tokens per call, between one token and the limit; or differences of such.
        """
        ratio, most = self.ratio if ratio is None else ratio, tasks.most
        budgets, at = tasks.budgets, tasks.at
        if self.family == "borrowed":
            assert self.profile is not None
            found = self.profile.extrapolate(budgets, logs, at)
        elif self.family == "loss":
            assert self.curve is not None
            found = self.curve.values(tasks, logs, tasks.losses if losses is None else losses)
        elif self.family == "power":
            found = np.log(np.maximum(power_law(budgets, np.exp(logs), at, ratio, most=most), 1.0))
        elif self.scale == "tokens":
            found = np.log(np.maximum(damped_trend(budgets, np.exp(logs), at, ratio), 1.0))
        else:
            found = damped_trend(budgets, logs, at, ratio)
        return found if self.scale == "difference" else np.clip(found, 0.0, np.log(tasks.limits))


def forecast_logs(
    level: Shape,
    difference: Shape,
    tasks: Tasks,
    reference: Int[ndarray, " tasks"],
    logs: Float[ndarray, "*batch tasks probes"] | None = None,
    losses: Float[ndarray, "*batch tasks probes"] | None = None,
) -> Float[ndarray, "*batch tasks"]:
    """Levels: the reference's by the level's shape, the others' by their difference to it.

    Parameters
    ----------
    level, difference : Shape
    tasks : Tasks
    reference : (tasks,) int array
        The task of each one's reference, or -1 where it has none.
    logs, losses : (*batch, tasks, probes) float arrays, optional
        Probes' values in the place of the tasks' own.
    """
    logs = tasks.logs if logs is None else logs
    direct = level.values(tasks, logs, losses=losses)  # (*batch, tasks)
    if difference.family == "levels":
        return direct
    steps = difference.values(tasks, logs - logs[..., reference, :])  # (*batch, tasks)
    joined = np.clip(direct[..., reference] + steps, 0.0, np.log(tasks.limits))
    return np.where(reference >= 0, joined, direct)


def reference_rows(tasks: Tasks, reference: str) -> Int[ndarray, " tasks"]:
    """The task of the reference candidate with each one's group and seed; -1: there is none."""
    keys = list(zip(tasks.groups, tasks.seeds, strict=True))
    where: dict[tuple, int] = {}
    for i, key in enumerate(keys):
        if short_name(tasks.candidates[i]) == reference:
            where.setdefault(key, i)
    return np.array([where.get(key, -1) for key in keys], dtype=int)


def fitted(kind: tuple[str, str], batches: list[Tasks]) -> Shape:
    """The shape of a family nearest to tasks whose ends are known, groups counted alike."""
    family, scale = kind
    if family == "borrowed":
        return Shape(family, scale, profile=Profile.of(list(_curves(batches))))
    if family == "loss":
        curve = LossCurve.of(batches)
        return Shape(family, scale, ratio=curve.ratio, curve=curve)
    shape = Shape(family, scale)
    errors = [_errors(shape, tasks, tasks.logs, tasks.truths) for tasks in batches]
    return Shape(family, scale, ratio=_best_ratio(batches, errors))


def fitted_difference(kind: tuple[str, str], batches: list[Tasks], reference: str) -> Shape:
    """The same of differences to the reference candidate."""
    shape, errors, kept = Shape(*kind), [], []
    if kind[0] == "levels":
        return shape
    for tasks in batches:
        rows = reference_rows(tasks, reference)
        others = (rows >= 0) & (rows != np.arange(len(tasks)))
        logs = (tasks.logs - tasks.logs[rows])[others]
        kept.append(tasks.of(others))
        errors.append(_errors(shape, kept[-1], logs, (tasks.truths - tasks.truths[rows])[others]))
    return Shape(*kind, ratio=_best_ratio(kept, errors))


def _errors(shape: Shape, tasks: Tasks, logs: ndarray, truths: ndarray) -> ndarray:
    """Squared errors at every ratio: (ratios, tasks)."""
    return (shape.values(tasks, logs, RATIOS) - truths) ** 2


def _best_ratio(batches: list[Tasks], errors: list[ndarray]) -> float:
    groups = np.concatenate([tasks.groups for tasks in batches])
    table = np.concatenate(errors, -1)  # (ratios, tasks)
    if not len(groups):
        return 0.0
    weights = 1 / pd.Series(groups).map(pd.Series(groups).value_counts()).to_numpy(dtype=float)
    return float(RATIOS[int((table @ weights).argmin())])


def _curves(batches: list[Tasks]) -> Iterator[tuple[ndarray, ndarray]]:
    """Budgets and logarithms of every task, its end among them."""
    for tasks in batches:
        budgets = np.append(tasks.budgets, tasks.at)
        for logs, truth in zip(tasks.logs, tasks.truths, strict=True):
            yield budgets, np.append(logs, truth)


def losses_known(batches: list[Tasks]) -> bool:
    """Whether every probe has a loss, and every end."""
    return all(np.isfinite(t.losses).all() and np.isfinite(t.end_losses).all() for t in batches)


def slopes_of(
    level: Shape, difference: Shape, tasks: Tasks, rows: Int[ndarray, " tasks"]
) -> Float[ndarray, "tasks probes"]:
    """How each task's forecast moves with each of its own probes: (tasks, probes)."""
    moved = tasks.logs + _STEP * np.eye(len(tasks.budgets))[:, None]  # (probes, tasks, probes)
    found = forecast_logs(level, difference, tasks, rows, moved)  # (probes, tasks)
    return (found - forecast_logs(level, difference, tasks, rows)).T / _STEP
