"""Which shape learning curves have, chosen on stored curves, and how far forecasts by it are off.

A group is a base model with a kind of text. One group after another is left out: families, shared
shapes and the interval's scale are judged on groups they have not seen. Levels and differences to a
reference candidate are forecast by families of their own; a candidate's level is the reference's
plus the difference, so that a table never says two things.

The interval of a forecast is ``y +- t sqrt(s_doc^2 + s_seed^2 + (c gain)^2)`` with Student's t of
one degree of freedom less than there are groups. Gain is what the forecast adds to the last probe
(of a difference: the mean of both candidates' gains); c is such that the other groups' residuals
have, standardised, a mean square of one. Beyond the farthest budget that a forecast was ever held
against, c grows with the root of the doublings, as if each brought an error of its own: a curve
that flattens adds little there, and would seem sure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from cpmtp.forecasting.learning_curves.shapes import (
    DIFFERENCES,
    LEVELS,
    Shape,
    fitted,
    fitted_difference,
    forecast_logs,
    losses_known,
    reference_rows,
    slopes_of,
)
from cpmtp.forecasting.learning_curves.tasks import (
    Tasks,
    checked_curves,
    differences_to,
    reference_of,
    seed_variance,
    tasks_of,
)


@dataclass(frozen=True)
class Spread:
    """What an interval is made of besides documents.

    Attributes
    ----------
    scale : float
        c: how far forecasts are off, as a share of the gain.
    seeds : float
        Variance of one training's score between seeds.
    """

    scale: float
    seeds: float


@dataclass(frozen=True)
class ShapeChoice:
    """The shapes that stored curves speak for.

    Attributes
    ----------
    level, difference : Shape
        Fitted to all groups.
    of_level, of_difference : Spread
        From residuals of groups that the shape had not seen.
    reference : str
        What differences are taken to, by its short name.
    groups : tuple of str
    errors : pandas.DataFrame
        `what`, `family`, `scale`, and the mean absolute `error` (of logarithms) on left-out groups.
    residuals : pandas.DataFrame
        A row per task: `group`, `candidate`, `seed`, `at`, how many times that is `ahead` of the
        last probe, and `forecast`, `truth` and `gain`, of logarithms; the shapes had not seen the
        group.
    """

    level: Shape
    difference: Shape
    of_level: Spread
    of_difference: Spread
    reference: str
    groups: tuple[str, ...]
    errors: pd.DataFrame = field(repr=False)
    residuals: pd.DataFrame = field(repr=False)

    @property
    def farthest(self) -> float:
        """How many times beyond its last probe a forecast was ever held against the truth."""
        return float(self.residuals["ahead"].max())

    def widening(self, ahead: float) -> float:
        """What c is multiplied by so many times beyond the last probe."""
        doublings, checked = np.log2(max(ahead, 1.0)), np.log2(self.farthest)
        return float(max(np.sqrt(doublings / checked), 1.0))

    @classmethod
    def stored(cls) -> ShapeChoice:
        """From the curves that come with the package."""
        return cls.of(pd.read_csv(_stored_curves()))

    @classmethod
    def of(cls, curves: pd.DataFrame, *, losses: bool = True) -> ShapeChoice:
        """From a table of stored curves, see `cpmtp.forecasting.learning_curves.tasks`.

        Parameters
        ----------
        curves : pandas.DataFrame
        losses : bool
            Whether forecasts may be made of held-out losses, where the table has them.

        Raises
        ------
        ValueError
            If the table is not one of curves, or has less than two groups with targets.
        """
        table = checked_curves(curves)
        reference, batches = reference_of(table), tasks_of(table)
        groups = tuple(sorted({str(g) for tasks in batches for g in tasks.groups}))
        if len(groups) < 2:
            raise ValueError(
                f"{len(groups)} groups of curves with probes and targets: expected at least 2, "
                "since forecasts are judged on groups left out"
            )
        judged = _Judged(batches, reference, groups)
        errors, level = [], None
        for family, scale in LEVELS:
            if family == "loss" and not (losses and losses_known(batches)):
                continue
            errors.append(("level", family, scale, judged.level_error(family, scale)))
        level = min(errors, key=lambda row: row[3])[1:3]
        for family, scale in DIFFERENCES:
            error = judged.difference_error(level, (family, scale))
            errors.append(("difference", family, scale, error))
        chosen = min((e for e in errors if e[0] == "difference"), key=lambda row: row[3])[1:3]
        residuals = judged.residuals(level, chosen)
        paired = differences_to(table, reference)
        seeds = seed_variance(table), seed_variance(paired, "log_difference")
        whole = fitted(level, batches), fitted_difference(chosen, batches, reference)
        return cls(
            *whole,
            Spread(_scale(residuals, seeds[0]), seeds[0]),
            Spread(_scale(_of_differences(residuals), seeds[1]), seeds[1]),
            reference,
            groups,
            pd.DataFrame(errors, columns=["what", "family", "scale", "error"]),
            residuals,
        )

    def half_widths(
        self,
        gains: Float[ndarray, "..."],
        doc_variance: Float[ndarray, "..."],
        weights: Float[ndarray, "..."],
        *,
        confidence: float = 0.9,
        differences: bool = False,
    ) -> Float[ndarray, "..."]:
        """Half of the interval: ``t sqrt(s_doc^2 + s_seed^2 + (c gain)^2)``.

        Parameters
        ----------
        gains, doc_variance : float arrays
            Gains times `widening`.
        weights : float array
            Trainings' seeds count with this: the sum of squares of how a forecast depends on each
            probe, plus one over the number of trainings it is to be held against.
        confidence : float
        differences : bool
            Of differences to the reference, not levels.
        """
        spread = self.of_difference if differences else self.of_level
        t = float(stats.t.ppf((1 + confidence) / 2, len(self.groups) - 1))
        variance = doc_variance + spread.seeds * weights + (spread.scale * gains) ** 2
        return t * np.sqrt(variance)

    def forecast(
        self,
        tasks: Tasks,
        logs: Float[ndarray, "*batch tasks probes"] | None = None,
        losses: Float[ndarray, "*batch tasks probes"] | None = None,
    ) -> Float[ndarray, "*batch tasks"]:
        """Logarithms of tokens per call at the tasks' budget."""
        rows = reference_rows(tasks, self.reference)
        return forecast_logs(self.level, self.difference, tasks, rows, logs, losses)

    def seed_weights(self, tasks: Tasks) -> Float[ndarray, " tasks"]:
        """How seeds count in each task's forecast: see `half_widths`."""
        return self.seed_weights_of(tasks, reference_rows(tasks, self.reference))

    def seed_weights_of(
        self, tasks: Tasks, reference: Int[ndarray, " tasks"]
    ) -> Float[ndarray, " tasks"]:
        """The same with each task's reference given."""
        slopes = slopes_of(self.level, self.difference, tasks, reference)
        return (slopes**2).sum(-1) + 1 / tasks.truth_seeds


