"""What a draft that is told the first token gains, on the reference study's own contexts; goes on
where it was stopped.

Run from the checkout: python data/studies/anchored.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

import cpmtp
from cpmtp.study.plan import open_language_model, plan_study
from cpmtp.study.settings import StudySettings

SETTINGS = StudySettings(
    horizons=(2, 3), ranks=(1, 2, 4, 8, 16, 32, 64), methods=("em",), contexts=64
)
CONTEXTS, RANKS, HORIZON = 32, (1, 2, 4, 8, 16, 32), 3


def rows_of(unit) -> pd.DataFrame:
    """One context: an anchored fit at every rank."""
    lm = open_language_model(unit.model)
    joint = cpmtp.exact_joint(lm, torch.as_tensor(unit.token_ids), HORIZON)
    rows = []
    for rank in RANKS:
        fit = cpmtp.fit(joint, rank, "em", anchored=True, seed=unit.seed(SETTINGS.seed) % 2**31)
        row = {
            "model": unit.model,
            "domain": unit.domain,
            "document": unit.document,
            "context": unit.context,
        }
        row |= {
            "horizon": HORIZON,
            "rank": rank,
            "method": "em",
            "anchored": True,
            "status": fit.status,
        }
        row |= {
            "message": fit.message,
            "parameters": fit.distribution.parameter_count,
            "fit_seconds": fit.seconds,
        }
        for rule in ("token", "block", "coupling"):
            profile = cpmtp.implied_acceptance(joint, fit.distribution, rule=rule)
            row[f"tokens_per_call_{rule}_target"] = profile.tokens_per_call
            for k, survival in enumerate(profile.survival.tolist(), start=1):
                row[f"survival_{rule}_target_{k}"] = survival
        rows.append(row)
    return pd.DataFrame(rows)


def main(out: Path) -> None:
    """One part per context, then the table."""
    torch.set_num_threads(1)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    units = [unit for unit in plan_study(SETTINGS)[0] if unit.context < CONTEXTS]
    paths = [out / "parts" / f"{unit.model}-{unit.context:03d}.parquet" for unit in units]
    for unit, path in sorted(zip(units, paths, strict=True), key=lambda pair: pair[0].context):
        if not path.exists():
            rows_of(unit).to_parquet(path)
    pd.concat(map(pd.read_parquet, paths), ignore_index=True).to_parquet(out / "table.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
