"""Forecasts of trained heads held against heads that were then trained; goes on where it was
stopped.

Run from the checkout, one after the other:

    python data/studies/backtest.py curves OUT [--group NAME=MODEL[:CORPUS]] [--minutes M]
    python data/studies/backtest.py latency OUT --group NAME=MODEL[:CORPUS]
    python data/studies/backtest.py adopt OUT --table FILE
    python data/studies/backtest.py commit OUT --group NAME=MODEL[:CORPUS]
    python data/studies/backtest.py judge OUT
    python data/studies/backtest.py store OUT

`curves` trains every candidate side by side in every group (a base model with a kind of text; by
default both embedded models, each on its own samples and on what Python carries): two seeds of
probes of one, two and four units, and two seeds of targets of sixteen and thirty-two units on other
windows and other held-out texts. A unit is 8,192 positions, a step 256. First seeds of all groups
come first. `latency` times what every candidate's cycle takes, alone on the machine. `adopt` takes
the table that `data/studies/curve_losses.py` makes in the place of the groups of own samples: a
model's largest budget is a target, the others are probes (of the same documents, which flatters
forecasts a little). `commit` writes down, from the groups that are trained, what will be
said of one that is not. `judge` leaves one group out after another, of three at least: families,
shapes and the interval's scale come from the others. `store` puts the curves where forecasts borrow
shapes from.

A training is kept as soon as it is done; an hour of one core for the four groups by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from judged_forecasts import judge

import cpmtp
from cpmtp.corpora import read_documents, standard_library_documents
from cpmtp.forecasting.candidates import Candidate, candidates_of, with_draft_vocabulary
from cpmtp.forecasting.held_out import held_out_texts, split_texts
from cpmtp.forecasting.learning_curves.losses import DIVERGENCES, pooled_loss
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.probes import ProbePlan, train_probes, training_windows
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.head_settings import quick_precision
from cpmtp.whole_files import write_parquet, write_text

HORIZON, HORIZONS = 4, (2, 3, 4)
# The first ones are those that tell most where there is time for few.
CANDIDATES = [
    {"form": "cp", "rank": 1},
    {"form": "markov", "transition_rank": 64},
    {"form": "recurrent"},
    {"form": "cp", "rank": 4},
    {"form": "cp", "rank": 8},
    {"form": "markov_mixture", "rank": 4, "transition_rank": 32},
]
PROBES, TARGETS = (1, 2, 4), (16, 32)
SEEDS = {"probe": (0, 1), "target": (100, 101)}
LIBRARY = {"python-code": "code", "python-prose": "prose"}
TEXTS, START, DRAWN = 64, 32, 48
STAGES = ("curves", "latency", "adopt", "commit", "judge", "store")
TRUNK = ("width", "blocks")
COLUMNS = ["group", "role", "seed", "budget", "form", "horizon", "rank", "transition_rank"]
COLUMNS += [*TRUNK, "tokens_per_call", "s_doc", "loss", "limit", "seconds_per_position"]


@dataclass(frozen=True)
class Group:
    """A base model with a kind of text."""

    name: str
    model: str
    corpus: str | None = None

    @classmethod
    def of(cls, text: str) -> Group:
        """From NAME=MODEL or NAME=MODEL:CORPUS."""
        name, _, rest = text.partition("=")
        model, _, corpus = rest.partition(":")
        return cls(name, model, corpus or None)

    def texts(self) -> list[str] | None:
        """Its documents; None: the model's own samples."""
        if self.corpus is None:
            return None
        if self.corpus in LIBRARY:
            return [d.text for d in standard_library_documents(LIBRARY[self.corpus])]
        return [d.text for d in read_documents([self.corpus])]


GROUPS = [
    Group("code, own samples", "code"),
    Group("code, corpus", "code", "python-code"),
    Group("prose, own samples", "prose"),
    Group("prose, corpus", "prose", "python-prose"),
]


