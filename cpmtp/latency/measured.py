"""Step times as they were measured, here or in a serving engine, and their file `latency.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpmtp.latency.model import LatencyModel, require_positive
from cpmtp.whole_files import write_text

_FIELDS = ("plain_step", "base", "per_position", "per_component")
_FORMAT = 2
OURS = "this library's loop"


@dataclass(frozen=True)
class StepTime:
    """Seconds of one target call, median with quartiles.

    Attributes
    ----------
    batch : int
        Requests decoded together.
    tokens : int
        Tokens verified in each of them.
    seconds, low, high : float
    context : int
        Tokens before them.
    """

    batch: int
    tokens: int
    seconds: float
    low: float = math.nan
    high: float = math.nan
    context: int = 0


@dataclass(frozen=True)
class StepCurve:
    """Seconds of one target call against the number of tokens verified in it.

    Attributes
    ----------
    source : str
        Whose times they are: this library's loop, or a serving engine's, its device with it.
    times : tuple of StepTime
        One context's length.

    Raises
    ------
    ValueError
        If there are none, or one is not positive.

    Examples
    --------
    >>> curve = StepCurve("an engine", (StepTime(1, 1, 0.010), StepTime(1, 9, 0.018)))
    >>> round(curve.seconds(1, 5), 4), round(curve.seconds(4, 4), 4)
    (0.014, 0.025)
    """

    source: str
    times: tuple[StepTime, ...]

    def __repr__(self) -> str:
        return f"StepCurve({self.source!r}, {len(self.times)} times, batches {self.batches})"

    def __post_init__(self):
        if not self.times:
            raise ValueError(f"a step curve of {self.source!r} without times: measure some")
        for time in self.times:
            require_positive(batch=time.batch, tokens=time.tokens, seconds=time.seconds)

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were measured."""
        return sorted({time.batch for time in self.times})

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest call that was measured; beyond, times go on in a straight line."""
        return max(time.batch * time.tokens for time in self.times)

    def seconds(self, batch: int, tokens: int) -> float:
        """A call that verifies so many tokens in each of so many requests.

        Linear in all tokens of the call on the curve of a batch size, and between two batch sizes
        linear in the batch; beyond the largest the call's tokens alone count.
        """
        whole, sizes = batch * tokens, self.batches
        lower = max((b for b in sizes if b <= batch), default=sizes[0])
        upper = min((b for b in sizes if b >= batch), default=sizes[-1])
        first, last = (self._on_curve(b, whole) for b in (lower, upper))
        share = (batch - lower) / (upper - lower) if upper > lower else 0.0
        return first + share * (last - first)

    def _on_curve(self, batch: int, whole: float) -> float:
        rows = sorted((t.batch * t.tokens, t.seconds) for t in self.times if t.batch == batch)
        return _straight(rows, whole)

    def left_out_errors(self) -> list[float]:
        """Relative error of every inner time when it is read off its neighbours."""
        errors = []
        for batch in self.batches:
            rows = sorted((t.batch * t.tokens, t.seconds) for t in self.times if t.batch == batch)
            for i in range(1, len(rows) - 1):
                found = _straight([rows[i - 1], rows[i + 1]], rows[i][0])
                errors.append(found / rows[i][1] - 1)
        return errors


def _straight(rows: Sequence[tuple[float, float]], at: float) -> float:
    """Piecewise linear through rows sorted by their first number; never below the first row."""
    if len(rows) == 1:
        return rows[0][1] * max(at / rows[0][0], 1.0)
    after = next((i for i, (x, _) in enumerate(rows) if x >= at), len(rows) - 1)
    (x0, y0), (x1, y1) = rows[max(after, 1) - 1], rows[max(after, 1)]
    return max(y0 + (y1 - y0) * (at - x0) / (x1 - x0), rows[0][1] if at < rows[0][0] else 0.0)


@dataclass(frozen=True)
class HeadTime:
    """What a head adds to a target call: seconds per cycle, medians over interleaved rounds.

    Attributes
    ----------
    form : str
    horizon, rank, transition_rank : int
    batch : int
    draft, verification, rest : float
        Drafting, judging the draft, and the loop around them.
    cycle : float
        A whole cycle, the target's call with it, as it ran.
    spread : float
        Half the distance between the quartiles of the cycle.
    width, blocks : int
        Of the trunk; 0: the head's own default.
    """

    form: str
    horizon: int
    rank: int
    transition_rank: int
    batch: int
    draft: float
    verification: float
    rest: float
    cycle: float
    spread: float = 0.0
    width: int = 0
    blocks: int = 0

    @property
    def beside_target(self) -> float:
        """Seconds of a cycle that are not the target's."""
        return self.draft + self.verification + self.rest

    def is_of(self, sizes: dict[str, Any]) -> bool:
        """Whether it is the time of a head of these sizes; those that are not named may be any."""
        return all(getattr(self, name) == value for name, value in sizes.items())


