"""The plan of a staged roll-out: what to measure, what to expect, how long, when to stop.

What cannot change is the distribution of the output: verification is lossless, so no new review of
quality is needed, only checks that the implementation is right. What to expect is what a trained
head is forecast to earn; an alarm set to a rank's ceiling would ring at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

from cpmtp.latency import LatencyModel, Throughput, cost_per_million_tokens, tokens_until_paid
from cpmtp.ranking.parts import OUTCOME
from cpmtp.ranking.scores import context_values, tokens_in_words
from cpmtp.report.blocks import Section, Table, Text
from cpmtp.report.first_screen.answer import does_not_pay
from cpmtp.report.first_screen.stored_forecast import HeadsForecast
from cpmtp.report.subject import Subject
from cpmtp.report.words import percent, three_digits

LOOKS = 4
# O'Brien and Fleming's bounds for four equally spaced looks at a two-sided level of 5 %: 2.024
# sqrt(4 / k).
_LAST_BOUND = 2.024
_LEVEL, _POWER = 0.05, 0.8
_EDIT_MARGIN, _EDIT_RATE = 0.03, 0.2
_FEWEST = 100  # fewer requests do not show what traffic is like
# Between requests throughput varies for more reasons than the contexts of a study show: lengths,
# batches, other users.
_LEAST_VARIATION = 0.3


@dataclass(frozen=True)
class PilotMeasure:
    """One thing to measure.

    Attributes
    ----------
    name, how : str
    expected, low, high : float, optional
        The forecast and its range, in `unit`; None where the baseline of the service itself is what
        is expected, ends None too where there is no range.
    unit : str
    alarm : str
        When to switch back.
    """

    name: str
    how: str
    expected: float | None
    low: float | None
    high: float | None
    unit: str
    alarm: str


@dataclass(frozen=True)
class PilotPlan:
    """Measures, sizes and bounds of an A/B test between plain and speculative decoding.

    Attributes
    ----------
    horizon, rank : int
        Of the head to try.
    measures : tuple of PilotMeasure
    requests_per_arm : int
        To see half of the forecast gain in throughput; at least a hundred.
    edit_requests_per_arm : int
        To exclude that people edit more by three points.
    variation : float
        Coefficient of variation between requests that the first size rests on.
    bounds : tuple of float
        Absolute z at each look beyond which the test ends early.
    break_even : float
        Tokens per call at which speculation is as fast as plain decoding.
    tokens_per_training_hour : float
        Tokens to decode for each device-hour of training until it has paid for itself; infinite
        where it never does.
    """

    horizon: int
    rank: int
    measures: tuple[PilotMeasure, ...]
    requests_per_arm: int
    edit_requests_per_arm: int
    variation: float
    bounds: tuple[float, ...]
    break_even: float
    tokens_per_training_hour: float


def plan_pilot(
    tokens_per_call: tuple[float, float, float],
    latency: LatencyModel,
    *,
    horizon: int,
    rank: int,
    price: float,
    variation: float,
) -> PilotPlan:
    """Plan a pilot of one horizon and rank.

    Parameters
    ----------
    tokens_per_call : tuple of float
        Of a trained head: forecast, lower and upper end of its range (NaN: unknown).
    latency : LatencyModel
    horizon, rank : int
    price : float
        Per device-hour.
    variation : float
        Coefficient of variation of throughput between requests.

    Raises
    ------
    ValueError
        If price or variation is not positive.

    Examples
    --------
    >>> latency = LatencyModel(0.02, 0.02)
    >>> plan = plan_pilot((2.5, 2.4, 2.6), latency, horizon=3, rank=8, price=2.5, variation=0.5)
    >>> plan.requests_per_arm, round(plan.break_even, 2), plan.bounds
    (100, 1.0, (4.05, 2.86, 2.34, 2.02))
    """
    if not variation > 0:
        raise ValueError(f"variation {variation}: expected a coefficient of variation above 0")
    seconds = latency.call_seconds(horizon, rank)
    expected = Throughput(
        tokens_per_call[0] / seconds,
        tokens_per_call[0] * latency.plain_step / seconds,
        seconds / latency.plain_step,
    )
    detect = abs(expected.speedup - 1) / 2
    return PilotPlan(
        horizon=horizon,
        rank=rank,
        measures=_measures(tokens_per_call, latency, seconds, price),
        requests_per_arm=max(requests_per_arm(variation, detect), _FEWEST),
        edit_requests_per_arm=non_inferiority_size(_EDIT_RATE, _EDIT_MARGIN),
        variation=variation,
        bounds=tuple(
            round(_LAST_BOUND * math.sqrt(LOOKS / look), 2) for look in range(1, LOOKS + 1)
        ),
        break_even=expected.break_even_tokens_per_call,
        tokens_per_training_hour=tokens_until_paid(expected, training_device_hours=1.0),
    )


def requests_per_arm(variation: float, difference: float) -> int:
    """Requests in each arm to find a relative difference of means, two-sided at 5 % with a power of
    80 %.

    ``2 (z_{0.975} + z_{0.8})^2 variation^2 / difference^2``, at least 2.

    Examples
    --------
    >>> requests_per_arm(0.5, 0.1)
    393
    """
    if difference == 0:
        return 0
    z = NormalDist().inv_cdf(1 - _LEVEL / 2) + NormalDist().inv_cdf(_POWER)
    return max(math.ceil(2 * (z * variation / difference) ** 2), 2)


def non_inferiority_size(rate: float, margin: float) -> int:
    """Requests in each arm to exclude, one-sided at 5 % with a power of 80 %, that a rate is higher
    by `margin`.

    Examples
    --------
    >>> non_inferiority_size(0.2, 0.03)
    2199
    """
    z = NormalDist().inv_cdf(1 - _LEVEL) + NormalDist().inv_cdf(_POWER)
    return math.ceil(2 * rate * (1 - rate) * (z / margin) ** 2)


def _measures(
    tokens: tuple[float, float, float], latency: LatencyModel, seconds: float, price: float
):
    mean, low, high = tokens
    break_even = seconds / latency.plain_step

    def cost(tokens_per_call: float) -> float:
        return cost_per_million_tokens(tokens_per_call / seconds, price)

    def ends(scale: Callable[[float], float]) -> tuple[float | None, float | None]:
        lower, upper = (
            sorted((scale(low), scale(high))) if math.isfinite(low + high) else (None, None)
        )
        return lower, upper

    # Below break-even the first alarm has rung already.
    watched = f"; below {low:.2f}: look at the traffic" if low > break_even else ""
    return (
        PilotMeasure(
            "tokens per call",
            "tokens emitted divided by forward passes of the target, per request",
            mean,
            *ends(lambda tokens: tokens),
            "tokens",
            f"mean of a day below {break_even:.2f} (break-even): switch off{watched}",
        ),
        PilotMeasure(
            "time per call",
            "clock around the target's forward pass and the draft, p50 and p95",
            1e3 * seconds,
            None,
            None,
            "ms",
            "p95 above 1.2 times the forecast for an hour",
        ),
        PilotMeasure(
            "throughput",
            "tokens per second and request, at the service's own batch sizes",
            mean / seconds,
            *ends(lambda tokens: tokens / seconds),
            "tokens/s",
            f"below plain decoding ({three_digits(1 / latency.plain_step)} tokens/s) at any batch "
            "size in use",
        ),
        PilotMeasure(
            "latency",
            "time per output token as a user sees it, p50 and p95; time to first token",
            1e3 * seconds / mean,
            *ends(lambda tokens: 1e3 * seconds / tokens),
            "ms per token",
            "p95 above that of plain decoding for an hour",
        ),
        PilotMeasure(
            "cost",
            "device-hours paid divided by tokens delivered",
            cost(mean),
            *ends(cost),
            "per million tokens",
            "a week above plain decoding "
            f"({cost_per_million_tokens(1 / latency.plain_step, price):.2f})",
        ),
        PilotMeasure(
            "edits",
            "share of outputs that people change before use",
            None,
            None,
            None,
            "as in the arm without speculation",
            f"higher by {percent(_EDIT_MARGIN)} or more: not the method but a fault of the "
            "implementation; stop and test it",
        ),
    )


def pilot(subject: Subject) -> Section:
    """The plan of a staged roll-out of the recommendation, from what a trained head is forecast to
    earn.
    """
    (horizon, rank), forecast = subject.best, subject.forecast
    scores = context_values(subject.table, OUTCOME).xs(horizon, level="horizon")[rank].dropna()
    seen = float(scores.std() / scores.mean()) if len(scores) > 1 else 0.0
    plan = plan_pilot(
        (forecast.tokens_per_call, forecast.low, forecast.high),
        subject.economics.latency,
        horizon=horizon,
        rank=rank,
        price=subject.economics.price,
        variation=max(seen, _LEAST_VARIATION),
    )
    return Section(
        f"{subject.title}: horizon {horizon}, rank {rank}",
        (*_basis(subject), _pilot_table(plan), *_pilot_texts(plan, seen)),
        level=3,
    )


def pilot_of_forecast(found: HeadsForecast, price: float) -> Iterator[Section]:
    """The same of the head that is forecast to be the best; nothing where none is."""
    row, choice = found.row, found.choice
    if row["kind"] != "head":
        yield Section(
            "No head to pilot",
            (Text("What is forecast to be the fastest needs no training: no pilot of a head."),),
            level=3,
        )
        return
    load = choice["load"]
    # Per request: what a call of all of them takes, as one formula's constant.
    latency = LatencyModel(found.plain_seconds, float(row["cycle_seconds"]))
    mean, low, high = choice["tokens_per_call"]
    plan = plan_pilot(
        (mean, low, high),
        latency,
        horizon=int(row["horizon"]),
        rank=int(row["rank"]),
        price=price / load,
        variation=_LEAST_VARIATION,
    )
    told = f" at {load} requests decoded together; costs and throughput are per request"
    basis = Text(
        f"The alarms are from the forecast of a trained head, {choice['name']}: {mean:.2f} tokens "
        f"per call ({low:.2f} to {high:.2f}){told if load > 1 else ''}. No ceiling enters."
    )
    yield Section(
        f"{f'{found.model}: ' if found.model else ''}{choice['name']}, horizon {row['horizon']}",
        (basis, _pilot_table(plan), *_pilot_texts(plan)),
        level=3,
    )


def _basis(subject: Subject) -> Iterator[Text]:
    if does_not_pay(subject):
        yield Text(does_not_pay(subject), "strong")
    yield Text(
        "The forecasts and the alarm on tokens per call are of a trained head, "
        f"{subject.forecast.words}. They are not the ceiling: {tokens_in_words(subject.row)}."
    )


def _pilot_table(plan: PilotPlan) -> Table:
    def interval(measure) -> str:
        if measure.expected is None:
            return measure.unit
        low, high = measure.low, measure.high
        ends = "" if low is None else f" ({three_digits(low)} to {three_digits(high)})"
        return f"{three_digits(measure.expected)}{ends} {measure.unit}"

    rows = tuple((m.name, m.how, interval(m), m.alarm) for m in plan.measures)
    return Table(("measure", "how", "forecast (range)", "alarm"), rows, wide=True)


def _pilot_texts(plan: PilotPlan, seen: float | None = None) -> Iterator[Text]:
    varies = "" if seen is None else f"the study's contexts vary by {seen:.2f}, traffic by more: "
    paid = plan.tokens_per_training_hour
    pays = (
        f"after {paid / 1e6:.1f} million tokens for every device-hour of it"
        if math.isfinite(paid)
        else "never"
    )
    yield Text(
        f"Sample: {plan.requests_per_arm:,} requests in each arm show half of the forecast gain "
        "in throughput (two-sided 5 %, "
        f"power 80 %, coefficient of variation {plan.variation:.2f}; {varies}"
        "measure it in a week with the same decoding in both arms and scale the number by its "
        "square). "
        f"{plan.edit_requests_per_arm:,} in each arm exclude that people edit three points more "
        "often than 20 %."
    )
    yield Text(
        f"Stopping rule: {LOOKS} equally spaced looks; stop for a difference where |z| exceeds "
        f"{', '.join(map(str, plan.bounds))} (O'Brien and Fleming, 5 % in all); stop for futility "
        "where at half-time the "
        "interval of the measured speedup lies below half of the forecast gain; stop at once on "
        "an alarm. Break-even: "
        f"{plan.break_even:.2f} tokens per call. The head's training has paid for itself {pays}."
    )
