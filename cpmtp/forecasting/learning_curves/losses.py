"""Learning curves by way of a loss: a head's divergence from its target falls more evenly than its
tokens per call rise.

The loss of a head at horizon n is the weighted geometric mean of its divergences at positions 2 to
n along held-out texts, each position weighted a third of the one before it. Its logarithm falls by
steps per doubling of the budget, each `ratio` times the one before. What tokens per call lack of
their limit follows it: with ``missing = ln(limit / tokens per call)``,

    ln missing falls by `slope` times what ln loss falls by,

so that no budget brings more than the limit, which is what an exact draft would earn. (A draft
loses by total variation, which Pinsker's inequality bounds by the root of half the divergence: a
slope of one half.) What is shared:

* The ratio is a geometric mean of the group's own, which its probes show (the sum of all
  candidates' last steps over the sum of those before), and of the one that other groups had, which
  is at most 1; so is the mean. The group's own counts half over the doublings that forecasts were
  ever checked on, and half as much at every further one: what three probes show of a training's
  beginning says little of its end.
* A candidate's step is for the most part the mean of all candidates' times what this candidate's
  gain was of such a mean in other groups; its own step, of one training, is noise for the most
  part.
* The slope is that of other groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from cpmtp.forecasting.learning_curves.families import damped_factor
from cpmtp.forecasting.learning_curves.tasks import Tasks, short_name

DIVERGENCES = tuple(f"divergence_{position}" for position in range(2, 65))
_FALLING = 1 / 3  # the weight of a position, of that of the one before it
_RATIOS = np.linspace(0.3, 1.0, 71)
_OWN_LEAST, _OWN_MOST = 0.1, 2.0
# How much a group's own ratio counts over the doublings checked; beyond them ever less.
_OWN_RATIO, _CHECKED, _FADING = 0.5, 3, 0.5
# How far a candidate's step is its own: where its gain is known of other groups, and where not.
_OWN_STEP, _OWN_STEP_OF_UNKNOWN = 0.2, 0.5
_LEAST_GAIN = 0.01
_LEAST = 1e-6  # a draft may be as good as its target, and earn what is the limit
_SWEEPS = 50


def pooled_loss(divergences: Float[ndarray, "*batch positions"]) -> Float[ndarray, "*batch"]:
    """The loss of divergences at positions 2, 3, ….

    Examples
    --------
    >>> round(float(pooled_loss(np.array([0.5, 0.5]))), 6)
    0.5
    """
    weights = _FALLING ** np.arange(divergences.shape[-1])
    logs = np.log(np.maximum(divergences, _LEAST))
    return np.asarray(np.exp(logs @ (weights / weights.sum())))  # (*batch,)


@dataclass(frozen=True)
class LossCurve:
    """What curves share by way of their losses.

    Attributes
    ----------
    ratio : float
        That of other groups, before it is put together with a group's own.
    slopes : dict of float to float
        By horizon: how far the logarithm of what is missing falls as that of the loss falls by one.
    speeds : dict of (float, str) to float
        By horizon and short name: the logarithm of a candidate's gain, in the logarithm of what is
        missing, over the mean candidate's.
    """

    ratio: float
    slopes: dict[float, float]
    speeds: dict[tuple[float, str], float]

    @classmethod
    def of(cls, batches: Sequence[Tasks]) -> LossCurve:
        """Fitted to tasks whose ends are known, groups counted alike."""
        horizons = sorted({tasks.most for tasks in batches})
        slopes: dict[float, float] = {}
        speeds: dict[tuple[float, str], float] = {}
        for horizon in horizons:
            mine = [tasks for tasks in batches if tasks.most == horizon]
            slopes[horizon] = _slope(mine)
            speeds |= {(horizon, name): speed for name, speed in _speeds(mine).items()}
        first = cls(1.0, slopes, speeds)
        groups = np.concatenate([tasks.groups for tasks in batches])
        weights = 1 / pd.Series(groups).map(pd.Series(groups).value_counts()).to_numpy(dtype=float)
        errors = []
        for tasks in batches:
            fall, own = first._falls(tasks, tasks.losses)  # (tasks,) each
            steps = _steps(own, _RATIOS[:, None], _doublings(tasks))  # (ratios, tasks)
            found = _after(tasks.logs[:, -1], fall * steps, tasks.limits)
            errors.append((found - tasks.truths) ** 2)
        best = int((np.concatenate(errors, -1) @ weights).argmin())
        return cls(float(_RATIOS[best]), slopes, speeds)

    def values(
        self,
        tasks: Tasks,
        logs: Float[ndarray, "*batch tasks probes"],
        losses: Float[ndarray, "... tasks probes"],
    ) -> Float[ndarray, "*batch tasks"]:
        """Logarithms of tokens per call at the tasks' budget."""
        fall, own = self._falls(tasks, losses)
        steps = _steps(own, np.asarray(self.ratio), _doublings(tasks))
        return _after(logs[..., -1], fall * steps, tasks.limits)  # (*batch, tasks)

    def _falls(self, tasks: Tasks, losses: ndarray) -> tuple[ndarray, ndarray]:
        """Of every task: how far one more doubling would bring the logarithm of what is missing
        down were the ratio one, and the ratio that its group's and seed's probes show, NaN where
        they show none; (..., tasks) each.
        """
        horizon = min(self.slopes, key=lambda known: (abs(known - tasks.most), known))
        doublings = np.diff(np.log2(tasks.budgets))
        steps = -np.diff(np.log(losses), axis=-1) / doublings  # (..., tasks, probes - 1)
        keys = [f"{group}/{seed}" for group, seed in zip(tasks.groups, tasks.seeds, strict=True)]
        alike = np.array(
            [[key == other for other in keys] for key in keys], float
        )  # (tasks, tasks)
        known = [self._speed(horizon, short_name(name)) for name in tasks.candidates]
        usual = np.exp([0.0 if speed is None else speed for speed in known])
        own = np.where([speed is None for speed in known], _OWN_STEP_OF_UNKNOWN, _OWN_STEP)

        sums = np.moveaxis(steps, -1, 0) @ alike  # (probes - 1, ..., tasks)
        step = (1 - own) * usual * sums[-1] / (alike @ usual) + own * steps[..., -1]
        shown = np.full(sums.shape[1:], np.nan)
        if len(sums) > 1:
            # Per doubling, from the middle of one step to the middle of the next.
            apart = float(np.log2(tasks.budgets[-1] / tasks.budgets[-3])) / 2
            falls = (sums[-1] > 0) & (sums[-2] > 0)
            shown[falls] = (sums[-1][falls] / sums[-2][falls]) ** (1 / apart)
        return self.slopes[horizon] * step, shown

    def _speed(self, horizon: float, name: str) -> float | None:
        """Of the candidate, else the mean of its form's; None where no group had that."""
        if (horizon, name) in self.speeds:
            return self.speeds[horizon, name]
        form = _form(name)
        alike = [
            s for (n, other), s in self.speeds.items() if n == horizon and _form(other) == form
        ]
        return float(np.mean(alike)) if alike else None


