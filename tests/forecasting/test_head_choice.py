"""The choice among forecasts: what it says where the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from curve_tables import damped_curves

from cpmtp.forecasting.candidates import Candidate
from cpmtp.forecasting.head_choice import Loaded, chosen, schedule
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice, Spread
from cpmtp.forecasting.outlook import Option, Scores
from cpmtp.latency import OURS, HeadTime, LatencyModel, MeasuredLatency, StepCurve, StepTime

SIZES = [
    {"form": "cp", "horizon": 4, "rank": r, "transition_rank": 0, "width": 8, "blocks": 1}
    for r in (1, 4)
]
CANDIDATES = [Candidate({"form": "cp", "rank": s["rank"], "blocks": 1}, s) for s in SIZES]
BUDGETS = (1000, 2000, 4000)


@pytest.fixture(scope="module")
def shapes() -> ShapeChoice:
    exact = damped_curves(
        np.random.default_rng(0), groups=6, group_effect=0.0, own_effect=0.0, ratio=0.5
    )
    return ShapeChoice.of(exact)


def with_errors(shapes: ShapeChoice, level: float, difference: float) -> ShapeChoice:
    changed = dict(vars(shapes))
    changed |= {"of_level": Spread(level, 0.0), "of_difference": Spread(difference, 0.0)}
    return ShapeChoice(**changed)


def table(curves, *, documents: int = 40, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Probes of candidates at horizon 4 that earn these tokens per call, documents apart."""
    chance, rows = np.random.default_rng(seed), []
    common = chance.standard_normal(documents)
    for candidate, curve in enumerate(curves):
        own = chance.standard_normal(documents)
        for budget, tokens in zip(BUDGETS, curve, strict=True):
            each = tokens * np.exp(noise * (common + 0.3 * own))
            rows += [
                {"candidate": candidate, "budget": budget, "horizon": 4, "document": d}
                | {"tokens": 48.0, "cycles": 48.0 / t}
                for d, t in enumerate(each)
            ]
    return pd.DataFrame(rows)


def looked_up(tokens: float = 1.1, documents: int = 40) -> pd.DataFrame:
    row = {"candidate": -1, "budget": 0, "horizon": 4, "tokens": 48.0, "cycles": 48.0 / tokens}
    return pd.DataFrame([row | {"document": d} for d in range(documents)])


def latency(slope: float = 0.0001) -> MeasuredLatency:
    """Calls that cost more the more tokens all requests verify."""
    times = [StepTime(b, n, 0.010 + slope * max(b * n - 8, 0)) for b in (1, 64) for n in (1, 4, 16)]
    heads = [
        HeadTime(**size, batch=1, draft=draft, verification=0.0, rest=0.0, cycle=0.010 + draft)
        for size, draft in zip(SIZES, (0.0002, 0.0008), strict=True)
    ]
    model = LatencyModel(0.01, 0.01)
    return MeasuredLatency(model, (StepCurve(OURS, tuple(times)),), tuple(heads))


def choice(shapes, curves, *, load=1, at=0, grid=(8000, 16000, 64000), **noise):
    sizes = {k: v for k, v in noise.items() if k == "documents"}
    scores = Scores.of(CANDIDATES, table(curves, **noise), looked_up(**sizes), seed=0)
    outlooks = [scores.outlook(shapes, budget, 0.9, 0) for budget in grid]
    loaded = Loaded.of(scores.options, latency(), load)
    costs = {0: 1e-3, 1: 2e-3, -1: 0.0}
    return chosen(
        outlooks, at, loaded, shapes, seconds_per_position=costs.__getitem__, confidence=0.9
    )


def damped(last: float, step: float, ratio: float = 0.5) -> tuple[float, ...]:
    """Tokens per call whose logarithm's steps shrink by the ratio."""
    logs = np.log(last) - np.array([step / ratio + step, step, 0.0])
    return tuple(np.exp(logs).tolist())


def test_the_best_is_the_one_of_most_tokens_per_second_not_per_call(shapes):
    close = choice(shapes, (damped(2.0, 0.1), damped(2.01, 0.1)))
    assert close.name == "cp 1"  # cp 4 takes longer than it earns
    assert choice(shapes, (damped(2.0, 0.1), damped(2.4, 0.1))).name == "cp 4"


def test_forecasts_are_those_of_the_shape(shapes):
    found = choice(shapes, (damped(2.0, 0.1), damped(2.6, 0.1)), at=0)
    assert found.tokens_per_call[0] == pytest.approx(2.6 * np.exp(0.05), rel=1e-6)
    assert found.tokens_per_second[0] == pytest.approx(2.6 * np.exp(0.05) / 0.0108, rel=1e-6)
    assert found.speedup == pytest.approx(found.tokens_per_second[0] * 0.010)
    assert found.device_hours == pytest.approx(8000 * 2e-3 / 3600)
    saved = 0.010 - 1 / found.tokens_per_second[0]
    assert found.pays_after == pytest.approx(8000 * 2e-3 / saved)


def test_a_difference_that_the_interval_does_not_separate_is_a_tie(shapes):
    curves = (damped(2.0, 0.2), damped(2.2, 0.2))
    clear = choice(with_errors(shapes, 0.2, 0.02), curves)
    assert clear.name == "cp 4" and not clear.is_tie and clear.sure > 0.95
    unclear = choice(with_errors(shapes, 0.2, 0.5), curves)
    assert "cp 1 (n = 4)" in unclear.ties and "a tie with cp 1" in unclear.sentence
    assert unclear.sure < clear.sure


