"""A forecast written down before its head is trained, and what decoding with that head then comes
to.

Run from the checkout, and commit the folder of the first before the second is run:

    python data/studies/end_to_end.py forecast OUT MODEL [--budget N] [--probe N]
    python data/studies/end_to_end.py measure OUT MODEL

`forecast` probes three candidates and writes OUT/MODEL. `measure` trains the one chosen there as
its probes were trained, to the budget, from another seed; then it decodes, in turns with plain
decoding, after prompts that no other stage has seen. Its row parts a miss into what the curve, the
weighting of cycles and step times have to do with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

import cpmtp
from cpmtp.forecasting.candidates import Candidate
from cpmtp.forecasting.held_out import held_out_texts
from cpmtp.forecasting.probes import probe_precision, training_windows
from cpmtp.latency import read_latency
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.heads import HeadTrainingSettings, train_head
from cpmtp.whole_files import write_parquet

CANDIDATES = [
    {"form": "cp", "rank": 1, "horizon": 4},
    {"form": "markov", "transition_rank": 64, "horizon": 4},
    {"form": "recurrent", "horizon": 4},
]
ROWS, LENGTH, START, DRAWN = 4, 64, 32, 48
SEED = 500  # of training and decoding; forecasts have seed 0
TEXTS, TURNS, TIMED = 128, 3, 8


def forecast(out: Path, model: str, budget: int, probe: int) -> None:
    """What is expected, written before anything is trained to the budget."""
    lm = cpmtp.load_language_model(model)
    sizes = {"rows": ROWS, "length": LENGTH, "start": START, "drawn": DRAWN, "horizons": (4,)}
    latency = cpmtp.measure_latency(lm, CANDIDATES, (1, 2, 4), context=START + DRAWN, seconds=20)
    asked = {"budget": budget, "probe_budget": probe, "latency": latency, "out": out / model}
    found = cpmtp.forecast_heads(lm, CANDIDATES, **asked, **sizes)
    print(found.choice().sentence)
    print(found.table[found.table["budget"] == budget].to_string())


def measure(out: Path, model: str) -> None:
    """The chosen head, trained and decoded with."""
    lm, folder = cpmtp.load_language_model(model), out / model
    told = json.loads((folder / "forecast.json").read_text("utf-8"))
    choice, budget = told["choices"][0], int(told["settings"]["budget"])
    table = pd.read_parquet(folder / "forecast.parquet")
    row = table[(table["option"] == choice["name"]) & (table["budget"] == budget)].iloc[0]
    mine = next(c for c in CANDIDATES if c["form"] == row["form"])
    keywords = Candidate.of(lm, mine).keywords
    sizes = {"rows": ROWS, "length": LENGTH, "positions": budget, "seed": SEED}
    settings = HeadTrainingSettings(**keywords, **sizes, precision=probe_precision("cpu"))
    # Windows enough for one pass.
    windows, _ = training_windows(lm, None, length=LENGTH, positions=4 * budget, seed=SEED)
    head = train_head(lm, settings, tokens=windows)

    law, other = SamplingLaw(), {"count": TEXTS, "start": START, "drawn": DRAWN, "seed": SEED + 1}
    texts = held_out_texts(lm, None, law=law, **other)
    along = texts.drawn * TEXTS / float(texts.cycles_of_head(head, [4], "block").sum())
    prompts = list(texts.tokens[:, :START])
    more = {"max_new_tokens": DRAWN + 1, "seed": SEED + 2}
    stats = cpmtp.speculative_generate(lm, head, prompts, **more).stats
    alone = timed(lm, head, prompts, more)
    seconds = read_latency(folder / "latency.json")
    cycle, plain = row["cycle_seconds"], seconds.plain_seconds()
    found = {
        "model": model,
        "option": row["option"],
        "budget": budget,
        "forecast": row["tokens_per_call"],
        "forecast_low": row["tokens_per_call_low"],
        "forecast_high": row["tokens_per_call_high"],
        "trained_along_texts": along,
        "decoded": stats.tokens_per_call,
        "forecast_speedup": row["speedup"],
        "decoded_speedup": alone["plain"] / alone["head"],
        "forecast_cycle_over_plain": cycle / plain,
        "decoded_cycle_over_plain": alone["cycle"] / alone["plain"],
        "of_curve": along / row["tokens_per_call"] - 1,
        "of_cycles": stats.tokens_per_call / along - 1,
    }
    write_parquet(folder / "measured.parquet", pd.DataFrame([found]))
    print(json.dumps(found, indent=1, default=float))


def timed(lm, head, prompts: list[torch.Tensor], more: dict) -> dict[str, float]:
    """Seconds per token with the head and without, in turns, one request at a time; and per
    cycle: the fastest turn of each.
    """
    turns = []
    for _ in range(TURNS):
        spent = {}
        for name, drafter in (("head", head), ("plain", None)):
            one = [
                cpmtp.speculative_generate(lm, drafter, [prompt], **more).stats
                for prompt in prompts[:TIMED]
            ]
            seconds = sum(sum(s.stage_seconds.values()) for s in one)
            spent[name] = seconds / (TIMED * more["max_new_tokens"])
            if drafter is not None:
                spent["cycle"] = seconds / sum(s.calls for s in one)
        turns.append(spent)
    return {name: min(spent[name] for spent in turns) for name in turns[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("forecast", "measure"))
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--budget", type=int, default=131072)
    parser.add_argument("--probe", type=int, default=16384)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.stage == "forecast":
        forecast(given.out, given.model, given.budget, given.probe)
    else:
        measure(given.out, given.model)


if __name__ == "__main__":
    main()