def _doublings(tasks: Tasks) -> float:
    return float(np.log2(tasks.at / tasks.budgets[-1]))


def _ratio(own: ndarray, others: ndarray, doubling: int) -> ndarray:
    """A group's own ratio, where it shows one, and the others' together: what the step of a
    doubling, counted from 0, is of the one before.
    """
    weight = _OWN_RATIO * _FADING ** max(doubling - _CHECKED + 1, 0)
    mixed = np.clip(own, _OWN_LEAST, _OWN_MOST) ** weight * others ** (1 - weight)
    return np.minimum(np.where(np.isnan(own), others, mixed), 1.0)


def _steps(own: ndarray, others: ndarray, doublings: float) -> ndarray:
    """By how many of the last steps the loss falls in so many doublings."""
    total, step = np.zeros_like(own * others), np.ones_like(own * others)
    for doubling in range(int(np.ceil(doublings))):
        ratio = _ratio(own, others, doubling)
        total = total + step * damped_factor(ratio, 1.0, min(doublings - doubling, 1.0))
        step = step * ratio
    return total


def _missing(logs: ndarray, limits: ndarray) -> ndarray:
    """What logarithms of tokens per call lack of the limit's."""
    return np.maximum(np.log(limits) - logs, _LEAST)


def _after(logs: ndarray, falls: ndarray, limits: ndarray) -> ndarray:
    """Logarithms of tokens per call once the logarithm of what is missing has fallen so far."""
    return np.log(limits) - _missing(logs, limits) * np.exp(-falls)


def _fallen(tasks: Tasks) -> ndarray:
    """How far it fell from the last probe to the end: (tasks,)."""
    before, after = (_missing(logs, tasks.limits) for logs in (tasks.logs[:, -1], tasks.truths))
    return np.log(before / after)


def _form(name: str) -> str:
    """Its words alone: ``cp 4`` is ``cp``."""
    return " ".join(word for word in name.split() if not word.isdigit())


def _slope(batches: list[Tasks]) -> float:
    """Least squares over what happened between the last probe and the end, groups counted alike."""
    rows = [
        pd.DataFrame(
            {
                "group": tasks.groups,
                "gain": _fallen(tasks),
                "fall": np.log(tasks.losses[:, -1]) - np.log(tasks.end_losses),
            }
        )
        for tasks in batches
    ]
    table = pd.concat(rows)
    table = table.assign(both=table["gain"] * table["fall"], square=table["fall"] ** 2)
    means = table.groupby("group")[["both", "square"]].mean().mean()
    return float(means["both"] / max(means["square"], 1e-12))


def _speeds(batches: list[Tasks]) -> dict[str, float]:
    """Candidates' gains over their tasks' mean, in logarithms, groups counted alike."""
    rows = [
        pd.DataFrame(
            {
                "group": tasks.groups,
                "task": [f"{i}/{g}/{s}" for g, s in zip(tasks.groups, tasks.seeds, strict=True)],
                "name": [short_name(name) for name in tasks.candidates],
                "gain": np.log(np.maximum(_fallen(tasks), _LEAST_GAIN)),
            }
        )
        for i, tasks in enumerate(batches)
    ]
    table = pd.concat(rows, ignore_index=True)
    speeds = pd.Series(0.0, index=sorted(table["name"].unique()))
    # Which candidates a task has differs from group to group: levels and speeds take turns.
    for _ in range(_SWEEPS):
        left = table["gain"] - table["name"].map(speeds)
        level = table["task"].map(left.groupby(table["task"]).mean())
        off = (table["gain"] - level).groupby([table["group"], table["name"]]).mean()
        speeds = off.groupby("name").mean()
    return {str(name): float(speed) for name, speed in (speeds - speeds.mean()).items()}
