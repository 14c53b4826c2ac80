"""Forecasts of trained heads held against heads that were then trained; goes on where it was
stopped.

Run from the checkout, one after the other:

    python data/studies/backtest.py curves OUT [--group NAME=MODEL[:CORPUS]] [--minutes M]
    python data/studies/backtest.py adopt OUT --table FILE
    python data/studies/backtest.py commit OUT --group NAME=MODEL[:CORPUS]
    python data/studies/backtest.py judge OUT [--ceilings FILE]
    python data/studies/backtest.py store OUT

`curves` trains every candidate side by side in every group (a base model with a kind of text; by
default both embedded models, each on its own samples and on what Python carries): two seeds of
probes of one, two and four units, and two seeds of targets of sixteen and thirty-two units on other
windows and other held-out texts. A unit is 8,192 positions, a step 256. `adopt` takes the table
that `data/studies/curves.py` makes in the place of the groups of own samples: its budgets up to
128k are probes, the larger ones targets (of the same seeds and documents, which flatters forecasts
a little). `commit` writes down, from the groups that are trained, what will be said of one that is
not. `judge` leaves one group out after another, of three at least: families, shapes and the
interval's scale come from the others. `store` puts the curves where forecasts borrow shapes from.

A training is kept as soon as it is done; twelve hours of one core for the four groups by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

import cpmtp
from cpmtp.corpora import read_documents, standard_library_documents
from cpmtp.forecasting.candidates import candidates_of, with_draft_vocabulary
from cpmtp.forecasting.held_out import held_out_texts, split_texts
from cpmtp.forecasting.learning_curves.families import damped_trend
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.learning_curves.shapes import reference_rows
from cpmtp.forecasting.learning_curves.tasks import Tasks, checked_curves, tasks_of
from cpmtp.forecasting.probes import ProbePlan, train_probes, training_windows
from cpmtp.latency import MeasuredLatency, read_latency
from cpmtp.sampling_law import SamplingLaw
from cpmtp.whole_files import write_parquet, write_text

HORIZON = 4
CANDIDATES = [
    {"form": "cp", "rank": 1},
    {"form": "cp", "rank": 4},
    {"form": "cp", "rank": 8},
    {"form": "markov", "transition_rank": 64},
    {"form": "markov_mixture", "rank": 4, "transition_rank": 32},
    {"form": "recurrent"},
]
PROBES, TARGETS = (1, 2, 4), (16, 32)
SEEDS = {"probe": (0, 1), "target": (100, 101)}
TEXTS, START, DRAWN = 64, 32, 48
CONFIDENCE = 0.9
LARGEST_PROBE = 128  # of the grid, in thousands of positions
COLUMNS = ["group", "role", "seed", "budget", "form", "horizon", "rank", "transition_rank"]
COLUMNS += ["width", "blocks", "tokens_per_call", "s_doc", "seconds_per_position"]


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
        if self.corpus == "python":
            return [d.text for d in standard_library_documents(self.model)]
        return [d.text for d in read_documents([self.corpus])]


GROUPS = [
    Group("code, own samples", "code"),
    Group("code, corpus", "code", "python"),
    Group("prose, own samples", "prose"),
    Group("prose, corpus", "prose", "python"),
]


@dataclass(frozen=True)
class Size:
    """How large everything is: smaller for a trial of the script itself."""

    unit: int
    rows: int
    length: int
    candidates: int

    def plan(self, role: str, seed: int) -> ProbePlan:
        """Budgets of probes or targets."""
        units = PROBES if role == "probe" else TARGETS
        budgets = tuple(k * self.unit for k in units)
        return ProbePlan(budgets, self.rows, self.length, (HORIZON,), seed=seed)


def curves(out: Path, groups: list[Group], size: Size, deadline: float) -> None:
    """Train what is missing, a group after another, and write the table of all."""
    for group in groups:
        lm, texts = cpmtp.load_language_model(group.model), group.texts()
        training, held_back = (None, None) if texts is None else split_texts(texts)
        asked = with_draft_vocabulary(lm, CANDIDATES[: size.candidates], training, seed=0)
        made = candidates_of(lm, [keywords | {"horizon": HORIZON} for keywords in asked])
        folder = out / "groups" / group.name
        time_heads(lm, [c.keywords for c in made], folder / "latency.json")
        for role, seeds in SEEDS.items():
            sides = None if held_back is None else held_back[role == "target" :: 2]
            judged_by = held_out_texts(
                lm,
                sides,
                count=TEXTS,
                start=START,
                drawn=DRAWN,
                law=SamplingLaw(),
                seed=7 if role == "probe" else 1007,
            )
            for seed in seeds:
                plan = size.plan(role, seed)
                largest = 4 * plan.budgets[-1]  # windows enough for one pass over own samples
                windows, _ = training_windows(
                    lm, training, length=size.length, positions=largest, seed=seed
                )
                place = folder / f"{role}-{seed}"
                table = train_probes(lm, made, plan, windows, judged_by, folder=place)
                rows = curve_rows(table, [c.sizes for c in made], group.name, role, seed)
                write_parquet(place / "curve.parquet", rows)
                print(time.strftime("%H:%M:%S"), group.name, role, seed, flush=True)
                if time.monotonic() > deadline:
                    print("the minutes are over; the same command goes on", file=sys.stderr)
                    write_parquet(out / "curves.parquet", read_curves(out))
                    return
    write_parquet(out / "curves.parquet", read_curves(out))


def time_heads(lm, heads: list[dict], file: Path) -> None:
    if not file.exists():
        cpmtp.measure_latency(lm, heads, (1, 2, 4, 8), context=80, seconds=60).write(file)


def curve_rows(
    table: pd.DataFrame, sizes: list[dict], group: str, role: str, seed: int
) -> pd.DataFrame:
    """A row per training from its texts: pooled tokens per call, its error over documents."""
    rows = []
    for (candidate, budget), part in table.groupby(["candidate", "budget"]):
        sums = part.groupby("document")[["tokens", "cycles"]].sum()
        ratio = sums["tokens"].sum() / sums["cycles"].sum()
        off = (sums["tokens"] - ratio * sums["cycles"]).std() / len(sums) ** 0.5
        found = {"tokens_per_call": ratio, "s_doc": off / sums["tokens"].mean()}
        costs = {"seconds_per_position": part["seconds_per_position"].iloc[0]}
        key = {"group": group, "role": role, "seed": seed, "budget": budget}
        rows.append(key | sizes[candidate] | found | costs)
    return pd.DataFrame(rows)


def read_curves(out: Path) -> pd.DataFrame:
    files = sorted((out / "groups").glob("*/*/curve.parquet"))
    return pd.concat(map(pd.read_parquet, files), ignore_index=True)


def adopt(out: Path, file: Path) -> None:
    """The grid of curves as groups: a base model's own samples each."""
    table = pd.read_parquet(file)
    table = table[table["tokens_per_call"].notna() & ~table["over_text"].astype(bool)]
    half = (table["tokens_per_call_high"] - table["tokens_per_call_low"]) / 2
    table = table.assign(
        group=table["model"] + ", own samples",
        role=np.where(table["budget"] <= LARGEST_PROBE, "probe", "target"),
        budget=table["positions"],
        s_doc=half / stats.norm.ppf(0.975) / table["tokens_per_call"],
        seconds_per_position=table["training_seconds"] / table["positions"],
    )
    for group in table["group"].unique():
        if (out / "groups" / group / "probe-0" / "probes.json").exists():
            raise SystemExit(f"{group} has curves of its own: one group must not be two")
    for (group, role, seed), rows in table.groupby(["group", "role", "seed"]):
        write_parquet(out / "groups" / group / f"{role}-{seed}" / "curve.parquet", rows[COLUMNS])
        lm = cpmtp.load_language_model(rows["model"].iloc[0])
        shapes = rows[["form", "rank", "transition_rank", "width", "blocks"]].drop_duplicates()
        heads = [keywords | {"horizon": HORIZON} for keywords in shapes.to_dict("records")]
        time_heads(lm, heads, out / "groups" / group / "latency.json")