@dataclass(frozen=True)
class Size:
    """How large everything is: smaller for a trial of the script itself, or where time is short."""

    unit: int
    rows: int
    length: int
    candidates: int
    targets: tuple[int, ...] = TARGETS
    seeds: int = 2
    dtype: str = "float32"

    def plan(self, role: str, seed: int) -> ProbePlan:
        """Budgets of probes or targets."""
        budgets = tuple(k * self.unit for k in (PROBES if role == "probe" else self.targets))
        sizes = (self.rows, self.length, HORIZONS)
        return ProbePlan(budgets, *sizes, precision=quick_precision("cpu"), seed=seed)

    def model(self, name: str):
        """The base model of this name, in the precision asked for."""
        return cpmtp.load_language_model(name, dtype=self.dtype)

    def heads(self, lm, texts: list[str] | None) -> list[Candidate]:
        """Every candidate as this model has it."""
        asked = with_draft_vocabulary(lm, CANDIDATES[: self.candidates], texts, seed=0)
        return candidates_of(lm, [keywords | {"horizon": HORIZON} for keywords in asked])


def curves(out: Path, groups: list[Group], size: Size, deadline: float) -> None:
    """Train what is missing, a group after another, and write the table of all."""
    for which in range(size.seeds):
        for group in groups:
            for role, seeds in SEEDS.items():
                train(out / "groups" / group.name, group, size, role, seeds[which])
                write_parquet(out / "curves.parquet", read_curves(out))
                print(time.strftime("%H:%M:%S"), group.name, role, seeds[which], flush=True)
                if time.monotonic() > deadline:
                    print("the minutes are over; the same command goes on", file=sys.stderr)
                    return


def train(folder: Path, group: Group, size: Size, role: str, seed: int) -> None:
    """All candidates of a group at all budgets of a role, from one seed."""
    place, plan = folder / f"{role}-{seed}", size.plan(role, seed)
    if all((place / f"probe-{budget}.parquet").exists() for budget in plan.budgets):
        return
    lm, texts = size.model(group.model), group.texts()
    training, held_back = (None, None) if texts is None else split_texts(texts)
    made = size.heads(lm, training)
    held_out = held_out_texts(
        lm,
        None if held_back is None else held_back[role == "target" :: 2],
        count=TEXTS,
        start=START,
        drawn=DRAWN,
        law=SamplingLaw(),
        seed=7 if role == "probe" else 1007,
    )
    # Windows of own samples enough for one pass of the largest budget there may be.
    most = 4 * size.unit * max(PROBES if role == "probe" else TARGETS)
    windows, _ = training_windows(lm, training, length=size.length, positions=most, seed=seed)
    table = train_probes(lm, made, plan, windows, held_out, folder=place)
    rows = curve_rows(table, [c.sizes for c in made], group.name, role, seed)
    write_parquet(place / "curve.parquet", rows)


def time_heads(out: Path, groups: list[Group], size: Size, seconds: float) -> None:
    """What a cycle of every candidate takes; groups of one model share it."""
    table = read_curves(out)
    for model in dict.fromkeys(group.model for group in groups):
        names = [group.name for group in groups if group.model == model]
        shapes = table[table["group"].isin(names)][["form", "rank", "transition_rank", *TRUNK]]
        sizes = shapes.drop_duplicates().to_dict("records")
        heads = [keywords | {"horizon": HORIZON} for keywords in sizes]
        lm, calls = size.model(model), (1, 2, 4, 8)
        found = cpmtp.measure_latency(lm, heads, calls, context=START + DRAWN, seconds=seconds)
        for name in names:
            found.write(out / "groups" / name / "latency.json")


def curve_rows(
    table: pd.DataFrame, sizes: list[dict], group: str, role: str, seed: int
) -> pd.DataFrame:
    """A row per training and horizon from its texts: pooled tokens per call, its error over
    documents, the loss, and tokens per call of an exact draft.
    """
    rows = []
    for (candidate, budget, horizon), part in table.groupby(["candidate", "budget", "horizon"]):
        sums = part.groupby("document")[["tokens", "cycles", "exact_cycles"]].sum()
        ratio = sums["tokens"].sum() / sums["cycles"].sum()
        off = (sums["tokens"] - ratio * sums["cycles"]).std() / len(sums) ** 0.5
        found = {"tokens_per_call": ratio, "s_doc": off / sums["tokens"].mean()}
        divergences = part[list(DIVERGENCES[: horizon - 1])].sum() / part["tokens"].sum()
        found["loss"] = float(pooled_loss(divergences.to_numpy()))
        found["limit"] = sums["tokens"].sum() / sums["exact_cycles"].sum()
        costs = {"seconds_per_position": part["seconds_per_position"].iloc[0]}
        key = {"group": group, "role": role, "seed": seed, "budget": budget}
        rows.append(key | sizes[candidate] | {"horizon": horizon} | found | costs)
    return pd.DataFrame(rows)


