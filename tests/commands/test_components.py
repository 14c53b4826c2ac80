"""A study keeps what the components of one of its contexts say."""

from __future__ import annotations

import pandas as pd
import pytest

from cpmtp.commands.studying.components import FILE, write_components
from cpmtp.report.document import Report, read_extras
from cpmtp.study.running import read_study, run_study
from cpmtp.study.settings import StudySettings

SETTINGS = StudySettings(
    models=("code",), horizons=(2,), ranks=(1,), methods=("em",), contexts=2, context_length=6
)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, run_study(SETTINGS, out, workers=1, progress=False)


def test_components_of_a_context_of_the_study_are_kept_and_told(studied):
    out, table = studied
    write_components(SETTINGS, out, table, seconds=1e6)
    kept = pd.read_parquet(out / FILE)
    assert kept["context_text"].iloc[0] in set(table["context_text"])
    assert set(kept["position"]) == {1, 2} and kept["component"].max() == 3
    assert kept.drop_duplicates("component")["weight"].sum() == pytest.approx(1.0)
    assert (kept.groupby(["component", "position"])["probability"].sum() <= 1 + 1e-9).all()
    sections = Report.of(*read_study(out), read_extras(out)).sections
    assert "What components say" in [section.title for section in sections]


def test_what_would_take_long_is_left_out(studied, tmp_path):
    _, table = studied
    write_components(SETTINGS, tmp_path, table, seconds=0.0)
    assert not (tmp_path / FILE).exists()
