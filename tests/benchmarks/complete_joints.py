"""What complete joints of three tokens under top-k cost on a real model, over their floor.

    python tests/benchmarks/complete_joints.py MODEL [--dtype bfloat16] [--device cpu]
        [--top-k 16,50] [--temperatures 1,0.7] [--contexts 3] [--brute-force]

Contexts of 128 tokens of Python and of Markdown, cut from this checkout. The floor is as many
tokens (the context's and one for every expanded prefix after the first) as plain batches through
the same model, logits included, in the fastest of some shapes; both are timed in turn on every
context. With --brute-force the joints under top-k 8 of three contexts are compared with full
forward passes over every sequence.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import psutil
import torch

from cpmtp import complete_joint, load_language_model

LENGTH, HORIZON = 128, 3
SHAPES = ((4, 128), (16, 32), (1, 384))
ROOT = Path(__file__).parents[2]
SOURCES = {"python": "cpmtp/**/*.py", "markdown": "docs/*.md"}


def contexts(lm, kind: str, count: int) -> list[torch.Tensor]:
    """Windows from as many long files, from a third of the way in."""
    files = sorted(ROOT.glob(SOURCES[kind]))
    encoded = (lm.encode_document(file.read_text("utf-8")) for file in files)
    long = [ids for ids in encoded if len(ids) > 3 * LENGTH]
    step = max(len(long) // count, 1)
    return [ids[len(ids) // 3 :][:LENGTH] for ids in long[::step][:count]]


def synchronised(lm) -> float:
    """The time when all that was asked of the device is done."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


@torch.inference_mode()
def floor_per_token(lm, shape: tuple[int, int]) -> float:
    """Seconds per token of plain batches, logits included."""
    ids = torch.randint(lm.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    begun = synchronised(lm)
    lm.model(input_ids=ids.to(lm.device), use_cache=False)
    return (synchronised(lm) - begun) / ids.numel()


def brute_force_gap(lm, context, top_k: int) -> float:
    """Largest difference of a complete joint's probabilities to those of full passes."""
    tree = complete_joint(lm, context, HORIZON, top_k=top_k)
    worst = 0.0
    for length, level in enumerate(tree.levels, 1):
        prefixes = tree.prefixes(length)
        parents = tree.expanded_prefixes(length - 1)
        rows = torch.cat([context.expand(len(parents), -1), parents], 1)
        law = torch.cat(
            [tree.law.process_log_probs(lm.next_token_log_probs(r).double()) for r in rows.split(8)]
        ).exp()
        where = torch.zeros(len(prefixes), dtype=torch.long)
        where[1:] = (level.parents[1:] != level.parents[:-1]).cumsum(0)
        worst = max(worst, float((law[where, level.tokens] - level.conditionals).abs().max()))
        kept = torch.zeros_like(law).index_put((where, level.tokens), level.conditionals)
        worst = max(worst, float((law - kept).abs().max()))
    return worst


def measure(lm, options) -> pd.DataFrame:
    """A row per context, top-k and temperature."""
    rows = []
    for kind in SOURCES:
        for number, context in enumerate(contexts(lm, kind, options.contexts)):
            for top_k in options.top_k:
                for temperature in options.temperatures:
                    floor = min(floor_per_token(lm, shape) for shape in SHAPES)
                    lm._context_cache = None
                    begun = synchronised(lm)
                    tree = complete_joint(
                        lm, context, HORIZON, top_k=top_k, temperature=temperature
                    )
                    seconds = synchronised(lm) - begun
                    floor = min(floor, *(floor_per_token(lm, shape) for shape in SHAPES))
                    tokens = len(context) + tree.expanded_nodes - 1
                    row = {"kind": kind, "context": number, "top_k": top_k, "T": temperature}
                    row |= {"seconds": seconds, "tokens": tokens, "floor": floor * tokens}
                    row |= {"ratio": seconds / (floor * tokens), "nodes": tree.expanded_nodes}
                    row |= {"kept": float(tree.mass[-1]), "tree_mb": tree.nbytes / 1e6}
                    row["resident_gb"] = psutil.Process().memory_info().rss / 1e9
                    rows.append(row)
                    print(pd.DataFrame([row]).round(4).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Print every measurement and their summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--top-k", type=numbers(int), default=[16, 50])
    parser.add_argument("--temperatures", type=numbers(float), default=[1.0, 0.7])
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--brute-force", action="store_true")
    options = parser.parse_args()
    lm = load_language_model(options.model, device=options.device, dtype=options.dtype)
    lm.shares_prefixes_up_to(LENGTH + HORIZON)  # its trials are no part of a joint
    print(f"{lm.name}, {lm.model.dtype} on {lm.device}, {torch.get_num_threads()} thread(s)")
    if options.brute_force:
        for kind in SOURCES:
            for number, context in enumerate(contexts(lm, kind, 2)):
                gap = brute_force_gap(lm, context, 8)
                print(f"{kind} {number}, top-k 8: differs from full passes by {gap:.2g} at most")
        return
    table = measure(lm, options)
    print(table.groupby(["kind", "top_k", "T"])[["seconds", "ratio"]].median().round(3))
    print(f"ratio to the floor: median {table.ratio.median():.2f}, largest {table.ratio.max():.2f}")


if __name__ == "__main__":
    main()
