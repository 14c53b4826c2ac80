"""A study and its probes in a given time, and what is said meanwhile."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

# Of the minutes: contexts, with the trial before them; probes after them; the report.
_CONTEXTS_SHARE, _REPORT_SHARE = 0.48, 0.04
_COMPONENT_SECONDS = 20.0
_PROBE_SECONDS = 60.0  # per model, where no time is given


@dataclass(frozen=True)
class TimeFor:
    """What there is time for.

    Attributes
    ----------
    minutes : float, optional
        For everything; None: as long as it takes, probes a minute per model.
    probe : bool
    begun : float
    enough : bool
        Whether it is enough for probes.
    """

    minutes: float | None
    probe: bool
    begun: float = field(default_factory=time.perf_counter)
    enough: bool = True

    @property
    def contexts_share(self) -> float:
        """Of the minutes, for contexts."""
        return _CONTEXTS_SHARE if self.probe and self.enough else 1 - 3 * _REPORT_SHARE

    @property
    def seconds_for_components(self) -> float:
        """Of each model's one context."""
        share = 60 * (self.minutes or math.inf) * _REPORT_SHARE / 2
        return min(share, _COMPONENT_SECONDS)

    def seconds_for_probes(self, models: int) -> float:
        """What is left for them."""
        if self.minutes is None:
            return _PROBE_SECONDS * models
        spent = time.perf_counter() - self.begun
        return max(60 * self.minutes * (1 - _REPORT_SHARE) - spent, 1.0)


def watched_study(settings, out: Path, executor, workers, time_for: TimeFor, *, quiet: bool):
    """Contexts, then probes; says what is done as it is done."""
    from cpmtp.study.effort.limits import planned_limit
    from cpmtp.study.running import run_study

    say = _said if not quiet else _unsaid
    limit = callback = None
    asked: dict = {}
    if time_for.minutes is not None:
        minutes = time_for.minutes
        say(f"loading {', '.join(settings.models)} in {settings.dtype}")
        time_for, asked = _shared(settings, time_for, out)
        limit = planned_limit(
            settings,
            minutes,
            out,
            share=time_for.contexts_share,
            workers=workers,
            begun=time_for.begun,
        )
        for name, speed in limit.prefixes_per_second.items():
            say(f"{name}: {speed:,.0f} next-token distributions a second on a core")
        say(
            f"planned: {limit.contexts} of {settings.contexts} contexts of every model and domain"
            + (", then probes of heads" if time_for.contexts_share <= _CONTEXTS_SHARE else "")
        )
        callback = None if quiet else _Teller(settings)
    table = run_study(
        settings,
        out,
        executor,
        workers=workers,
        progress=False if quiet or callback else None,
        limit=limit,
        callback=callback,
    )
    if time_for.probe and (table["status"] != "failed").any():
        from cpmtp.commands.studying.probing import probe_models

        seconds = time_for.seconds_for_probes(len(settings.models))
        probe_models(settings, out, seconds=seconds, asked=asked, say=say)
    if (table["status"] != "failed").any():
        from cpmtp.commands.studying.components import write_components

        write_components(settings, out, table, seconds=time_for.seconds_for_components)


def _shared(settings, time_for: TimeFor, out: Path) -> tuple[TimeFor, dict]:
    """Time for contexts and probes, and what can be probed: where there is not enough for any
    model's probes, contexts get it all.
    """
    from cpmtp.commands.studying.probing import affordable_probes
    from cpmtp.study.effort.limits import read_limit

    planned = read_limit(out).get("minutes") == time_for.minutes
    if not time_for.probe or planned:
        return time_for, {}
    assert time_for.minutes is not None
    seconds = 60 * time_for.minutes * (1 - _CONTEXTS_SHARE - _REPORT_SHARE)
    asked = affordable_probes(settings, seconds)
    enough = any(one["enough"] for one in asked.values())
    return replace(time_for, enough=enough), asked


class _Teller:
    """A line for every finished context."""

    def __init__(self, settings):
        self.settings, self.done, self.begun = settings, 0, time.perf_counter()

    def __call__(self, unit, rows) -> None:
        self.done += 1
        best = rows[rows["best"]] if (rows["status"] != "failed").any() else rows[:0]
        told = []
        for (horizon, anchored), part in best.groupby(["horizon", "anchored"]):
            part = part.sort_values("rank")
            ends = part["tokens_per_call_block_target"].iloc[[0, -1]]
            told.append(
                f"n {horizon}, {'' if anchored else 'not '}told the first token: "
                f"{ends.iloc[0]:.2f} at rank {part['rank'].iloc[0]} to {ends.iloc[1]:.2f} at rank "
                f"{part['rank'].iloc[-1]}"
            )
        place = f"{unit.domain}, context {unit.context + 1}"
        spent = time.perf_counter() - self.begun
        _said(f"{spent:5.0f} s  {place}: {'; '.join(told) or 'every fit failed'}")


def show_plan(settings, workers: int | None, time_for: TimeFor) -> None:
    """What a study would take, from a trial."""
    from cpmtp.study.effort.estimate import estimate_study

    seconds = None
    if time_for.minutes is not None:
        seconds = 60 * time_for.minutes * time_for.contexts_share
    estimate = estimate_study(settings, workers, seconds=seconds)
    for name, speed in estimate.prefixes_per_second.items():
        print(f"trial           {name}: {speed:,.0f} next-token distributions a second on a core")
    print(f"contexts        {estimate.contexts} of every model and domain")
    print(f"cells           {estimate.cells:,}")
    print(f"largest joint   {estimate.joint_bytes / 1e6:,.1f} MB at most")
    for what in estimate.truncated:
        print(
            f"truncated       {what}: tokens per call will be lower and upper bounds, or estimates "
            f"where these are more than {settings.width:g} apart"
        )
    print(
        f"memory          about {estimate.memory_bytes / 1e9:.1f} GB with {estimate.workers} "
        "worker(s)"
    )
    took = estimate.seconds
    if time_for.probe:
        took += (
            _PROBE_SECONDS * len(settings.models)
            if time_for.minutes is None
            else 60 * time_for.minutes * (1 - time_for.contexts_share - _REPORT_SHARE)
        )
    print(
        f"time            about {max(took / 60, 0.1):.1f} minutes"
        + (f", {estimate.seconds / 60:.1f} of them for contexts" if time_for.probe else "")
    )


def _said(line: str) -> None:
    print(line, flush=True)


def _unsaid(line: str) -> None:
    pass
