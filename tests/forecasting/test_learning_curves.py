"""Shapes of learning curves: exact where a curve has the shape, and bounded where none is."""

from __future__ import annotations

import numpy as np
import pytest

from cpmtp.forecasting.learning_curves.families import (
    RATIOS,
    Profile,
    damped_trend,
    power_law,
)

# Tokens per call after 150, 300 and 1,200 steps of 1,024 positions (a prototype's heads on the two
# embedded models, two decimals), and the error at 1,200 that was stated for a ratio of 0.6.
PROTOTYPE = {
    ("code", "cp 8"): ((2.03, 2.30, 2.56), -0.004),
    ("code", "recurrent"): ((2.19, 2.45, 2.71), 0.0),
    ("code", "markov mixture"): ((2.07, 2.36, 2.65), -0.005),
    ("code", "cp 1"): ((2.00, 2.18, 2.32), 0.016),
    ("prose", "recurrent"): ((2.40, 2.68, 2.916), 0.013),
    ("prose", "cp 1"): ((2.13, 2.31, 2.437), 0.023),
}
HALF_A_DIGIT = 0.005


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_damped_trend_is_the_last_step_times_a_geometric_sum(ratio, ahead):
    probes = np.array([100.0, 200.0, 400.0])
    scores = np.array([1.0, 1.4, 1.7])
    expected = 1.7 + 0.3 * sum(ratio**j for j in range(1, ahead + 1))
    assert damped_trend(probes, scores, 400.0 * 2**ahead, ratio) == pytest.approx(expected)


@pytest.mark.parametrize("budgets", [(1.0, 2.0), (1.0, 4.0), (3.0, 4.0, 10.0)])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_a_curve_whose_steps_shrink_by_the_ratio_is_continued_exactly_at_any_spacing(
    budgets, ratio
):
    def curve(b):
        return 2.5 - 1.2 * ratio ** np.log2(b)

    probes = np.array(budgets)
    for at in (12.0, 37.0, 1000.0):
        assert damped_trend(probes, curve(probes), at, ratio) == pytest.approx(curve(at))
        found = power_law(probes, curve(probes), at, ratio, most=4)
        assert found == pytest.approx(curve(at))


def test_a_ratio_of_zero_keeps_the_last_score_and_one_goes_straight_on():
    probes, scores = np.array([1.0, 2.0, 4.0]), np.array([[1.0, 1.1, 1.3], [2.0, 2.0, 1.9]])
    kept, straight = damped_trend(probes, scores, 32.0, np.array([0.0, 1.0]))
    assert kept == pytest.approx(scores[:, -1])
    assert straight == pytest.approx([1.3 + 3 * 0.2, 1.9 - 3 * 0.1])


def test_all_ratios_at_once_are_those_one_by_one():
    probes, scores = np.array([1.0, 2.0, 8.0]), np.random.default_rng(0).random((4, 3)) + 1
    together = damped_trend(probes, scores, 64.0, RATIOS)
    powers = power_law(probes, scores, 64.0, RATIOS, most=9.0)
    for k in (0, 17, 60, 100):
        alone = damped_trend(probes, scores, 64.0, float(RATIOS[k]))
        assert together[k] == pytest.approx(alone)
        assert powers[k] == pytest.approx(
            power_law(probes, scores, 64.0, float(RATIOS[k]), most=9.0)
        )


def test_a_power_law_never_exceeds_the_horizon():
    probes = np.array([1.0, 2.0, 4.0])
    steep = np.array([1.0, 2.0, 2.9])
    found = power_law(probes, steep, 1e9, RATIOS[1:-1], most=3.0)
    assert (found <= 3.0 + 1e-12).all()
    free = damped_trend(probes, steep, 1e9, RATIOS[1:-1])
    assert free.max() > 3.0  # what the bound is for


def test_a_borrowed_shape_continues_a_curve_that_accelerates_first():
    def shape(b):
        return np.tanh(np.log2(b) - 2)

    budgets = 2.0 ** np.arange(6)
    curves = [(budgets, a + s * shape(budgets)) for a, s in ((1.0, 0.2), (1.5, 0.4), (0.3, 1.0))]
    profile = Profile.of(curves)
    probes = budgets[:3]
    new = 2.0 + 0.7 * shape(probes)
    missed = np.zeros(len(RATIOS))
    for at in (16.0, 32.0):
        found = profile.extrapolate(probes, new, at)
        assert found == pytest.approx(2.0 + 0.7 * shape(at), abs=1e-6)
        missed = np.maximum(missed, np.abs(damped_trend(probes, new, at, RATIOS) - found))
    assert missed.min() > 0.02  # no ratio gets to both


def test_a_shape_needs_a_curve_of_three_points():
    with pytest.raises(ValueError, match="three budgets"):
        Profile.of([(np.array([1.0, 2.0]), np.array([1.0, 1.5]))])


def test_beyond_what_others_were_trained_to_a_borrowed_shape_slows_down():
    budgets = 2.0 ** np.arange(5)
    curve = 2 - 0.5 ** np.arange(5)
    profile = Profile.of([(budgets, curve)] * 2)
    found = profile.height(2.0 ** np.arange(4, 9))
    steps = np.diff(found)
    assert (steps > 0).all() and steps[1:] == pytest.approx(steps[:-1] * 0.5, rel=1e-6)


@pytest.mark.parametrize("case", PROTOTYPE)
def test_the_prototypes_curves_are_continued_with_the_errors_that_were_stated(case):
    (*probes, truth), stated = PROTOTYPE[case]
    found = damped_trend(np.array([150.0, 300.0]), np.array(probes), 1200.0, 0.6)
    # The scores are known to half a digit each; the sum of the ratio's powers is 0.96.
    allowed = HALF_A_DIGIT * (1 + 2 * 0.96 + 1) / truth + 0.0005
    assert float(found) / truth - 1 == pytest.approx(stated, abs=allowed)
    straight = damped_trend(np.array([150.0, 300.0]), np.array(probes), 1200.0, 1.0)
    assert float(straight) > 1.03 * truth