@dataclass(frozen=True)
class PlainTime:
    """Seconds of a plain step, one token for each request, and who was the faster.

    Attributes
    ----------
    batch : int
    seconds : float
    way : str
        Whose plain step it is.
    spread : float
        Half the distance between the quartiles.
    """

    batch: int
    seconds: float
    way: str
    spread: float = 0.0


@dataclass(frozen=True)
class MeasuredLatency:
    """Step times of a device: what `latency.json` holds.

    Attributes
    ----------
    model : LatencyModel
        The textbook formula nearest to the measured cycles of one request.
    curves : tuple of StepCurve
        This library's, and those of serving engines.
    heads : tuple of HeadTime
    plain : tuple of PlainTime
    measured_on : dict of str to str
        Device, precision, base model, versions, date.
    """

    model: LatencyModel
    curves: tuple[StepCurve, ...] = ()
    heads: tuple[HeadTime, ...] = ()
    plain: tuple[PlainTime, ...] = ()
    measured_on: dict[str, str] | None = None

    def __repr__(self) -> str:
        step, of = 1e3 * self.model.plain_step, f" of {self.where}" if self.where else ""
        counts = f"{len(self.curves)} step curves, {len(self.heads)} head times"
        return f"MeasuredLatency(plain step {step:.4g} ms{of}, {counts})"

    @property
    def where(self) -> str:
        """Device and precision, as far as they are known."""
        told = self.measured_on or {}
        return ", ".join(told[name] for name in ("device", "dtype") if name in told)

    def curve(self, source: str | None = None) -> StepCurve | None:
        """The step curve of this source; without one the first, None where none was measured.

        Raises
        ------
        ValueError
            If no curve is of this source.
        """
        if source is None:
            return self.curves[0] if self.curves else None
        for curve in self.curves:
            if curve.source == source:
                return curve
        known = ", ".join(repr(curve.source) for curve in self.curves) or "none"
        raise ValueError(f"no step curve of {source!r}: there are {known}")

    def plain_seconds(self, batch: int = 1, *, source: str | None = None) -> float:
        """A plain step: the faster way's, or that of a serving engine's own curve."""
        curve = self.curve(source)
        if source not in (None, OURS) and curve is not None:
            return curve.seconds(batch, 1)
        if self.plain:
            return _straight(sorted((t.batch, t.seconds) for t in self.plain), batch)
        return self.model.plain_step if curve is None else curve.seconds(batch, 1)

    def cycle_seconds(
        self, sizes: dict[str, Any], batch: int = 1, *, source: str | None = None
    ) -> float:
        """A cycle: the target's call over all tokens of all requests, and what the head adds.

        Parameters
        ----------
        sizes : dict
            `form`, `horizon`, `rank`, `transition_rank` (and `width`, `blocks`) of the head.
        batch : int
        source : str, optional
            Whose step curve; default: the first.

        Raises
        ------
        ValueError
            If no head of these sizes, but for the horizon, was measured.
        """
        curve = self.curve(source)
        if curve is None:
            return self.model.call_seconds(sizes["horizon"], sizes.get("rank") or 1)
        return curve.seconds(batch, sizes["horizon"]) + self._added(sizes, batch, curve)

    def _added(self, sizes: dict[str, Any], batch: int, curve: StepCurve) -> float:
        """What a cycle takes beyond a call of this curve, linear in horizon and batch between
        measured ones.
        """
        others = {name: value for name, value in sizes.items() if name != "horizon"}
        timed = [time for time in self.heads if time.is_of(others)]
        if not timed:
            told = ", ".join(f"{name} {value}" for name, value in sizes.items())
            raise ValueError(f"no head of {told} was timed: measure the latency with it")
        rows = []
        for horizon in sorted({time.horizon for time in timed}):
            at = [(t.batch, _beyond_call(t, curve)) for t in timed if t.horizon == horizon]
            rows.append((horizon, _straight(sorted(at), batch)))
        return rows[0][1] if len(rows) == 1 else _straight(rows, sizes["horizon"])

    def lookup_seconds(self, horizon: int, batch: int = 1, *, source: str | None = None) -> float:
        """A cycle whose draft is looked up: the target's call, and the loop around it as it was
        measured with heads; the look-up itself takes next to nothing.
        """
        curve = self.curve(source)
        if curve is None:
            return self.model.call_seconds(horizon, 0)
        around = sorted((t.batch, max(_beyond_call(t, curve) - t.draft, 0.0)) for t in self.heads)
        least = {b: min(t for other, t in around if other == b) for b, _ in around}
        extra = _straight(sorted(least.items()), batch) if least else 0.0
        return curve.seconds(batch, horizon) + extra

    def with_curve(self, curve: StepCurve, *, first: bool = False) -> MeasuredLatency:
        """With one more step curve, that of a serving engine for example."""
        others = tuple(c for c in self.curves if c.source != curve.source)
        curves = (curve, *others) if first else (*others, curve)
        return MeasuredLatency(self.model, curves, self.heads, self.plain, self.measured_on)

    def write(self, path: str | Path) -> Path:
        """As JSON; the formula's four numbers stand on top, as in files of before."""
        found = {"format": _FORMAT} | asdict(self.model)
        found |= {"measured_on": self.measured_on or {}}
        found["plain"] = [asdict(time) for time in self.plain]
        found["step_curves"] = [asdict(curve) for curve in self.curves]
        found["heads"] = [asdict(time) for time in self.heads]
        text = json.dumps(found, indent=1, allow_nan=True)
        return write_text(Path(path), text.replace("NaN", "null") + "\n")


