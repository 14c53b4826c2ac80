"""How what a form gains grows with the block: from the tables of longer blocks.

Run from the checkout: python data/studies/block_growth.py TABLE.parquet OUT.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from cpmtp.resampling import CLUSTER_KEYS, Clusters, resampling_weights
from cpmtp.whole_files import write_text

REFERENCE, CHAIN = "cp 1", "markov 16"
LEVEL = (2.5, 97.5)
# What is told, of which two columns: shares of the second column's mean, or differences.
SHARES = {"share won by markov 16": (CHAIN, REFERENCE), "share won by cp 8": ("cp 8", REFERENCE)}
DIFFERENCES = {
    "hmm 4 over cp 4": ("hmm 4", "cp 4"),
    "markov 16 over cp 8": (CHAIN, "cp 8"),
    "beyond one token of memory": ("all", "full chain"),
}


def figures(means: np.ndarray, columns: list[str]) -> dict[str, np.ndarray]:
    """From means (resamples, columns)."""
    of = {name: means[:, place] for place, name in enumerate(columns)}
    found = {name: of[a] / of[b] - 1 for name, (a, b) in SHARES.items()}
    return found | {name: of[a] - of[b] for name, (a, b) in DIFFERENCES.items()}


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and length, on the contexts that have it and on those that have every length."""
    parts = []
    for model, rows in table.groupby("model"):
        lengths = rows.groupby("context")["horizon"].nunique()
        every = lengths.index[lengths == lengths.max()]
        for horizon, own in rows.groupby("horizon"):
            for which, some in (("all", own), ("same", own[own["context"].isin(every)])):
                index = [*CLUSTER_KEYS, "context"]
                wide = some.pivot(index=index, columns="draft", values="tokens_per_call")
                wide = wide.assign(all=float(horizon))
                clusters = Clusters.of(wide)
                weights = resampling_weights(clusters.number, seed=0)
                columns = list(wide.columns)
                middle = figures(clusters.means()[None], columns)
                drawn = figures(clusters.resampled_means(weights), columns)
                for name, values in drawn.items():
                    low, high = np.percentile(values, LEVEL)
                    row = {"model": model, "horizon": horizon, "contexts": len(wide)}
                    row |= {"of": which, "figure": name, "mean": middle[name][0]}
                    parts.append(row | {"mean_low": low, "mean_high": high})
    return pd.DataFrame(parts)


if __name__ == "__main__":
    found = growth(pd.read_parquet(sys.argv[1]))
    write_text(Path(sys.argv[2]), found.to_csv(index=False, float_format="%.5g"))
