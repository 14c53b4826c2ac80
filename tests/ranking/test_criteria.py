"""Criteria on curves alone: what each promises, against loops that say it slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmtp.ranking.criteria import marginal_choice, throughput_choice, tolerant_choice

GRID = np.array([1, 2, 3, 8, 16])
curves = st.lists(
    st.lists(st.floats(1, 4), min_size=len(GRID), max_size=len(GRID)), min_size=1, max_size=5
).map(np.array)


def first_small_step(curve, ranks, tolerance: float) -> int:
    for i in range(len(ranks) - 1):
        doublings = math.log2(ranks[i + 1] / ranks[i])
        if (curve[i + 1] - curve[i]) / doublings < tolerance * curve[i]:
            return i
    return len(ranks) - 1


@settings(max_examples=200, deadline=None)
@given(curves, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_a_marginal_choice_is_the_first_rank_after_which_a_doubling_gains_little(means, tolerance):
    expected = [first_small_step(curve, GRID, tolerance) for curve in means]
    assert marginal_choice(means, GRID, tolerance).tolist() == expected


def test_a_step_of_two_doublings_is_held_against_two_gains():
    gain = np.array([[2.0, 2.03]])
    assert marginal_choice(gain, np.array([1, 2]), 0.01).tolist() == [1]
    assert marginal_choice(gain, np.array([1, 4]), 0.01).tolist() == [0]
    assert marginal_choice(gain, np.array([4, 8]), 0.01).tolist() == [1]


def test_a_gain_is_a_share_of_what_the_smaller_rank_has():
    curve = np.array([[2.0, 2.5, 2.9, 2.95]])
    ranks = np.array([1, 2, 4, 8])
    # 1/4, then 4/25, then 1/58 a doubling.
    for tolerance, chosen in ((0.26, 0), (0.24, 1), (0.17, 1), (0.15, 2), (0.018, 2), (0.017, 3)):
        assert marginal_choice(curve, ranks, tolerance).tolist() == [chosen], tolerance
        assert marginal_choice(100 * curve, ranks, tolerance).tolist() == [chosen], tolerance


def test_a_gain_of_exactly_the_tolerance_is_worth_its_doubling():
    assert marginal_choice(np.array([[2.0, 3.0]]), np.array([1, 2]), 0.5).tolist() == [1]


def test_what_later_ranks_gain_does_not_bring_back_a_marginal_choice():
    flat_then_steep = np.array([[2.0, 2.0, 3.0]])
    assert marginal_choice(flat_then_steep, np.array([1, 2, 4]), 0.01).tolist() == [0]


@settings(max_examples=200, deadline=None)
@given(curves, st.lists(st.floats(0.01, 1), min_size=len(GRID), max_size=len(GRID)).map(np.array))
def test_a_throughput_choice_is_as_fast_as_any_and_the_first_that_is(means, seconds):
    for curve, chosen in zip(means, throughput_choice(means, seconds), strict=True):
        speeds = [tokens / time for tokens, time in zip(curve, seconds, strict=True)]
        assert speeds[chosen] == max(speeds) and chosen == speeds.index(max(speeds))


@settings(max_examples=100, deadline=None)
@given(curves)
def test_where_every_rank_costs_the_same_the_most_tokens_win_and_where_cost_is_all_the_least(means):
    assert throughput_choice(means, np.ones(len(GRID))).tolist() == means.argmax(1).tolist()
    steep = 4.0 * 5.0 ** np.arange(len(GRID))  # more than any gain between 1 and 4 tokens
    assert throughput_choice(means, steep).tolist() == [0] * len(means)


def test_every_resample_chooses_for_itself():
    means = np.array([[1.0, 2.0], [2.0, 2.1]])
    assert throughput_choice(means, np.array([1.0, 1.5])).tolist() == [1, 0]
    assert marginal_choice(means, np.array([1, 2]), 0.1).tolist() == [1, 0]
    nothing = np.zeros_like(means)
    assert tolerant_choice(means, means.max(1, keepdims=True) - means, nothing, 0.1).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("error", [0.0, np.nan])
def test_without_a_standard_error_the_tolerance_alone_decides(error):
    means = np.array([[1.97, 1.99, 2.0]])
    chosen = tolerant_choice(means, 2.0 - means, np.full_like(means, error), 0.01)
    assert chosen.tolist() == [1]
