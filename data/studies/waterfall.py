"""Where tokens per call are lost by trained heads of every form, on the reference study's own
contexts; goes on where it was stopped.

Run from the checkout: python data/studies/waterfall.py train HEADS CURVES [THOUSANDS], then
python data/studies/waterfall.py OUT HEADS [CONTEXTS [FORM …]]

HEADS holds folders of heads whose names begin with their model's; ``train`` makes one of each form
and model, in the grid's narrow trunk and at its best rates, on the windows and by the table in the
folder CURVES of `curves.py`. A row per context and head: what
an equal draft would earn, what the best draft of the head's form and rank does with the left and
right factors that the head has stored, and what the head itself does. What a draft with factors of
the context's own would earn is in the table of the study `forms`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import curves
import pandas as pd
import torch
from head import SETTINGS

import cpmtp
from cpmtp.heads.evaluation import head_ceilings, learned_scores
from cpmtp.resampling import CLUSTER_KEYS, Clusters, intervals
from cpmtp.study.models import open_language_model
from cpmtp.study.plan import plan_study
from cpmtp.training.heads import HeadTrainingSettings, train_heads
from cpmtp.whole_files import write_parquet, write_text

HORIZON, RULE = 3, "block"
LEVELS = ("exact_limit", "acceptance_fit", "em_fit", "learned")
TRAINED = (0, 3, 5, 6, 7)  # of the grid's forms
GAPS = ("rank_gap", "objective_gap", "learning_gap")


def row_of(unit, lm, joint, head, name: str) -> pd.DataFrame:
    """One context and head."""
    common = {key: getattr(unit, key) for key in (*CLUSTER_KEYS, "context")}
    common |= {"horizon": HORIZON, "rule": RULE, "head": name, "exact_limit": float(HORIZON)}
    sizes = {key: getattr(head, key) for key in ("form", "rank", "transition_rank", "anchored")}
    ceilings = head_ceilings(joint, head, rule=RULE, own=False)
    learned = learned_scores(lm, head, torch.as_tensor(unit.token_ids), joint, rule=RULE)
    return pd.DataFrame([common | sizes | ceilings | learned])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and head: levels and gaps, and what ceiling and head are above those of rank 1 in
    the same contexts; 95 % intervals over documents.
    """
    table = table.set_index([*CLUSTER_KEYS, "context"]).sort_index()
    for gap, above, below in zip(GAPS, LEVELS, LEVELS[1:], strict=False):
        table[gap] = table[above] - table[below]
    lines, keys = [], ["model", "form", "rank", "transition_rank", "head"]
    for named, rows in table.groupby(keys):
        of_model = table[table.index.get_level_values("model") == named[0]]
        first = of_model[(of_model["form"] == "cp") & (of_model["rank"] == 1)]
        values = rows[[*LEVELS, *GAPS]].copy()
        for name in ("acceptance_fit", "learned"):
            values[f"{name}_gain"] = values[name] - first[name]
        clusters = Clusters.of(values.dropna())
        low, high = intervals(clusters, seed=0)
        line = dict(zip(keys, named, strict=True)) | {"contexts": len(values)}
        for i, (name, mean) in enumerate(zip(values.columns, clusters.means(), strict=True)):
            line[name] = mean
            if name != "exact_limit":
                line |= {f"{name}_low": low[i], f"{name}_high": high[i]}
        lines.append(line)
    return pd.DataFrame(lines)


def train(heads: Path, grid: Path, thousands: int = 256) -> None:
    """A head of each form and model that is not there."""
    torch.set_num_threads(1)
    for folder in ("rows", "samples"):
        (grid / folder).mkdir(parents=True, exist_ok=True)
    curves.restore(grid)
    for model in curves.MODELS:
        best = curves.best_rates(curves.read_rows(grid), model)
        shapes = [curves.SMALL | curves.FORMS[i] for i in TRAINED]
        folders = [heads / f"{model}-{thousands}k-{curves.label(shape)}" for shape in shapes]
        if all((folder / "config.json").exists() for folder in folders):
            continue
        settings = [
            HeadTrainingSettings(
                horizon=curves.HORIZON,
                positions=thousands * 1024,
                rows=curves.ROWS,
                length=curves.LENGTH,
                learning_rate=best[curves.kind(shape)],
                **shape,
            )
            for shape in shapes
        ]
        lm = cpmtp.load_language_model(model)
        tokens = curves.windows(lm, grid, thousands * 1024 // curves.LENGTH, 0)
        train_heads(lm, settings, folders, tokens=tokens)


def main(out: Path, heads: Path, contexts: int = 16, *forms: str) -> None:
    """A part per context and head, then the tables."""
    torch.set_num_threads(1)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    units = [unit for unit in plan_study(SETTINGS)[0] if unit.context < contexts]
    for unit in sorted(units, key=lambda unit: unit.context):
        lm, joint = open_language_model(unit.model), None
        for folder in sorted(heads.glob(f"{unit.model}-*")):
            part = out / "parts" / f"{unit.context:03d}-{folder.name}.parquet"
            head = cpmtp.DraftHead.from_pretrained(folder).attach(lm)
            if part.exists() or (forms and head.form not in forms):
                continue
            if joint is None:
                joint = cpmtp.exact_joint(lm, torch.as_tensor(unit.token_ids), HORIZON)
            write_parquet(part, row_of(unit, lm, joint, head, folder.name))
        parts = [pd.read_parquet(part) for part in sorted((out / "parts").glob("*.parquet"))]
        if parts:
            table = pd.concat(parts, ignore_index=True)
            write_parquet(out / "table.parquet", table)
            write_text(out / "summary.csv", summary(table).to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    place, heads_, *more = sys.argv[1:]
    if place == "train":
        train(Path(heads_), Path(more[0]), *map(int, more[1:]))
    else:
        main(Path(place), Path(heads_), *map(int, more[:1]), *more[1:])
