"""Whether half of a budget of distillation, and half of acceptance, earns more than distillation
alone, for heads of every form.

Run from the checkout: python data/studies/phases.py OUT [MODEL …], where OUT is the folder of
`curves.py` in which heads of 64k positions of the second seed were trained: they go on for 64k
more, on the windows that follow, and are judged on the texts of the curves beside those of 128k of
distillation. Writes `phases.csv` there, where the lines of models that are not asked for stay.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import curves
import curves_summary
import pandas as pd
import torch

import cpmtp
from cpmtp.training.heads import HeadTrainingSettings, train_heads
from cpmtp.whole_files import write_text

SEED, HALF, WHOLE = 1, 64, 128
FORMS = [curves.FORMS[i] for i in (0, 3, 5, 6, 7)]
SHARE = 0.5  # of the first phase's learning rate


def trained(out: Path, model: str) -> pd.DataFrame:
    """A row per form: sums on the held-out texts, as the curves' rows have them."""
    lm = cpmtp.load_language_model(model)
    half = curves.Training(model, HALF, SEED)
    best = curves.best_rates(curves.read_rows(out), model)
    shapes = [curves.SMALL | form | {"learning_rate": best[curves.kind(form)]} for form in FORMS]
    starts = [
        cpmtp.DraftHead.from_pretrained(out / "running" / curves.row_file(out, half, shape).stem)
        for shape in shapes
    ]
    shared = HeadTrainingSettings(
        horizon=curves.HORIZON,
        objective="acceptance",
        positions=(WHOLE - HALF) * 1024,
        rows=curves.ROWS,
        length=curves.LENGTH,
        precision="bfloat16",
        seed=SEED,
    )
    settings = [
        replace(shared, **shape | {"learning_rate": SHARE * shape["learning_rate"]})
        for shape in shapes
    ]
    tokens = curves.windows(lm, out, WHOLE * 1024 // curves.LENGTH, SEED)
    later = tokens[HALF * 1024 // curves.LENGTH :]
    folders = [out / "running" / f"{model}-phases-{curves.label(shape)}" for shape in shapes]
    heads = train_heads(lm, settings, folders, tokens=later, starts=starts)
    texts, names = curves.held_out_texts(lm, out)
    rows = [
        curves.key_of(half, shape, head) | curves.scores(lm, head, texts, names)
        for shape, head in zip(shapes, heads, strict=True)
    ]
    return pd.DataFrame(rows)


def main(out: Path, *models: str) -> None:
    """The models asked for, or both, and the comparison."""
    torch.set_num_threads(1)
    known, lines = curves.read_rows(out), []
    known = known[(known["seed"] == SEED) & known["tokens_per_call"].notna()]
    for model in models or curves.MODELS:
        for _, row in trained(out, model).iterrows():
            same = known[(known["model"] == model) & (known["candidate"] == row["candidate"])]
            both = curves_summary.Cell.of(row.to_frame().T)
            line = {"model": model, "candidate": curves_summary.name_of(row)}
            for budget in (HALF, WHOLE):
                cell = curves_summary.Cell.of(same[same["budget"] == budget])
                line[f"distilled_{budget}k"] = cell.tokens.value
            line["with_acceptance"] = both.tokens.value
            line |= curves_summary.with_interval("difference", both.tokens - cell.tokens)
            first = both.survival[1] - cell.survival[1]
            lines.append(line | curves_summary.with_interval("difference_of_survival_2", first))
    table, file = pd.DataFrame(lines), out / "phases.csv"
    if file.exists():
        before = pd.read_csv(file)
        table = pd.concat([before[~before["model"].isin(table["model"])], table])
    write_text(file, table.to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
