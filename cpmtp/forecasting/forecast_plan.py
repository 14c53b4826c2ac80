"""What a forecast is asked for, and what is done for it in which time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpmtp.forecasting.candidates import Candidate
from cpmtp.forecasting.held_out import HeldOut, held_out_texts
from cpmtp.forecasting.probes import (
    FEWEST_STEPS,
    ProbePlan,
    largest_affordable,
    probe_budgets,
    step_seconds,
    training_windows,
)
from cpmtp.forecasting.step_times import measure_latency
from cpmtp.joint_distribution.habits import knows_habits
from cpmtp.latency import MeasuredLatency
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.head_settings import quick_precision
from cpmtp.whole_files import write_text

LOADS = (1,)
# Of the time: the rest is for held-out texts and for judging heads by them.
_SHARE_OF_LATENCY, _SHARE_OF_PROBES = 0.15, 0.6
_DEFAULT_STEPS = 128


@knows_habits
@dataclass(frozen=True)
class ForecastSettings:
    """What a forecast is asked for.

    Attributes
    ----------
    budget : float
        Positions that a head is to be trained on.
    probe_budget : int, optional
        Positions of the largest probes; default: as many as `minutes` has room for, without it
        32,768.
    minutes : float, optional
        Time for everything, loading left out.
    loads : tuple of int
        Requests decoded together.
    horizons : tuple of int, optional
        Tokens per call at most; default: 2 up to the longest candidate's.
    rule : {"block", "token"}
    temperature, top_k, top_p
        The law that is decoded by.
    confidence : float
        Nominal coverage of intervals.
    held_out, start, drawn : int
        Held-out texts, tokens of their beginnings, tokens written after them.
    rows, length : int
        Windows in a step of probes, tokens in a window.
    seed : int
    """

    budget: float = 50_000_000
    probe_budget: int | None = None
    minutes: float | None = None
    loads: tuple[int, ...] = LOADS
    horizons: tuple[int, ...] | None = None
    rule: str = "block"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    confidence: float = 0.9
    held_out: int = 64
    start: int = 32
    drawn: int = 48
    rows: int = 4
    length: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("budget", "probe_budget", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value}: expected a number above 0")
        _ = self.law  # refuses what is out of range
        if not self.loads or min(self.loads) < 1:
            raise ValueError(f"loads {self.loads}: expected batch sizes of at least 1")
        if self.horizons is not None and (not self.horizons or min(self.horizons) < 2):
            raise ValueError(f"horizons {self.horizons}: expected numbers of at least 2")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence {self.confidence}: expected a number between 0 and 1")
        if self.held_out < 2:
            raise ValueError(f"held_out {self.held_out}: expected at least 2, for an interval")

    @property
    def law(self) -> SamplingLaw:
        """Temperature, top-k and top-p together."""
        return SamplingLaw(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Work:
    """What is to be done in how much time."""

    lm: Any
    candidates: list[Candidate]
    settings: ForecastSettings
    begun: float

    @property
    def left(self) -> float:
        """Seconds, of a forecast that is held to a time."""
        assert self.settings.minutes is not None
        return 60 * self.settings.minutes - (time.perf_counter() - self.begun)

    @property
    def horizons(self) -> tuple[int, ...]:
        """At which heads are judged."""
        longest = max(candidate.sizes["horizon"] for candidate in self.candidates)
        return tuple(sorted(set(self.settings.horizons or range(2, longest + 1))))

    def measured_latency(self) -> MeasuredLatency:
        """Step times for every candidate, at its own horizon and the shortest one."""
        minutes = self.settings.minutes
        heads = [
            candidate.keywords | {"horizon": horizon}
            for candidate in self.candidates
            for horizon in sorted({min(self.horizons), candidate.sizes["horizon"]})
        ]
        most = max(self.horizons)
        return measure_latency(
            self.lm,
            heads,
            sorted({1, *self.horizons, 2 * most}),
            batches=self.settings.loads,
            context=self.settings.start + self.settings.drawn,
            seconds=60.0 if minutes is None else _SHARE_OF_LATENCY * 60 * minutes,
            seed=self.settings.seed,
        )

    def held_out(self, texts: Sequence[str] | None) -> HeldOut:
        """What heads are judged on."""
        settings = self.settings
        return held_out_texts(
            self.lm,
            texts,
            count=settings.held_out,
            start=settings.start,
            drawn=settings.drawn,
            law=settings.law,
            seed=settings.seed + 1,
        )

    def plan(self, texts: list[str] | None, folder: Path | None) -> tuple[ProbePlan, Any, int]:
        """Budgets of the probes, windows to train on, positions that there are (0: no end)."""
        settings = self.settings
        sizes = {"rows": settings.rows, "length": settings.length, "seed": settings.seed}
        plan = ProbePlan(
            (),
            horizons=self.horizons,
            rule=settings.rule,
            precision=quick_precision(self.lm.device.type),
            **sizes,
        )
        asked = {"length": settings.length, "seed": settings.seed}
        largest = settings.probe_budget
        if largest is None and settings.minutes is None:
            largest = _DEFAULT_STEPS * plan.step
        if largest is None:
            largest = self._kept_plan(folder) or self._affordable(plan, texts, asked)
        windows, available = training_windows(self.lm, texts, positions=largest, **asked)
        budgets = probe_budgets(largest, plan.step)
        if folder is not None and len(budgets) > 1:
            write_text(folder / "largest_probe.json", json.dumps({"positions": largest}))
        return replace(plan, budgets=budgets), windows, available

    @staticmethod
    def _kept_plan(folder: Path | None) -> int | None:
        """What the same folder's earlier run had time for."""
        file = None if folder is None else folder / "largest_probe.json"
        return json.loads(file.read_text("utf-8"))["positions"] if file and file.exists() else None

    def _affordable(self, plan: ProbePlan, texts: list[str] | None, asked: dict[str, int]) -> int:
        few, _ = training_windows(self.lm, texts, positions=plan.step, **asked)
        seconds = _SHARE_OF_PROBES * self.left
        # Two probes are three times the fewest steps, and warming up may double a step's time.
        most = max(2 * seconds / (3 * FEWEST_STEPS), 0.0)
        spent = step_seconds(self.lm, self.candidates, plan, few, most=most)
        return largest_affordable(_SHARE_OF_PROBES * self.left, spent, plan.step)

    def too_little(self, plan: ProbePlan) -> str:
        """Why there is no forecast."""
        return (
            f"not enough for a forecast: the time or budget has no room for two probes of "
            f"{FEWEST_STEPS} steps ({FEWEST_STEPS * plan.step:,} positions) or more of all "
            f"{len(self.candidates)} candidates; give more minutes, a larger --probe-budget, or "
            "fewer candidates"
        )
