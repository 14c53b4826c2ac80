"""Which shape is chosen on stored curves, and that intervals cover what they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from curve_tables import PROBES, damped_curves

from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.learning_curves.shapes import reference_rows
from cpmtp.forecasting.learning_curves.tasks import checked_curves, tasks_of


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def exact(**changes) -> pd.DataFrame:
    return damped_curves(chance(), group_effect=0.0, own_effect=0.0, groups=4, **changes)


def test_a_law_that_all_curves_share_is_found_and_continued_exactly():
    found = ShapeChoice.of(exact(ratio=0.45))
    assert (found.level.family, found.level.scale) == ("damped", "log")
    assert found.level.ratio == pytest.approx(0.45)
    assert found.of_level.scale < 1e-6 and found.of_difference.scale < 1e-6
    assert found.residuals["forecast"].to_numpy() == pytest.approx(found.residuals["truth"])


def test_a_law_of_tokens_is_told_from_one_of_their_logarithms():
    table = exact(ratio=0.45)
    # Logarithms that shrink by the ratio become tokens that do.
    told = table.assign(tokens_per_call=1 + np.log(table["tokens_per_call"]))
    found = ShapeChoice.of(told)
    assert found.level.scale == "tokens" and found.level.ratio == pytest.approx(0.45)
    assert found.errors.set_index(["family", "scale"])["error"]["damped", "log"] > 1e-4


def test_forecasts_of_a_group_do_not_depend_on_its_own_targets():
    table = damped_curves(chance(1), groups=4)
    mine = (table["group"] == "g2") & (table["role"] == "target")
    moved = table.assign(tokens_per_call=table["tokens_per_call"] * np.where(mine, 1.01, 1))
    before, after = (ShapeChoice.of(t) for t in (table, moved))
    assert (before.level.family, before.level.scale) == (after.level.family, after.level.scale)
    rows = before.residuals["group"] == "g2"
    same = after.residuals["forecast"][rows] == before.residuals["forecast"][rows]
    assert same.all()
    assert (after.residuals["forecast"] != before.residuals["forecast"])[~rows].any()


def test_groups_count_alike_however_many_candidates_they_have():
    table = damped_curves(chance(2), groups=3, group_effect=0.2, candidates=2)
    again = [table[table["group"] == "g0"].assign(rank=table["rank"] + 10 * k) for k in (1, 2, 3)]
    assert ShapeChoice.of(pd.concat([table, *again])).level == ShapeChoice.of(table).level


def test_a_candidates_level_is_the_references_and_the_difference():
    table = damped_curves(chance(3), groups=5, own_effect=0.1)
    found = ShapeChoice.of(table)
    (tasks,) = tasks_of(checked_curves(table[(table["group"] == "g0")]))[:1]
    logs, rows = found.forecast(tasks), reference_rows(tasks, found.reference)
    steps = tasks.logs - tasks.logs[rows]
    if found.difference.family == "damped":
        assert logs - logs[rows] == pytest.approx(found.difference.values(tasks, steps))
    assert logs[rows] == pytest.approx(found.level.values(tasks, tasks.logs)[rows])


def test_the_reference_may_have_another_trunk_in_every_group():
    table = damped_curves(chance(4), groups=4)
    wide = table.assign(width=np.where(table["group"] == "g1", 384, 192))
    same, other = (ShapeChoice.of(t) for t in (table, wide))
    assert same.reference == other.reference == "cp 1"
    assert (same.difference, same.of_difference) == (other.difference, other.of_difference)
    assert other.residuals["is_reference"].sum() == same.residuals["is_reference"].sum() == 8


def coverage(libraries: int, groups: int, **law) -> tuple[float, float, int]:
    """Share of curves of new groups inside the interval, and inside one without what
    extrapolations are off by.
    """
    inside, documents_alone = [], []
    for library in range(libraries):
        generator = chance(100 + library)
        found = ShapeChoice.of(damped_curves(generator, targets=(262144,), **law))
        new = damped_curves(generator, targets=(262144,), groups=groups, first=50, **law)
        for tasks in tasks_of(checked_curves(new)):
            logs = found.forecast(tasks)
            gains, weights = logs - tasks.logs[:, -1], found.seed_weights(tasks)
            half = found.half_widths(gains, tasks.noise, weights)
            inside += list(np.abs(logs - tasks.truths) <= half)
            alone = found.half_widths(0 * gains, tasks.noise, weights)
            documents_alone += list(np.abs(logs - tasks.truths) <= alone)
    return float(np.mean(inside)), float(np.mean(documents_alone)), len(inside)


def test_a_nominal_interval_covers_two_thousand_curves_of_groups_never_seen():
    found, documents_alone, curves = coverage(25, 16, noise=0.001)
    assert curves == 2000
    assert 0.87 <= found <= 0.93
    assert documents_alone < 0.6  # a variant that knows of no error in shape


def test_seeds_are_told_from_repeated_trainings_alone():
    repeated = damped_curves(chance(5), groups=3, noise=0.02, seeds=4)
    assert ShapeChoice.of(repeated).of_level.seeds == pytest.approx(0.02**2, rel=0.5)
    assert ShapeChoice.of(repeated[repeated["seed"] != 1]).of_level.seeds > 0
    single = damped_curves(chance(5), groups=3, noise=0.02, seeds=1)
    assert ShapeChoice.of(single).of_level.seeds == 0


def test_intervals_grow_with_what_is_added_and_with_confidence():
    found = ShapeChoice.of(damped_curves(chance(6)))
    gains = np.array([0.0, 0.1, 0.2])
    half = found.half_widths(gains, np.zeros(3), np.zeros(3))
    assert half[0] == 0 and half[2] == pytest.approx(2 * half[1])
    wider = found.half_widths(gains, np.zeros(3), np.zeros(3), confidence=0.99)
    assert (wider[1:] > half[1:]).all()
    assert found.farthest == 262144 / 32768


def test_the_stored_curves_speak_for_losses():
    found = ShapeChoice.stored()
    assert found.level.family == "loss" and found.difference.family == "levels"
    assert len(found.groups) >= 5 and found.of_level.scale > found.of_difference.scale > 0
    assert found.farthest == 8
    without = found.errors[found.errors["family"] == "damped"]["error"].min()
    assert found.errors.set_index("family").loc["levels", "error"] < without


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="role"), "without role"),
        (lambda t: t.assign(tokens_per_call=0.0), "tokens_per_call 0.0"),
        (lambda t: t[t["group"] == "g0"], "1 groups"),
        (lambda t: t[t["budget"].isin(PROBES)], "0 groups"),
    ],
)
def test_tables_that_say_too_little_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ShapeChoice.of(change(damped_curves(chance(), groups=2)))