def commit(out: Path, groups: list[Group]) -> None:
    """What the trained groups say of one that is not: written before its curves are."""
    table = read_curves(out)
    for group in groups:
        if (out / "groups" / group.name).exists():
            raise SystemExit(f"{group.name} has curves already: nothing is left to commit to")
        found = ShapeChoice.of(table[table["group"] != group.name], losses=False)
        told = {"level": found.level.words, "difference": found.difference.words}
        told |= {"of_level": asdict(found.of_level), "of_difference": asdict(found.of_difference)}
        told |= {"groups": list(found.groups), "date": time.strftime("%Y-%m-%d %H:%M")}
        write_text(out / f"committed-{group.name}.json", json.dumps(told, indent=1) + "\n")
        print(json.dumps(told))


def judge(out: Path, ceilings: dict[str, str]) -> None:
    """Every group forecast from the others, and every group from the others' other forms."""
    table = read_curves(out)
    groups = sorted(table["group"].unique())
    if len(groups) < 3:
        raise SystemExit(f"{len(groups)} groups: at least three are needed to leave one out")
    parts = [forecast_rows(table, group, None) for group in groups]
    parts += [forecast_rows(table, group, form) for group in groups for form in forms(table)]
    rows = pd.concat(parts, ignore_index=True)
    write_parquet(out / "backtest.parquet", rows)
    for left_out, part in rows.groupby("left_out", sort=False):
        report(left_out, part)
    losses = pd.DataFrame(list(choice_losses(out, table, groups, ceilings)))
    write_parquet(out / "choices.parquet", losses)
    report_choices(losses)


