"""From tokens per call to throughput and cost."""

from __future__ import annotations

import math

import pytest
import torch

from cpmtp.acceptance.implied import AcceptanceProfile
from cpmtp.latency import (
    LatencyModel,
    Throughput,
    cost_per_million_tokens,
    predicted_speedup,
    tokens_until_paid,
)

PROFILE = AcceptanceProfile(torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64), "block", "target")


def test_a_call_as_long_as_a_step_gains_its_tokens_per_call():
    assert predicted_speedup(PROFILE, LatencyModel(0.01, 0.01), rank=8).speedup == pytest.approx(
        2.3
    )


def test_at_the_break_even_point_the_speedup_is_one():
    latency = LatencyModel(0.01, 0.011, 0.001, 0.0005)
    forecast = predicted_speedup(PROFILE, latency, rank=4)
    assert forecast.speedup == pytest.approx(2.3 / forecast.break_even_tokens_per_call)
    assert forecast.tokens_per_second == pytest.approx(2.3 / latency.call_seconds(3, 4))


def test_a_higher_rank_costs_time_and_nothing_else():
    latency = LatencyModel(0.01, 0.01, 0.0, 0.001)
    assert (
        predicted_speedup(PROFILE, latency, rank=8).speedup
        < predicted_speedup(PROFILE, latency, rank=1).speedup
    )


def test_twice_the_speed_halves_the_cost():
    assert cost_per_million_tokens(200, 3) == pytest.approx(cost_per_million_tokens(100, 3) / 2)


def test_training_is_paid_when_the_time_saved_is_the_time_spent():
    forecast = Throughput(tokens_per_second=300.0, speedup=3.0, break_even_tokens_per_call=1.0)
    tokens = tokens_until_paid(forecast, training_device_hours=2)
    plain, fast = tokens / 100.0, tokens / 300.0
    assert plain - fast == pytest.approx(2 * 3600)
    assert tokens_until_paid(Throughput(90.0, 0.9, 1.1), training_device_hours=2) == math.inf


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: LatencyModel(0.0, 0.1), "plain_step 0"),
        (lambda: LatencyModel(0.1, -0.1), "base -0.1"),
        (lambda: LatencyModel(0.1, math.nan), "base nan"),
        (lambda: cost_per_million_tokens(0, 1), "tokens_per_second 0"),
        (lambda: cost_per_million_tokens(1, math.inf), "price_per_device_hour inf"),
        (
            lambda: tokens_until_paid(Throughput(1.0, 2.0, 1.0), training_device_hours=-1),
            "training_device_hours -1",
        ),
        (
            lambda: predicted_speedup(
                AcceptanceProfile(torch.ones(2, 3), "block", "target"),
                LatencyModel(0.1, 0.1),
                rank=1,
            ),
            "batch axes",
        ),
    ],
)
def test_bad_figures_are_refused(call, said):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)
