"""Notebooks run as they stand, and each pair says the same."""

from __future__ import annotations

import json
import runpy
import time

import matplotlib
import pytest

NAMES = (
    "01_exact_joint",
    "02_decompositions",
    "03_choosing_the_rank",
    "04_waterfall",
    "05_forecast",
    "06_your_model_your_text",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(root, name):
    matplotlib.use("Agg", force=True)
    runpy.run_path(str(root / "notebooks" / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_half_a_minute(root, name):
    begun = time.process_time()
    test_a_notebook_runs(root, name)
    assert time.process_time() - begun <= 60  # thirty seconds of two cores


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_holds_the_same_cells_and_no_outputs(root, name):
    jupytext = pytest.importorskip("jupytext")
    source = jupytext.read(root / "notebooks" / f"{name}.py")
    stored = json.loads((root / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]]
    assert cells == [(cell.cell_type, cell.source) for cell in source.cells]
    assert not any(cell.get("outputs") for cell in stored["cells"])


def test_the_notebook_on_the_choice_recommends_and_marks_the_fastest_rank(root, capsys):
    matplotlib.use("Agg", force=True)
    space = runpy.run_path(str(root / "notebooks" / "03_choosing_the_rank.py"))
    fastest = space["choices"]["throughput"]
    horizon = fastest.horizon
    assert f"recommended: horizon {horizon} with rank {fastest.rank[horizon]}\n" in (
        capsys.readouterr().out
    )
    legend = [text.get_text() for text in space["left"].get_legend().get_texts()]
    assert f"recommended rank {fastest.rank[horizon]}" in legend
