"""What a straight line through the last two probes would have forecast: tokens per call against the
logarithm of the budget, for every stored curve of four tokens.

Run from the checkout: python data/studies/straight_lines.py OUT.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from cpmtp.whole_files import write_text

CURVES = Path(__file__).parents[1] / "curves" / "stored.csv"
HORIZON = 4
HEAD = ["group", "form", "rank", "transition_rank", "width", "blocks"]


def straight_lines(curves: pd.DataFrame) -> Iterator[dict]:
    """A row per target beyond the last probe: the line's tokens per call, and the truth."""
    for head, rows in curves[curves["horizon"] == HORIZON].groupby(HEAD):
        probes = rows[rows["role"] == "probe"].groupby("budget")["tokens_per_call"].mean()
        before, last = probes.iloc[-2:]
        doubling = (last - before) / np.log2(probes.index[-1] / probes.index[-2])
        for target in rows[rows["role"] == "target"].itertuples():
            times = target.budget / probes.index[-1]
            if times > 1:
                line = last + doubling * np.log2(times)
                found = {"seed": target.seed, "times": times, "straight": line}
                yield (
                    dict(zip(HEAD, head, strict=True)) | found | {"truth": target.tokens_per_call}
                )


def main(out: Path) -> None:
    """The table."""
    rows = pd.DataFrame(straight_lines(pd.read_csv(CURVES)))
    write_text(out, rows.to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
