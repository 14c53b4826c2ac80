"""Curves by way of a loss: what it is made of, what is shared, and what that is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cpmtp.forecasting.cycles import divergences_along
from cpmtp.forecasting.learning_curves.losses import LossCurve, pooled_loss
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.learning_curves.tasks import Tasks, checked_curves, tasks_of

PROBES, TARGET = (8192, 16384, 32768), 262144
SPEEDS = {1: 0.7, 4: 1.0, 8: 1.3}  # by rank; their logarithms have mean -0.03
SLOPE, LIMIT = 0.55, 4.0


def loss_curves(ratios: dict[str, float], *, irregular: float = 0.0) -> pd.DataFrame:
    """Losses whose falls are a ratio times the fall before, and tokens of which what is missing
    follows them; with `irregular` neither does from probe to probe, but both together.
    """
    chance, rows = np.random.default_rng(0), []
    for group, ratio in ratios.items():
        step = 0.15 + 0.05 * chance.random()
        for rank, speed in SPEEDS.items():
            falls = step * speed * ratio ** np.arange(5)
            logs = 0.5 + 0.1 * speed - np.concatenate([[0], np.cumsum(falls)])
            missing = np.log(LIMIT) - 0.4 - 0.02 * rank
            tokens = np.log(LIMIT) - missing * np.exp(SLOPE * (logs - logs[0]))
            off = irregular * chance.standard_normal(6)
            budgets = [*PROBES, 65536, 131072, TARGET]
            for budget, log, token, shift in zip(budgets, logs, tokens, off, strict=True):
                if budget in (*PROBES, TARGET):
                    role = "probe" if budget < TARGET else "target"
                    rows.append(
                        {"group": group, "form": "cp", "rank": rank, "horizon": 4, "seed": 0}
                        | {"budget": budget, "role": role, "loss": float(np.exp(log))}
                        | {"tokens_per_call": float(np.exp(token + shift)), "s_doc": 0.0}
                    )
    return pd.DataFrame(rows)


def after(logs: np.ndarray, falls: np.ndarray) -> np.ndarray:
    """Once the logarithm of what is missing has fallen so far."""
    return np.log(LIMIT) - (np.log(LIMIT) - logs) * np.exp(-falls)


def fallen(before: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The other way round: how far it has fallen."""
    return np.log((np.log(LIMIT) - before) / (np.log(LIMIT) - found))


def batches(table: pd.DataFrame) -> list[Tasks]:
    return tasks_of(checked_curves(table))


def test_a_loss_is_the_weighted_geometric_mean_of_its_divergences():
    divergences = np.array([[0.5, 1.0, 2.0], [0.3, 0.9, 1.1]])
    found = pooled_loss(divergences)
    weights = np.array([9, 3, 1]) / 13
    assert found == pytest.approx(np.prod(divergences**weights, axis=-1))
    assert pooled_loss(3 * divergences) == pytest.approx(3 * found)
    assert pooled_loss(divergences[:, :1]) == pytest.approx(divergences[:, 0])
    assert np.isfinite(pooled_loss(np.array([0.0, 0.1])))  # as good as its target


def test_divergences_are_means_of_log_ratios_over_what_can_be_drafted():
    ratios = torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    found = divergences_along(ratios)
    # The last start has no whole block.
    assert torch.allclose(found, -ratios[:, :8].double().log().mean(1))
    ratios[1, 2, 0] = 0  # outside a draft vocabulary
    kept = torch.cat([ratios[1, :2, 0], ratios[1, 3:8, 0]]).double()
    assert float(divergences_along(ratios)[1, 0]) == pytest.approx(float(-kept.log().mean()))
    assert torch.equal(divergences_along(ratios)[0], found[0])


def test_what_all_groups_share_is_found_and_continued_exactly():
    table = loss_curves({"a": 0.8, "b": 0.8, "c": 0.8})
    curve = LossCurve.of(batches(table))
    assert curve.ratio == pytest.approx(0.8) and curve.slopes == {4.0: pytest.approx(SLOPE)}
    spread = curve.speeds[4.0, "cp 8"] - curve.speeds[4.0, "cp 1"]
    assert spread == pytest.approx(np.log(SPEEDS[8] / SPEEDS[1]))
    for tasks in batches(table):
        found = curve.values(tasks, tasks.logs, tasks.losses)
        assert found == pytest.approx(tasks.truths, abs=1e-9)
        # The unit of a loss is of no account.
        assert curve.values(tasks, tasks.logs, 7 * tasks.losses) == pytest.approx(found)


