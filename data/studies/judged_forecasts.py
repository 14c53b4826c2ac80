"""Forecasts from the curves of other groups, held against what was then trained: errors, how often
intervals cover, and what choosing by them costs beside naive rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from cpmtp.forecasting.learning_curves.families import damped_trend
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.learning_curves.shapes import reference_rows
from cpmtp.forecasting.learning_curves.tasks import (
    Tasks,
    checked_curves,
    short_name,
    tasks_of,
)
from cpmtp.latency import MeasuredLatency, read_latency
from cpmtp.whole_files import write_parquet

CONFIDENCE = 0.9
DIFFERENT = 0.03  # share of tokens per second from which a choice matters
EIGHT = 8
HORIZON = 4
ALWAYS = ("recurrent", "cp 1", "markov 64")
# Stored ceilings of three tokens, by candidate; a draft that reads all tokens may be exact.
FORMS = Path(__file__).parent / "forms" / "summary.csv"
CEILINGS = {"cp 1": "cp 1", "cp 2": "cp 2", "cp 4": "cp 4", "cp 8": "cp 8"}
CEILINGS |= {"markov 64": "markov 64 gated", "markov mixture 4 32": "markov_mixture 4, 16 gated"}
EXACT, UNKNOWN = {"recurrent": 3.0}, 1e-9


def judge(out: Path, table: pd.DataFrame) -> None:
    """Every group forecast from the others, and every group from the others' other forms; once from
    all probes, and once from those that end eight times below the largest target.
    """
    groups = sorted(table["group"].unique())
    if len(groups) < 3:
        raise SystemExit(f"{len(groups)} groups: at least three are needed to leave one out")
    kinds = {"all probes": table}
    if eightfold(table)["group"].nunique() == len(groups):
        kinds["eight times ahead"] = eightfold(table)
    rows, losses = [], []
    for kind, part in kinds.items():
        rows += [forecast_rows(part, g, None).assign(probes=kind) for g in groups]
        rows += [forecast_rows(part, g, f).assign(probes=kind) for g in groups for f in forms(part)]
        found = pd.DataFrame(list(choice_losses(out, part, groups)))
        losses.append(found.assign(probes=kind))
    told, chosen = pd.concat(rows, ignore_index=True), pd.concat(losses, ignore_index=True)
    for name, found in (("backtest", told), ("choices", chosen)):
        write_parquet(out / f"{name}.parquet", found)
    for kind in kinds:
        print(f"== {kind}")
        for left_out, part in told[told["probes"] == kind].groupby("left_out", sort=False):
            report(left_out, part)
        if len(chosen):
            report_choices(chosen[chosen["probes"] == kind])


def eightfold(table: pd.DataFrame) -> pd.DataFrame:
    """Every group's largest target, and its probes of at most an eighth of that."""
    largest = table.groupby("group")["budget"].transform("max")
    probes = (table["role"] == "probe") & (table["budget"] <= largest / EIGHT)
    found = table[probes | (table["budget"] == largest)]
    enough = found[found["role"] == "probe"].groupby("group")["budget"].nunique() >= 2
    return found[found["group"].isin(enough.index[enough])]


def forms(table: pd.DataFrame) -> list[str]:
    return sorted(set(table["form"]) - {"cp"})  # the reference's form stays


