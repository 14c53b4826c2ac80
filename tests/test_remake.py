"""Stored studies are stale once their command or the code behind them is another."""

from __future__ import annotations

import json
import runpy
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


def test_an_unknown_study_is_refused(made):
    with pytest.raises(SystemExit, match="no stored study nothing"):
        made["main"]("nothing")
