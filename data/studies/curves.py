"""How heads of every form learn: tokens per call against the training budget; goes on where it was
stopped.

Run from the checkout:
python data/studies/curves.py OUT [--minutes M] [--threads T] [--largest N] [--at-once C]
[--model NAME] [--only CANDIDATE …].

For each base model, budget and seed all candidates are trained side by side, on the same windows of
the base model's own samples in the same order, each budget with its full decay of the learning
rate. The rate of a form is the best of three at the smallest budget, judged on other samples than
those that the rows report. A row per base model, candidate, budget, rate and seed is written whole
as soon as it is known, and `curves.parquet` after each training holds all of them: tokens per call
in decoding after prompts from held-out documents (`forecast_cycles`) with an interval over
documents and the sums per text it is made of, survival, parameters, seconds of training on one
thread, and milliseconds of a draft.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

import cpmtp
from cpmtp.corpora import split_held_out, standard_library_documents
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.drafting import drafted_block
from cpmtp.resampling import normal_half_width
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.heads import HeadTrainingSettings, train_heads
from cpmtp.whole_files import write_parquet, write_tensors, write_text

MODELS, HORIZON = ("code", "prose"), 4
SMALL, LARGE = {"width": 192, "blocks": 1}, {"width": 384, "blocks": 2}
FORMS: list[dict[str, Any]] = [{"form": "cp", "rank": r} for r in (1, 2, 4, 8, 16)]
FORMS += [
    {"form": "markov", "rank": 1, "transition_rank": 64},
    {"form": "markov_mixture", "rank": 4, "transition_rank": 32},
    {"form": "recurrent"},
    {"form": "recurrent", "over_text": True},
]
IN_BOTH_SIZES = (FORMS[3], FORMS[5], FORMS[7])
RATES = (8e-3, 1.6e-2, 3.2e-2)
ROWS, LENGTH = 4, 256  # 1,024 positions a step
BUDGETS = {32: 2, 64: 2, 128: 2, 1024: 1, 4096: 1}  # thousands (1,024) of positions: seeds
SAMPLED_AT_ONCE = 128
PROMPT, NEW_TOKENS, TEXTS, CHOSEN_BY = 64, 128, 64, 16


@dataclass(frozen=True)
class Training:
    """Candidates to be trained side by side."""

    model: str
    budget: int
    seed: int
    tunes: bool = False

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.model}-{self.budget}k-{self.seed}" + ("-rates" if self.tunes else "")


def trainings(largest: int) -> Iterator[Training]:
    """All of them, what tells most per second first."""
    for seeds in (range(1), range(1, 2)):
        for budget in (b for b in BUDGETS if b < 1024):
            for model in MODELS:
                if budget == min(BUDGETS) and 0 in seeds:
                    yield Training(model, budget, 0, tunes=True)
                for seed in set(seeds) & set(range(BUDGETS[budget])):
                    yield Training(model, budget, seed)
    for budget in (b for b in BUDGETS if 1024 <= b <= largest):
        yield from (Training(model, budget, 0) for model in MODELS)


def candidates(out: Path, training: Training) -> list[dict[str, Any]]:
    """Shapes and learning rates of the heads that a training still has to give."""
    if training.tunes:
        found = [SMALL | form | {"learning_rate": rate} for form in FORMS for rate in RATES]
    else:
        best = best_rates(read_rows(out), training.model)
        shapes = [SMALL | form for form in FORMS] + [LARGE | form for form in IN_BOTH_SIZES]
        if training.budget > 1024:
            shapes = best_shapes(out, training.model, shapes)
        found = [shape | {"learning_rate": best[kind(shape)]} for shape in shapes]
    return [shape for shape in found if not row_file(out, training, shape).exists()]


def kind(shape: dict) -> str:
    """What shares a learning rate: a form; the step over the text is one of its own."""
    return shape["form"] + ("_over_text" if shape.get("over_text") else "")


def best_rates(table: pd.DataFrame, model: str) -> dict[str, float]:
    """The learning rate of each kind: of most tokens per call on the texts kept for choosing."""
    tuned = table[(table["model"] == model) & (table["tuning"])]
    kinds = tuned["form"] + tuned["over_text"].map({True: "_over_text", False: ""})
    means = tuned.groupby([kinds, "learning_rate"])["chosen_by"].mean().unstack()
    return means.idxmax(axis=1).to_dict()


def best_shapes(out: Path, model: str, shapes: list[dict]) -> list[dict]:
    """The three of most tokens per call at 1M positions."""
    table = read_rows(out)
    longest = table[(table["model"] == model) & (table["budget"] == 1024)]
    best = set(longest.nlargest(3, "tokens_per_call")["candidate"])
    return [shape for shape in shapes if label(shape) in best]


def label(shape: dict) -> str:
    """A candidate's name: everything but the learning rate."""
    own = {name: value for name, value in shape.items() if name != "learning_rate"}
    return "-".join(f"{name}_{value}" for name, value in sorted(own.items()))