def forecast_rows(table: pd.DataFrame, group: str, form: str | None) -> pd.DataFrame:
    """Forecast and truth of a group's curves (of a form's) from the other groups (other forms)."""
    others, mine = table[table["group"] != group], table[table["group"] == group]
    if form is not None:
        others, mine = others[others["form"] != form], mine[mine["form"].isin([form, "cp"])]
    shapes, rows = ShapeChoice.of(others), []
    for tasks in tasks_of(checked_curves(mine)):
        logs, reference = shapes.forecast(tasks), reference_rows(tasks, shapes.reference)
        gains, weights = logs - tasks.logs[:, -1], shapes.seed_weights(tasks)
        wide = gains * shapes.widening(tasks.at / tasks.budgets[-1])
        half = shapes.half_widths(wide, tasks.noise, weights, confidence=CONFIDENCE)
        between = (np.abs(wide) + np.abs(wide[reference])) / 2
        apart = shapes.half_widths(between, 0 * gains, weights, differences=True)
        truths = tasks.truths
        found = {
            "group": group,
            "candidate": tasks.candidates,
            "seed": tasks.seeds,
            "times": tasks.at / tasks.budgets[-1],
            "horizon": int(tasks.most),
            "forecast": np.exp(logs),
            "straight": np.exp(straight(tasks)),
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


def straight(tasks: Tasks) -> np.ndarray:
    """Logarithms by a line of tokens per call through the last two probes."""
    return np.log(damped_trend(tasks.budgets, np.exp(tasks.logs), tasks.at, 1.0))


def report(left_out: str, rows: pd.DataFrame) -> None:
    rows = rows[rows["horizon"] == HORIZON]
    errors = rows["forecast"] / rows["truth"] - 1
    apart = rows[~rows["reference"]]
    off = (apart["difference"] - apart["true_difference"]).abs()
    print(f"left out: {left_out}; {len(rows)} forecasts, shapes {sorted(set(rows['shape']))}")
    for times, part in errors.abs().groupby(rows["times"]):
        print(f"  {times:g} x: error median {part.median():.1%}, 90 % {part.quantile(0.9):.1%}")
    print(f"  difference to the reference: median {off.median():.3f}, 90 % {off.quantile(0.9):.3f}")
    for group, part in errors.groupby(rows["group"]):
        print(f"  {group}: mean {part.mean():+.1%}, median {part.abs().median():.1%}")
    by_group = rows.groupby("group")["inside"].mean()
    print(
        f"  a {CONFIDENCE:.0%} interval covers {rows['inside'].mean():.1%}, the least of a group "
        f"{by_group.min():.1%} ({by_group.idxmin()}); of differences "
        f"{apart['difference_inside'].mean():.1%}"
    )


def ceilings_of(group: str, candidates: Sequence[str]) -> np.ndarray | None:
    """Logarithms of the candidates' ceilings in studies of the group's model; None where they were
    not computed; of candidates that they say nothing of next to nothing.
    """
    table = pd.read_csv(FORMS)
    mine = table[table["model"] == group.partition(",")[0]].set_index("draft")["tokens_per_call"]
    if not len(mine):
        return None
    known = {name: float(mine[draft]) for name, draft in CEILINGS.items()} | EXACT
    # A wider trunk has the ceiling of the narrow one.
    return np.log([known.get(short_name(name), UNKNOWN) for name in candidates])


def choice_losses(out: Path, table: pd.DataFrame, groups: list[str]) -> Iterator[dict]:
    """Share of tokens per second that each rule's choice is behind the best in hindsight."""
    for group in groups:
        others, mine = table[table["group"] != group], table[table["group"] == group]
        mine = mine[mine["horizon"] == HORIZON]
        file = out / "groups" / group / "latency.json"
        if not file.exists():
            continue  # nothing is known of its tokens per second
        shapes, latency = ShapeChoice.of(others), read_latency(file)
        named = checked_curves(mine).drop_duplicates("candidate").set_index("candidate")
        for whole in tasks_of(checked_curves(mine)):
            for seed in sorted(set(whole.seeds)):
                tasks = whole.of(whole.seeds == seed)
                speed = -np.log([cycle(latency, named.loc[c]) for c in tasks.candidates])
                truth = tasks.truths + speed
                for rule, scores in rules(shapes, tasks, group).items():
                    best = (scores + speed) == (scores + speed).max()
                    best |= rule == "random"  # the mean over all of them
                    loss = 1 - np.exp(truth[best].mean() - truth.max())
                    spread = 1 - np.exp(truth.min() - truth.max())
                    key = {"group": group, "seed": seed, "times": tasks.at / tasks.budgets[-1]}
                    yield key | {"rule": rule, "loss": loss, "spread": spread}


def cycle(latency: MeasuredLatency, row: pd.Series) -> float:
    names = ("form", "horizon", "rank", "transition_rank", "width", "blocks")
    return latency.cycle_seconds({name: row[name] for name in names})


def rules(shapes: ShapeChoice, tasks: Tasks, group: str) -> dict[str, np.ndarray]:
    """What each rule expects of every candidate; the highest, times its speed, is chosen."""
    told = {
        "forecast": shapes.forecast(tasks),
        "best probe": tasks.logs[:, -1],
        "last two points straight": straight(tasks),
        "random": np.zeros(len(tasks)),
    }
    for name in ALWAYS:
        chosen = np.array([short_name(candidate) == name for candidate in tasks.candidates])
        told[f"always {name}"] = np.where(chosen, 100.0, 0.0)
    ceilings = ceilings_of(group, tasks.candidates)
    return told if ceilings is None else told | {"ceilings": ceilings}


def report_choices(losses: pd.DataFrame) -> None:
    """Losses where candidates differ by more than 3 %, paired with the forecast's by group."""
    told = losses[losses["spread"] > DIFFERENT]
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
