"""A forecast written down before its head is trained, and what decoding with that head then comes
to.

Run from the checkout, and commit the folder of the first before the second is run:

    python data/studies/end_to_end.py forecast OUT MODEL [--budget N] [--probe N]
    python data/studies/end_to_end.py measure OUT MODEL [--name NAME] [--corpus FOLDER] [--dtype D]
    [--threads T] [--head FOLDER] [--timed N]

`forecast` probes three candidates and writes OUT/MODEL; `cpmtp forecast --out OUT/NAME` does for
`measure` as well, which is then told its model's folder, its name here, its text and precision.
`measure` trains the head of most tokens per second there as its probes were trained, to the budget,
from another seed; then it decodes, in turns with plain decoding, after prompts that no other stage
has seen, N of them timed one at a time; `--head` keeps the head, so that it is measured again
without training. Its row parts a miss into what the curve, the weighting of cycles and step times
have to do with it. Step times hold for a machine that is as free as it was when they were taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import pandas as pd
import torch

import cpmtp
from cpmtp.corpora import read_documents
from cpmtp.forecasting.candidates import Candidate, with_draft_vocabulary
from cpmtp.forecasting.held_out import held_out_texts, split_texts
from cpmtp.forecasting.outlook import HEAD
from cpmtp.forecasting.probes import training_windows
from cpmtp.heads.draft_head import DraftHead
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
SIZES = ("horizon", "rank", "transition_rank", "width", "blocks")
SEED = 500  # of training and decoding; forecasts have seed 0
TEXTS, TURNS, ELSEWHERE = 128, 15, 500


def forecast(out: Path, model: str, budget: int, probe: int) -> None:
    """What is expected, written before anything is trained to the budget."""
    lm = cpmtp.load_language_model(model)
    sizes = {"rows": ROWS, "length": LENGTH, "start": START, "drawn": DRAWN, "horizons": (4,)}
    latency = cpmtp.measure_latency(lm, CANDIDATES, (1, 2, 4), context=START + DRAWN, seconds=20)
    asked = {"budget": budget, "probe_budget": probe, "latency": latency, "out": out / model}
    found = cpmtp.forecast_heads(lm, CANDIDATES, **asked, **sizes)
    print(found.choice().sentence)
    print(found.table[found.table["budget"] == budget].to_string())


def best_head(folder: Path, budget: float) -> pd.Series:
    """The row of the head of most tokens per second at the budget, whatever else is faster."""
    table = pd.read_parquet(folder / "forecast.parquet")
    heads = table[(table["kind"] == HEAD) & (table["budget"] == budget)]
    return heads.loc[heads["tokens_per_second"].idxmax()]


def trained_as_probed(
    lm, row: pd.Series, told: dict, texts: list[str] | None, place: Path | None
) -> DraftHead:
    """A head of the row's sizes, from the text and by the settings of its probes."""
    if place is not None and (place / "config.json").exists():
        return DraftHead.from_pretrained(place).attach(lm).requires_grad_(False)
    sizes = {name: int(row[name]) for name in SIZES}
    asked = [{"form": row["form"], **sizes}]
    keywords = with_draft_vocabulary(lm, asked, texts, seed=told["seed"])[0]
    budget = {"rows": told["rows"], "length": told["length"], "positions": int(told["budget"])}
    chosen = Candidate.of(lm, keywords).keywords | budget
    settings = HeadTrainingSettings(**chosen, seed=SEED)
    # Windows enough for one pass.
    most = {"length": settings.length, "positions": 4 * settings.positions, "seed": SEED}
    windows, _ = training_windows(lm, texts, **most)
    return train_head(lm, settings, tokens=windows, out=place)