def forms(table: pd.DataFrame) -> list[str]:
    return sorted(set(table["form"]) - {"cp"})  # the reference's form stays


def forecast_rows(table: pd.DataFrame, group: str, form: str | None) -> pd.DataFrame:
    """Forecast and truth of a group's curves (of a form's) from the other groups (other forms)."""
    others, mine = table[table["group"] != group], table[table["group"] == group]
    if form is not None:
        others, mine = others[others["form"] != form], mine[mine["form"].isin([form, "cp"])]
    shapes, rows = ShapeChoice.of(others, losses=False), []
    for tasks in tasks_of(checked_curves(mine)):
        logs, reference = shapes.forecast(tasks), reference_rows(tasks, shapes.reference)
        gains, weights = logs - tasks.logs[:, -1], shapes.seed_weights(tasks)
        half = shapes.half_widths(gains, tasks.noise, weights, confidence=CONFIDENCE)
        between = (np.abs(gains) + np.abs(gains[reference])) / 2
        apart = shapes.half_widths(between, 0 * gains, weights, differences=True)
        truths = tasks.truths
        found = {
            "group": group,
            "candidate": tasks.candidates,
            "seed": tasks.seeds,
            "times": tasks.at / tasks.budgets[-1],
            "forecast": np.exp(logs),
            "truth": np.exp(truths),
            "inside": np.abs(logs - truths) <= half,
            "difference": np.exp(logs) - np.exp(logs[reference]),
            "true_difference": np.exp(truths) - np.exp(truths[reference]),
            "difference_inside": np.abs(logs - logs[reference] - truths + truths[reference])
            <= apart,
            "reference": reference == np.arange(len(tasks)),
            "shape": shapes.level.words,
        }
        rows.append(pd.DataFrame(found))
    kept = pd.concat(rows).assign(left_out="group" if form is None else "group and form")
    return kept if form is None else kept[~kept["reference"]]


def report(left_out: str, rows: pd.DataFrame) -> None:
    errors = rows["forecast"] / rows["truth"] - 1
    apart = rows[~rows["reference"]]
    off = (apart["difference"] - apart["true_difference"]).abs()
    print(f"left out: {left_out}; {len(rows)} forecasts, shapes {sorted(set(rows['shape']))}")
    for times, part in errors.abs().groupby(rows["times"]):
        print(f"  {times:g} x: error median {part.median():.1%}, 90 % {part.quantile(0.9):.1%}")
    print(f"  difference to the reference: median {off.median():.3f}, 90 % {off.quantile(0.9):.3f}")
    by_group = rows.groupby("group")["inside"].mean()
    print(
        f"  a {CONFIDENCE:.0%} interval covers {rows['inside'].mean():.1%}, the least of a group "
        f"{by_group.min():.1%} ({by_group.idxmin()}); of differences "
        f"{apart['difference_inside'].mean():.1%}"
    )


