"""How the certified interval narrows with the time spent on the tree: a table, and a figure where a
path is given.

    python tests/benchmarks/interval_width.py MODEL [FIGURE.svg]
    python tests/benchmarks/interval_width.py MODEL --real [--dtype bfloat16] [--nodes 250,1000]

Ten contexts of 64 tokens drawn from the model, blocks of four tokens, block verification, the first
token from the target; the draft is an em fit of rank 4 to a small tree of the same context.

With --real: a context of Python and one of Markdown, 128 tokens, blocks of three, the whole
distribution of a real vocabulary; beside the certified interval the half-width of the sampled
estimate's after the same time, its samples in proportion to the time that some of them took.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import pandas as pd
from complete_joints import contexts, numbers

from cpmtp import (
    estimate_acceptance,
    fit,
    implied_acceptance,
    load_language_model,
    truncated_joint,
)
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


def measure_real(lm, nodes: list[int], samples: int = 400) -> pd.DataFrame:
    """Rows: context and nodes, with seconds, width, and the sampled half-width after as long."""
    rows = []
    for kind in ("python", "markdown"):
        context = contexts(lm, kind, 1)[0]
        small = truncated_joint(lm, context, 3, mass=0.9, max_nodes=100)
        draft = fit(small, 4, "em").distribution
        begun = time.perf_counter()
        drawn = estimate_acceptance(lm, draft, context, samples=samples)
        each = (time.perf_counter() - begun) / samples
        low, high = drawn.tokens_per_call_interval
        for most in nodes:
            begun = time.perf_counter()
            tree = truncated_joint(lm, context, 3, mass=0.999, max_nodes=most)
            seconds = time.perf_counter() - begun
            bounds = implied_acceptance(tree, draft)
            row = {"context": kind, "nodes": tree.expanded_nodes, "kept": float(tree.mass[-1])}
            row |= {"seconds": seconds, "low": bounds.tokens_per_call_lower}
            row |= {"high": bounds.tokens_per_call_upper, "samples": int(seconds / each)}
            row["width"] = row["high"] - row["low"]
            # Half-widths shrink with the square root of the samples.
            row["sampled_half_width"] = (high - low) / 2 * math.sqrt(samples * each / seconds)
            rows.append(row | {"sampled": drawn.tokens_per_call})
            print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table over masses, and draw it; or that over nodes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("figure", nargs="?", type=Path)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nodes", type=numbers(int), default=[250, 1000, 4000])
    options = parser.parse_args()
    lm = load_language_model(options.model, device=options.device, dtype=options.dtype)
    if options.real:
        measure_real(lm, options.nodes)
        return
    table = measure(lm)
    told = table.groupby("mass").agg(
        seconds=("seconds", "median"),
        slowest=("seconds", "max"),
        width=("width", "median"),
        widest=("width", "max"),
        nodes=("nodes", "median"),
    )
    print(told.round(4).to_string())
    if options.figure:
        options.figure.write_text(
            figure_svg(lambda ax: draw(table, ax), "Certified interval, four tokens"),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
