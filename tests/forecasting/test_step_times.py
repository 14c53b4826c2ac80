"""Step times as they are measured: everything is there, in order, and of the calls themselves."""

from __future__ import annotations

import math

import pytest
from unchecked import unchecked

from cpmtp.forecasting import step_times
from cpmtp.forecasting.step_times import measure_latency
from cpmtp.language_model import separated_hmm
from cpmtp.latency import OURS
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.new_models import new_llama


@pytest.fixture(scope="module")
def lm():
    return HuggingFaceLanguageModel(new_llama(7, width=96, layers=1, window=64, seed=0))


HEADS = ({"rank": 2, "horizon": 3}, {"form": "recurrent", "horizon": 2})


@pytest.fixture(scope="module")
def found(lm):
    return measure_latency(
        lm, HEADS, (1, 4, 500), batches=(1, 2), context=16, rounds=3, seconds=1.0
    )


def test_every_call_head_and_plain_step_is_timed(found):
    (curve,) = found.curves
    assert curve.source == OURS
    # A window of 64 has no room for 500 tokens after 16.
    assert [(t.batch, t.tokens) for t in curve.times] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert all(0 < t.low <= t.seconds <= t.high and t.context == 16 for t in curve.times)
    assert [(t.form, t.horizon, t.rank, t.batch) for t in found.heads] == [
        ("cp", 3, 2, 1),
        ("recurrent", 2, 1, 1),
        ("cp", 3, 2, 2),
        ("recurrent", 2, 1, 2),
    ]
    for time in found.heads:
        assert min(time.draft, time.verification, time.rest) > 0
        assert time.beside_target < time.cycle
    assert [time.batch for time in found.plain] == [1, 2]
    assert found.model.plain_step == found.plain[0].seconds
    assert found.measured_on["dtype"] == "float32" and int(found.measured_on["rounds"]) >= 2


def test_what_was_measured_predicts_cycles_of_the_heads_that_were_measured(found):
    for time in found.heads:
        sizes = {name: getattr(time, name) for name in ("form", "horizon", "rank", "width")}
        call = found.curve().seconds(time.batch, time.horizon)
        assert found.cycle_seconds(sizes, time.batch) == pytest.approx(max(time.cycle, call))


def test_a_slower_model_is_seen_to_be_slower(lm, found, monkeypatch):
    clock, pace = [0.0], 0.25

    def ticking() -> float:
        clock[0] += pace
        return clock[0]

    monkeypatch.setattr(step_times.time, "perf_counter", ticking)
    slow = measure_latency(lm, (), (2,), context=8, rounds=3, seconds=1e9)
    # Every look at the clock takes a tick, and a call lies between two.
    assert slow.curve().seconds(1, 2) == pytest.approx(pace)
    assert slow.heads == () and math.isfinite(slow.model.base)


def test_calls_count_when_the_processor_is_busy_with_them_alone(lm, monkeypatch):
    clock = [0.0]

    def ticking() -> float:
        clock[0] += 0.03 if clock[0] < 0.1 else 0.01  # cold for a tenth of a second
        return clock[0]

    watch = step_times._Stopwatch(lm, 8, 0)
    timed = watch.step(1, 2, 2)
    monkeypatch.setattr(step_times.time, "perf_counter", ticking)
    assert timed() == {"seconds": pytest.approx(0.01)}


def test_short_cycles_warm_up_as_long_as_long_ones_and_count_as_long():
    assert step_times._Planned.of(0.002, most=64) == step_times._Planned(25, 25)
    assert step_times._Planned.of(1.0, most=64) == step_times._Planned(3, 6)
    for most in (1, 2, 5, 64):
        for seconds in (0.0, 1e-6, 0.004, 3.0):
            planned = step_times._Planned.of(seconds, most)
            assert planned.counted >= 1 and planned.whole <= most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verified_tokens": (0,)}, r"verified_tokens \(0,\)"),
        ({"batches": ()}, r"batches \(\)"),
        ({"context": 0}, "context 0"),
        ({"context": 64, "verified_tokens": (1,)}, "no room"),
        ({"heads": ({"rank": 0},)}, "rank 0"),
        ({"heads": ({"layers": 2},)}, "layers"),
    ],
)
def test_bad_numbers_are_refused(lm, change, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(lm, **({"heads": (), "context": 8} | change))


def test_a_model_without_full_passes_has_no_step_times():
    with pytest.raises(ValueError, match="pretrained model"):
        unchecked(measure_latency, separated_hmm(2, 4))