def test_errors_that_all_levels_share_do_not_make_candidates_a_tie(shapes):
    curves = (damped(2.0, 0.2), damped(2.2, 0.2))
    found = choice(with_errors(shapes, 1.0, 0.01), curves)
    assert "cp 1 (n = 4)" not in found.ties
    mean, low, high = np.log(found.tokens_per_call)
    t = 2.0150  # Student's, five degrees of freedom, 95 %
    assert (mean - low, high - mean) == pytest.approx((t * 0.1, t * 0.1), rel=1e-3)


def test_the_winner_among_equals_owes_something_to_luck(shapes):
    alike = (damped(2.0, 0.1), damped(2.065, 0.1))  # as many tokens per second
    noisy = choice(shapes, alike, noise=0.3, documents=12)
    assert noisy.luck > 0.002
    assert choice(shapes, alike).luck == pytest.approx(0, abs=1e-9)


def test_a_candidate_that_learns_for_longer_overtakes_later(shapes):
    curves, grid = (damped(2.1, 0.02), damped(2.0, 0.15)), (8000, 16000, 32000)
    found = choice(shapes, curves, at=0, grid=grid)
    assert found.name == "cp 1" and found.overtaken == ("cp 4 (n = 4)", 32000.0)
    late = choice(shapes, curves, at=2, grid=grid)
    assert late.name == "cp 4" and late.overtaken is None


def test_training_stops_paying_where_a_doubling_adds_less_than_one_per_cent(shapes):
    grid = tuple(4000 * 2**k for k in range(1, 7))
    found = choice(shapes, (damped(2.0, 0.08), damped(2.0, 0.0)), grid=grid)
    # Doublings after the probes add 4, 2, 1 and 0.5 per cent, one after another.
    assert found.stop == 32000.0


def test_where_tokens_cost_more_than_they_bring_plain_decoding_is_chosen(shapes):
    found = choice(shapes, (damped(2.0, 0.1), damped(2.1, 0.1)), load=64)
    assert (found.name, found.horizon, found.budget) == ("plain decoding", 1, 0.0)
    assert found.speedup == pytest.approx(1) and "plain decoding is the fastest" in found.sentence


def test_the_schedule_flips_with_the_load_and_counts_the_tail(shapes):
    scores = Scores.of(CANDIDATES, table((damped(2.0, 0.1), damped(2.1, 0.1))), looked_up(), seed=0)
    outlook = scores.outlook(shapes, 8000, 0.9, 0)
    loads = [Loaded.of(scores.options, latency(), size) for size in (1, 2, 4, 64)]
    found = schedule(outlook, loads).set_index("load")
    assert found["speedup"].is_monotonic_decreasing and (found["speedup"] >= 1).all()
    assert found.loc[1, "option"].startswith("cp") and found.loc[64, "option"] == "plain decoding"
    # From two requests down to none: one step's time of two, then of one.
    spent, plain = [], []
    for size in (1, 2):
        spent.append(size / found.loc[size, "tokens_per_second"])
        plain.append(spent[-1] * found.loc[size, "speedup"])
    assert found.loc[2, "tail"] == pytest.approx(sum(plain) / sum(spent))
    assert found.loc[64, "tail"] < found.loc[4, "tail"]


def test_scores_are_pooled_tokens_over_pooled_cycles():
    tables = table((damped(2.0, 0.1), damped(2.1, 0.1)), noise=0.4)
    scores = Scores.of(CANDIDATES, tables, looked_up(), seed=0)
    assert scores.options[0] == Option("plain", "plain decoding", 1, -1, {})
    assert np.exp(scores.logs[0]) == pytest.approx(1) and np.exp(scores.logs[1]) == pytest.approx(
        1.1
    )
    for i, option in enumerate(scores.options[2:], start=2):
        rows = tables[tables["candidate"] == option.candidate].groupby("budget")
        expected = rows["tokens"].sum() / rows["cycles"].sum()
        assert np.exp(scores.logs[i]) == pytest.approx(expected.to_numpy())
    # Documents are drawn together: a paired difference varies less than either.
    drawn = scores.drawn[:, 2:, -1]
    assert (drawn[:, 1] - drawn[:, 0]).std() < 0.6 * drawn[:, 0].std()


def test_what_is_not_trained_is_uncertain_by_its_documents_alone(shapes):
    lookup = looked_up(documents=40)
    lookup["cycles"] *= np.exp(0.2 * np.random.default_rng(1).standard_normal(40))
    tables = table((damped(2.0, 0.1), damped(2.1, 0.1)))
    scores = Scores.of(CANDIDATES, tables, lookup, seed=0)
    outlook = scores.outlook(with_errors(shapes, 1.0, 1.0), 8000, 0.9, 0)
    error = 0.2 / 40**0.5
    assert outlook.high[1] - outlook.logs[1] == pytest.approx(1.645 * error, rel=0.3)
    assert outlook.low[0] == outlook.high[0] == 0  # plain decoding
    assert (outlook.high[2:] - outlook.logs[2:] > 0.09).all()


def test_the_chance_to_beat_plain_decoding_is_that_of_the_draws(shapes):
    curves = (damped(1.0, 0.0), damped(1.25, 0.0))
    # cp 4 takes 10.8 ms for 1.25 tokens where plain decoding takes 10 for one.
    certain = choice(with_errors(shapes, 1e-6, 1e-6), curves)
    assert certain.name == "cp 4" and certain.pays == 1.0
    noisy = choice(shapes, curves, noise=1.5, documents=12)
    assert 0.5 < noisy.pays < 1.0
    assert f"(faster than it with a chance of {100 * noisy.pays:.0f} %)" in noisy.sentence
    assert choice(shapes, curves, load=64).pays == 0.0  # plain decoding itself
