"""Which learning rate heads of every form want, with `train_head`'s own batches; goes on where it
was stopped.

Run from the checkout: python data/studies/rates.py OUT [--budgets K …] [--real MODEL WINDOWS]

Heads that are told the first token are trained on the windows of the grid (`curves.py`), for so
many thousands of positions in the steps that are the default, and judged on the grid's held-out
texts. With --real they are of a model in a folder, in bfloat16, draft the 4,096 most frequent
tokens, and are trained and judged on parts of the windows that `real_heads.py` wrote, in half as
large steps. `rates.csv` in OUT has a line per model, form, budget and rate: tokens per call, and
what they are less than those of the best rate, with a 95 % interval over documents (of a real
model: over windows).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import curves
import curves_summary
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

import cpmtp
from cpmtp.training.heads import HeadTrainingSettings, train_heads
from cpmtp.whole_files import write_text

RATES = (2e-3, 8e-3, 1.6e-2)
FORMS: list[dict[str, Any]] = [curves.FORMS[i] for i in (0, 3, 5, 6, 7)]
REAL_FORMS: list[dict[str, Any]] = [{"form": "cp", "rank": 4}, curves.FORMS[5], curves.FORMS[7]]
REAL_RATES, REAL_THOUSANDS, JUDGED = (2e-3, 4e-3, 8e-3, 1.6e-2), 32, 96
REAL = {"vocabulary": 4096, "width": 384, "rows": curves.ROWS}


def name_of(form: dict) -> str:
    """A form in a few words."""
    return " ".join(str(value) for value in form.values())


def heads_of(
    lm: Any, tokens: Tensor, budget: int, wanted: list[tuple[dict, float]], **more: Any
) -> list:
    """One for each form and rate."""
    shared = {"positions": budget * 1024, "length": curves.LENGTH, "precision": "bfloat16"} | more
    settings = [
        HeadTrainingSettings(horizon=curves.HORIZON, learning_rate=rate, **form, **shared)
        for form, rate in wanted
    ]
    return train_heads(lm, settings, tokens=tokens)


def embedded(out: Path, model: str, budget: int) -> None:
    """What is missing of a model's heads."""
    files = {
        (i, rate): out / "rows" / f"{model}-{budget}k-{name_of(form)}-{rate:g}.json"
        for i, form in enumerate(FORMS)
        for rate in RATES
    }
    missing = [key for key, file in files.items() if not file.exists()]
    if not missing:
        return
    lm = cpmtp.load_language_model(model)
    tokens = curves.windows(lm, out, budget * 1024 // curves.LENGTH, 0)
    heads = heads_of(lm, tokens, budget, [(FORMS[i], rate) for i, rate in missing])
    for (i, rate), head in zip(missing, heads, strict=True):
        row = {"model": model, "form": name_of(FORMS[i]), "budget": budget, "learning_rate": rate}
        row |= curves.scores(lm, head, *curves.held_out_texts(lm, out))
        write_text(files[i, rate], json.dumps(row) + "\n")


def real(out: Path, folder: str, windows: Path) -> None:
    """Heads of a real model, and what they earn on windows that none was trained on."""
    lm = cpmtp.load_language_model(folder, dtype="bfloat16")
    tokens = load_file(windows)["tokens"].long()
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    judged, kept = tokens[order[:JUDGED]], tokens[order[JUDGED:]]
    wanted = [(form, rate) for form in REAL_FORMS for rate in REAL_RATES]
    files = [out / "rows" / f"{lm.name}-{name_of(form)}-{rate:g}.json" for form, rate in wanted]
    if all(file.exists() for file in files):
        return
    heads = heads_of(lm, kept[: REAL_THOUSANDS * 4], REAL_THOUSANDS, wanted, **REAL)
    for (form, rate), file, head in zip(wanted, files, heads, strict=True):
        row = {"model": lm.name, "form": name_of(form), "budget": REAL_THOUSANDS}
        row |= {"learning_rate": rate}
        names = [str(i) for i in range(len(judged))]
        write_text(file, json.dumps(row | curves.scores(lm, head, judged, names)) + "\n")


def summary(out: Path) -> pd.DataFrame:
    """A line per head."""
    files = sorted((out / "rows").glob("*.json"))
    table = pd.DataFrame([json.loads(file.read_text("utf-8")) for file in files])
    lines = []
    for (model, form, budget), rows in table.groupby(["model", "form", "budget"]):
        cells = {
            rate: curves_summary.Cell.of(same).tokens
            for rate, same in rows.groupby("learning_rate")
        }
        best = max(cells.values(), key=lambda cell: cell.value)
        for rate, cell in cells.items():
            line = {"model": model, "form": form, "budget": budget, "learning_rate": rate}
            line["tokens_per_call"] = cell.value
            lines.append(line | curves_summary.with_interval("less_than_best", cell - best))
    return pd.DataFrame(lines)


def main() -> None:
    """What is missing, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--real", nargs=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in ("rows", "samples"):
        (given.out / folder).mkdir(parents=True, exist_ok=True)
    if given.real:
        real(given.out, given.real[0], Path(given.real[1]))
    for budget in [] if given.real else given.budgets:
        for model in curves.MODELS:
            embedded(given.out, model, budget)
    write_text(given.out / "rates.csv", summary(given.out).to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
