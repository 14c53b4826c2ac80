"""How far predicted cycles are from cycles as decoding then has them.

Run from the checkout, alone on the machine:

    python data/studies/latency_residuals.py OUT MODEL [--name N] [--dtype D] [--threads T]
    [--turns N] [--drawn N]

Measures the latency of heads with random weights, as forecasts do, after a context of one length;
in turns with that it decodes with the same heads, after prompts that are shorter and for many more
cycles. A row per head in OUT/NAME-DTYPE.csv: the predicted and the decoded seconds of a cycle and
what each stage took in both (medians of the turns), and the residual, the median of the turns' own
with its quartiles: a machine's speed drifts, so that only what ran within seconds is compared.
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
CONTEXT, PROMPT = 80, 32
PROMPTS = 2
STAGES = ("target", "draft", "verification", "rest")


def cycles(lm, head, prompts: list[torch.Tensor], drawn: int) -> list[dict[str, float]]:
    """Mean seconds of a cycle by stage, a row for each prompt."""
    found = []
    for seed, prompt in enumerate(prompts):
        stats = cpmtp.speculative_generate(lm, head, prompt, max_new_tokens=drawn, seed=seed).stats
        stages = {k: v / max(stats.calls - 1, 1) for k, v in stats.stage_seconds.items()}
        found.append(stages | {"kept": stats.tokens_per_call})
    return found


def turn_of(head, latency: MeasuredLatency, decoded: list[dict[str, float]]) -> dict[str, float]:
    """Predicted and decoded, of one head in one turn."""
    sizes = sizes_of(head)
    time: HeadTime = next(t for t in latency.heads if t.is_of(sizes))
    stages = {f"decoded_{s}": statistics.mean(one[s] for one in decoded) for s in STAGES}
    told = {f"timed_{s}": getattr(time, s) for s in STAGES[1:]}
    curve = latency.curve()
    assert curve is not None
    predicted, cycle = latency.cycle_seconds(sizes), sum(stages.values())
    return (
        {"predicted": predicted, "decoded": cycle, "residual": predicted / cycle - 1}
        | {"tokens_per_call": statistics.mean(one["kept"] for one in decoded)}
        | {"call": curve.seconds(1, head.horizon), "timed_target": time.cycle - time.beside_target}
        | told
        | stages
    )


def row_of(head, turns: list[dict[str, float]]) -> dict:
    """Medians of the turns."""
    table = pd.DataFrame(turns)
    low, high = (table["residual"].quantile(q) for q in (0.25, 0.75))
    ends = {"residual_low": low, "residual_high": high, "turns": len(turns)}
    return sizes_of(head) | table.median().to_dict() | ends


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--name")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, in each turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--drawn", type=int, default=96, help="tokens after a prompt")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = cpmtp.load_language_model(given.model, dtype=given.dtype)
    heads = [new_head(lm, Candidate.of(lm, keywords).keywords, seed=1) for keywords in HEADS]
    prompts = [trial_ids(lm.vocab_size, PROMPT, seed) for seed in range(PROMPTS)]
    turns: list[list[dict[str, float]]] = [[] for _ in heads]
    for turn in range(given.turns + 1):
        decoded = [cycles(lm, head, prompts, given.drawn) for head in heads]
        latency = cpmtp.measure_latency(
            lm, heads, (1, 2, 4, 8), context=CONTEXT, seconds=given.seconds, rounds=3
        )
        for head, one, rows in zip(heads, decoded, turns, strict=True):
            if turn:  # the first one warms up
                rows.append(turn_of(head, latency, one))
    table = pd.DataFrame([row_of(head, rows) for head, rows in zip(heads, turns, strict=True)])
    name = f"{given.name or given.model}-{given.dtype}"
    told = {"model": given.name or given.model, "dtype": given.dtype, "threads": given.threads}
    table = table.assign(**told)
    write_text(given.out / f"{name}.csv", table.round(7).to_csv(index=False))
    print(table.round(6).T.to_string())


if __name__ == "__main__":
    main()
