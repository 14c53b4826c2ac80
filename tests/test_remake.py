"""Stored studies are stale once their command or the code behind them is another."""

from __future__ import annotations

import json
import runpy
import subprocess
from dataclasses import replace

import pytest


@pytest.fixture(scope="module")
def made(root):
    return runpy.run_path(str(root / "data" / "studies" / "remake.py"))


def test_every_stored_study_has_its_folder_and_modules_that_exist(made, root):
    for study in made["STUDIES"]:
        assert (root / "data" / "studies" / study.name).is_dir()
        assert all((root / "cpmtp" / module).exists() for module in study.modules)


def test_a_study_is_stale_without_a_record_after_another_command_and_after_other_code(
    made, tmp_path
):
    (tmp_path / "s").mkdir()
    (tmp_path / "cpmtp").mkdir()
    (tmp_path / "cpmtp" / "a.py").write_text("x = 1\n")
    space = type(made["STUDIES"][0]).make.__globals__
    kept = {name: space[name] for name in ("HERE", "ROOT")}
    space.update(HERE=tmp_path, ROOT=tmp_path)
    try:
        study = made["Stored"]("s", "python -c pass", ("a.py",))
        assert "not on record" in study.why_stale
        study.make()
        assert study.why_stale == ""
        assert json.loads((tmp_path / "s" / "made.json").read_text())["command"] == study.command
        assert "another command" in replace(study, command="python -c 1").why_stale
        (tmp_path / "cpmtp" / "a.py").write_text("x = 2\n")
        assert "the code has changed" in study.why_stale
    finally:
        space.update(kept)


@pytest.mark.parametrize("fails", [False, True])
def test_a_study_takes_the_old_ones_place_when_it_is_done(made, tmp_path, fails):
    for name, said in (("s", "old"), ("s.new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table").write_text(said)
    study = made["Stored"]("s", f"python -c 'raise SystemExit({int(fails)})'", (), ("table",))
    space = type(study).make.__globals__
    kept = {name: space[name] for name in ("HERE", "ROOT")}
    space.update(HERE=tmp_path, ROOT=tmp_path)
    try:
        if fails:
            with pytest.raises(subprocess.CalledProcessError):
                study.make()
        else:
            study.make()
    finally:
        space.update(kept)
    assert (tmp_path / "s" / "table").read_text() == ("old" if fails else "new")
    assert (tmp_path / "s.new").exists() is fails


def test_studies_are_made_where_nothing_else_is_and_without_probes(made):
    for study in made["STUDIES"]:
        if study.files:
            assert f"--out data/studies/{study.name}.new" in study.command
            assert "--no-probe" in study.command


def test_an_unknown_study_is_refused(made):
    with pytest.raises(SystemExit, match="no stored study nothing"):
        made["main"]("nothing")
