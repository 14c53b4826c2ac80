"""The pilot's sizes and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpmtp.latency import LatencyModel, memory_bound_latency
from cpmtp.report.pilot import LOOKS, non_inferiority_size, plan_pilot, requests_per_arm


def plan(tokens=(2.5, 2.4, 2.6), **changes):
    settings = dict(horizon=3, rank=8, price=2.5, variation=0.5) | changes
    return plan_pilot(tokens, LatencyModel(0.02, 0.021), **settings)


def test_the_stated_sample_finds_the_difference_in_four_fifths_of_simulated_tests():
    generator = np.random.default_rng(0)
    size = requests_per_arm(0.3, 0.1)
    plain = generator.normal(1.0, 0.3, (4000, size))
    faster = generator.normal(1.1, 0.3, (4000, size))
    z = (faster.mean(1) - plain.mean(1)) / np.sqrt((plain.var(1) + faster.var(1)) / size)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)


def test_looking_four_times_keeps_the_level():
    steps = np.random.default_rng(1).standard_normal((200_000, LOOKS)).cumsum(1)
    z = steps / np.sqrt(np.arange(1, LOOKS + 1))
    assert np.mean((np.abs(z) > np.array(plan().bounds)).any(1)) == pytest.approx(0.05, abs=0.003)


def test_the_stated_sample_excludes_more_edits_in_four_fifths_of_simulated_tests():
    size = non_inferiority_size(0.2, 0.03)
    edits = np.random.default_rng(2).binomial(size, 0.2, (20_000, 2)) / size
    error = np.sqrt((edits * (1 - edits)).sum(1) / size)
    assert np.mean(edits[:, 1] - edits[:, 0] + 1.645 * error < 0.03) == pytest.approx(0.8, abs=0.02)


def test_forecasts_and_their_ends_are_what_the_ends_of_tokens_per_call_come_to():
    # A call of 21 ms at 2.5 an hour; fewer tokens per call are slower and dearer.
    found = {m.name: (m.expected, m.low, m.high) for m in plan().measures}
    assert found == {
        "tokens per call": (2.5, 2.4, 2.6),
        "time per call": pytest.approx((21.0, None, None)),
        "throughput": pytest.approx((2.5 / 0.021, 2.4 / 0.021, 2.6 / 0.021)),
        "latency": pytest.approx((21 / 2.5, 21 / 2.6, 21 / 2.4)),
        "cost": pytest.approx(tuple(0.021 / t * 2.5 / 3600 * 1e6 for t in (2.5, 2.6, 2.4))),
        "edits": (None, None, None),
    }


@pytest.mark.parametrize("unknown", [(math.nan, math.nan), (2.4, math.nan), (math.nan, 2.6)])
def test_without_an_interval_of_tokens_per_call_no_forecast_has_one(unknown):
    known = {m.name: m for m in plan().measures}
    for measure in plan(tokens=(2.5, *unknown)).measures:
        assert measure.low is None and measure.high is None, measure.name
        assert measure.expected == known[measure.name].expected, measure.name


def test_alarms_name_break_even_the_forecasts_end_and_plain_decoding():
    alarms = {m.name: m.alarm for m in plan().measures}
    # 21 ms a call against 20 ms a step.
    assert "below 1.05 (break-even)" in alarms["tokens per call"]
    assert "below 2.40" in alarms["tokens per call"]
    assert "(50.0 tokens/s)" in alarms["throughput"]
    assert f"({0.02 * 2.5 / 3600 * 1e6:.2f})" in alarms["cost"]


def test_a_head_that_does_not_pay_never_pays_for_its_training():
    assert plan(tokens=(1.0, 0.9, 1.1)).tokens_per_training_hour == float("inf")
    assert plan().tokens_per_training_hour < float("inf")


def test_no_variation_and_no_layers_are_refused():
    with pytest.raises(ValueError, match="variation 0"):
        plan(variation=0)
    with pytest.raises(ValueError, match="layers 0"):
        memory_bound_latency(0.02, layers=0)
