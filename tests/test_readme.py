"""What the README shows runs as it stands."""

from __future__ import annotations

import json
import re

import pytest

from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.evaluation import held_out_survival
from cpmtp.language_model import sample_sequences
from cpmtp.pretrained import embedded_heads, embedded_models, load_language_model
from cpmtp.report.document import Report
from cpmtp.study.running import read_study


def _blocks(root, language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (root / "README.md").read_text("utf-8"), flags=re.DOTALL
    )


def test_the_python_in_the_readme_runs(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    space: dict = {}
    for block in _blocks(root, "python"):
        exec(compile(block, "README.md", "exec"), space)
    assert space["profile"].tokens_per_call > 1.5
    shown = capsys.readouterr().out
    assert "torch.Size([6, 6, 6, 6])" in shown
    assert "horizon 3: ceiling saturates at rank at least 64, 2.94 tokens per call" in shown


def test_the_two_commands_are_what_the_continuous_integration_runs(root):
    clone, first, second = _blocks(root, "console")[0].strip().splitlines()
    assert clone.startswith("git clone ") and clone.endswith(" && cd cpmtp")
    assert re.sub(" +", " ", first) == "pip install -e . && cpmtp study"
    assert re.sub(" +", " ", second) == 'pip install -e ".[test]" && pytest'
    assert re.sub(" +", " ", second) in (root / ".ci" / "run").read_text()


def test_what_the_readme_says_was_found_is_what_the_results_say(root):
    text = (root / "README.md").read_text("utf-8")
    found = text.split("**What was found**")[1].split("\n## ")[0]
    lines = [line for line in found.splitlines() if line.startswith("* ")]
    results = (root / "docs" / "results.md").read_text("utf-8").splitlines()
    assert len(lines) == 3 and set(lines) <= set(results)


def test_the_sample_in_the_readme_is_what_the_stored_study_prints(root):
    (sample,) = _blocks(root, "text")
    table, manifest = read_study(root / "data" / "studies" / "reference")
    code = table[table["model"] == "code"]
    printed = Report.of(code, manifest).summary.splitlines()
    assert set(sample.strip().splitlines()) <= set(printed)


@pytest.mark.parametrize("name", ["code", "prose"])
def test_the_embedded_models_are_there_and_small(name):
    folder = embedded_models()[name]
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000


def _missing(root, text: str) -> list[str]:
    """Files and folders that a text names and that are not where it says.

    A row of the table names folders of the package, then files in them or beside them.
    """
    missing = []
    for line in text.splitlines():
        names = re.findall(r"`([\w./-]+(?:\.(?:py|md|cff)|/))`", line)
        package = root / "cpmtp"
        homes = [root]
        if line.startswith("| "):
            homes += [package, *(package / name for name in names if name.endswith("/"))]
        missing += [name for name in names if not any((home / name).exists() for home in homes)]
    return missing


def test_files_named_in_the_readme_are_where_it_says(root):
    text = (root / "README.md").read_text("utf-8")
    assert _missing(root, text) == []
    fits = "| fits to a joint | `decomposition/`: `fitting.py` is the entrance |"
    assert _missing(root, fits) == []
    assert _missing(root, fits.replace("decomposition", "acceptance")) == ["fitting.py"]
    assert _missing(root, fits.replace("decomposition", "fits")) == ["fits/", "fitting.py"]
    assert _missing(root, "See `docs/heads.md` and `fitting.py`.") == ["fitting.py"]


def test_the_table_of_the_readme_names_all_that_stands_on_top_of_the_package(root):
    table = re.findall(r"^\| .*$", (root / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", "\n".join(table)))
    on_top = {path.stem for path in (root / "cpmtp").iterdir() if path.suffix in ("", ".py")}
    assert {name for name in on_top if not name.startswith("_")} <= named


@pytest.mark.parametrize("model", ["code", "prose"])
def test_embedded_heads_are_small_and_the_recommended_one_earns_more(model):
    lm = load_language_model(model)
    windows, earned = sample_sequences(lm, 4, 96, seed=5), {}
    for name, folder in embedded_heads(model).items():
        assert (folder / "model.safetensors").stat().st_size <= 8e6
        assert json.loads((folder / "recipe.json").read_text("utf-8"))["stages"]
        earned[name] = (
            held_out_survival(lm, CPHead.from_pretrained(folder).attach(lm), windows).sum(1).mean()
        )
    assert earned["recommended"] > earned["baseline"] + 0.3


def test_other_models_come_without_heads():
    assert embedded_heads("../models/code") == {}
