"""`cpmtp latency` and `cpmtp forecast`: what they write and say, and how bad input ends."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from command_line import run
from samples import random_llama_folder

from cpmtp.commands.latency import head_grid
from cpmtp.latency import OURS, LatencyModel, MeasuredLatency, read_latency
from cpmtp.ranking.parts import OUTCOME
from cpmtp.report.document import read_extras
from cpmtp.whole_files import write_parquet


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_llama_folder(tmp_path_factory.mktemp("base") / "mine", window=64)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return random_llama_folder(tmp_path_factory.mktemp("larger") / "mine", window=128)


QUICK = ("--tokens", "1,2", "--ranks", 2, "--horizons", 2, "--context", 8, "--seconds", 0.1)


def test_step_times_are_measured_and_read_by_the_report(monkeypatch, capsys, base, tmp_path):
    file, csv = tmp_path / "latency.json", tmp_path / "curve.csv"
    csv.write_text("batch,tokens,seconds\n1,1,0.003\n1,8,0.004\n")
    engine = ("--engine", "an engine on a card", "--engine-curve", csv)
    status, out, err = run(
        monkeypatch, capsys, "latency", "--model", base, *QUICK, *engine, "--out", file
    )
    assert (status, err) == (0, "")
    found = read_latency(file)
    assert [curve.source for curve in found.curves] == [OURS, "an engine on a card"]
    assert found.curve("an engine on a card").seconds(1, 8) == 0.004
    assert "seconds of a call, an engine on a card" in out and "cp n 2 r 2 k 0" in out
    extras = read_extras(tmp_path)
    assert extras.latency == found.model and "float32" in extras.latency_source


def test_a_forecast_without_time_says_that_it_is_not_enough(monkeypatch, capsys, base, tmp_path):
    status, out, err = run(
        monkeypatch, capsys, "forecast", "--model", base, "--forms", "cp", "--ranks", 1,
        "--horizons", 2, "--minutes", 0.001, "--out", tmp_path / "f",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out.startswith("not enough for a forecast")


@pytest.mark.parametrize("fastest", ["bfloat16", "float32"])
def test_a_forecast_takes_the_precision_that_is_fastest_on_the_device(
    monkeypatch, capsys, base, tmp_path, fastest
):
    monkeypatch.setattr("cpmtp.training.head_settings.quick_precision", lambda device: fastest)
    command = ("forecast", "--model", base, "--forms", "cp", "--ranks", 1, "--horizons", 2)
    short = ("--minutes", 0.001, "--out", tmp_path / "f")
    status, _, err = run(monkeypatch, capsys, *command, *short)
    assert (status, err) == (0, "")
    told = json.loads((tmp_path / "f" / "forecast.json").read_text())
    assert told["model"]["dtype"] == fastest


def test_the_answer_says_what_it_rests_on_with_ceilings_and_loads_beside(
    monkeypatch, capsys, larger, tmp_path
):
    latency = tmp_path / "latency.json"
    MeasuredLatency(LatencyModel(0.010, 0.0105, 0.0001)).write(latency)
    row = {"model": "m", "domain": "d", "document": "a", "context": 0, "horizon": 2, "rank": 1}
    row |= {"status": "ok", "method": "em", "temperature": 1.0, "tokens_per_call_block_target": 1.7}
    rows = [row | {"anchored": True}, row | {"anchored": False, OUTCOME: 1.5}]
    write_parquet(tmp_path / "study" / "table.parquet", pd.DataFrame(rows))
    (tmp_path / "study" / "manifest.json").write_text("{}")
    status, out, err = run(
        monkeypatch, capsys, "forecast", "--model", larger, "--forms", "cp", "--ranks", 1,
        "--horizons", 2, "--probe-budget", 16384, "--budget", "20k", "--loads", "1,4",
        "--latency", latency, "--study", tmp_path / "study", "--out", tmp_path / "f",
    )  # fmt: skip
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("At load 1 ") and "after 20,000 positions" in out
    of_cp = next(line for line in lines if line.startswith("  cp 1 "))
    assert of_cp.endswith("; ceiling 1.70")
    assert sum(line.startswith("  lookup ") for line in lines) == 1
    assert "by load:" in lines and sum("while requests end from here" in x for x in lines) == 2
    assert "times the largest probe" not in out  # stored curves go farther than this
    told = json.loads((tmp_path / "f" / "forecast.json").read_text())
    assert told["model"]["name"] == larger.name


def test_a_study_without_anchored_drafts_has_no_ceilings_of_heads(monkeypatch, capsys, tmp_path):
    row = {"model": "m", "domain": "d", "document": "a", "context": 0, "horizon": 2, "rank": 1}
    row |= {"status": "ok", "method": "em", "anchored": False, OUTCOME: 1.5}
    write_parquet(tmp_path / "table.parquet", pd.DataFrame([row]))
    (tmp_path / "manifest.json").write_text("{}")
    status, out, err = run(monkeypatch, capsys, "forecast", "--study", tmp_path)
    assert status == 2 and out == "" and "no anchored drafts" in err and err.count("\n") == 1


def test_every_form_is_there_in_every_size_it_has():
    found = head_grid("cp,markov,markov_mixture,recurrent", "1,4", "16,64", "2,3")
    sizes = [(h["form"], h["horizon"], h.get("rank"), h.get("transition_rank")) for h in found]
    assert len(set(sizes)) == len(sizes) == 2 * (2 + 2 + 2 + 1)
    assert ("markov_mixture", 2, 4, 64) in sizes and ("recurrent", 3, None, None) in sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--forms", "tree"), "--forms 'tree'"),
        (("latency", "--engine", "e"), "--engine and --engine-curve go together"),
        (("latency", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("forecast", "--budget", "much"), "--budget 'much'"),
        (("forecast", "--curves", "nowhere.csv"), "no such file"),
        (("forecast", "--latency", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_options_end_in_one_line(monkeypatch, capsys, arguments, message):
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and out == "" and message in err and err.count("\n") == 1
