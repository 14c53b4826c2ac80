"""A forecast's own report, and the training that it advises: the one that was forecast."""

from __future__ import annotations

import shlex

import pytest
from command_line import run
from samples import MANIFEST, study_table
from stored_forecast import not_enough, stored, told_anew

from cpmtp.report.document import Report, read_extras
from cpmtp.report.first_screen.forecast import forecast_answer
from cpmtp.report.first_screen.stored_forecast import HeadsForecast

TOLD = dict(
    model={"name": "mine", "fingerprint": "f", "device": "cpu", "dtype": "bfloat16"},
    settings={"budget": 1e6, "confidence": 0.9, "rows": 4, "length": 64, "seed": 0},
    asked={"model": "a folder/mine", "corpus": ["nowhere/*.md", "its texts"]},
    candidates={"cp 4": {"form": "cp", "rank": 4, "vocabulary": 4096, "blocks": 2}},
)
FAR = dict(groups=list("abcde"), ahead=20.0, farthest=8.0)


def lines_of(folder, models=()) -> dict[str, str]:
    card = forecast_answer(HeadsForecast.read(folder), 2.5, models)
    return {block.label: block.text for block in card.blocks if block.kind == "line"}


def command_of(folder, models=()) -> list[str]:
    return shlex.split(lines_of(folder, models)["Next"].split("`")[1])


def test_a_forecast_alone_is_a_report_of_its_own(monkeypatch, capsys, tmp_path):
    folder = told_anew(stored(tmp_path), **TOLD)
    status, out, err = run(monkeypatch, capsys, "report", folder)
    assert (status, err) == (0, "")
    page = (folder / "report.html").read_text("utf-8")
    assert "mine · forecast of trained heads" in page and "Every option" in page
    assert 'id="pilot-plan"' in page and 'id="set-up"' in page
    for said in ("Diagnosis", "Where tokens are lost", "form cp on these contexts"):
        assert said not in page
    assert (folder / "report.md").is_file() and "report.html" in out


def test_a_forecast_alone_has_no_step_times_but_its_own(monkeypatch, capsys, tmp_path):
    folder = stored(tmp_path)
    status, _, err = run(monkeypatch, capsys, "report", folder, "--latency", tmp_path / "x.json")
    assert status == 2 and "--latency" in err and "a forecast alone" in err


def test_a_forecast_alone_that_had_not_enough_says_what_would_be(tmp_path):
    report = Report.of_forecast(HeadsForecast.read(not_enough(tmp_path)))
    assert [section.title for section in report.sections] == ["Set-up"]
    lines = lines_of(tmp_path)
    assert lines["Why"] == "The time has no room for two probes."
    assert lines["Next"] == (
        "run `cpmtp forecast` again and give more minutes, or a larger `--probe-budget`."
    )


def test_what_is_to_be_trained_is_what_was_forecast(tmp_path):
    folder = told_anew(stored(tmp_path), **TOLD)
    for models in ((), ("what a study calls it",)):
        assert command_of(folder, models) == [
            *("cpmtp", "train-head", "--model", "a folder/mine"),
            *(
                "--corpus",
                "nowhere/*.md",
                "--corpus",
                "its texts",
                "--form",
                "cp",
                "--horizon",
                "3",
            ),
            *("--rank", "4", "--vocabulary", "4096", "--blocks", "2", "--rows", "4"),
            *("--length", "64", "--dtype", "bfloat16", "--positions", "1000000"),
        ]


def test_the_advised_command_is_one_that_train_head_takes(monkeypatch, capsys, tmp_path):
    command = command_of(told_anew(stored(tmp_path), **TOLD))
    status, _, err = run(monkeypatch, capsys, *command[1:])
    # Every option is known, and the first thing that is missing is the text.
    assert status == 2 and "nowhere/*.md" in err and "option" not in err


def test_own_samples_are_read_no_more_often_than_by_the_probes(tmp_path):
    asked = {"model": "mine", "corpus": []}
    command = command_of(told_anew(stored(tmp_path), **TOLD | {"asked": asked}, most_passes=4))
    assert command[command.index("--sequences") + 1] == f"{-(-1_000_000 // 64 // 4)}"


def test_an_older_forecast_advises_what_it_knows(tmp_path):
    assert command_of(stored(tmp_path), ["m"]) == [
        *("cpmtp", "train-head", "--model", "m", "--form", "cp", "--horizon", "3"),
        *("--rank", "4", "--positions", "1000000"),
    ]


@pytest.mark.parametrize("far", [True, False])
def test_how_likely_a_far_forecast_holds_rests_on_its_ranges(tmp_path, far):
    folder = told_anew(stored(tmp_path), shapes=FAR | {"ahead": 20.0 if far else 4.0})
    assert lines_of(folder)["How sure"].startswith("if the ranges hold so far ahead, ") == far


def test_draws_make_nothing_certain(tmp_path):
    said = lines_of(stored(tmp_path, sure=1.0, pays=1.0))["How sure"]
    assert said.startswith("over 99 % likely faster than plain decoding; over 99 % likely the fast")


def test_a_pilot_names_its_model_and_the_set_up_its_probes(tmp_path):
    told_anew(stored(tmp_path), **TOLD, shapes=FAR)
    table = study_table(lambda rank: 0.4 / rank).assign(anchored=True)
    report = Report.of(table, MANIFEST, read_extras(tmp_path))
    assert report.sections[-1].title == "mine: cp 4, horizon 3"
    (setup,) = next(s for s in report.sections if s.title == "Set-up").blocks
    (said,) = [value for name, value in setup.rows if name == "Forecast of mine"]
    assert said == (
        "on cpu, bfloat16; probes of up to 50,000 positions of training; curves of 5 kinds of "
        "model and text; seed 0"
    )
