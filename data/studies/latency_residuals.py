"""How far predicted cycles are from cycles as decoding then has them.

Run from the checkout, alone on the machine:

    python data/studies/latency_residuals.py OUT MODEL [--name N] [--dtype D] [--threads T]

Measures the latency of heads with random weights, as forecasts do, after a context of one length;
before and after that it decodes with the same heads, after prompts that are shorter and for many
more cycles, and writes a row per head into OUT/NAME-DTYPE.csv: the predicted seconds of a cycle,
the median of those decoded, the residual, and what each stage took in both.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import pandas as pd
import torch

import cpmtp
from cpmtp.forecasting.candidates import Candidate, new_head, sizes_of
from cpmtp.latency import HeadTime, MeasuredLatency
from cpmtp.pretrained.trials import trial_ids
from cpmtp.whole_files import write_text

HEADS = (
    {"form": "cp", "rank": 1, "horizon": 4},
    {"form": "cp", "rank": 4, "horizon": 4},
    {"form": "markov", "transition_rank": 64, "horizon": 4},
    {"form": "recurrent", "horizon": 4},
    {"form": "recurrent", "horizon": 2},
)
CONTEXT, PROMPT, DRAWN = 80, 32, 96  # a prompt and half of what is drawn after it
TURNS, PROMPTS = 3, 2  # turns before and after
STAGES = ("target", "draft", "verification", "rest")


def cycles(lm, head, prompts: list[torch.Tensor]) -> list[dict[str, float]]:
    """Mean seconds of a cycle by stage, a row for each prompt."""
    found = []
    for seed, prompt in enumerate(prompts):
        stats = cpmtp.speculative_generate(lm, head, prompt, max_new_tokens=DRAWN, seed=seed).stats
        stages = {k: v / max(stats.calls - 1, 1) for k, v in stats.stage_seconds.items()}
        found.append(stages | {"kept": stats.tokens_per_call})
    return found


def row_of(head, latency: MeasuredLatency, decoded: list[dict[str, float]]) -> dict:
    """Predicted and decoded, of one head."""
    sizes = sizes_of(head)
    time: HeadTime = next(t for t in latency.heads if t.is_of(sizes))
    cycle = statistics.median(sum(one[s] for s in STAGES) for one in decoded)
    predicted = latency.cycle_seconds(sizes)
    stages = {f"decoded_{s}": statistics.median(one[s] for one in decoded) for s in STAGES}
    told = {f"timed_{s}": getattr(time, s) for s in STAGES[1:]}
    told["timed_target"] = time.cycle - time.beside_target
    curve = latency.curve()
    assert curve is not None
    return (
        sizes
        | {"predicted": predicted, "decoded": cycle, "residual": predicted / cycle - 1}
        | {"tokens_per_call": statistics.mean(one["kept"] for one in decoded)}
        | {"call": curve.seconds(1, head.horizon), **told, **stages}
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--name")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = cpmtp.load_language_model(given.model, dtype=given.dtype)
    heads = [new_head(lm, Candidate.of(lm, keywords).keywords, seed=1) for keywords in HEADS]
    prompts = [trial_ids(lm.vocab_size, PROMPT, seed) for seed in range(PROMPTS)]
    decoded: list[list[dict[str, float]]] = [[] for _ in heads]

    def decode(turns: int) -> None:
        for _ in range(turns):
            for head, rows in zip(heads, decoded, strict=True):
                rows += cycles(lm, head, prompts)

    decode(1)
    for rows in decoded:
        rows.clear()  # that warmed up
    # A machine drifts: half before, half after.
    decode(TURNS)
    latency = cpmtp.measure_latency(
        lm, heads, (1, 2, 4, 8), context=CONTEXT, seconds=given.seconds, rounds=15
    )
    decode(TURNS)
    table = pd.DataFrame([row_of(h, latency, d) for h, d in zip(heads, decoded, strict=True)])
    name = f"{given.name or given.model}-{given.dtype}"
    told = {"model": given.name or given.model, "dtype": given.dtype, "threads": given.threads}
    table = table.assign(**told)
    write_text(given.out / f"{name}.csv", table.round(7).to_csv(index=False))
    print(table.round(6).T.to_string())


if __name__ == "__main__":
    main()
