"""What the grid of learning curves says: levels, the first position of higher ranks, and who wins.

Run from the checkout: python data/studies/curves_summary.py OUT [FIGURES], where OUT holds the
`curves.parquet` that `curves.py` wrote. Four tables are written beside it, and two figures; the
fourth, `longer.csv`, is of budgets at which only the best were trained.

The unit is a document: its texts' tokens and cycles are added up. A candidate's tokens per call are
a quotient of sums; its error, and that of a difference of two candidates on the same documents, is
that of the documents' linearised residuals, with Student's quantile. Seeds are averaged: intervals
are over documents, not over seeds, whose own scatter has a column.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy import stats

from cpmtp.report.plots import figure_svg
from cpmtp.report.plots.study import series
from cpmtp.whole_files import write_text

REFERENCE = "cp 1"
SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
DRAWN = ("cp 1", "cp 8", "cp 16", "markov 64", "mixture 4, 32", "recurrent", "recurrent, wide")
SIZE = (7.0, 4.5)
LONGER = ["model", "name", "budget", "positions", "seed", "tokens_per_call", "tokens_per_call_low"]
LONGER += ["tokens_per_call_high", "survival_2", "survival_3", "survival_4", "parameters"]
LONGER += ["training_seconds", "draft_milliseconds"]


def name_of(row: pd.Series) -> str:
    """A candidate in words.

    Examples
    --------
    >>> row = {"form": "markov", "rank": 1, "transition_rank": 64, "width": 384}
    >>> name_of(pd.Series(row | {"over_text": False}))
    'markov 64, wide'
    """
    sizes = {
        "cp": f"cp {row['rank']}",
        "markov": f"markov {row['transition_rank']}",
        "markov_mixture": f"mixture {row['rank']}, {row['transition_rank']}",
        "recurrent": "recurrent over text" if row["over_text"] else "recurrent",
    }
    return sizes[row["form"]] + (", wide" if row["width"] > 192 else "")


@dataclass(frozen=True)
class Mean:
    """A number with the residual that each document leaves of it.

    Attributes
    ----------
    value : float
    residuals : (documents,) float array
        Their sum is zero; ``value`` moves by ``residual / documents`` with a document's weight.
    """

    value: float
    residuals: ndarray

    @classmethod
    def ratio(cls, above: ndarray, below: ndarray, documents: ndarray) -> Mean:
        """Sum of `above` over sum of `below`, of texts from these documents."""
        sums = pd.DataFrame({"above": above, "below": below}).groupby(documents).sum()
        value = float(sums["above"].sum() / sums["below"].sum())
        errors = (sums["above"] - value * sums["below"]) / sums["below"].mean()
        return cls(value, errors.to_numpy())

    @classmethod
    def average(cls, means: list[Mean], weights: list[float] | None = None) -> Mean:
        """Of numbers of the same documents; weights add up to one, or to zero in a difference."""
        shares = np.full(len(means), 1 / len(means)) if weights is None else np.array(weights)
        values = np.array([mean.value for mean in means])
        residuals = np.stack([mean.residuals for mean in means])  # (means, documents)
        return cls(float(shares @ values), shares @ residuals)

    def __sub__(self, other: Mean) -> Mean:
        return Mean.average([self, other], [1.0, -1.0])

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """By Student's quantile over documents."""
        count = len(self.residuals)
        error = self.residuals.std(ddof=1) / count**0.5
        half = float(stats.t.ppf((1 + level) / 2, count - 1) * error)
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Cell:
    """A candidate at a budget: its numbers, seeds averaged.

    Attributes
    ----------
    tokens : Mean
        Tokens per call.
    survival : tuple of Mean
        ``S_1 … S_n``.
    seeds : tuple of float
        Tokens per call of each.
    """

    tokens: Mean
    survival: tuple[Mean, ...]
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Cell:
        """From a row per seed."""
        tokens, survivals = [], []
        for _, row in rows.iterrows():
            documents = np.array(row["documents"])
            calls = np.array(row["calls_per_text"])  # (texts,)
            survived = np.stack(list(row["survived_per_text"]))  # (texts, horizon)
            drawn = np.full(len(calls), float(row["tokens_per_text"]))
            tokens.append(Mean.ratio(drawn, calls, documents))
            survivals.append([Mean.ratio(s, calls, documents) for s in survived.T])
        survival = tuple(Mean.average(list(each)) for each in zip(*survivals, strict=True))
        return cls(Mean.average(tokens), survival, tuple(mean.value for mean in tokens))


