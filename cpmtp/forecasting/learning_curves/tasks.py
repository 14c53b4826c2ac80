"""From a table of learning curves to extrapolations whose ends are known.

The table has a row per training: its `group` (a base model with a kind of text), the candidate's
sizes, `seed`, `budget` in positions, `role` (probe or target), and what it reached:
`tokens_per_call` on held-out documents, its standard error over documents `s_doc` (of the
logarithm), and, where they are known, the held-out `loss`, see
`cpmtp.forecasting.learning_curves.losses`, and the `limit`, tokens per call of an exact draft (the
horizon, unless a draft vocabulary leaves tokens out). Targets have other seeds and other documents
than probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

SIZES = ("form", "horizon", "rank", "transition_rank", "gated", "width", "blocks")
REFERENCE = {"form": "cp", "rank": 1}
_NEEDED = ("group", "horizon", "seed", "budget", "role", "tokens_per_call")


@dataclass(frozen=True)
class Tasks:
    """Curves with the same probe budgets that are to be extrapolated to the same budget.

    Attributes
    ----------
    budgets : (probes,) float array
        Positions, ascending.
    at : float
        The budget wanted.
    most : float
        The horizon.
    groups, candidates : (tasks,) object arrays
        Names.
    seeds : (tasks,) int array
    logs : (tasks, probes) float array
        Logarithms of tokens per call.
    truths : (tasks,) float array
        The same at the budget wanted; NaN where it is not known.
    noise : (tasks,) float array
        Variance of forecast minus truth over documents.
    truth_seeds : (tasks,) float array
        Trainings that the truth is the mean of.
    losses : (tasks, probes) float array
        NaN where they are not known.
    end_losses : (tasks,) float array
        At the budget wanted; NaN where it is not known.
    limits : (tasks,) float array
        Tokens per call of an exact draft.
    """

    budgets: Float[ndarray, " probes"]
    at: float
    most: float
    groups: ndarray
    candidates: ndarray
    seeds: ndarray
    logs: Float[ndarray, "tasks probes"]
    truths: Float[ndarray, " tasks"]
    noise: Float[ndarray, " tasks"]
    truth_seeds: Float[ndarray, " tasks"]
    losses: Float[ndarray, "tasks probes"]
    end_losses: Float[ndarray, " tasks"]
    limits: Float[ndarray, " tasks"]

    def __len__(self) -> int:
        return len(self.truths)

    def of(self, keep: ndarray) -> Tasks:
        """Some of them."""
        arrays = ("groups", "candidates", "seeds", "logs", "truths", "noise", "truth_seeds")
        chosen = {
            name: getattr(self, name)[keep] for name in (*arrays, "losses", "end_losses", "limits")
        }
        return Tasks(self.budgets, self.at, self.most, **chosen)


def checked_curves(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every column there is to be, and names of candidates in `candidate`.

    Raises
    ------
    ValueError
        If a column is missing, or a figure is not above 0.
    """
    missing = [name for name in _NEEDED if name not in table]
    if missing:
        raise ValueError(
            f"a table of learning curves without {', '.join(missing)}: expected the columns "
            f"{', '.join(_NEEDED)}, and s_doc and loss where they are known"
        )
    for name in ("budget", "tokens_per_call"):
        if not (table[name] > 0).all():
            raise ValueError(f"{name} {table[name].min()}: expected figures above 0")
    table = table.assign(**{n: table.get(n, d) for n, d in (("s_doc", 0.0), ("loss", np.nan))})
    limits = table["horizon"] if "limit" not in table else table["limit"].fillna(table["horizon"])
    table = table.assign(limit=np.maximum(limits, table["tokens_per_call"]))
    table = table.assign(log_tokens=np.log(table["tokens_per_call"].astype(float)))
    return table.assign(candidate=[candidate_name(row) for row in table.to_dict("records")])


def candidate_name(sizes: dict) -> str:
    """A candidate in a few words.

    Examples
    --------
    >>> candidate_name({"form": "markov", "rank": 1, "transition_rank": 64, "horizon": 4})
    'markov 64, n = 4'
    >>> candidate_name({"form": "cp", "rank": 8, "horizon": 4, "width": 384})
    'cp 8, n = 4, width 384'
    """
    form = str(sizes.get("form", "cp"))
    rank, transition = sizes.get("rank"), sizes.get("transition_rank")
    told = {
        "cp": [rank],
        "markov": [transition],
        "markov_mixture": [rank, transition],
    }.get(form, [])
    shown = " ".join(
        [form.replace("_", " "), *(str(int(n)) for n in told if n is not None and _known(n))]
    )
    more = [f"n = {int(sizes['horizon'])}"] if _known(sizes.get("horizon")) else []
    more += [f"{n} {int(sizes[n])}" for n in ("width", "blocks") if _known(sizes.get(n))]
    more += ["not gated"] if form.startswith("markov") and sizes.get("gated") is False else []
    return ", ".join([shown, *more])


