"""The pilot's sizes and bounds."""

from __future__ import annotations

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


def test_every_forecast_lies_in_its_interval():
    for measure in plan().measures:
        if measure.low is not None:
            assert measure.low <= measure.expected <= measure.high, measure.name


def test_a_head_that_does_not_pay_never_pays_for_its_training():
    assert plan(tokens=(1.0, 0.9, 1.1)).tokens_per_training_hour == float("inf")
    assert plan().tokens_per_training_hour < float("inf")


def test_no_variation_and_no_layers_are_refused():
    with pytest.raises(ValueError, match="variation 0"):
        plan(variation=0)
    with pytest.raises(ValueError, match="layers 0"):
        memory_bound_latency(0.02, layers=0)