def cells_of(rows: pd.DataFrame) -> dict[tuple[str, int], Cell]:
    """By candidate and budget, of one model."""
    return {
        (str(name), int(str(budget))): Cell.of(same)
        for (name, budget), same in rows.groupby(["name", "budget"])
    }


def with_interval(prefix: str, mean: Mean) -> dict[str, float]:
    """Three columns."""
    low, high = mean.interval()
    return {prefix: mean.value, f"{prefix}_low": low, f"{prefix}_high": high}


def levels(rows: pd.DataFrame, cells: dict[tuple[str, int], Cell]) -> list[dict]:
    """A line per candidate and budget: what it earns, and its gain on rank 1."""
    found = []
    for (name, budget), cell in cells.items():
        same = rows[(rows["name"] == name) & (rows["budget"] == budget)]
        line = {"budget": budget, "candidate": name, "seeds": len(cell.seeds)}
        line |= with_interval("tokens_per_call", cell.tokens)
        line["between_seeds"] = max(cell.seeds) - min(cell.seeds)
        if (REFERENCE, budget) in cells:
            line |= with_interval("gain", cell.tokens - cells[REFERENCE, budget].tokens)
        for k, mean in enumerate(cell.survival[1:], start=2):
            line |= with_interval(f"survival_{k}", mean)
        line["parameters"] = int(same["parameters"].iloc[0])
        line["learning_rate"] = same["learning_rate"].iloc[0]
        line["training_seconds"] = same["training_seconds"].min()
        line["draft_milliseconds"] = rows[rows["name"] == name]["draft_milliseconds"].min()
        found.append(line)
    return found


def first_position(cells: dict[tuple[str, int], Cell]) -> list[dict]:
    """``S_2`` of every rank of form cp less that of rank 1, paired; in the narrow trunk, the only
    one that rank 1 was trained in.
    """
    found = []
    for (name, budget), cell in cells.items():
        of_cp = name.startswith("cp ") and "," not in name
        if of_cp and name != REFERENCE and (REFERENCE, budget) in cells:
            one = cells[REFERENCE, budget]
            line = {"budget": budget, "candidate": name, "survival_2": cell.survival[1].value}
            line["survival_2_of_cp_1"] = one.survival[1].value
            found.append(line | with_interval("difference", cell.survival[1] - one.survival[1]))
    return found


def at_seconds(
    cells: dict[tuple[str, int], Cell], seconds: dict[tuple[str, int], float], wanted: float
) -> dict[str, Mean]:
    """What every candidate earns after at most so many seconds of training: between two budgets
    along their logarithm; after its largest, what it had then.
    """
    found = {}
    for name in {name for name, _ in cells}:
        points = sorted((seconds[key], key) for key in cells if key[0] == name)
        if points[-1][0] <= wanted:
            found[name] = cells[points[-1][1]].tokens
        for (before, lower), (after, upper) in pairwise(points):
            if before <= wanted < after:
                share = float(np.log(wanted / before) / np.log(after / before))
                both = [cells[lower].tokens, cells[upper].tokens]
                found[name] = Mean.average(both, [1 - share, share])
    return found


def first_two(asked: str, value: float, means: dict[str, Mean]) -> dict:
    """The best and the next, and whether the interval of their difference tells them apart."""
    order = sorted(means, key=lambda name: -means[name].value)
    best, others = order[0], order[1:]
    line = {"equal": asked, "value": value, "candidates": len(means), "best": best}
    line |= with_interval("tokens_per_call", means[best])
    if not others:
        return line
    line["second"] = others[0]
    line |= with_interval("lead", means[best] - means[others[0]])
    tied = [name for name in others if (means[best] - means[name]).interval()[0] <= 0]
    return line | {"tied": "; ".join(tied)}