def test_a_groups_own_ratio_counts_half_and_none_is_above_one():
    others = LossCurve.of(batches(loss_curves({"a": 1.0, "b": 1.0, "c": 1.0})))
    assert others.ratio == pytest.approx(1.0)
    for own in (0.4, 1.0, 1.4):
        (tasks,) = batches(loss_curves({"new": own}))
        steps = -np.diff(np.log(tasks.losses), axis=-1)[:, -1]
        ratio = min(np.sqrt(own), 1.0)
        wanted = after(tasks.logs[:, -1], SLOPE * steps * (ratio + ratio**2 + ratio**3))
        found = others.values(tasks, tasks.logs, tasks.losses)
        assert found == pytest.approx(wanted, abs=1e-9)
        kept = LossCurve(0.9, others.slopes, others.speeds)
        few = Tasks(
            tasks.budgets[1:],
            *(tasks.at, tasks.most, tasks.groups, tasks.candidates, tasks.seeds),
            *(tasks.logs[:, 1:], tasks.truths, tasks.noise, tasks.truth_seeds),
            *(tasks.losses[:, 1:], tasks.end_losses, tasks.limits),
        )
        # Two probes show no ratio: the other groups' it is.
        wanted = after(tasks.logs[:, -1], SLOPE * steps * (0.9 + 0.9**2 + 0.9**3))
        assert kept.values(few, few.logs, few.losses) == pytest.approx(wanted, abs=1e-9)


def test_groups_do_not_lend_each_other_their_steps():
    curve = LossCurve.of(batches(loss_curves({"a": 0.8, "b": 0.8})))
    both = loss_curves({"slow": 0.5, "fast": 0.9})
    (together,) = batches(both)
    found = curve.values(together, together.logs, together.losses)
    for group in ("slow", "fast"):
        (alone,) = batches(both[both["group"] == group])
        mine = together.groups == group
        assert found[mine] == pytest.approx(curve.values(alone, alone.logs, alone.losses))


def test_one_candidates_chance_step_is_mostly_not_believed():
    curve = LossCurve.of(batches(loss_curves({"a": 0.8, "b": 0.8})))
    (tasks,) = batches(loss_curves({"new": 0.8}))
    before = curve.values(tasks, tasks.logs, tasks.losses)
    moved = tasks.losses.copy()
    moved[0, -1] *= np.exp(-0.1)
    found = curve.values(tasks, tasks.logs, moved)
    believed = after(before[0], SLOPE * 0.1 * (0.8 + 0.8**2 + 0.8**3))
    assert before[0] < found[0] < before[0] + 0.7 * (believed - before[0])


def test_a_candidate_that_no_group_had_takes_its_forms_speed_or_its_own_step():
    curve = LossCurve.of(batches(loss_curves({"a": 0.8, "b": 0.8})))
    table = loss_curves({"new": 0.8})
    (named,) = batches(table)
    (other,) = batches(table.assign(rank=table["rank"].replace({8: 16})))
    (foreign,) = batches(table.assign(form="recurrent", width=table["rank"]))
    known, alike, apart = (curve.values(t, t.logs, t.losses) for t in (named, other, foreign))
    assert not np.allclose(known, alike)
    # Of none known, own steps and their mean in equal parts keep order and mean.
    own, usual = (fallen(t.logs[:, -1], f) for t, f in ((foreign, apart), (named, known)))
    assert (np.diff(own) > 0).all()
    assert own.sum() == pytest.approx(usual.sum())


def test_losses_are_what_forecasts_go_by_where_they_are_the_more_even():
    table = loss_curves({"a": 0.7, "b": 0.8, "c": 0.9, "d": 0.75}, irregular=0.01)
    found = ShapeChoice.of(table)
    assert found.level.family == "loss"
    without = ShapeChoice.of(table, losses=False)
    errors = [np.abs(c.residuals["forecast"] - c.residuals["truth"]) for c in (found, without)]
    assert errors[0].mean() < 0.6 * errors[1].mean()
    assert ShapeChoice.of(table.drop(columns="loss")).level.words == without.level.words


