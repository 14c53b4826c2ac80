"""The forecast before training, end to end on a tiny model, and its parts against what they are."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from curve_tables import damped_curves
from reference import verify

from cpmtp.forecasting import probes
from cpmtp.forecasting.candidates import LEARNING_RATE, candidates_of
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.forecasting.forecast_plan import ForecastSettings
from cpmtp.forecasting.head_forecast import forecast_heads
from cpmtp.forecasting.held_out import held_out_texts, lookup_matches, split_texts
from cpmtp.forecasting.probes import largest_affordable, probe_budgets
from cpmtp.heads.draft_head import DraftHead
from cpmtp.latency import LatencyModel, MeasuredLatency
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.report.blocks import Table
from cpmtp.report.findings.forecast import forecast_sections
from cpmtp.report.first_screen.forecast import forecast_answer
from cpmtp.report.first_screen.stored_forecast import HeadsForecast
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.head_settings import quick_precision
from cpmtp.training.heads import train_head
from cpmtp.training.new_models import new_llama

CANDIDATES = (
    {"rank": 1, "horizon": 3},
    {"form": "markov", "transition_rank": 2, "horizon": 3},
)
LATENCY = MeasuredLatency(LatencyModel(0.010, 0.0105, 0.0001))
SMALL = {"held_out": 12, "start": 6, "drawn": 16, "rows": 2, "length": 16}
STEP = 2 * 16


@pytest.fixture(scope="module")
def lm():
    return HuggingFaceLanguageModel(new_llama(9, width=96, layers=1, window=64, seed=0))


@pytest.fixture(scope="module")
def curves():
    return damped_curves(np.random.default_rng(0), groups=4, candidates=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("forecast")


def forecast(lm, curves, **changes):
    asked = {"probe_budget": 64 * STEP, "budget": 1_000_000, "latency": LATENCY, "curves": curves}
    return forecast_heads(lm, CANDIDATES, **(SMALL | asked | changes))


@pytest.fixture(scope="module")
def found(lm, curves, folder):
    return forecast(lm, curves, out=folder)


def test_there_is_a_row_for_every_option_and_budget(found):
    options = {("plain decoding", 1), ("lookup", 2), ("lookup", 3)}
    options |= {(name, n) for name in ("cp 1", "markov 2") for n in (2, 3)}
    for _, rows in found.table.groupby("budget"):
        assert set(zip(rows["option"], rows["horizon"], strict=True)) == options
    assert (found.table["budget"] == 1_000_000).any()
    assert found.status == "" and not found.table["too_many"].any()


def test_tokens_per_call_lie_in_their_intervals_between_one_and_the_horizon(found):
    table = found.table
    for name in ("tokens_per_call", "tokens_per_call_low", "tokens_per_call_high"):
        assert (table[name] >= 1 - 1e-12).all()
        assert (table[name] <= table["horizon"] + 1e-12).all()
    assert (table["tokens_per_call_low"] <= table["tokens_per_call"]).all()
    assert (table["tokens_per_call"] <= table["tokens_per_call_high"]).all()
    heads = table[table["kind"] == "head"]
    by_horizon = heads.pivot_table(
        index=["option", "budget"], columns="horizon", values="tokens_per_call"
    )
    assert (by_horizon[3] >= by_horizon[2]).all()


def test_tokens_per_second_are_tokens_over_a_cycles_time(found):
    table = found.table
    seconds = np.where(table["kind"] == "plain", 0.010, 0.0105 + 0.0001 * table["horizon"])
    assert table["tokens_per_second"].to_numpy() == pytest.approx(
        table["tokens_per_call"] / seconds
    )
    assert table["speedup"].to_numpy() == pytest.approx(table["tokens_per_second"] * 0.010)


def test_what_a_probe_scored_is_what_a_head_trained_so_is_forecast_to_earn(lm, found):
    held_out = held_out_texts(lm, None, count=12, start=6, drawn=16, law=SamplingLaw(), seed=1)
    windows, _ = probes.training_windows(lm, None, length=16, positions=64 * STEP, seed=0)
    shape = {"rows": 2, "length": 16, "seed": 0, "positions": 32 * STEP}
    shape |= {"learning_rate": LEARNING_RATE, "precision": quick_precision("cpu")}
    head = train_head(lm, **CANDIDATES[0], **shape, tokens=windows)
    direct = forecast_cycles(lm, head, held_out.tokens, start=6)
    curve = found.curve("cp 1")
    measured = curve[curve["measured"]].sort_values("budget")
    assert list(measured["budget"]) == [32 * STEP, 64 * STEP]
    assert measured["tokens_per_call"].iloc[0] == pytest.approx(direct.tokens_per_call, rel=1e-6)


def test_the_same_folder_trains_nothing_again(lm, curves, found, folder, monkeypatch):
    monkeypatch.setattr(probes, "train_heads", None)
    again = forecast(lm, curves, out=folder)
    pd.testing.assert_frame_equal(
        again.table.drop(columns="device_hours"), found.table.drop(columns="device_hours")
    )
    told = json.loads((folder / "forecast.json").read_text())
    assert told["choices"][0]["name"] == found.choice().name
    assert told["model"]["name"] == lm.name and told["model"]["fingerprint"] == lm.fingerprint
    assert told["shapes"]["ahead"] == pytest.approx(1_000_000 / (64 * STEP))
    assert told["schedule"][0]["option"] == told["choices"][0]["name"]
    with pytest.raises(ValueError, match="another model, text or plan"):
        forecast_heads(
            lm,
            CANDIDATES[:1],
            probe_budget=64 * STEP,
            latency=LATENCY,
            curves=curves,
            out=folder,
            **SMALL,
        )


def test_a_report_reads_what_was_written(found, folder):
    stored, choice = HeadsForecast.read(folder), found.worth()
    assert stored.known and (stored.row["option"], stored.row["horizon"]) == (
        choice.name,
        choice.horizon,
    )
    assert stored.speedup[0] == pytest.approx(choice.speedup)
    lines = [block.label for block in forecast_answer(stored, 2.5).blocks if block.label]
    assert lines[0] in ("Train", "Pilot first", "Do not train") and len(lines) == 4
    blocks = [block for section in forecast_sections(stored) for block in section.blocks]
    best = next(block for block in blocks if isinstance(block, Table))
    assert len(best.rows) == found.table["option"].nunique()


def test_no_more_training_is_worth_than_what_doublings_of_add_one_per_cent(found):
    whole, worth = found.choice(), found.worth()
    assert (worth.name, worth.horizon) == (whole.name, whole.horizon)
    assert 0 < worth.stop == worth.budget < whole.budget == 1_000_000
    assert worth.device_hours == pytest.approx(whole.device_hours * worth.budget / whole.budget)
    curve = found.curve(worth.name, worth.horizon).set_index("budget")["tokens_per_call"]
    later = curve[curve.index > worth.budget]
    doublings = np.log2(later.index[0] / worth.budget)
    assert 0 <= np.log(later.iloc[0] / curve[worth.budget]) / doublings < np.log1p(0.01)


def test_the_table_says_what_a_head_holds_in_memory(lm, found, folder):
    heads = found.table[found.table["kind"] == "head"]
    longest = heads[heads["horizon"] == heads["horizon"].max()]
    for index, asked in enumerate(CANDIDATES):
        head = DraftHead.from_pretrained(folder / "heads" / f"{64 * STEP}-{index}")
        rows = longest[longest["option"] == candidates_of(lm, [asked])[0].name]
        assert set(rows["weight_bytes"]) == {4 * sum(p.numel() for p in head.parameters())}
    others = found.table[found.table["kind"] != "head"]
    assert not others["weight_bytes"].any()


def test_a_first_step_that_takes_too_long_is_the_last_one(lm, monkeypatch):
    clock = [0.0]

    def ticking() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(probes.time, "perf_counter", ticking)
    candidates = candidates_of(lm, CANDIDATES)
    plan = probes.ProbePlan((), rows=2, length=16)
    windows, _ = probes.training_windows(lm, None, length=16, positions=STEP, seed=0)
    # A look at the clock before the first step and one after each takes a second.
    assert probes.step_seconds(lm, candidates, plan, windows, most=0.0) > 0
    looks = clock[0]
    assert probes.step_seconds(lm, candidates, plan, windows) > 0
    assert clock[0] - looks > looks


def test_too_little_time_or_budget_is_said_and_nothing_is_chosen(lm, curves):
    found = forecast(lm, curves, probe_budget=None, minutes=0.02)
    assert found.status.startswith("not enough for a forecast") and not len(found.table)
    with pytest.raises(ValueError, match="not enough for a forecast"):
        found.choice()
    assert forecast(lm, curves, probe_budget=40 * STEP).status


def test_more_than_four_passes_over_a_text_are_flagged(lm, curves):
    class Reader(HuggingFaceLanguageModel):
        def encode_document(self, text):
            return torch.tensor([ord(c) % 9 for c in text])

    texts = ["".join(chr(97 + (i * k) % 9) for i in range(120)) for k in range(1, 25)]
    reader = Reader(lm.model)
    asked = {"latency": LATENCY, "curves": curves, "texts": texts, "probe_budget": 64 * STEP}
    found = forecast_heads(reader, CANDIDATES[:1], budget=8_192, **asked, **SMALL)
    heads = found.table[found.table["kind"] == "head"]
    training, _ = split_texts(texts)
    positions = sum(len(t) // 16 * 16 for t in training)
    assert heads["passes"].to_numpy() == pytest.approx(heads["budget"] / positions)
    assert (heads["too_many"] == (heads["passes"] > 4)).all() and heads["too_many"].any()
    assert not heads["too_many"].all()


def test_held_out_texts_are_of_documents_that_nobody_trains_on():
    texts = [f"document {i}" for i in range(25)]
    training, held_out = split_texts(texts)
    assert sorted(training + held_out) == sorted(texts) and len(held_out) == 5
    whole = "abcdefghij" * 40
    training, held_out = split_texts([whole])
    assert "".join(sorted(training + held_out)) and sum(map(len, held_out)) == len(whole) // 5
    with pytest.raises(ValueError, match="no text"):
        split_texts(["  "])


def brute_matches(text: list[int], start: int, horizon: int) -> list[list[float]]:
    """Every earlier place is looked at, the latest of the longest match wins."""
    rows = []
    for t in range(start, len(text) - 1):
        proposed: list[int] = []
        for size in (3, 2, 1):
            ends = [
                e
                for e in range(size - 1, t)
                if text[e - size + 1 : e + 1] == text[t - size + 1 : t + 1]
            ]
            if ends and size <= t + 1:
                proposed = text[ends[-1] + 1 : t + 1][: horizon - 1]
                break
        row = [
            float(k < len(proposed) and t + 1 + k < len(text) and proposed[k] == text[t + 1 + k])
            for k in range(horizon - 1)
        ]
        rows.append(row)
    return rows


def test_a_looked_up_draft_is_what_followed_the_longest_match():
    generator = torch.Generator().manual_seed(0)
    for vocab in (2, 4, 30):
        text = torch.randint(vocab, (60,), generator=generator).tolist()
        assert lookup_matches(torch.tensor(text), 5, 4).tolist() == brute_matches(text, 5, 4)


def test_one_path_survives_where_the_target_draws_it():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    for path in ((1,), (2,)):
        q = torch.zeros(1, 3, dtype=torch.float64)
        q[0, path[0]] = 1
        verdict = verify(p, q, torch.tensor(path), "block")
        # Along texts: the proposed token is the text's with its own probability.
        assert float(verdict.accepted_length_probs[1]) == pytest.approx(float(p[0, path[0]]))


def test_probes_are_whole_steps_none_shorter_than_thirty_two():
    assert probe_budgets(128 * STEP, STEP) == (32 * STEP, 64 * STEP, 128 * STEP)
    assert probe_budgets(127 * STEP, STEP) == (63 * STEP, 127 * STEP)
    assert probe_budgets(63 * STEP, STEP) == (63 * STEP,)
    for seconds in (3.0, 77.0):
        largest = largest_affordable(seconds, 0.01, STEP)
        steps = sum(probe_budgets(largest, STEP)) / STEP
        assert steps * 0.01 <= seconds < (steps + 4 + 32) * 0.01 * 1.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget 0"),
        ({"minutes": -1.0}, "minutes -1"),
        ({"loads": ()}, r"loads \(\)"),
        ({"horizons": (1,)}, r"horizons \(1,\)"),
        ({"confidence": 1.0}, "confidence 1"),
        ({"held_out": 1}, "held_out 1"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ForecastSettings(**change)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [((), "no candidates"), (({"ranks": 2},), "ranks"), (({"form": "tree"},), "tree")],
)
def test_candidates_that_are_none_are_refused(lm, curves, candidates, message):
    with pytest.raises(ValueError, match=message):
        forecast_heads(lm, candidates, latency=LATENCY, curves=curves)


def test_a_curve_of_nobody_is_refused(found):
    with pytest.raises(ValueError, match="there are plain decoding, lookup, cp 1"):
        found.curve("cp 2")
