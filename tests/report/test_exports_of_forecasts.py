"""What an export of a forecast says of its conditions: text, drafted tokens, and how far it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import run
from stored_forecast import stored, told_anew

from cpmtp.report.exports.of_forecast import table_of_forecast
from cpmtp.report.first_screen.stored_forecast import HeadsForecast

SAID = "for a training 20 times as long as the longest probe"


def reaching(folder, ahead: float):
    return told_anew(stored(folder), shapes=dict(groups=list("abcde"), ahead=ahead, farthest=8.0))


@pytest.mark.parametrize("ahead", [20.0, 8.0])
@pytest.mark.parametrize("to", ["vllm", "llama.cpp", "speculation-profile", "aiconfigurator"])
def test_how_far_a_forecast_reaches_is_said_on_screen_and_in_the_file(
    monkeypatch, capsys, tmp_path, to, ahead
):
    folder = reaching(tmp_path, ahead)
    status, out, _ = run(monkeypatch, capsys, "export", folder, "--to", to)
    assert status == 0 and (f"caution   The answer is {SAID}" in out) == (ahead > 8)
    (whole,) = folder.glob("*.table.json")
    conditions = [json.loads(whole.read_text("utf-8"))["conditions"]]
    if to == "speculation-profile":
        profile = json.loads((folder / "speculation_profile.json").read_text("utf-8"))
        conditions.append(profile["measurement_conditions"])
    for told in conditions:
        assert told["training_over_longest_probe"] == ahead
        assert told["forecasts_checked_up_to"] == 8.0
        assert (told["caution"] is not None and SAID in told["caution"]) == (ahead > 8)


def test_an_older_forecast_has_no_reach_to_tell(tmp_path):
    told = table_of_forecast(HeadsForecast.read(stored(tmp_path))).conditions
    assert told["caution"] is None and told["training_over_longest_probe"] is None
    assert told["texts"] is None


@pytest.mark.parametrize(
    ("corpus", "texts"), [(["a/*.md", "b"], "a/*.md, b"), ([], "samples of the model itself")]
)
def test_text_and_drafted_tokens_are_among_the_conditions(tmp_path, corpus, texts):
    candidates = {"cp 4": {"form": "cp", "rank": 4, "vocabulary": 4096}}
    asked = {"model": "there/m", "corpus": corpus}
    folder = told_anew(stored(tmp_path), candidates=candidates, asked=asked)
    told = table_of_forecast(HeadsForecast.read(folder)).conditions
    assert told["texts"] == texts and told["draft"] == "cp, rank 4, vocabulary 4096"


def test_lengths_by_drafted_tokens_are_those_of_the_rates(tmp_path):
    folder = stored(tmp_path, tokens_per_call=[2.0, 1.8, 2.5])  # 0.2 of 2.2 is luck
    table = table_of_forecast(HeadsForecast.read(folder))
    whole = 1 + np.cumsum(table.rates)
    np.testing.assert_allclose(list(table.by_drafted.values()), whole, atol=2e-6)
    assert list(table.by_drafted) == [1, 2] and table.by_drafted[2] == pytest.approx(2.0)