def _stored_curves() -> Path:
    installed = Path(__file__).parents[2] / "_data" / "curves"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "data" / "curves"
    return folder / "stored.csv"


@dataclass(frozen=True)
class _Judged:
    """Tasks of all groups, and what shapes fitted without a group say of it."""

    batches: list[Tasks]
    reference: str
    groups: tuple[str, ...]
    known: dict[tuple[str, str, str], Shape] = field(default_factory=dict)

    def split(self, group: str) -> tuple[list[Tasks], list[Tasks]]:
        """Tasks of the other groups, and of this one."""
        sides = [[], []]  # type: list[list[Tasks]]
        for tasks in self.batches:
            mine = tasks.groups == group
            for side, keep in zip(sides, (~mine, mine), strict=True):
                if keep.any():
                    side.append(tasks.of(keep))
        return sides[0], sides[1]

    def without(self, group: str, kind: tuple[str, str]) -> Shape:
        """The shape of a family fitted to the other groups."""
        key = (group, *kind)
        if key not in self.known:
            self.known[key] = fitted(kind, self.split(group)[0])
        return self.known[key]

    def level_error(self, family: str, scale: str) -> float:
        """Mean over groups of the mean absolute error of their logarithms."""
        means = []
        for group in self.groups:
            shape, mine = self.without(group, (family, scale)), self.split(group)[1]
            errors = [np.abs(shape.values(t, t.logs) - t.truths) for t in mine]
            means.append(np.concatenate(errors).mean())
        return float(np.mean(means))

    def difference_error(self, level: tuple[str, str], kind: tuple[str, str]) -> float:
        """The same of differences to the reference; NaN where no group has one."""
        rows = _of_differences(self.residuals(level, kind))
        errors = (rows["forecast"] - rows["truth"]).abs()
        return float(errors.groupby(rows["group"]).mean().mean())

    def residuals(self, level: tuple[str, str], difference: tuple[str, str]) -> pd.DataFrame:
        """Forecast and truth of every task by shapes that have not seen its group."""
        parts = []
        for group in self.groups:
            others, mine = self.split(group)
            apart = fitted_difference(difference, others, self.reference)
            shapes = self.without(group, level), apart
            parts += [_columns(*shapes, tasks, self.reference) for tasks in mine]
        return pd.DataFrame({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def _columns(level: Shape, difference: Shape, tasks: Tasks, reference: str) -> dict[str, ndarray]:
    rows = reference_rows(tasks, reference)
    found, slopes = (of(level, difference, tasks, rows) for of in (forecast_logs, slopes_of))
    return {
        "group": tasks.groups,
        "candidate": tasks.candidates,
        "seed": tasks.seeds,
        "at": np.full(len(tasks), tasks.at),
        "ahead": np.full(len(tasks), tasks.at / tasks.budgets[-1]),
        "horizon": np.full(len(tasks), tasks.most),
        "forecast": found,
        "truth": tasks.truths,
        "gain": found - tasks.logs[:, -1],
        "noise": tasks.noise,
        "seed_weight": (slopes**2).sum(-1) + 1 / tasks.truth_seeds,
        "is_reference": rows == np.arange(len(tasks)),
    }


def _of_differences(residuals: pd.DataFrame) -> pd.DataFrame:
    """The same rows for differences to the reference of their group, seed, budget and horizon.

    Documents are shared by both, so that their noise is taken to drop out; what is left of it, the
    scale accounts for.
    """
    keys = ["group", "seed", "at", "horizon"]
    beside = residuals[residuals["is_reference"]][[*keys, "forecast", "truth", "gain"]]
    joined = residuals[~residuals["is_reference"]].merge(beside, on=keys, suffixes=("", "_r"))
    return joined.assign(
        forecast=joined["forecast"] - joined["forecast_r"],
        truth=joined["truth"] - joined["truth_r"],
        gain=(joined["gain"].abs() + joined["gain_r"].abs()) / 2,
        noise=0.0,
    )


def _scale(residuals: pd.DataFrame, seeds: float) -> float:
    """c: the mean over groups of squared residuals over their variance is one; 0 where noise alone
    is more than enough.
    """
    if not len(residuals):
        return 0.0
    squares = ((residuals["forecast"] - residuals["truth"]) ** 2).to_numpy()
    known = (residuals["noise"] + seeds * residuals["seed_weight"]).to_numpy()
    gains = (residuals["gain"] ** 2).to_numpy()
    sizes = residuals["group"].map(residuals["group"].value_counts()).to_numpy(dtype=float)
    weights = 1 / sizes / residuals["group"].nunique()

    def excess(scale: float) -> float:
        return float(weights @ (squares / np.maximum(known + scale**2 * gains, 1e-18))) - 1

    low, high = 0.0, 1.0
    if excess(low) <= 0:
        return 0.0
    while excess(high) > 0 and high < 1e3:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high
