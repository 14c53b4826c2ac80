"""What the README shows runs as it stands."""

from __future__ import annotations

import json
import re

import pytest

from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.evaluation import held_out_survival
from cpmtp.language_model import sample_sequences
from cpmtp.pretrained import embedded_heads, embedded_models, load_language_model


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
    first, second = _blocks(root, "console")[0].strip().splitlines()
    assert re.sub(" +", " ", first) == "pip install -e . && cpmtp study"
    assert re.sub(" +", " ", second) == 'pip install -e ".[test]" && pytest'
    assert re.sub(" +", " ", second) in (root / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["code", "prose"])
def test_the_embedded_models_are_there_and_small(name):
    folder = embedded_models()[name]
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000


def test_files_named_in_the_readme_exist(root):
    for name in re.findall(r"`([\w./-]+\.(?:py|md|cff))`", (root / "README.md").read_text("utf-8")):
        # A row of a table names a folder once, then its files.
        there = [*root.glob(name), *(root / "cpmtp").glob(f"**/{name}")]
        assert there, name


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
