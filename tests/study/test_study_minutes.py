"""A study in a given time: planned from a trial, in turn over domains, whole after what happens."""

from __future__ import annotations

import errno
import math
import random
import time
from dataclasses import replace

import pandas as pd
import pytest
from samples import tiny_study, without_times

from cpmtp.commands.studying.probing import affordable_probes
from cpmtp.forecasting import probes
from cpmtp.report.document import Report
from cpmtp.study.effort.estimate import estimate_study
from cpmtp.study.effort.limits import StudyLimit, planned_limit
from cpmtp.study.effort.trial import Trial
from cpmtp.study.folder import StudyFolder
from cpmtp.study.plan import plan_study
from cpmtp.study.running import read_study, run_study
from cpmtp.study.table import KEY_COLUMNS

MANY = tiny_study(contexts=12)


@pytest.fixture
def domains(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for k in range(12):
            (tmp_path / name / f"{k}.txt").write_text(f"{name} abcdefgh"[k % 3 :] * 5)
    places = {name: tmp_path / name / "*.txt" for name in ("first", "second")}
    return replace(MANY, models=("samples:characters",), domains=places)


def order_of(settings, out=None, **options) -> list[tuple[str, int]]:
    seen = []
    run_study(
        settings,
        out,
        workers=1,
        callback=lambda unit, rows: seen.append((unit.domain, unit.context, len(rows))),
        **options,
    )
    return [place[:2] for place in seen]


def test_contexts_are_taken_in_turn_from_all_domains(domains):
    seen = order_of(replace(domains, contexts=3))
    assert seen == [(name, k) for k in range(3) for name in ("first", "second")]


def test_less_time_is_a_smaller_study_with_the_same_rows(domains, tmp_path):
    small = run_study(domains, tmp_path / "out", workers=1, limit=StudyLimit(contexts=4))
    whole = run_study(domains, workers=1)
    assert small.groupby("domain")["context"].nunique().to_dict() == {"first": 4, "second": 4}
    part = whole[whole["context"] < 4].reset_index(drop=True)
    columns = [c for c in without_times(part) if c != "domain_bits_per_byte"]
    pd.testing.assert_frame_equal(small[columns], part[columns])
    # the same folder with more room goes on
    seen = order_of(domains, tmp_path / "out", limit=StudyLimit(contexts=5))
    assert seen == [("first", 4), ("second", 4)]


def test_when_the_time_is_spent_no_context_is_begun_but_the_first_of_each_domain(domains, tmp_path):
    seen = order_of(domains, tmp_path / "out", limit=StudyLimit(contexts=12, seconds=0.0))
    assert seen == [("first", 0), ("second", 0)]
    table, manifest = read_study(tmp_path / "out")
    summary = Report.of(table, manifest).summary
    assert "left out  1 of 12 contexts of every model and domain were studied" in summary
    assert "no recommendation" in summary and "  recommended:" not in summary
    whole = order_of(domains, tmp_path / "out")
    assert len(whole) == 22 and "left out" not in Report.of(*read_study(tmp_path / "out")).summary


def test_a_plan_has_as_many_contexts_as_a_trial_says_there_is_room_for():
    trial = Trial({"m": 1.0}, 10.0, 7.0, start_seconds=6.0, sequences=1, pilots=1)
    settings = replace(MANY, contexts=32)
    assert trial.seconds(6, 1, settings) == 60.0
    assert trial.seconds(6, 1, replace(settings, acceptance_contexts=2)) == 60.0 - 4 * 7.0
    assert trial.room(60.0, 1, settings) == 6
    assert trial.room(60.0, 2, settings) == 10  # what starting two workers takes is taken off
    assert trial.room(0.5, 1, settings) == 1 and trial.room(1e6, 1, settings) == 32


def test_acceptance_fits_can_be_of_the_first_contexts_alone(domains, tmp_path):
    settings = replace(domains, methods=("em", "acceptance"), contexts=3, acceptance_contexts=1)
    table = run_study(settings, tmp_path / "out", workers=1)
    assert set(table.loc[table["context"] == 0, "method"]) == {"em", "acceptance"}
    assert set(table.loc[table["context"] > 0, "method"]) == {"em"}
    trial = Trial({}, 1.0, 0.5, 0.0, 1, 1)
    assert len(table) == estimate_study(settings, 1, trial=trial).cells
    assert not order_of(settings, tmp_path / "out")  # all parts are whole


def test_a_trial_measures_this_machine_and_the_dry_run_is_its():
    units, identity = plan_study(MANY)
    vocab_size = identity["models"]["samples:bigram"]["vocab_size"]
    trial = Trial.of(MANY, units)
    assert trial.pilots >= 1 and trial.round_seconds > 0 and trial.sequences == vocab_size**2
    assert trial.prefixes_per_second["samples:bigram"] > 0
    assert trial.acceptance_seconds == 0.0  # the study has no such fits
    slower = replace(trial, round_seconds=2 * trial.round_seconds)
    times = [estimate_study(MANY, 1, trial=found).seconds for found in (trial, slower)]
    assert times[1] == pytest.approx(2 * times[0]) and times[0] == 12 * trial.round_seconds
    few = estimate_study(MANY, 1, trial=trial, seconds=3.5 * trial.round_seconds)
    assert few.contexts == 3 and few.cells == 3 * len(MANY.ranks) * len(MANY.methods)


def test_the_same_folder_keeps_its_plan_and_other_minutes_make_another(tmp_path, monkeypatch):
    first = planned_limit(MANY, 0.5, tmp_path)
    run_study(MANY, tmp_path, workers=1, limit=replace(first, contexts=3))
    monkeypatch.setattr(Trial, "of", lambda *a: pytest.fail("tried again"))
    assert planned_limit(MANY, 0.5, tmp_path).contexts == 3
    monkeypatch.undo()
    assert planned_limit(MANY, 0.6, tmp_path).minutes == 0.6
    with pytest.raises(ValueError, match="expected a number above 0"):
        planned_limit(MANY, math.nan, tmp_path)


def test_a_full_disk_and_a_stop_cost_nothing_within_a_plan(domains, tmp_path, monkeypatch):
    limit = StudyLimit(contexts=4, minutes=1.0)
    expected = run_study(domains, workers=1, limit=limit)
    whole, refused = StudyFolder.write, []

    def full_once(self, unit, table):
        if not refused:
            refused.append(unit)
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, unit, table)

    def stopped(unit, rows):
        if unit.context == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StudyFolder, "write", full_once)
    with pytest.raises(KeyboardInterrupt):
        run_study(domains, tmp_path / "out", workers=1, limit=limit, callback=stopped)
    # what was finished is a smaller study; the part that could not be written is not in it
    kept = read_study(tmp_path / "out")[0]
    assert 3 <= len(kept[["domain", "context"]].drop_duplicates()) <= 5
    assert Report.of(kept, read_study(tmp_path / "out")[1]).summary
    found = run_study(domains, tmp_path / "out", workers=1, limit=limit)
    pd.testing.assert_frame_equal(without_times(found), without_times(expected))


