"""How the certified interval narrows with the time spent on the tree: a table, and a figure where a
path is given.

    python tests/benchmarks/interval_width.py MODEL [FIGURE.svg]

Ten contexts of 64 tokens drawn from the model, blocks of four tokens, block verification, the first
token from the target; the draft is an em fit of rank 4 to a small tree of the same context.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd

from cpmtp import fit, implied_acceptance, load_language_model, truncated_joint
from cpmtp.report.plots import figure_svg

MASSES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
CONTEXTS, LENGTH, HORIZON = 10, 64, 4


def measure(lm) -> pd.DataFrame:
    """Rows: context and mass, with seconds, nodes and width."""
    rows = []
    for seed in range(CONTEXTS):
        context = lm.sample_tokens(1, LENGTH, seed=seed)[0]
        draft = fit(
            truncated_joint(lm, context, HORIZON, mass=0.7), 4, "em", seed=seed
        ).distribution
        for mass in MASSES:
            begun = time.perf_counter()
            tree = truncated_joint(lm, context, HORIZON, mass=mass)
            seconds = time.perf_counter() - begun
            bounds = implied_acceptance(tree, draft)
            width = bounds.tokens_per_call_upper - bounds.tokens_per_call_lower
            row = {"context": seed, "mass": mass, "seconds": seconds, "width": float(width)}
            rows.append(row | {"nodes": tree.expanded_nodes})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, ax):
    """A line per context."""
    for _, rows in table.groupby("context"):
        ax.plot(rows["seconds"], rows["width"], marker="o", markersize=3, linewidth=1)
    ax.axhline(0.02, linestyle=":", color="gray")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="seconds of growing the tree",
        ylabel="width, tokens per call",
    )


def main(model: str, figure: Path | None = None) -> None:
    """Print the table over masses; draw it."""
    table = measure(load_language_model(model))
    told = table.groupby("mass").agg(
        seconds=("seconds", "median"),
        slowest=("seconds", "max"),
        width=("width", "median"),
        widest=("width", "max"),
        nodes=("nodes", "median"),
    )
    print(told.round(4).to_string())
    if figure:
        figure.write_text(
            figure_svg(lambda ax: draw(table, ax), "Certified interval, four tokens"),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