def measure(folder: Path, lm, documents: list[str] | None, place: Path | None, count: int) -> None:
    """The chosen head, trained and decoded with."""
    told = json.loads((folder / "forecast.json").read_text("utf-8"))["settings"]
    row = best_head(folder, told["budget"])
    training, held_back = (None, None) if documents is None else split_texts(documents)
    head = trained_as_probed(lm, row, told, training, place)

    law, start, drawn = SamplingLaw(), told["start"], told["drawn"]
    other = {"count": TEXTS, "start": start, "drawn": drawn, "seed": SEED + 1}
    # The forecast's own beginnings are those of the documents.
    held_back = held_back and [document[ELSEWHERE:] for document in held_back]
    texts = held_out_texts(lm, held_back, law=law, **other)
    along = texts.drawn * TEXTS / float(texts.cycles_of_head(head, [head.horizon], "block").sum())
    prompts = list(texts.tokens[:, :start])
    more = {"max_new_tokens": drawn + 1, "seed": SEED + 2}
    stats = cpmtp.speculative_generate(lm, head, prompts, **more).stats
    decoded, each = stats.tokens_per_call, torch.tensor(stats.tokens_per_call_by_row)
    ratios, here = timed(lm, head, prompts[:count], more, start + drawn)
    ratio = statistics.median(ratios)
    cycle, usual = row["cycle_seconds"], read_latency(folder / "latency.json").plain_seconds()
    found = {
        "model": folder.name,
        "option": row["option"],
        "horizon": head.horizon,
        "budget": told["budget"],
        "forecast": row["tokens_per_call"],
        "forecast_low": row["tokens_per_call_low"],
        "forecast_high": row["tokens_per_call_high"],
        "trained_along_texts": along,
        "decoded": decoded,
        "decoded_error": float(each.std()) / len(each) ** 0.5,
        "forecast_speedup": row["speedup"],
        "decoded_speedup": decoded / ratio,
        "forecast_cycle_over_plain": cycle / usual,
        "cycle_over_plain_here": statistics.median(here),
        "decoded_cycle_over_plain": ratio,
        "decoded_cycles_over_plain": ratios,
        "cycles_over_plain_here": here,
        "of_curve": along / row["tokens_per_call"] - 1,
        "of_cycles": decoded / along - 1,
    }
    write_parquet(folder / "measured.parquet", pd.DataFrame([found]))
    print(json.dumps(found, indent=1, default=float))


def timed(
    lm, head, prompts: list[torch.Tensor], more: dict, context: int
) -> tuple[list[float], list[float]]:
    """A cycle over a plain step, one request at a time, the reading of its prompt left out; and
    beside it as forecasts measure it. A machine's speed drifts, so that both have a value in every
    turn, of what ran within seconds of each other.
    """
    decoded, measured = [], []
    for _ in range(TURNS):
        latency = cpmtp.measure_latency(lm, [head], (1,), context=context, rounds=3, seconds=0.5)
        measured.append(latency.heads[0].cycle / latency.plain_seconds())
        each = []
        for drafter in (head, None):
            one = [
                cpmtp.speculative_generate(lm, drafter, [prompt], **more).stats
                for prompt in prompts
            ]
            # The first token of each comes with its prompt.
            each.append(
                sum(sum(s.stage_seconds.values()) for s in one) / sum(s.calls - 1 for s in one)
            )
        decoded.append(each[0] / each[1])
    return decoded, measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("forecast", "measure"))
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--budget", type=int, default=131072)
    parser.add_argument("--probe", type=int, default=32768)
    parser.add_argument("--name", help="of the forecast's folder; default: the model")
    parser.add_argument("--corpus", help="text of a forecast that had some")
    parser.add_argument("--head", type=Path, help="where the trained head is kept")
    parser.add_argument("--timed", type=int, default=8, help="prompts that are timed alone")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.stage == "forecast":
        forecast(given.out, given.model, given.budget, given.probe)
    else:
        lm = cpmtp.load_language_model(given.model, dtype=given.dtype)
        corpus = given.corpus and [document.text for document in read_documents([given.corpus])]
        folder = given.out / (given.name or given.model)
        measure(folder, lm, corpus, given.head, given.timed)


if __name__ == "__main__":
    main()
