"""The validation at its smallest size, every stage of it; and the way it trains a base model of its
own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cpmtp.training.base_models import BaseTrainingSettings
from cpmtp.validation import PRESETS, STAGES, BasePlan, validate
from cpmtp.validation.checks import law_p_value

WITHOUT_TENSORLY = """
import sys
sys.modules["tensorly"] = None
from cpmtp.cli import main
sys.argv = ["cpmtp", "validate", "--preset", "tiny", "--out", sys.argv[1]]
main()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command line's tiny preset, on a machine without TensorLy."""
    folder = tmp_path_factory.mktemp("validation")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORLY, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "report" in done.stdout, done.stdout + done.stderr
    return folder


def _error(table, name):
    """Standard error, from the 95 % interval."""
    return (table[f"{name}_high"] - table[f"{name}_low"]) / (2 * 1.96)


def test_few_files_come_out_and_none_is_large(finished):
    files = list((finished / "results").iterdir())
    assert {f.name for f in files} >= {
        "report.html",
        "summary.json",
        "decoding.parquet",
        "heads.parquet",
        "overhead.parquet",
    }
    assert len(files) <= 8
    assert all(f.stat().st_size < 16e6 for f in files)


def test_every_head_is_decoded_with_beside_plain_decoding(finished):
    cells = pd.read_parquet(finished / "results" / "decoding.parquet")
    preset = PRESETS["tiny"]
    heads = 2 * len(preset.horizons) * len(preset.ranks)
    assert len(cells) == (heads + 2) * len(preset.batches) * len(preset.temperatures)
    drafted = cells[cells["rank"].notna()]
    assert (drafted["measured"] >= 1).all() and (drafted["measured"] <= drafted["horizon"]).all()
    apart = (drafted["forecast"] - drafted["measured"]).abs()
    assert (apart <= 4 * np.hypot(_error(drafted, "forecast"), _error(drafted, "measured"))).all()
    assert (cells["tokens_per_second"] > 0).all()


def test_the_output_follows_the_exact_joint_and_estimates_contain_it(finished):
    checks = pd.read_parquet(finished / "results" / "checks.parquet")
    law = checks[checks["table"] == "law"]
    assert len(law) == 2 * 2 * len(PRESETS["tiny"].ranks) * PRESETS["tiny"].law_seeds
    assert (law["p_value"] > 1e-4).all()
    estimates = checks[checks["table"] == "estimates"]
    middle = (estimates["estimate_low"] + estimates["estimate_high"]) / 2
    assert ((estimates["exact"] - middle).abs() <= 4 * _error(estimates, "estimate")).all()


def test_the_summary_names_the_machine_the_choice_and_the_errors(finished):
    found = json.loads((finished / "results" / "summary.json").read_text("utf-8"))
    assert found["device"] and found["versions"]["torch"] == torch.__version__
    assert len(found["choices"]) == 4
    errors = pd.read_parquet(finished / "results" / "decoding.parquet")["forecast_error"]
    assert found["forecast_error_largest"] == pytest.approx(errors.abs().max())


def test_what_is_done_is_not_done_again(finished):
    parts = {path: path.stat().st_mtime_ns for path in (finished / "parts").iterdir()}
    for stage in STAGES:
        assert validate(PRESETS["tiny"], finished, stage=stage).finished
    assert {path: path.stat().st_mtime_ns for path in (finished / "parts").iterdir()} == parts


def test_other_settings_an_unknown_stage_and_a_missing_stage_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        validate(replace(PRESETS["tiny"], prompts=5), finished)
    with pytest.raises(ValueError, match="unknown stage"):
        validate(PRESETS["tiny"], tmp_path, stage="train")
    with pytest.raises(ValueError, match="needs 'base' first"):
        validate(PRESETS["tiny"], tmp_path, stage="heads")


def test_a_spent_budget_begins_nothing(tmp_path):
    done = validate(PRESETS["tiny"], tmp_path, budget_seconds=0.0)
    assert not done.finished and done.missing[0] == "bases code"
    assert not (tmp_path / "parts").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_preset_runs_elsewhere_and_in_another_precision_where_it_is_told_to(tmp_path):
    elsewhere = PRESETS["gpu"].on("cpu", "bfloat16")
    assert (elsewhere.device, elsewhere.dtype) == ("cpu", "bfloat16")
    assert replace(elsewhere, device="cuda") == PRESETS["gpu"]
    assert PRESETS["tiny"].on(None, None) == PRESETS["tiny"]
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        PRESETS["tiny"].on("cpu", "int8")
    with pytest.raises(ValueError, match="unknown device 'tpus'"):
        validate(PRESETS["tiny"].on("tpus", None), tmp_path)


def test_the_gpu_preset_without_a_gpu_says_so(tmp_path):
    with pytest.raises(ValueError, match="CUDA"):
        validate(PRESETS["gpu"], tmp_path)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
        ),
    ],
)
def test_bases_of_its_own_and_all_that_follows_work_at_a_small_size(tmp_path, device):
    training = BaseTrainingSettings(
        seconds=3.0, windows_per_step=4, window=64, width=96, layers=1, bfloat16=True
    )
    bases = tuple(
        BasePlan(
            f"base{v}", vocab_size=v, training=training, corpus_bytes=600_000, held_out_bytes=20_000
        )
        for v in (300, 257)
    )
    preset = replace(
        PRESETS["tiny"],
        device=device,
        dtype="bfloat16",
        bases=bases,
        horizons=(3,),
        ranks=(1,),
        head_seconds=1.0,
        windows=8,
        window=32,
        prompts=4,
        prompt=8,
        new_tokens=8,
        batches=(2,),
        temperatures=(1.0,),
        widths=(96,),
        law_rows=50,
    )
    done = validate(preset, tmp_path)
    assert done.finished
    table = pd.read_parquet(tmp_path / "parts" / "bases-base300.parquet")
    assert table["vocab_size"].iloc[0] == 300 and 0 < table["bits_per_byte"].iloc[0] < 8
    assert len(table["held_out_packages"].iloc[0]) > 0
    assert (done.results / "report.html").is_file()


def test_a_wrong_law_is_found_and_the_right_one_is_not_refused():
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(4, 4, 4, generator=generator, dtype=torch.float64)
    joint = joint / joint.sum()
    cells = torch.multinomial(joint.flatten(), 4000, replacement=True, generator=generator)
    tokens = torch.stack([cells // 16, cells // 4 % 4, cells % 4], 1)
    assert law_p_value(tokens, joint) > 1e-3
    wrong = joint.sqrt() / joint.sqrt().sum()
    assert law_p_value(tokens, wrong) < 1e-6
    assert law_p_value(tokens, joint * (torch.arange(64).view(4, 4, 4) != int(cells[0]))) == 0.0
