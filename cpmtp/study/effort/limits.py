"""What of a study fits into a given time, and what does not."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cpmtp.study.effort.trial import Trial
from cpmtp.study.plan import StudyUnit, default_workers, plan_study
from cpmtp.study.rows import one_thread
from cpmtp.study.settings import StudySettings
from cpmtp.whole_files import write_text

_FILE = "plan.json"
# A trial may be of a dear context: so much more than it says there is room for is planned, and the
# clock ends it.
_LUCK = 1.5


@dataclass(frozen=True)
class StudyLimit:
    """As much of a study as there is time for: its first contexts of every model and domain.

    Attributes
    ----------
    contexts : int
        Of every model and domain.
    seconds : float
        After which no further context is begun; the first of every model and domain always is.
    minutes : float
        What was asked for.
    prefixes_per_second : dict of str to float
        Of every model, as measured.
    round_seconds : float
        Estimate: one context of every model and domain, on one core.
    begun : float
        When the clock began.

    Examples
    --------
    >>> limit = StudyLimit(contexts=3, seconds=60.0)
    >>> limit.contexts
    3
    """

    contexts: int
    seconds: float = math.inf
    minutes: float = math.inf
    prefixes_per_second: dict[str, float] = field(default_factory=dict)
    round_seconds: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return time.perf_counter() - self.begun > self.seconds

    def first_of(self, units: Sequence[StudyUnit]) -> list[StudyUnit]:
        """The units that there is room for."""
        return [unit for unit in units if unit.context < self.contexts]

    def write(self, folder: Path) -> None:
        """Keep it beside the study: the same folder again does the same contexts."""
        told = asdict(self)
        kept = ("contexts", "minutes", "prefixes_per_second", "round_seconds")
        told = {name: told[name] for name in kept}
        told["minutes"] = None if math.isinf(self.minutes) else self.minutes
        write_text(folder / _FILE, json.dumps(told) + "\n")


def planned_limit(
    settings: StudySettings,
    minutes: float,
    out: Path,
    *,
    share: float = 1.0,
    workers: int | None = None,
    begun: float | None = None,
) -> StudyLimit:
    """The contexts that there is room for in a share of some minutes, by a trial; what the folder
    already has planned for as many minutes is kept.

    Parameters
    ----------
    minutes : float
        For everything.
    share : float
        Of it for contexts.
    begun : float, optional
        When the minutes began, by `time.perf_counter`; default: now.

    Raises
    ------
    ValueError
        If a model or corpus cannot be used, or the minutes are no positive number.
    """
    begun = time.perf_counter() if begun is None else begun
    if not (0 < minutes < math.inf):
        raise ValueError(f"minutes {minutes}: expected a number above 0")
    seconds = 60 * minutes * share
    kept = _kept(out, minutes)
    if kept is not None:
        return replace(kept, seconds=seconds, begun=begun)
    with one_thread():
        units, _ = plan_study(settings)
    trial = Trial.of(settings, units)
    left = seconds - (time.perf_counter() - begun)
    used = min(workers or default_workers(settings), len(units))
    return StudyLimit(
        contexts=trial.room(_LUCK * left, used, settings),
        seconds=seconds,
        minutes=minutes,
        prefixes_per_second=trial.prefixes_per_second,
        round_seconds=trial.round_seconds,
        begun=begun,
    )


def _kept(folder: Path, minutes: float) -> StudyLimit | None:
    """What was planned there for as many minutes."""
    told = read_limit(folder)
    try:
        return StudyLimit(**told) if told.get("minutes") == minutes else None
    except TypeError:  # of another version
        return None


def read_limit(folder: Path) -> dict:
    """What `StudyLimit.write` kept there; empty where there is nothing."""
    try:
        return dict(json.loads((folder / _FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