def _known(value) -> bool:
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def tasks_of(table: pd.DataFrame, *, probes: Sequence[float] | None = None) -> list[Tasks]:
    """Every probes' curve of the table with every target of the same group and candidate.

    Parameters
    ----------
    table : pandas.DataFrame
        From `checked_curves`.
    probes : sequence of float, optional
        Budgets of the probes; default: those whose role is probe.
    """
    wanted = None if probes is None else set(map(float, probes))
    curves: dict[tuple, dict[int, list[dict]]] = {}
    targets: dict[tuple, dict[float, list[dict]]] = {}
    for row in sorted(table.to_dict("records"), key=lambda row: (row["seed"], row["budget"])):
        name = (row["group"], row["candidate"], float(row["horizon"]))
        if row["role"] == "target":
            targets.setdefault(name, {}).setdefault(float(row["budget"]), []).append(row)
        elif wanted is None or float(row["budget"]) in wanted:
            curves.setdefault(name, {}).setdefault(int(row["seed"]), []).append(row)
    found: dict[tuple, list[dict]] = {}
    for name in sorted(curves):
        for seed, curve in curves[name].items():
            budgets = tuple(float(row["budget"]) for row in curve)
            for at, ends in targets.get(name, {}).items():
                if len(budgets) >= 2 and at > budgets[-1]:
                    task = _task(curve, ends) | {"group": name[0], "candidate": name[1]}
                    found.setdefault((budgets, at, name[2]), []).append(task | {"seed": seed})
    return [
        _stacked(budgets, at, most, rows) for (budgets, at, most), rows in sorted(found.items())
    ]


def _task(curve: list[dict], ends: list[dict]) -> dict:
    """One seed's probes and what the trainings of a target came to, its seeds averaged."""
    return {
        "logs": [row["log_tokens"] for row in curve],
        "losses": [row["loss"] for row in curve],
        "limit": curve[-1]["limit"],
        "truth": np.mean([row["log_tokens"] for row in ends]),
        "truth_seeds": len(ends),
        "end_loss": np.exp(np.mean(np.log([row["loss"] for row in ends]))),
        "noise": curve[-1]["s_doc"] ** 2 + np.mean([row["s_doc"] ** 2 for row in ends]),
    }


def _stacked(budgets: tuple, at: float, most: float, rows: list[dict]) -> Tasks:
    def column(name: str, kind: type) -> ndarray:
        return np.array([row[name] for row in rows], dtype=kind)

    return Tasks(
        np.array(budgets),
        at,
        most,
        column("group", object),
        column("candidate", object),
        column("seed", int),
        column("logs", float),
        column("truth", float),
        column("noise", float),
        column("truth_seeds", float),
        column("losses", float),
        column("end_loss", float),
        column("limit", float),
    )


def seed_variance(table: pd.DataFrame, value: str = "log_tokens") -> float:
    """Pooled variance of a column between trainings that differ by their seed alone; 0 where no
    training was repeated.
    """
    columns = ["group", "candidate", "budget", "role"]
    groups = table.groupby(columns)[value]
    squares, freedom = groups.var(ddof=1).fillna(0.0), groups.size() - 1
    return float((squares * freedom).sum() / max(int(freedom.sum()), 1))


def differences_to(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Every row with the difference of its logarithm to the reference's of the same group, budget,
    seed and role, in `log_difference`; rows without one are dropped.
    """
    keys = ["group", "budget", "seed", "role"]
    of_reference = table[table["candidate"].map(short_name) == reference].groupby(
        keys, as_index=False
    )
    beside = of_reference["log_tokens"].mean().rename(columns={"log_tokens": "log_reference"})
    joined = table.merge(beside, on=keys)
    return joined.assign(log_difference=joined["log_tokens"] - joined["log_reference"])


def reference_of(table: pd.DataFrame) -> str:
    """What differences are taken to: cp 1 where it is there, else the first candidate; by its short
    name, so that it may have another trunk in every group.
    """
    for name, value in REFERENCE.items():
        if name in table:
            part = table[table[name] == value]
            table = part if len(part) else table
    return short_name(str(table["candidate"].iloc[0]))


def short_name(candidate: str) -> str:
    """Form and ranks alone.

    Examples
    --------
    >>> short_name("cp 8, n = 4, width 384")
    'cp 8'
    """
    return candidate.split(",")[0]
