"""What a larger vocabulary changes: rank needed, worth of anchoring and losses by rank, from the
tables of finished studies; fits by em, three tokens, block verification, temperature 1.

Where joints are truncated, tokens per call are certified lower bounds: then a loss is at most what
is said, and at least what `least` says, from the upper bounds of the same fits.

Run from the checkout: python data/studies/vocabulary_axis.py OUT.csv NAME:V=FOLDER[,FOLDER] …
such as code:104=data/studies/reference,data/studies/anchored
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from cpmtp.resampling import Clusters, intervals

HORIZON, RANKS, WITHIN = 3, (1, 2, 4, 8, 16), 0.01
OUTCOME = "tokens_per_call_block_target"
UPPER = "tokens_per_call_upper_block_target"
KEYS = ["model", "domain", "document", "context"]


def scores(folders: list[Path], name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokens per call and their upper bounds: a row per context, a column per kind of draft and
    rank.
    """
    tables = [pd.read_parquet(folder / "table.parquet") for folder in folders]
    table = pd.concat([t.assign(anchored=t.get("anchored", False)) for t in tables])
    temperatures = table["temperature"].fillna(1.0) if "temperature" in table else 1.0
    chosen = (table["horizon"] == HORIZON) & (table["method"] == "em") & (temperatures == 1.0)
    chosen &= table["rank"].isin(RANKS) & (table["status"] != "failed")
    rows = table[chosen]
    upper = rows[UPPER].fillna(rows[OUTCOME]) if UPPER in rows else rows[OUTCOME]
    columns = ["anchored", "rank"]
    wide, above = (
        values.pivot_table(index=KEYS, columns=columns, values=OUTCOME)
        for values in (rows, rows.assign(**{OUTCOME: upper}))
    )
    named = [name in (index[0], index[1], f"{index[0]} {index[1]}") for index in wide.index]
    wide = wide[named].dropna() if any(named) else wide.dropna()
    return wide, above.loc[wide.index]


def rows(name: str, vocabulary: int, folders: list[Path]):
    """What is said of one model and kind of text."""
    wide, above = scores(folders, name)
    measured, least = {}, {}
    for anchored, kind in ((False, "not told"), (True, "told")):
        own = wide[anchored]
        last = own.columns.max()
        for rank in own.columns:
            measured[f"lost at rank {rank}", kind] = HORIZON - own[rank]
            least[f"lost at rank {rank}", kind] = HORIZON - above[anchored][rank].mean()
        measured[f"rank {last} over rank 1", kind] = own[last] - own[1]
        means = own.mean()
        enough = means.index[means >= (1 - WITHIN) * means.max()].min()
        yield named(name, vocabulary, len(wide)) | {
            "figure": f"smallest rank within {WITHIN:.0%} of the best to {last}",
            "draft": kind,
            "mean": enough,
        }
    for rank in (1, 16):
        if rank in wide[True] and rank in wide[False]:
            gain = wide[True][rank] - wide[False][rank]
            measured[f"told over not told, rank {rank}", "both"] = gain
    clusters = Clusters.of(pd.DataFrame(measured))
    low, high = intervals(clusters, seed=0)
    for place, (figure, kind) in enumerate(measured):
        mean = clusters.means()[place]
        yield named(name, vocabulary, len(wide)) | {
            "figure": figure,
            "draft": kind,
            "mean": mean,
            "low": low[place],
            "high": high[place],
            "least": least.get((figure, kind), mean),
        }


def named(name: str, vocabulary: int, contexts: int) -> dict:
    """What a row is of."""
    return {"contexts of": name, "vocabulary": vocabulary, "contexts": contexts}


def main(out: str, *given: str) -> None:
    """The table of all that is given."""
    found = []
    for one in given:
        what, _, places = one.partition("=")
        name, _, vocabulary = what.partition(":")
        found += rows(name, int(vocabulary), [Path(place) for place in places.split(",")])
    table = pd.DataFrame(found).round(4)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
