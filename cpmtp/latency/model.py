"""What tokens per call are worth: step times, throughput, cost.

The textbook assumptions, all of them stated: one request at a time on one device; a call's time
depends on horizon and rank alone, ``t(n, r) = a + b n + c n r``, not on what is accepted; tokens
per call are those of the contexts decoding meets. A loaded server that verifies many requests in
one batch gains less: there arithmetic is the limit, and refused tokens cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatencyModel:
    """Seconds per forward pass, measured or given.

    Attributes
    ----------
    plain_step : float
        ``t0``: one step of plain decoding, one token.
    base : float
        ``a``: what a speculative call costs whatever it drafts.
    per_position : float
        ``b``: per position that is verified.
    per_component : float
        ``c``: per position and component of the draft.

    Raises
    ------
    ValueError
        If a time is negative or not finite, or the plain step is zero.

    Examples
    --------
    >>> latency = LatencyModel(0.010, base=0.010, per_position=0.0002, per_component=0.00001)
    >>> round(latency.call_seconds(4, 8), 6)
    0.01112
    """

    plain_step: float
    base: float
    per_position: float = 0.0
    per_component: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{name} {value}: expected a finite number of seconds of at least 0"
                )
        if self.plain_step == 0:
            raise ValueError("plain_step 0: a step of plain decoding takes time; measure it")

    @classmethod
    def fitted(
        cls,
        plain_step: float,
        horizons: Sequence[float],
        ranks: Sequence[float],
        seconds: Sequence[float],
    ) -> LatencyModel:
        """Least squares with times of at least 0 over measured calls.

        Examples
        --------
        >>> found = LatencyModel.fitted(0.01, [2, 4, 4], [1, 1, 8], [0.012, 0.014, 0.014])
        >>> round(found.base, 6), round(found.per_position, 6), round(found.per_component, 6)
        (0.01, 0.001, 0.0)
        """
        import numpy as np
        from scipy.optimize import nnls

        n, r = np.asarray(horizons, dtype=float), np.asarray(ranks, dtype=float)
        found, _ = nnls(np.stack([np.ones_like(n), n, n * r], 1), np.asarray(seconds, dtype=float))
        return cls(plain_step, *map(float, found))

    def call_seconds(self, horizon: int, rank: int) -> float:
        """``t(n, r)``: one speculative call."""
        return self.base + self.per_position * horizon + self.per_component * horizon * rank


def memory_bound_latency(plain_step: float, layers: int) -> LatencyModel:
    """What a call costs if a device does nothing but read weights: the assumption to replace by a
    measurement.

    A transformer of L layers of width d has about 12 L d^2 weights, and a head with one d-by-d map
    per position and component adds n r d^2: ``t(n, r) = t0 (1 + n r / (12 L))``. Arithmetic, caches
    and sampling are left out.

    Examples
    --------
    >>> round(memory_bound_latency(0.02, layers=32).call_seconds(3, 8) / 0.02, 4)
    1.0625
    """
    if layers < 1:
        raise ValueError(f"layers {layers}: expected at least 1")
    return LatencyModel(plain_step, plain_step, per_component=plain_step / (12 * layers))


@dataclass(frozen=True)
class Throughput:
    """What a horizon and rank are predicted to buy.

    Attributes
    ----------
    tokens_per_second : float
    speedup : float
        Over plain decoding; below 1 it does not pay.
    break_even_tokens_per_call : float
        Tokens per call at which speculation is as fast as plain decoding.
    """

    tokens_per_second: float
    speedup: float
    break_even_tokens_per_call: float


def predicted_speedup(profile: Any, latency: LatencyModel, *, rank: int) -> Throughput:
    """Throughput of decoding with a draft of the given rank:
    ``speedup = tokens per call * t0 / t(n, r)``.

    Parameters
    ----------
    profile : AcceptanceProfile
        Without batch axes; its horizon is the call's. An average over contexts should average
        tokens per call first.
    latency : LatencyModel
    rank : int
        Of the draft.

    Raises
    ------
    ValueError
        If the profile has batch axes.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> profile = SimpleNamespace(tokens_per_call=2.5, survival=[1.0, 0.9, 0.6])
    >>> round(predicted_speedup(profile, LatencyModel(0.01, 0.011), rank=4).speedup, 3)
    2.273
    """
    tokens = profile.tokens_per_call
    if not isinstance(tokens, float):
        raise ValueError(
            "a profile with batch axes has many tokens per call: give the profile of one context, "
            "or of their mean"
        )
    seconds = latency.call_seconds(len(profile.survival), rank)
    return Throughput(
        tokens / seconds, tokens * latency.plain_step / seconds, seconds / latency.plain_step
    )


def cost_per_million_tokens(tokens_per_second: float, price_per_device_hour: float) -> float:
    """In the price's currency; the device is taken to decode all the time.

    Raises
    ------
    ValueError
        If a figure is not positive.

    Examples
    --------
    >>> cost_per_million_tokens(tokens_per_second=100.0, price_per_device_hour=3.6)
    10.0
    """
    require_positive(
        tokens_per_second=tokens_per_second, price_per_device_hour=price_per_device_hour
    )
    return price_per_device_hour / 3600 / tokens_per_second * 1e6


def tokens_until_paid(forecast: Throughput, *, training_device_hours: float) -> float:
    """Tokens to decode until the head's training has paid for itself; infinite where it never does.

    Decoding and training are priced alike, by device-hour, so that the price drops out.

    Examples
    --------
    >>> tokens_until_paid(Throughput(200.0, 2.0, 1.1), training_device_hours=1.0)
    720000.0
    """
    require_positive(training_device_hours=training_device_hours)
    saved_per_token = (forecast.speedup - 1) / forecast.tokens_per_second
    return training_device_hours * 3600 / saved_per_token if saved_per_token > 0 else math.inf


def require_positive(**figures: float) -> None:
    """ValueError for the first figure that is not a finite number above 0."""
    for name, value in figures.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} {value}: expected a finite number above 0")
