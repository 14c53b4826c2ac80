"""Probes: all candidates trained side by side, to several budgets, each with its whole decay."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.forecasting.candidates import Candidate
from cpmtp.forecasting.held_out import HeldOut
from cpmtp.forecasting.learning_curves.losses import DIVERGENCES
from cpmtp.language_model import sample_sequences
from cpmtp.training.heads import HeadTrainingSettings, train_heads, windows_of_text
from cpmtp.whole_files import write_parquet, write_text

FEWEST_STEPS = 32
STEPS_OF_PROBES = (0.25, 0.5, 1.0)  # budgets as shares of the largest
MOST_PASSES = 4
_SAMPLED_AT_ONCE = 128
_TIMED_STEPS = 3


@dataclass(frozen=True)
class ProbePlan:
    """How probes are trained and judged.

    Attributes
    ----------
    budgets : tuple of int
        Positions, ascending; every budget is a training of its own.
    rows, length : int
        Windows in a step and tokens in a window.
    horizons : tuple of int
        At which heads are judged; a head's own and shorter ones.
    rule : str
    precision : str
        Of the heads' matrix products, see `HeadTrainingSettings`.
    seed : int
        Of weights and windows.
    """

    budgets: tuple[int, ...]
    rows: int = 4
    length: int = 64
    horizons: tuple[int, ...] = (4,)
    rule: str = "block"
    precision: str = "float32"
    seed: int = 0

    @property
    def step(self) -> int:
        """Positions of an optimiser step."""
        return self.rows * self.length


def probe_budgets(largest: int, step: int) -> tuple[int, ...]:
    """A quarter, a half and the whole of the largest budget, in whole steps; those that are at
    least 32 steps long.

    Examples
    --------
    >>> probe_budgets(32768, 256), probe_budgets(20000, 256), probe_budgets(4000, 256)
    ((8192, 16384, 32768), (9984, 19968), ())
    """
    steps = [int(share * largest / step) for share in STEPS_OF_PROBES]
    return tuple(count * step for count in steps if count >= FEWEST_STEPS)


def largest_affordable(seconds: float, step_seconds: float, step: int) -> int:
    """Positions of the largest budget whose probes fit into a time, all candidates together."""
    steps = seconds / (step_seconds * sum(STEPS_OF_PROBES))
    return max(math.floor(steps), 0) * step


def training_windows(
    lm: Any, texts: Sequence[str] | None, *, length: int, positions: int, seed: int
) -> tuple[Int[Tensor, "count length"], int]:
    """Windows to train on, and the positions that there are of them in all.

    Of texts all windows; of the model's own samples a quarter of the largest budget, read four
    times at most, and as many more as anybody wants (the number is then 0).
    """
    if texts is not None:
        windows = windows_of_text(lm, texts, length)
        return windows, windows.numel()
    count = max(math.ceil(positions / length / MOST_PASSES), 16)
    sizes = [min(_SAMPLED_AT_ONCE, count - i) for i in range(0, count, _SAMPLED_AT_ONCE)]
    parts = [
        sample_sequences(lm, size, length, seed=seed * 1_000_003 + 7 * i)
        for i, size in enumerate(sizes)
    ]
    return torch.cat(parts), 0  # (count, length)


class _Hopeless(Exception):
    """The first step alone says that there is no time for probes."""


def step_seconds(
    lm: Any,
    candidates: Sequence[Candidate],
    plan: ProbePlan,
    windows: Tensor,
    *,
    most: float = math.inf,
) -> float:
    """Seconds of a step of all candidates, the base model's pass with it.

    The first step, which warms up, is not counted, unless it takes more than `most` seconds: then
    no other is timed.
    """
    ends: list[float] = []

    def noted(index: int, *_: Any) -> None:
        if index == len(candidates) - 1:
            ends.append(time.perf_counter())
            if ends[0] - begun > most:
                raise _Hopeless

    settings = _settings(candidates, plan, _TIMED_STEPS * plan.step)
    begun = time.perf_counter()
    try:
        train_heads(lm, settings, tokens=windows, callback=noted)
    except _Hopeless:
        return ends[0] - begun
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def train_probes(
    lm: Any,
    candidates: Sequence[Candidate],
    plan: ProbePlan,
    windows: Int[Tensor, "count length"],
    held_out: HeldOut,
    *,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Every candidate at every budget on the held-out texts.

    Parameters
    ----------
    folder : path, optional
        Where finished budgets are kept, a table each; the same folder again goes on from there.

    Returns
    -------
    pandas.DataFrame
        A row per candidate, budget, horizon and text: `candidate` (its number), `document`,
        `tokens` emitted, expected `cycles`, those of a draft that is exact over the tokens the head
        can draft, `exact_cycles`, and `divergence_2`, … summed over the tokens, see
        `cpmtp.forecasting.cycles.divergences_along`; and what a step of the head took per position,
        `seconds_per_position`, and of all together, `seconds_of_all`.

    Raises
    ------
    ValueError
        If the folder is of other probes.
    """
    if folder is not None:
        _claim(lm, folder, candidates, plan, windows, held_out)
    parts = []
    for budget in plan.budgets:
        part = folder and folder / f"probe-{budget}.parquet"
        if part is None or not part.exists():
            table = _trained(lm, candidates, plan, windows, held_out, budget=budget, folder=folder)
            if part is not None:
                write_parquet(part, table)
        else:
            table = pd.read_parquet(part)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _trained(
    lm: Any,
    candidates: Sequence[Candidate],
    plan: ProbePlan,
    windows: Tensor,
    held_out: HeldOut,
    *,
    budget: int,
    folder: Path | None,
) -> pd.DataFrame:
    spent, clock = [0.0] * len(candidates), [time.perf_counter()]

    def noted(index: int, *_: Any) -> None:
        now = time.perf_counter()
        spent[index] += now - clock[0]
        clock[0] = now

    places = (
        [folder / "heads" / f"{budget}-{i}" for i in range(len(candidates))] if folder else None
    )
    settings = _settings(candidates, plan, budget)
    heads = train_heads(lm, settings, places, tokens=windows, callback=noted)
    tables = []
    for index, head in enumerate(heads):
        horizons = [n for n in plan.horizons if n <= head.horizon]
        # (horizons, texts), (drafted, texts)
        cycles, divergences = held_out.scores_of_head(head, horizons, plan.rule)
        exact = held_out.cycles_of_exact(head, horizons, plan.rule)  # (horizons, texts)
        off = dict(zip(DIVERGENCES, held_out.drawn * divergences, strict=False))
        for horizon, row, best in zip(horizons, cycles, exact, strict=True):
            found = {"candidate": index, "budget": budget, "horizon": horizon}
            told = {"document": held_out.documents, "tokens": held_out.drawn}
            told |= {"cycles": row, "exact_cycles": best}
            costs = {
                "seconds_per_position": spent[index] / budget,
                "seconds_of_all": sum(spent) / budget,
            }
            tables.append(pd.DataFrame(found | told | off | costs))
    return pd.concat(tables, ignore_index=True)