def reaching(tasks: Tasks, at: float) -> Tasks:
    """The same curves, to be continued to another budget."""
    return replace(tasks, at=at)


def saturating(group: str, floor: float, most: float = LIMIT) -> pd.DataFrame:
    """Losses that fall by a power law to a floor, which no training gets under; three probes and
    what is reached 8, 64 and 512 times beyond them.
    """
    rows = []
    for rank, speed in SPEEDS.items():
        for budget in (*PROBES, *(PROBES[-1] * 8**k for k in (1, 2, 3))):
            loss = floor + (2.0 - 0.1 * speed) * (budget / PROBES[0]) ** -0.4
            tokens = most * np.exp(-1.1 * (loss / 2) ** SLOPE)
            role = "probe" if budget in PROBES else "target"
            rows.append(
                {"group": group, "form": "cp", "rank": rank, "horizon": 4, "seed": 0}
                | {"budget": budget, "role": role, "loss": loss, "limit": most}
                | {"tokens_per_call": tokens, "s_doc": 0.0}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("own", [0.7, 1.0, 1.4])
def test_no_budget_brings_more_than_the_limit_and_more_never_brings_less(own):
    curve = LossCurve.of(batches(loss_curves({"a": 0.9, "b": 1.0})))
    table = loss_curves({"new": own})
    for limit in (LIMIT, 2.5):  # a draft vocabulary may leave tokens out
        (tasks,) = batches(table.assign(limit=limit))
        grid = [tasks.budgets[-1] * 2.0**k for k in (0.5, 1, 2, 3, 4.5, 8, 12, 40)]
        found = [curve.values(reaching(tasks, b), tasks.logs, tasks.losses) for b in grid]
        assert (np.diff([tasks.logs[:, -1], *found], axis=0) >= 0).all()
        assert (np.diff(found[:-1], axis=0) > 0).all()
        assert (found[-1] <= np.log(limit)).all()


def test_beyond_what_was_checked_a_groups_own_ratio_fades_from_the_forecast():
    curve = LossCurve(0.8, {4.0: SLOPE}, {})
    (tasks,) = batches(loss_curves({"new": 1.4}))
    last = -np.diff(np.log(tasks.losses), axis=-1)[:, -1]
    step = (last.mean() + last) / 2  # where none is known, half of it is a candidate's own
    ratios, steps, going = [], 0.0, 1.0
    for doubling, weight in enumerate((0.5, 0.5, 0.5, 0.25, 0.125, 0.0625)):
        ratios.append(min(1.4**weight * 0.8 ** (1 - weight), 1.0))
        going = going * ratios[-1]
        steps = steps + going
        at = tasks.budgets[-1] * 2.0 ** (doubling + 1)
        found = curve.values(reaching(tasks, at), tasks.logs, tasks.losses)
        assert found == pytest.approx(after(tasks.logs[:, -1], SLOPE * step * steps), abs=1e-9)
    assert ratios[0] == 1.0 and ratios == sorted(ratios, reverse=True) and ratios[-1] < 0.85


def test_a_curve_that_saturates_is_forecast_far_better_than_by_steps_that_stay():
    library = pd.concat([saturating(name, floor) for name, floor in (("a", 0.25), ("b", 0.35))])
    curve = LossCurve.of(batches(library))
    for tasks in batches(saturating("new", 0.3)):
        found = np.exp(curve.values(tasks, tasks.logs, tasks.losses))
        truth = np.exp(tasks.truths)
        assert found == pytest.approx(truth, rel=0.02)
        last = -np.diff(np.log(tasks.losses), axis=-1)[:, -1]
        going = curve.slopes[4.0] * last * np.log2(tasks.at / tasks.budgets[-1])
        straight = np.exp(after(tasks.logs[:, -1], going))  # a ratio of one
        assert (straight - truth > 3 * np.abs(found - truth)).all()


def test_intervals_widen_with_reach_even_where_a_curve_is_flat():
    found = ShapeChoice.of(loss_curves({"a": 0.7, "b": 0.8, "c": 0.9}, irregular=0.01))
    assert found.farthest == 8 and found.widening(2) == found.widening(8) == 1
    assert 1 < found.widening(8**2) < found.widening(8**4) == pytest.approx(2)
