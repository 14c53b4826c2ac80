"""Measured step times: what is read off them, and their file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cpmtp.latency import (
    OURS,
    HeadTime,
    LatencyModel,
    MeasuredLatency,
    PlainTime,
    StepCurve,
    StepTime,
    read_latency,
)

MODEL = LatencyModel(0.01, 0.011, 0.001, 0.0001)
CP = {"form": "cp", "rank": 4, "transition_rank": 0, "width": 8, "blocks": 1}


def law(batch: int, tokens: int) -> float:
    """A call that reads weights, then computes; a batch reads its caches."""
    return max(0.010, 0.0002 * batch * tokens) + 0.0001 * batch


def curve(batches=(1, 4), tokens=(1, 2, 4, 8, 16, 100)) -> StepCurve:
    times = [StepTime(b, n, law(b, n), law(b, n), law(b, n), 64) for b in batches for n in tokens]
    return StepCurve(OURS, tuple(times))


def head(horizon: int, batch: int, **changes) -> HeadTime:
    draft = 0.001 * horizon * batch
    times = {"draft": draft, "verification": 0.002, "rest": 0.0005}
    times["cycle"] = law(batch, horizon) + sum(times.values())
    return HeadTime(**(CP | {"horizon": horizon, "batch": batch} | times | changes))


def measured() -> MeasuredLatency:
    heads = tuple(head(n, b) for n in (2, 4) for b in (1, 4))
    plain = (PlainTime(1, 0.009, "transformers' generate"), PlainTime(4, 0.012, OURS))
    return MeasuredLatency(MODEL, (curve(),), heads, plain, {"device": "a machine"})


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tokens", [1, 3, 16, 60, 100])
def test_between_measured_calls_time_is_a_straight_line(batch, tokens):
    rows = [n for n in (1, 2, 4, 8, 16, 100)]
    below, above = max(n for n in rows if n <= tokens), min(n for n in rows if n >= tokens)
    share = (tokens - below) / max(above - below, 1)
    expected = law(batch, below) + share * (law(batch, above) - law(batch, below))
    assert curve().seconds(batch, tokens) == pytest.approx(expected)


def test_beyond_the_longest_call_time_goes_on_straight():
    found = curve(batches=(1,))
    assert found.seconds(1, 184) == pytest.approx(
        law(1, 100) + (law(1, 100) - law(1, 16)) * (184 - 100) / 84
    )
    assert found.most_tokens == 100


def test_a_batch_beyond_the_largest_costs_what_its_tokens_cost():
    assert curve(batches=(1,)).seconds(10, 10) == pytest.approx(law(1, 100))


def test_a_call_is_never_cheaper_than_the_shortest_one():
    falling = StepCurve(OURS, (StepTime(1, 2, 0.010), StepTime(1, 4, 0.018)))
    assert falling.seconds(1, 1) == pytest.approx(0.010)


def test_a_cycle_is_the_targets_call_and_what_the_head_adds():
    found = measured()
    for batch in (1, 4):
        expected = law(batch, 4) + 0.004 * batch + 0.0025
        assert found.cycle_seconds(CP | {"horizon": 4}, batch) == pytest.approx(expected)


def test_heads_between_measured_horizons_and_batches_are_between_them():
    added = measured().cycle_seconds(CP | {"horizon": 3}, 1) - curve().seconds(1, 3)
    assert added == pytest.approx(0.003 + 0.0025)
    added = measured().cycle_seconds(CP | {"horizon": 4}, 2) - curve().seconds(2, 4)
    assert added == pytest.approx(0.008 + 0.0025)


def test_a_looked_up_draft_costs_the_call_and_the_loop_around_it():
    assert measured().lookup_seconds(4) == pytest.approx(law(1, 4) + 0.0025)


def test_a_plain_step_is_the_faster_ways():
    assert measured().plain_seconds(1) == 0.009
    assert measured().plain_seconds(4) == 0.012


def test_a_serving_engines_curve_is_used_where_it_is_named_and_its_plain_step_with_it():
    engine = StepCurve("an engine on a card", (StepTime(1, 1, 0.003), StepTime(1, 8, 0.004)))
    found = measured().with_curve(engine)
    assert found.curve().source == OURS
    assert found.curve("an engine on a card") == engine
    assert found.plain_seconds(1, source=engine.source) == 0.003
    sizes = CP | {"horizon": 8}
    ours, theirs = (found.cycle_seconds(sizes, source=s) for s in (None, engine.source))
    assert ours - theirs == pytest.approx(law(1, 8) - 0.004)
    assert measured().with_curve(engine, first=True).curve() == engine
    with pytest.raises(ValueError, match=r"'another'.*'an engine on a card'"):
        found.curve("another")


def test_the_file_gives_back_what_was_written(tmp_path):
    engine = StepCurve("an engine", (StepTime(1, 1, 0.003),))
    for found in (measured(), measured().with_curve(replace(engine))):
        written = read_latency(found.write(tmp_path / "latency.json"))
        assert written.cycle_seconds(CP | {"horizon": 4}) == found.cycle_seconds(
            CP | {"horizon": 4}
        )
        assert (written.model, written.heads, written.plain) == (
            found.model,
            found.heads,
            found.plain,
        )
        assert [c.source for c in written.curves] == [c.source for c in found.curves]


def test_a_file_of_the_four_numbers_is_still_read_and_its_formula_used(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"plain_step": 0.01, "base": 0.011, "per_position": 0.001}))
    found = read_latency(path)
    assert found.model == LatencyModel(0.01, 0.011, 0.001)
    assert found.plain_seconds() == 0.01
    assert found.cycle_seconds({"horizon": 4, "rank": 2}) == pytest.approx(0.015)
    assert found.lookup_seconds(4) == pytest.approx(0.015)


def test_reading_a_time_off_its_neighbours_is_exact_on_a_line_and_not_on_a_bend():
    line = StepCurve(OURS, tuple(StepTime(1, n, 0.01 + 0.001 * n) for n in (1, 2, 4, 8)))
    assert line.left_out_errors() == pytest.approx([0, 0])
    assert max(map(abs, curve(batches=(1,)).left_out_errors())) > 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}', "expected JSON such as"),
        ('{"plain_step": 0.01, "base": 0.01, "curve": []}', "it has curve"),
        ("[]", "expected JSON such as"),
        ("no json", "expected JSON such as"),
        ('{"plain_step": 0.01, "base": 0.01, "step_curves": [{"times": []}]}', "source"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_latency(path)


def test_heads_that_were_not_timed_are_named():
    with pytest.raises(ValueError, match=r"no head of .*rank 16"):
        measured().cycle_seconds(CP | {"rank": 16, "horizon": 4})
    with pytest.raises(ValueError, match="without times"):
        StepCurve("nobody", ())


def test_a_call_that_takes_longer_inside_the_loop_is_counted_as_it_ran():
    slow = tuple(replace(time, cycle=time.cycle + 0.003) for time in measured().heads)
    found = replace(measured(), heads=slow)
    sizes = CP | {"horizon": 3}
    assert found.cycle_seconds(sizes) - measured().cycle_seconds(sizes) == pytest.approx(0.003)
    engine = StepCurve("an engine", (StepTime(1, 1, 0.003), StepTime(1, 8, 0.004)))
    theirs = [
        m.with_curve(engine).cycle_seconds(sizes, source="an engine") for m in (found, measured())
    ]
    assert theirs[0] == theirs[1]  # whose loop is not ours