def _settings(
    candidates: Sequence[Candidate], plan: ProbePlan, positions: int
) -> list[HeadTrainingSettings]:
    shared: dict[str, Any] = {"rows": plan.rows, "length": plan.length, "seed": plan.seed}
    shared["precision"] = plan.precision
    return [
        HeadTrainingSettings(**candidate.keywords, **shared, positions=positions)
        for candidate in candidates
    ]


def _short(keywords: dict[str, Any]) -> dict[str, Any]:
    """With the sum of a draft vocabulary in its place."""
    kept = keywords.get("vocabulary")
    return keywords if kept is None else keywords | {"vocabulary": [len(kept), sum(kept)]}


def _claim(
    lm: Any,
    folder: Path,
    candidates: Sequence[Candidate],
    plan: ProbePlan,
    windows: Tensor,
    held_out: HeldOut,
) -> None:
    """The folder is of these probes, or of none yet."""
    own = asdict(plan) | {"budgets": []}  # others may be added
    described = {
        # Earlier tables say nothing of these.
        "told": [*DIVERGENCES[:1], "exact_cycles"],
        "model": lm.fingerprint,
        "candidates": [_short(c.keywords) for c in candidates],
        "plan": own | {"horizons": list(plan.horizons)},
        "windows": [*windows.shape, int(windows.sum())],
        "held_out": [*held_out.tokens.shape, int(held_out.tokens.sum())],
    }
    text = json.dumps(described, sort_keys=True, default=list)
    file = folder / "probes.json"
    if not file.exists():
        write_text(file, text)
    elif file.read_text("utf-8") != text:
        raise ValueError(
            f"{str(folder)!r} holds probes of another model, text or plan: choose another folder, "
            "or delete it"
        )