def row_file(out: Path, training: Training, shape: dict) -> Path:
    """Where a row is kept."""
    name = f"{training.model}-{training.budget}k-{training.seed}-{label(shape)}"
    return out / "rows" / f"{name}-{shape['learning_rate']:g}.json"


def restore(out: Path) -> None:
    """Rows of a stored table as files again, so that a run goes on from the table alone."""
    table = out / "curves.parquet"
    for row in pd.read_parquet(table).to_dict("records") if table.exists() else ():
        name = f"{row['model']}-{row['budget']}k-{row['seed']}-{row['candidate']}"
        file = out / "rows" / f"{name}-{row['learning_rate']:g}.json"
        known = {key: value for key, value in row.items() if not is_missing(value)}
        if not file.exists():
            write_text(file, json.dumps(known, default=lambda value: value.tolist()) + "\n")


def is_missing(value: Any) -> bool:
    """Whether a cell of a table has nothing in it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_rows(out: Path) -> pd.DataFrame:
    """All rows there are."""
    files = sorted((out / "rows").glob("*.json"))
    return pd.DataFrame([json.loads(file.read_text("utf-8")) for file in files])


def windows(lm, out: Path, count: int, seed: int) -> Tensor:
    """The first so many windows of a seed's samples, (count, length); those of a smaller budget
    are among those of a larger one.
    """
    parts = []
    for block in range(-(-count // SAMPLED_AT_ONCE)):
        file = out / "samples" / f"{lm.name}-{seed}-{block}.safetensors"
        if not file.exists():
            drawn = cpmtp.sample_sequences(
                lm, SAMPLED_AT_ONCE, LENGTH, seed=1_000 * (seed + 1) + block
            )
            write_tensors(file, {"tokens": drawn.to(torch.int32)})
        parts.append(load_file(file)["tokens"].long())
    return torch.cat(parts)[:count]


def held_out_texts(lm, out: Path) -> tuple[Tensor, list[str]]:
    """Prompts from held-out documents with what the base model writes after them, (texts, time),
    and the documents' names.
    """
    documents = split_held_out(standard_library_documents(lm.name), 0.05)[1]
    encoded = [(d.name, lm.encode_document(d.text)) for d in documents]
    encoded = [(name, ids) for name, ids in encoded if len(ids) > 2 * PROMPT]
    generator = torch.Generator().manual_seed(0)
    names, prompts = [], []
    for i in range(TEXTS):
        name, ids = encoded[i % len(encoded)]
        start = int(torch.randint(len(ids) - PROMPT, (1,), generator=generator))
        names.append(name)
        prompts.append(ids[start : start + PROMPT])
    file = out / "samples" / f"{lm.name}-held-out.safetensors"
    if not file.exists():
        done = cpmtp.speculative_generate(lm, None, prompts, max_new_tokens=NEW_TOKENS, seed=101)
        write_tensors(file, {"tokens": torch.stack(done.sequences).to(torch.int32)})
    return load_file(file)["tokens"].long(), names


def cheapest_first(out: Path, training: Training, shapes: list[dict]) -> list[dict]:
    """Shapes by the seconds that they took per position where they were trained before."""
    table = read_rows(out)
    if table.empty:
        return shapes
    known = table[table["model"] == training.model]
    each = known["training_seconds"] / known["positions"]
    seconds = each.groupby(known["candidate"]).median()
    return sorted(shapes, key=lambda shape: seconds.get(label(shape), math.inf))


def run(
    out: Path,
    training: Training,
    deadline: float,
    at_once: int | None,
    only: list[str] | None = None,
) -> bool:
    """Train what is missing of a training, at most so many side by side, and write the rows; false
    where nothing was missing.
    """
    shapes = candidates(out, training)
    shapes = [shape for shape in shapes if only is None or label(shape) in only]
    if not shapes:
        return False
    # Rates are chosen among all of them.
    shapes = cheapest_first(out, training, shapes)[: None if training.tunes else at_once]
    lm = cpmtp.load_language_model(training.model)
    shared = HeadTrainingSettings(
        horizon=HORIZON,
        positions=training.budget * 1024,
        rows=ROWS,
        length=LENGTH,
        precision="bfloat16",
        seed=training.seed,
    )
    settings = [replace(shared, **shape) for shape in shapes]
    tokens = windows(lm, out, training.budget * 1024 // LENGTH, training.seed)
    folders = [out / "running" / row_file(out, training, shape).stem for shape in shapes]
    steps: list[list[float]] = [[] for _ in shapes]
    base = base_seconds(lm, tokens[:ROWS])
    last = time.process_time()

    def spent(index: int, step: int, loss) -> None:
        nonlocal last
        now = time.process_time()
        steps[index].append(now - last - (base if index == 0 else 0.0))
        last = now
        if time.monotonic() > deadline:
            raise TimeoutError

    heads = train_heads(lm, settings, folders, tokens=tokens, callback=spent)
    texts, names = held_out_texts(lm, out)
    others = windows(lm, out, CHOSEN_BY, seed=90)  # to choose learning rates by
    rows = []
    for shape, head, each in zip(shapes, heads, steps, strict=True):
        row = key_of(training, shape, head) | {"precision": shared.precision}
        if training.tunes:
            row["chosen_by"] = forecast_cycles(lm, head, others, start=PROMPT).tokens_per_call
        seconds = float(pd.Series(each).median()) * shared.planned_steps if each else None
        row |= {"training_seconds": seconds, "draft_milliseconds": draft_milliseconds(head)}
        rows.append(row | {"torch": torch.__version__, "threads": torch.get_num_threads()})
    best = best_rates(pd.concat([read_rows(out), pd.DataFrame(rows)]), training.model)
    for row, shape, head in zip(rows, shapes, heads, strict=True):
        if shape["learning_rate"] == best[kind(shape)]:
            row |= scores(lm, head, texts, names)
        write_text(row_file(out, training, shape), json.dumps(row) + "\n")
    write_parquet(out / "curves.parquet", read_rows(out))
    return True


def base_seconds(lm, windows_: Tensor, repeats: int = 3) -> float:
    """What the base model's part of a step takes, which all candidates share."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        lm.unembed(lm.hidden_states(windows_)).softmax(-1)
        times.append(time.process_time() - begun)
    return min(times)