@pytest.mark.slow
def test_killed_at_ten_moments_a_planned_study_has_the_same_table(tmp_path):
    multiprocessing = pytest.importorskip("multiprocessing")
    settings = replace(MANY, models=("samples:hidden_markov",), contexts=24, cheapest=True)
    limit = StudyLimit(contexts=16, minutes=1.0)

    def begun(out):
        process = multiprocessing.get_context("fork").Process(
            target=run_study, args=(settings, out), kwargs={"workers": 1, "limit": limit}
        )
        process.start()
        return process

    before = time.perf_counter()
    begun(tmp_path / "whole").join()
    seconds, chance = time.perf_counter() - before, random.Random(3)
    expected = read_study(tmp_path / "whole")[0]
    for _ in range(10):
        running = begun(tmp_path / "killed")
        time.sleep(chance.random() * seconds / 3)
        running.kill()
        running.join()
    begun(tmp_path / "killed").join()
    found = read_study(tmp_path / "killed")[0]
    assert not found.duplicated(list(KEY_COLUMNS)).any() and found["context"].nunique() == 16
    pd.testing.assert_frame_equal(without_times(found), without_times(expected))


@pytest.mark.parametrize(("step", "tried", "enough"), [(10.0, 1, False), (0.01, 4, True)])
def test_no_second_head_is_tried_where_one_alone_has_no_time(step, tried, enough, monkeypatch):
    seen = []

    def timed(lm, candidates, plan, windows):
        seen.append(candidates)
        return step

    monkeypatch.setattr(probes, "step_seconds", timed)
    settings = replace(MANY, models=("code",))
    found = affordable_probes(settings, 60.0)["code"]
    assert len(seen) == tried and found["enough"] is enough
    assert len(found["candidates"]) == tried
