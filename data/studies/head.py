"""The learned heads against what their ranks allow, on the reference study's own contexts; goes on
where it was stopped.

Run from the checkout: python data/studies/head.py ceilings OUT [MODEL], then python
data/studies/head.py learned OUT HEADS, where HEADS holds a folder of heads per model. A context's
ceilings take about a minute of one core, its heads a second.

What expectation-maximisation reaches is in the tables of the studies `reference` and `anchored`,
for the same contexts; only what optimising acceptance adds to it is computed here, on the first of
them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import cpmtp
from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.evaluation import learned_scores, rank_ceilings
from cpmtp.resampling import Clusters, intervals
from cpmtp.study.plan import StudyUnit, open_language_model, plan_study
from cpmtp.study.settings import StudySettings

SETTINGS = StudySettings(
    horizons=(2, 3), ranks=(1, 2, 4, 8, 16, 32, 64), methods=("em",), contexts=64
)
CONTEXTS, WITH_ACCEPTANCE, RANKS, HORIZON, RULE = 32, 16, (1, 2, 4, 8, 16), 3, "token"


def units_of(contexts: int, model: str | None = None) -> list[StudyUnit]:
    """The first so many contexts, models taking turns."""
    units = [
        unit
        for unit in plan_study(SETTINGS)[0]
        if unit.context < contexts and model in (None, unit.model)
    ]
    return sorted(units, key=lambda unit: unit.context)


def key_of(unit: StudyUnit) -> dict:
    """What a row is about."""
    return {
        "model": unit.model,
        "domain": unit.domain,
        "context": unit.context,
        "horizon": HORIZON,
        "rule": RULE,
    }


def ceilings(out: Path, model: str | None = None) -> None:
    """A part per context: the fits of every rank, anchored and not."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for unit in tqdm(units_of(WITH_ACCEPTANCE, model)):
        path = out / "parts" / f"{unit.model}-{unit.context:03d}.parquet"
        if path.exists():
            continue
        joint = cpmtp.exact_joint(
            open_language_model(unit.model), torch.as_tensor(unit.token_ids), HORIZON
        )
        rows = [
            key_of(unit)
            | {"rank": rank, "anchored": anchored}
            | rank_ceilings(joint, rank, anchored, rule=RULE)
            for rank in RANKS
            for anchored in (False, True)
        ]
        pd.DataFrame(rows).to_parquet(path)


def learned(out: Path, heads: Path) -> None:
    """What every head earns on the same contexts, beside the ceilings of its rank: one row per
    context and head.
    """
    rows = []
    for unit in tqdm(units_of(CONTEXTS)):
        lm = open_language_model(unit.model)
        context = torch.as_tensor(unit.token_ids)
        joint = cpmtp.exact_joint(lm, context, HORIZON)
        for folder in sorted((heads / unit.model).glob("*/config.json")):
            head = CPHead.from_pretrained(folder.parent).attach(lm)
            key = key_of(unit) | {
                "rank": head.rank,
                "anchored": head.anchored,
                "head": folder.parent.name,
            }
            rows.append(key | learned_scores(lm, head, context, joint, rule=RULE))
    table = pd.DataFrame(rows).merge(em_ceilings(), on=["model", "context", "rank", "anchored"])
    table.insert(table.columns.get_loc("learned"), "exact_limit", float(HORIZON))
    found = pd.concat(map(pd.read_parquet, sorted((out / "parts").glob("*.parquet"))))
    found["acceptance_gain"] = found["acceptance_fit"] - found["em_fit"]
    gains = found[["model", "context", "rank", "anchored", "acceptance_gain"]]
    table = table.merge(gains, on=["model", "context", "rank", "anchored"], how="left")
    table.to_parquet(out / "contexts.parquet")
    summary(table).to_parquet(out / "waterfall.parquet")


def em_ceilings() -> pd.DataFrame:
    """Tokens per call of the stored studies' em fits, by model, context, rank and anchoring."""
    tables = []
    for study, anchored in (("reference", False), ("anchored", True)):
        table = pd.read_parquet(Path(__file__).parent / study / "table.parquet")
        rows = table[(table["horizon"] == HORIZON) & (table["method"] == "em")].assign(
            anchored=anchored
        )
        tables.append(
            rows[["model", "context", "rank", "anchored", f"tokens_per_call_{RULE}_target"]]
        )
    return pd.concat(tables).rename(columns={f"tokens_per_call_{RULE}_target": "em_fit"})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over contexts, one row per head, with intervals of what was learned, and its share of
    what em reaches.
    """
    rows = []
    for keys, part in table.groupby(
        ["model", "domain", "horizon", "rule", "rank", "anchored", "head"], sort=False
    ):
        clusters = Clusters(
            part[["exact_limit", "em_fit", "learned"]].to_numpy(),
            np.ones(len(part), dtype=int),
            len(part),
        )
        low, high = intervals(clusters, seed=0)
        row = dict(
            zip(
                ["model", "domain", "horizon", "rule", "rank", "anchored", "head"],
                keys,
                strict=True,
            )
        )
        row |= dict(zip(["exact_limit", "em_fit", "learned"], clusters.means(), strict=True))
        row |= {"acceptance_fit": row["em_fit"] + part["acceptance_gain"].mean()}
        row |= {"learned_low": low[-1], "learned_high": high[-1], "contexts": len(part)}
        row |= {"contexts_of_acceptance_fit": int(part["acceptance_gain"].notna().sum())}
        rows.append(row | {"share_of_ceiling": row["learned"] / row["em_fit"]})
    return pd.DataFrame(rows).sort_values(["model", "anchored", "rank"], ignore_index=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stage, place, *more = sys.argv[1:]
    {"ceilings": ceilings, "learned": lambda out, heads: learned(out, Path(heads))}[stage](
        Path(place), *more
    )
