"""Tables that an earlier version wrote, brought to the columns of this one when they are read."""

from __future__ import annotations

import math

import pandas as pd

from cpmtp.study.table import column_descriptions, is_best

# What every study of the version that had no such column did, or did not know.
_IMPLIED = {
    "context_bytes": 0,
    "context_nats": math.nan,
    "domain_bits_per_byte": math.nan,
    "temperature": 1.0,
    "top_k": math.nan,
    "top_p": math.nan,
    "anchored": False,
    "joint": "dense",
    "kept_mass": 1.0,
    "kl_floor_nats": math.nan,
    "form": "cp",
    "transition_rank": 0,
    "gated": False,
    "free_numbers": math.nan,
    "shared_numbers": 0.0,
    "serial_steps": 1.0,
    "beyond_one_token_nats": math.nan,
    "beyond_one_token_nats_anchored": math.nan,
    "markov_tokens_per_call": math.nan,
    "markov_tokens_per_call_anchored": math.nan,
}
_ENDS = ("tokens_per_call_lower_", "tokens_per_call_upper_")
_SURVIVAL = "survival_block_target_"


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with this version's columns in their order; one that has them stays as it is.

    Earlier studies knew dense joints, unanchored drafts and the form ``cp`` only, and did not mark
    the best method. `schema_version` still says which version wrote the rows.
    """
    horizons = [int(name.removeprefix(_SURVIVAL)) for name in table if name.startswith(_SURVIVAL)]
    columns = list(column_descriptions(max(horizons, default=1)))
    missing = [name for name in columns if name not in table]
    if not missing:
        return table
    added = {name: value for name, value in _IMPLIED.items() if name in missing}
    if "computed" in missing:
        joints = table["joint"] if "joint" in table else pd.Series("dense", index=table.index)
        added["computed"] = joints.map({"dense": "complete", "tree": "certified"})
    for name in missing:
        for end in _ENDS:
            # Until there were estimates, tokens per call were exact or lower bounds themselves.
            exact = name.replace(end, "tokens_per_call_", 1)
            if name.startswith(end) and exact in table:
                added[name] = table[exact]
    # One frame from all columns: adding them one by one would take the table apart.
    table = pd.concat([table, pd.DataFrame(added, index=table.index)], axis=1)
    if "best" in missing:
        table = table.assign(best=is_best(table))
    others = [name for name in table if name not in columns]
    return table[[*(name for name in columns if name in table), *others]]