def read_curves(out: Path) -> pd.DataFrame:
    files = sorted((out / "groups").glob("*/*/curve.parquet"))
    return pd.concat(map(pd.read_parquet, files), ignore_index=True)


def adopt(out: Path, file: Path) -> None:
    """The grid of curves as groups: a base model's own samples each; of every model the largest
    budget is a target.
    """
    table = pd.read_parquet(file)
    largest = table.groupby("model")["budget"].transform("max")
    table = table.assign(
        group=table["model"] + ", own samples",
        role=np.where(table["budget"] < largest, "probe", "target"),
        budget=table["positions"],
    )
    for group in table["group"].unique():
        if (out / "groups" / group / "probe-0" / "probes.json").exists():
            raise SystemExit(f"{group} has curves of its own: one group must not be two")
    for group in table["group"].unique():
        for file in sorted((out / "groups" / group).glob("*/curve.parquet")):
            file.unlink()
    for (group, role, seed), rows in table.groupby(["group", "role", "seed"]):
        place = out / "groups" / group / f"{role}-{seed}"
        write_parquet(place / "curve.parquet", rows.reindex(columns=COLUMNS))


def commit(out: Path, groups: list[Group]) -> None:
    """What the trained groups say of one that is not: written before its curves are."""
    table = read_curves(out)
    for group in groups:
        if (out / "groups" / group.name).exists():
            raise SystemExit(f"{group.name} has curves already: nothing is left to commit to")
        found = ShapeChoice.of(table[table["group"] != group.name])
        told = {"level": found.level.words, "difference": found.difference.words}
        told |= {"of_level": asdict(found.of_level), "of_difference": asdict(found.of_difference)}
        told |= {"groups": list(found.groups), "date": time.strftime("%Y-%m-%d %H:%M")}
        write_text(out / f"committed-{group.name}.json", json.dumps(told, indent=1) + "\n")
        print(json.dumps(told))


def store(out: Path) -> None:
    """The curves, in the place of those stored before."""
    file = Path(__file__).parents[1] / "curves" / "stored.csv"
    kept = [name for name in COLUMNS if name != "seconds_per_position"]
    whole = read_curves(out)[kept].sort_values([*kept[:8], "width"], kind="stable")
    write_text(file, whole.round(6).to_csv(index=False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group", action="append", help="NAME=MODEL or NAME=MODEL:CORPUS")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table", type=Path, help="of data/studies/curve_losses.py")
    parser.add_argument("--unit", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES), help="the first")
    parser.add_argument("--targets", default="16,32", help="in units")
    parser.add_argument("--seeds", type=int, default=2, help="of probes and of targets")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=60, help="of latency, for a model")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    groups = [Group.of(text) for text in given.group] if given.group else GROUPS
    targets = tuple(map(int, given.targets.split(",")))
    sizes = (given.unit, given.rows, given.length, given.candidates)
    size = Size(*sizes, targets, given.seeds, given.dtype)
    deadline = time.monotonic() + 60 * given.minutes
    stages: dict[str, Callable[[], None]] = {
        "curves": lambda: curves(given.out, groups, size, deadline),
        "latency": lambda: time_heads(given.out, groups, size, given.seconds),
        "adopt": lambda: adopt(given.out, given.table),
        "commit": lambda: commit(given.out, groups),
        "judge": lambda: judge(given.out, read_curves(given.out)),
        "store": lambda: store(given.out),
    }
    stages[given.stage]()


if __name__ == "__main__":
    main()
