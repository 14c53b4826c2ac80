"""Which head to train, and what that is worth at a load: what a forecast comes down to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.outlook import HEAD, PLAIN, Option, Outlook
from cpmtp.latency import MeasuredLatency

STOPS_BELOW = 0.01


@dataclass(frozen=True)
class HeadChoice:
    """The option of most predicted tokens per second at a budget and a load.

    Attributes
    ----------
    name : str
    horizon : int
    budget : float
        Positions of training; 0 of what needs none.
    load : int
        Requests decoded together.
    tokens_per_call : (float, float, float)
        Forecast, lower and upper end; without what a winner is expected to owe to luck.
    tokens_per_second : (float, float, float)
        Of all requests together.
    speedup : float
        Over plain decoding at this load.
    sure : float
        Share of draws (documents, seeds, extrapolations) in which it is the one.
    pays : float
        Share of draws in which it is faster than plain decoding; 0 of plain decoding itself.
    luck : float
        Share by which the best of several forecasts is expected to be too high; taken off.
    ties : tuple of str
        Options that the interval does not separate from it.
    overtaken : (str, float) or None
        Who is the best at a larger budget, and from which on.
    stop : float
        Budget from which the next doubling adds less than one per cent of tokens per second;
        infinite where it does up to the largest that was looked at.
    device_hours, pays_after : float
        Of training; tokens to decode until it has paid for itself (infinite: never).
    """

    name: str
    horizon: int
    budget: float
    load: int
    tokens_per_call: tuple[float, float, float]
    tokens_per_second: tuple[float, float, float]
    speedup: float
    sure: float
    pays: float
    luck: float
    ties: tuple[str, ...]
    overtaken: tuple[str, float] | None
    stop: float
    device_hours: float
    pays_after: float

    @property
    def is_tie(self) -> bool:
        """Whether another option may be as good."""
        return bool(self.ties)

    @property
    def sentence(self) -> str:
        """The answer in words."""
        if self.horizon == 1:
            found = f"At load {self.load} plain decoding is the fastest"
        else:
            mean, low, high = self.tokens_per_call
            found = (
                f"At load {self.load} {self.name} with horizon {self.horizon}: {mean:.2f} tokens "
                f"per call ({low:.2f} to {high:.2f}), {self.speedup:.2f} times plain decoding "
                f"(faster than it with a chance of {100 * self.pays:.0f} %), sure to "
                f"{100 * self.sure:.0f} %"
            )
        shown = ", ".join(self.ties[:3]) + (" and others" if len(self.ties) > 3 else "")
        return found + (f"; a tie with {shown}" if self.ties else "") + "."


@dataclass(frozen=True)
class Loaded:
    """Options at a load: what a cycle of each takes.

    Attributes
    ----------
    options : tuple of Option
    seconds : (options,) array
        Of a cycle of all requests.
    load : int
    """

    options: tuple[Option, ...]
    seconds: Float[ndarray, " options"]
    load: int

    @classmethod
    def of(
        cls,
        options: tuple[Option, ...],
        latency: MeasuredLatency,
        load: int,
        *,
        source: str | None = None,
    ) -> Loaded:
        """By measured step times; `source` says whose."""
        ways: dict[str, Callable[[Option], float]] = {
            PLAIN: lambda o: latency.plain_seconds(load, source=source),
            HEAD: lambda o: latency.cycle_seconds(o.sizes, load, source=source),
        }
        looked_up = lambda o: latency.lookup_seconds(o.horizon, load, source=source)  # noqa: E731
        return cls(options, np.array([ways.get(o.kind, looked_up)(o) for o in options]), load)

    def rates(self, logs: Float[ndarray, "*draws options"]) -> Float[ndarray, "*draws options"]:
        """Logarithms of tokens per second of all requests, from those of tokens per call."""
        return logs + np.log(self.load / self.seconds)


def chosen(
    outlooks: Sequence[Outlook],
    at: int,
    loaded: Loaded,
    shapes: ShapeChoice,
    *,
    seconds_per_position: Callable[[int], float],
    confidence: float,
) -> HeadChoice:
    """The choice among options at the `at`-th of ascending budgets."""
    outlook, options = outlooks[at], loaded.options
    rates = loaded.rates(outlook.logs)
    best = int(rates.argmax())
    option = options[best]
    luck = _luck(loaded, outlook)
    drawn = loaded.rates(outlook.draws)  # (draws, options)
    plain = next(i for i, o in enumerate(options) if o.kind == PLAIN)
    ends = np.array([outlook.logs[best], outlook.low[best], outlook.high[best]])
    if option.kind != PLAIN:
        ends = np.maximum(ends - luck, 0.0)
    speeds = np.exp(ends) * loaded.load / loaded.seconds[best]
    hours = outlook.budget * seconds_per_position(option.candidate) / 3600
    saved = loaded.seconds[plain] / loaded.load - 1 / speeds[0]  # seconds per token
    trained = option.kind == HEAD
    return HeadChoice(
        name=option.name,
        horizon=option.horizon,
        budget=outlook.budget if trained else 0.0,
        load=loaded.load,
        tokens_per_call=tuple(np.exp(ends).tolist()),
        tokens_per_second=tuple(speeds.tolist()),
        speedup=float(speeds[0] * loaded.seconds[plain] / loaded.load),
        sure=float((drawn.argmax(-1) == best).mean()),
        pays=float((drawn[:, best] - luck > drawn[:, plain]).mean()),
        luck=float(np.expm1(luck)),
        ties=_ties(outlook, loaded, shapes, best, confidence),
        overtaken=_overtaken(outlooks[at:], loaded, best),
        stop=_stop(outlooks, loaded, best) if trained else 0.0,
        device_hours=hours if trained else 0.0,
        pays_after=(hours * 3600 / saved if saved > 0 else np.inf) if trained else 0.0,
    )


def _luck(loaded: Loaded, outlook: Outlook) -> float:
    """How much the winner of a draw of documents is above its own forecast, on average."""
    rates = loaded.rates(outlook.documents)
    winners = rates.argmax(-1)
    rows = np.arange(len(rates))
    return max(float((rates[rows, winners] - loaded.rates(outlook.logs)[winners]).mean()), 0.0)


def _ties(
    outlook: Outlook, loaded: Loaded, shapes: ShapeChoice, best: int, confidence: float
) -> tuple[str, ...]:
    """Options whose difference to the best one has an interval that reaches zero."""
    rates, found = loaded.rates(outlook.logs), []
    t = float(stats.t.ppf((1 + confidence) / 2, len(shapes.groups) - 1))
    gains = np.abs(outlook.gains)
    heads = np.array([o.kind == HEAD for o in loaded.options])
    for other, option in enumerate(loaded.options):
        if other == best:
            continue
        both = heads[other] and heads[best]
        scale = shapes.of_difference.scale if both else shapes.of_level.scale
        gain = (gains[other] + gains[best]) / (2 if both else 1)
        documents = (outlook.documents[:, best] - outlook.documents[:, other]).var()
        seeds = outlook.variances[best] + outlook.variances[other]
        if both and shapes.of_level.seeds > 0:
            seeds *= min(shapes.of_difference.seeds / (2 * shapes.of_level.seeds), 1.0)
        half = t * float(np.sqrt(documents + seeds + (scale * gain) ** 2))
        if rates[best] - rates[other] <= half:
            found.append((rates[other], _told(option)))
    return tuple(name for _, name in sorted(found, reverse=True))


def _told(option: Option) -> str:
    return option.name if option.horizon == 1 else f"{option.name} (n = {option.horizon})"


def _overtaken(outlooks: Sequence[Outlook], loaded: Loaded, best: int) -> tuple[str, float] | None:
    for outlook in outlooks[1:]:
        leader = int(loaded.rates(outlook.logs).argmax())
        if leader != best:
            return _told(loaded.options[leader]), outlook.budget
    return None


def _stop(outlooks: Sequence[Outlook], loaded: Loaded, best: int) -> float:
    for here, there in itertools.pairwise(outlooks):
        doublings = np.log2(there.budget / here.budget)
        if (there.logs[best] - here.logs[best]) / doublings < np.log1p(STOPS_BELOW):
            return here.budget
    return float("inf")


def schedule(outlook: Outlook, loaded: Sequence[Loaded]) -> pd.DataFrame:
    """The best option by load: a row per batch size.

    Returns
    -------
    pandas.DataFrame
        `load`, `option`, `horizon`, `tokens_per_call`, `tokens_per_second`, `speedup`, and `tail`:
        how much faster the best options together bring a batch of this size down to nothing than
        plain decoding does, requests ending one after another.
    """
    rows, spent, plain_spent = [], 0.0, 0.0
    for here, before in zip(loaded, [0, *(one.load for one in loaded)], strict=False):
        rates = here.rates(outlook.logs)
        best = int(rates.argmax())
        plain = next(i for i, o in enumerate(here.options) if o.kind == PLAIN)
        # While requests end from this batch size down to the next measured one, each step's tokens
        # cost what they cost here.
        sizes = here.load - before
        spent += sizes * here.load / float(np.exp(rates[best]))
        plain_spent += sizes * here.load / float(np.exp(rates[plain]))
        rows.append(
            {
                "load": here.load,
                "option": here.options[best].name,
                "horizon": here.options[best].horizon,
                "tokens_per_call": float(np.exp(outlook.logs[best])),
                "tokens_per_second": float(np.exp(rates[best])),
                "speedup": float(np.exp(rates[best] - rates[plain])),
                "tail": plain_spent / spent,
            }
        )
    return pd.DataFrame(rows)
