"""`cpmtp latency` and `cpmtp forecast`: what they write and say, and how bad input ends."""

from __future__ import annotations

import pytest
from command_line import run
from samples import random_llama_folder

from cpmtp.commands.latency import head_grid
from cpmtp.latency import OURS, read_latency
from cpmtp.report.document import read_extras


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_llama_folder(tmp_path_factory.mktemp("base") / "mine", window=64)


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