def winners(rows: pd.DataFrame, cells: dict[tuple[str, int], Cell]) -> list[dict]:
    """Who earns most at equal positions, seconds of training, and milliseconds of a draft."""
    seconds = {
        key: float(same["training_seconds"].min()) for key, same in rows.groupby(["name", "budget"])
    }
    found = []
    budgets = sorted({budget for _, budget in cells})
    for budget in budgets:
        here = {name: cell.tokens for (name, b), cell in cells.items() if b == budget}
        found.append(first_two("positions", budget * 1024, here))
    for wanted in SECONDS:
        means = at_seconds(cells, seconds, wanted)
        if len(means) > 1:
            found.append(first_two("training seconds", wanted, means))
    drafts = rows.groupby("name")["draft_milliseconds"].min().dropna().sort_values()
    whole = [b for b in budgets if all((name, b) in cells for name in drafts.index)]
    for count in range(1, len(drafts) + 1):
        allowed = {name: cells[name, whole[-1]].tokens for name in drafts.index[:count]}
        line = first_two("draft milliseconds", float(drafts.iloc[count - 1]), allowed)
        if line["best"] == drafts.index[count - 1]:  # what is slower and earns less is left out
            found.append(line | {"budget": whole[-1]})
    return found


def draw_curves(table: pd.DataFrame, model: str, ax) -> None:
    """Tokens per call against positions."""
    for i, name in enumerate(DRAWN):
        rows = table[(table["model"] == model) & (table["candidate"] == name)]
        rows = rows.sort_values("budget")
        middle = rows["tokens_per_call"]
        ends = (middle - rows["tokens_per_call_low"], rows["tokens_per_call_high"] - middle)
        narrow = name.removesuffix(", wide")
        style = series(DRAWN.index(narrow) if narrow in DRAWN else i)
        if narrow != name:  # a hollow mark of its form's own kind
            style |= {"markerfacecolor": "white"}
        label = name if narrow == name else f"wide {narrow}"
        ax.errorbar(rows["budget"], middle, yerr=ends, label=label, **style)
    ax.set_xscale("log", base=2)
    budgets = sorted(table["budget"].unique())
    ax.set_xticks(budgets, [f"{budget}k" for budget in budgets])
    ax.set_xlabel("training positions")
    ax.set_ylabel("tokens per call (of 4)")
    ax.legend()


def main(out: Path, figures: Path | None = None) -> None:
    """Tables, and figures where there is a place for them."""
    table = pd.read_parquet(out / "curves.parquet")
    table = table[table["tokens_per_call"].notna()]
    table = table.assign(name=table.apply(name_of, axis=1))
    longest = table[table["name"] == REFERENCE].groupby("model")["budget"].max().min()
    longer = pd.DataFrame(table[table["budget"] > longest][LONGER])
    table = table[table["budget"] <= longest]
    write_text(out / "longer.csv", longer.to_csv(index=False, float_format="%.5g"))
    parts: dict[str, list[pd.DataFrame]] = {"levels": [], "first_position": [], "winners": []}
    for model, rows in table.groupby("model"):
        cells = cells_of(rows)
        for name, lines in (
            ("levels", levels(rows, cells)),
            ("first_position", first_position(cells)),
            ("winners", winners(rows, cells)),
        ):
            part = pd.DataFrame(lines)
            part.insert(0, "model", model)
            parts[name].append(part)
    whole = {name: pd.concat(part, ignore_index=True) for name, part in parts.items()}
    for name, each in whole.items():
        write_text(out / f"{name}.csv", each.to_csv(index=False, float_format="%.5g"))
    for model in sorted(table["model"].unique()) if figures else ():
        title = f"{model}: how heads of four tokens learn"
        draw = partial(draw_curves, whole["levels"], model)
        own = f"curves-{model}"
        write_text(figures / f"{own}.svg", figure_svg(draw, title, name=own, size=SIZE) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