def choice_losses(
    out: Path, table: pd.DataFrame, groups: list[str], ceilings: dict[str, str]
) -> Iterator[dict]:
    """Share of tokens per second that each rule's choice is behind the best in hindsight."""
    for group in groups:
        others, mine = table[table["group"] != group], table[table["group"] == group]
        shapes = ShapeChoice.of(others, losses=False)
        latency = read_latency(out / "groups" / group / "latency.json")
        named = checked_curves(mine).drop_duplicates("candidate").set_index("candidate")
        for whole in tasks_of(checked_curves(mine)):
            for seed in sorted(set(whole.seeds)):
                tasks = whole.of(whole.seeds == seed)
                speed = -np.log([cycle(latency, named.loc[c]) for c in tasks.candidates])
                truth = tasks.truths + speed
                for rule, scores in rules(shapes, tasks, ceilings.get(group)).items():
                    best = (scores + speed) == (scores + speed).max()
                    best |= rule == "random"  # the mean over all of them
                    loss = 1 - np.exp(truth[best].mean() - truth.max())
                    spread = 1 - np.exp(truth.min() - truth.max())
                    key = {"group": group, "seed": seed, "times": tasks.at / tasks.budgets[-1]}
                    yield key | {"rule": rule, "loss": loss, "spread": spread}


def cycle(latency: MeasuredLatency, row: pd.Series) -> float:
    names = ("form", "horizon", "rank", "transition_rank", "width", "blocks")
    return latency.cycle_seconds({name: row[name] for name in names})


def rules(shapes: ShapeChoice, tasks: Tasks, ceiling: str | None) -> dict[str, np.ndarray]:
    """What each rule expects of every candidate; the highest, times its speed, is chosen."""
    told = {
        "forecast": shapes.forecast(tasks),
        "best probe": tasks.logs[:, -1],
        "last two points straight": damped_trend(tasks.budgets, tasks.logs, tasks.at, 1.0),
        "random": np.zeros(len(tasks)),
    }
    always = {"always recurrent": "recurrent", "always markov 64": "markov 64"}
    always |= {"ceilings": ceiling} if ceiling else {}
    for rule, name in always.items():
        chosen = np.array([c.startswith(str(name)) for c in tasks.candidates])
        told[rule] = np.where(chosen, 100.0, 0.0)
    return told


def report_choices(losses: pd.DataFrame) -> None:
    """Losses where candidates differ by more than 3 %, paired with the forecast's by group."""
    told = losses[losses["spread"] > 0.03]
    by_group = told.groupby(["group", "rule"])["loss"].mean().unstack()
    print(
        f"choices where candidates differ by more than 3 %: {len(told) // told['rule'].nunique()}"
    )
    for rule in by_group:
        behind = (by_group[rule] - by_group["forecast"]).dropna()
        half = np.nan
        if len(behind) > 1 and rule != "forecast":
            half = stats.t.ppf(0.975, len(behind) - 1) * behind.std() / len(behind) ** 0.5
        verdict = "" if rule == "forecast" else f"; more than the forecast's by {behind.mean():.2%}"
        verdict += "" if np.isnan(half) else f" +- {half:.2%}"
        verdict += " (a tie)" if half >= abs(behind.mean()) else ""
        print(f"  {rule:26} loses {by_group[rule].mean():.2%}{verdict}")


def store(out: Path) -> None:
    kept = COLUMNS[:-1]
    file = Path(__file__).parents[1] / "curves" / "stored.csv"
    write_text(file, read_curves(out)[kept].round(6).to_csv(index=False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("curves", "adopt", "commit", "judge", "store"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--group", action="append", help="NAME=MODEL or NAME=MODEL:CORPUS")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table", type=Path, help="of data/studies/curves.py, to adopt")
    parser.add_argument("--ceilings", type=Path, help="JSON: group to the candidate they choose")
    parser.add_argument("--unit", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    groups = [Group.of(text) for text in given.group] if given.group else GROUPS
    size = Size(given.unit, given.rows, given.length, given.candidates)
    deadline = time.monotonic() + 60 * given.minutes
    ceilings = json.loads(given.ceilings.read_text("utf-8")) if given.ceilings else {}
    stages: dict[str, Callable[[], None]] = {
        "curves": lambda: curves(given.out, groups, size, deadline),
        "adopt": lambda: adopt(given.out, given.table),
        "commit": lambda: commit(given.out, groups),
        "judge": lambda: judge(given.out, ceilings),
        "store": lambda: store(given.out),
    }
    stages[given.stage]()


if __name__ == "__main__":
    main()
