"""What anchored drafts of every form earn with everything free per context, on the reference
study's own contexts; goes on where it was stopped.

Run from the checkout: python data/studies/forms.py OUT [SHARE OF]

SHARE OF (for example 0 2 beside 1 2) leaves a process the contexts whose number is SHARE modulo OF.
The tables hold the contexts that every model has by now.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anchored import CONTEXTS, HORIZON, SETTINGS

import cpmtp
from cpmtp.resampling import CLUSTER_KEYS, Clusters, intervals
from cpmtp.study.models import open_language_model
from cpmtp.study.plan import plan_study
from cpmtp.whole_files import write_parquet, write_text

# Left and right factors of a Markov form are a context's own, shared by its first tokens; gated
# ones have a gate of every first token's own.
DRAFTS = {f"cp {rank}": {"rank": rank} for rank in (1, 2, 4, 8)}
DRAFTS |= {
    f"markov {width}{' gated' * gated}": {
        "form": "markov",
        "rank": 1,
        "transition_rank": width,
        "gated": gated,
    }
    for width, gated in ((16, False), (16, True), (64, True), ("full", False))
}
DRAFTS |= {
    f"markov_mixture {rank}, 16 gated": {
        "form": "markov_mixture",
        "rank": rank,
        "transition_rank": 16,
        "gated": True,
    }
    for rank in (2, 4)
}
BEST_PATH = "best path"
REFERENCE = "cp 1"


def rows_of(unit) -> pd.DataFrame:
    """One context: a fit of every draft by expectation-maximisation, and the best path of all."""
    lm = open_language_model(unit.model)
    joint = cpmtp.exact_joint(lm, torch.as_tensor(unit.token_ids), HORIZON)
    common = {key: getattr(unit, key) for key in (*CLUSTER_KEYS, "context")}
    common |= {"horizon": HORIZON, "anchored": True}
    rows = []
    for name, asked in DRAFTS.items():
        seed = unit.seed(SETTINGS.seed) % 2**31
        fit = cpmtp.fit(joint, anchored=True, seed=seed, **asked)
        row = {
            "draft": name,
            "form": asked.get("form", "cp"),
            "rank": asked["rank"],
            "transition_rank": fit.distribution.transition_rank if "form" in asked else 0,
            "gated": asked.get("gated", False),
            "method": fit.method,
            "status": fit.status,
            "passes": fit.iterations,
            "kl_nats": fit.objective,
            "fit_seconds": fit.seconds,
        }
        profile = cpmtp.implied_acceptance(joint, fit.distribution, rule="block")
        row["tokens_per_call"] = profile.tokens_per_call
        for k, survival in enumerate(profile.survival.tolist(), start=1):
            row[f"survival_{k}"] = survival
        rows.append(common | row)
    best = cpmtp.best_path_tokens_per_call(joint)
    rows.append(common | {"draft": BEST_PATH, "status": "ok", "tokens_per_call": best})
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and draft: mean tokens per call (block rule), its gain on `cp 1` in the same
    contexts, and 95 % intervals over documents.
    """
    parts = []
    for model, rows in table.groupby("model"):
        index = [*CLUSTER_KEYS, "context"]
        wide = rows.pivot(index=index, columns="draft", values="tokens_per_call")
        wide = wide[[*DRAFTS, BEST_PATH]]
        gains = wide.sub(wide[REFERENCE], axis=0)
        part = pd.DataFrame({"model": model, "draft": wide.columns, "contexts": len(wide)})
        for name, scores in (("tokens_per_call", wide), ("gain", gains)):
            clusters = Clusters.of(scores)
            low, high = intervals(clusters, seed=0)
            part[name] = clusters.means()
            part[f"{name}_low"], part[f"{name}_high"] = low, high
        drafts = rows.groupby("draft")
        for name in ("kl_nats", "fit_seconds"):
            part[name] = drafts[name].mean().reindex(wide.columns).to_numpy()
        converged = drafts["status"].agg(lambda values: np.mean(values == "ok"))
        part["converged"] = converged.reindex(wide.columns).to_numpy()
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def part_file(out: Path, model: str, context: int) -> Path:
    """Where a context's rows are kept."""
    return out / "parts" / f"{model}-{context:03d}.parquet"


def restore(out: Path) -> None:
    """Contexts of a stored table as parts again, so that a run goes on from the table alone."""
    table = out / "table.parquet"
    if table.exists():
        for (model, context), rows in pd.read_parquet(table).groupby(["model", "context"]):
            if not part_file(out, model, context).exists():
                write_parquet(part_file(out, model, context), rows)


def write_tables(out: Path, units: list) -> None:
    """The table and its summary, of the contexts that every model has by now."""
    there = pd.DataFrame(
        [(unit.model, unit.context) for unit in units], columns=["model", "context"]
    )
    there["file"] = [part_file(out, unit.model, unit.context) for unit in units]
    there["done"] = [file.exists() for file in there["file"]]
    both = there.groupby("context")["done"].transform("all")
    if both.any():
        table = pd.concat(map(pd.read_parquet, there["file"][both]), ignore_index=True)
        write_parquet(out / "table.parquet", table)
        write_text(out / "summary.csv", summary(table).to_csv(index=False, float_format="%.5g"))


def main(out: Path, share: int = 0, of: int = 1) -> None:
    """One part per context, then the tables."""
    torch.set_num_threads(1)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    restore(out)
    units = [unit for unit in plan_study(SETTINGS)[0] if unit.context < CONTEXTS]
    for unit in sorted(units, key=lambda unit: unit.context):
        path = part_file(out, unit.model, unit.context)
        if unit.context % of == share and not path.exists():
            write_parquet(path, rows_of(unit))
            write_tables(out, units)
    write_tables(out, units)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
