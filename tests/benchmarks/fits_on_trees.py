"""CP fits to complete joints of a real model: seconds, divergence, tokens per call.

    python tests/benchmarks/fits_on_trees.py MODEL [--dtype bfloat16] [--top-k 16,50]
        [--ranks 1,4,16] [--contexts 1]
    python tests/benchmarks/fits_on_trees.py --against-dense

The first fits `em` and `acceptance` to three tokens after contexts of Python and Markdown, not
anchored and anchored. The second compares fits to the embedded models' joints under top-k 16 both
ways, as trees and as dense tensors, from the same starts: differences of divergence (nats) and of
tokens per call at ranks 1, 4, 16; of anchored fits those of every first token, weighted by its
probability.
"""

from __future__ import annotations

import argparse
import time

import pandas as pd
import torch
from complete_joints import contexts, numbers

from cpmtp import (
    JointDistribution,
    complete_joint,
    exact_joint,
    fit_path,
    implied_acceptance,
    load_language_model,
    sample_sequences,
)
from cpmtp.decomposition.descent.em import Targets, em_runs
from cpmtp.decomposition.descent.gradient import Goal, acceptance_runs, tree_acceptance_runs
from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.decomposition.starts import disturbed_marginals
from cpmtp.decomposition.trees.nodes import first_token_forest, tree_forest
from cpmtp.decomposition.trees.targets import TreeTargets

HORIZON = 3


def fitted(tree, ranks: list[int], anchored: bool) -> list[dict]:
    """A row per rank and method."""
    em = fit_path(tree, ranks, anchored=anchored)
    accepted = fit_path(tree, ranks, "acceptance", anchored=anchored, starts=em)
    rows = []
    for rank, near, best in zip(ranks, em, accepted, strict=True):
        for method, found in (("em", near), ("acceptance", best)):
            begun = time.perf_counter()
            bounds = implied_acceptance(tree, found.distribution)
            judged = time.perf_counter() - begun
            row = {"anchored": anchored, "rank": rank, "method": method}
            row |= {"seconds": found.seconds, "passes": found.iterations}
            row |= {"kl_nats": near.objective if method == "em" else float("nan")}
            row |= {"tokens_per_call": bounds.tokens_per_call_lower}
            row |= {"width": bounds.tokens_per_call_upper - bounds.tokens_per_call_lower}
            rows.append(row | {"judging_seconds": judged})
    return rows


def measure(options) -> None:
    """Print the fits of every context."""
    lm = load_language_model(options.model, device=options.device, dtype=options.dtype)
    for kind in ("python", "markdown"):
        for number, context in enumerate(contexts(lm, kind, options.contexts)):
            for top_k in options.top_k:
                tree = complete_joint(lm, context, HORIZON, top_k=top_k)
                rows = [*fitted(tree, options.ranks, False), *fitted(tree, options.ranks, True)]
                print(f"{kind} {number}, top-k {top_k}: {len(tree.levels[-1]):,} sequences")
                print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)


def against_dense(anchored: bool, name: str, rank: int, passes: int = 60) -> dict:
    """Differences of fits from one start to one joint, as a tree and as a dense tensor."""
    lm = load_language_model(name)
    context = sample_sequences(lm, 1, 64, seed=1)[0]
    law = {"top_k": 16}
    tree, joint = (
        complete_joint(lm, context, HORIZON, **law),
        exact_joint(lm, context, HORIZON, **law),
    )
    if anchored:
        forest, tokens, mass = first_token_forest(tree, 1e-8)
        joint = JointDistribution(joint.given_first_token().probs[tokens], HORIZON - 1)
    else:
        forest, joint = tree_forest(tree), JointDistribution(joint.probs[None], HORIZON)
        mass = torch.ones(1, dtype=torch.float64)
    start = disturbed_marginals(forest.marginals, rank, 1, seed=0)
    wide = [
        forest.support.scatter(i, start.factors[:, i, :, :size])
        for i, size in enumerate(forest.support.sizes)
    ]
    dense_start = Mixtures(start.weights, torch.stack(wide, 1))
    # Plain sweeps: an extrapolation is taken or not by a comparison that rounding may decide. And
    # tokens per call from a start where nothing ties: at the end of em the first drafted token's
    # two probabilities do, and rounding decides which of them is the lesser.
    sweeps = {"max_iterations": passes, "tolerance": 0.0, "accelerate": False}
    climbs = {"max_iterations": passes // 3, "tolerance": 0.0}
    targets, goal = TreeTargets.of(forest), Goal("block", "draft" if anchored else "target")
    em = em_runs(targets, start, **sweeps)
    dense_em = em_runs(Targets.of(joint), dense_start, **sweeps)
    best = tree_acceptance_runs(targets, start, goal, **climbs)
    dense_best = acceptance_runs(joint, targets.owner, dense_start, goal, **climbs)
    return {
        "model": name,
        "anchored": anchored,
        "rank": rank,
        "kl_nats": float(mass @ em.objective),
        "kl_difference": float(mass @ (em.objective - dense_em.objective).abs()),
        "tokens_per_call": -float(mass @ best.objective),
        "tokens_difference": float(mass @ (best.objective - dense_best.objective).abs()),
    }


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--top-k", type=numbers(int), default=[16, 50])
    parser.add_argument("--ranks", type=numbers(int), default=[1, 4, 16])
    parser.add_argument("--contexts", type=int, default=1)
    parser.add_argument("--against-dense", action="store_true")
    options = parser.parse_args()
    if options.against_dense:
        rows = [
            against_dense(anchored, name, rank)
            for name in ("code", "prose")
            for anchored in (False, True)
            for rank in options.ranks
        ]
        print(pd.DataFrame(rows).to_string(index=False))
    elif options.model:
        measure(options)
    else:
        parser.error("name a model, or give --against-dense")


if __name__ == "__main__":
    main()