def key_of(training: Training, shape: dict, head: DraftHead) -> dict:
    """What a row is about."""
    return {
        "model": training.model,
        "candidate": label(shape),
        "form": head.form,
        "over_text": head.over_text,
        "horizon": head.horizon,
        "rank": head.rank,
        "transition_rank": head.transition_rank,
        "gated": head.gated,
        "anchored": head.anchored,
        "width": shape["width"],
        "blocks": shape["blocks"],
        "budget": training.budget,
        "positions": training.budget * 1024,
        "seed": training.seed,
        "learning_rate": shape["learning_rate"],
        "tuning": training.tunes,
        "parameters": sum(p.numel() for p in head.parameters()),
    }


def scores(lm, head: DraftHead, texts: Tensor, names: list[str]) -> dict:
    """Tokens per call and survival on held-out texts, with an interval over their documents."""
    found = forecast_cycles(lm, head, texts, start=PROMPT)
    tokens = float(found.calls.sum()) * found.tokens_per_call / len(texts)  # of each text
    sums = pd.DataFrame({"calls": found.calls.numpy(), "tokens": tokens}).groupby(names).sum()
    errors = sums["tokens"] - found.tokens_per_call * sums["calls"]
    error = float(errors.std() / sums["calls"].mean() / len(sums) ** 0.5)
    half = normal_half_width(error, 0.95)
    return {
        "tokens_per_call": found.tokens_per_call,
        "tokens_per_call_low": found.tokens_per_call - half,
        "tokens_per_call_high": found.tokens_per_call + half,
        "documents": names,
        "tokens_per_text": tokens,
        "calls_per_text": found.calls.tolist(),
        "survived_per_text": found.survived.tolist(),
    } | {f"survival_{k + 1}": s for k, s in enumerate(found.survival.tolist())}


@torch.inference_mode()
def draft_milliseconds(head: DraftHead, repeats: int = 40) -> float | None:
    """Median time to draft after one known token; none of a head that is not decoded with."""
    if head.over_text:
        return None
    hidden, token = torch.randn(1, head.hidden_size), torch.zeros(1, dtype=torch.long)
    uniform, law, times = torch.rand(1, HORIZON, dtype=torch.float64), SamplingLaw(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        drafted_block(head, hidden, token).sample(law, uniform)
        times.append(time.perf_counter() - begun)
    return 1e3 * float(torch.tensor(times).median())


def main() -> None:
    """Everything that is missing, until the minutes are over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--largest", type=int, default=max(BUDGETS), help="budget, in thousands")
    parser.add_argument("--at-once", type=int, help="candidates side by side, cheapest first")
    parser.add_argument("--model", choices=MODELS, help="of one only")
    parser.add_argument("--only", nargs="*", help="names of candidates, as in the table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    deadline = time.monotonic() + 60 * given.minutes
    for folder in ("rows", "samples", "running"):
        (given.out / folder).mkdir(parents=True, exist_ok=True)
    restore(given.out)
    for training in trainings(given.largest):
        if given.model not in (None, training.model):
            continue
        print(time.strftime("%H:%M:%S"), training.name, flush=True)
        try:
            while run(given.out, training, deadline, given.at_once, given.only):
                pass
        except TimeoutError:
            print("the minutes are over; the same command goes on from here", file=sys.stderr)
            return


if __name__ == "__main__":
    main()