def _beyond_call(time: HeadTime, curve: StepCurve) -> float:
    """A cycle as it ran, less a bare call of our own curve: a call inside the loop finds colder
    caches. On another's curve the head's own stages.
    """
    if curve.source != OURS:
        return time.beside_target
    return max(time.cycle - curve.seconds(time.batch, time.horizon), 0.0)


def read_latency(path: str | Path) -> MeasuredLatency:
    """What `latency.json` holds; files with the formula's four numbers alone are read as well.

    Raises
    ------
    ValueError
        If it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if missing := [name for name in _FIELDS[:2] if name not in found]:
            raise TypeError(f"it has no {', '.join(missing)}")
        model = LatencyModel(**{k: v for k, v in found.items() if k in _FIELDS})
        unknown = set(found) - {*_FIELDS, "format", "measured_on", "plain", "step_curves", "heads"}
        if unknown:
            raise TypeError(f"it has {', '.join(sorted(unknown))}")
        curves = [
            StepCurve(one["source"], tuple(StepTime(**_numbers(t)) for t in one["times"]))
            for one in found.get("step_curves", [])
        ]
        return MeasuredLatency(
            model,
            tuple(curves),
            tuple(HeadTime(**time) for time in found.get("heads", [])),
            tuple(PlainTime(**time) for time in found.get("plain", [])),
            found.get("measured_on"),
        )
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(path)!r}: {error}; expected JSON such as "
            '{"plain_step": 0.02, "base": 0.02, "per_position": 0.0001, "per_component": '
            "0.00005}, in seconds, or what `cpmtp latency` writes"
        ) from error


def _numbers(time: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in time.items()}
