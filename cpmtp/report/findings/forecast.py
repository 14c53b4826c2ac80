"""What stands below a forecast's answer: a picture, tables, and where tokens are lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd

from cpmtp.ranking.parts import OUTCOME, best_fits
from cpmtp.report import plots
from cpmtp.report.blocks import Figure, Section, Table, Text
from cpmtp.report.first_screen.forecast import (
    TITLE,
    device_hours,
    option_name,
    positions,
    requests,
)
from cpmtp.report.first_screen.stored_forecast import HEAD, LOOKUP, PLAIN, HeadsForecast
from cpmtp.report.words import percent

_MOST = 8  # heads in a picture
_RECURRENT = "recurrent"
_CANDIDATE = ["horizon", "form", "rank", "transition_rank"]
_USUAL: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}
_LOST = (
    "Of the tokens per call that an exact draft would give: what a trained head is forecast to "
    "earn, what learning loses (its ceiling less that), and what its form and rank lose (no "
    "training brings it back). A recurrent head's ceiling is the exact draft."
)
_FORMS = (
    "Heads: cp of rank r mixes r products of independent tokens (rank 1: independent heads); "
    "markov corrects each token by the one before it, through a table of the transition rank; a "
    "markov mixture does both; recurrent reads all drafted tokens. Prompt lookup copies what "
    "followed the same words earlier in the text."
)


def forecast_sections(
    found: HeadsForecast, ceilings: pd.DataFrame | None = None
) -> Iterator[Section]:
    """The picture and the tables of a forecast.

    Parameters
    ----------
    found : HeadsForecast
    ceilings : pandas.DataFrame, optional
        Of `ceilings_beside`.
    """
    yield Section(
        f"{TITLE}: {found.model}" if found.model else TITLE,
        (
            Text(_conditions(found)),
            _picture(found, ceilings),
            _learning(found),
        ),
    )
    options = (_options_table(found.candidates, found), Text(_FORMS, "note"))
    yield Section("Every option", options, level=3)
    yield Section("By load and budget", (*_by_load(found), _by_budget(found)), level=3)
    if ceilings is not None:
        yield from _losses(found, ceilings)
    yield Section(
        "Every head at every horizon", (_options_table(found.options, found),), 3, folded=True
    )


def ceilings_beside(found: HeadsForecast, table: pd.DataFrame, model: str) -> pd.DataFrame | None:
    """What a forecast's heads may be held against; None unless the study has drafts told the first
    token, under the same temperature, top-k and top-p.

    Parameters
    ----------
    found : HeadsForecast
    table : pandas.DataFrame
        A study's.
    model : str
        Whose rows.

    Returns
    -------
    pandas.DataFrame
        `horizon`, `form`, `rank`, `transition_rank`, and `ceiling`: tokens per call of the best
        fits, domains counted alike.
    """
    settings = found.told["settings"]
    rows = table[table["model"] == model]
    rows = rows[rows["anchored"]] if "anchored" in rows else rows[:0]
    for name, usual in _USUAL.items():
        asked = settings.get(name, usual)
        given = rows[name] if name in rows else pd.Series(usual, index=rows.index, dtype=object)
        rows = rows[given.isna() if asked is None else given == asked]
    if not (rows["status"] != "failed").any():
        return None
    best = best_fits(rows.assign(**{n: rows.get(n, usual) for n, usual in _ONE_FORM.items()}))
    means = best.groupby([*_CANDIDATE, "domain"])[OUTCOME].mean().groupby(_CANDIDATE).mean()
    return means.rename("ceiling").reset_index()


_ONE_FORM: dict[str, Any] = {"form": "cp", "transition_rank": 0}


def _conditions(found: HeadsForecast) -> str:
    load, settings = found.choice["load"], found.told["settings"]
    stop, asked = found.choice.get("stop", math.inf), ""
    if found.row["kind"] == HEAD and found.budget < found.asked:
        asked = f" of the {positions(found.asked)} that were asked for"
    enough = " Twice the training would add less than 1 %." if 0 < stop <= found.budget else ""
    kept = [f"temperature {settings.get('temperature', 1.0):g}"]
    kept += [
        f"top-{name} {settings[f'top_{name}']:g}" for name in "kp" if settings.get(f"top_{name}")
    ]
    return (
        f"After {positions(found.budget)} of training{asked}, {requests(load)}, {', '.join(kept)}; "
        f"{percent(found.confidence)} intervals. Each head at its own fastest horizon (tokens a "
        "call emits at most). Slow tenth: tokens per call that nine of ten requests exceed. In the "
        f"answer above, what the best of several forecasts owes to luck is taken off.{enough}"
    )


def _options_table(options: pd.DataFrame, found: HeadsForecast) -> Table:
    rows, marked = [], set()
    best = (found.choice["name"], found.choice["horizon"])
    for place, (_, row) in enumerate(options.iterrows()):
        if (row["option"], row["horizon"]) == best:
            marked.add(place)
        plain, trained = row["kind"] == PLAIN, row["kind"] == HEAD
        rows.append(
            (
                _label(row),
                str(row["horizon"]),
                "1" if plain else _with_ends(row, "speedup"),
                "1" if plain else _with_ends(row, "tokens_per_call"),
                "" if plain else f"{row['tenth_percentile']:.2f}",
                f"{row['device_hours']:.2g}" if trained else "",
            )
        )
    head = (
        *("option", "horizon", "times the speed", "tokens per call", "slow tenth"),
        "device-hours to train",
    )
    return Table(head, tuple(rows), frozenset(marked))


def _with_ends(row: pd.Series, name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"


def _label(row: pd.Series) -> str:
    return {LOOKUP: "prompt lookup", PLAIN: "plain decoding"}.get(row["kind"], row["option"])


def _heads(found: HeadsForecast) -> pd.DataFrame:
    """The heads of a picture, the fastest first."""
    options = found.candidates
    return options[options["kind"] == HEAD].head(_MOST)


def _picture(found: HeadsForecast, ceilings: pd.DataFrame | None) -> Figure:
    options, heads = found.candidates, _heads(found)
    tokens = pd.Series([_ceiling(row, ceilings) for _, row in heads.iterrows()], index=heads.index)
    heads = heads.assign(
        label=[f"{row.option}, n = {row.horizon}" for row in heads.itertuples()],
        ceiling=tokens * found.plain_seconds / heads["cycle_seconds"],
    )
    lookup = options.loc[options["kind"] == LOOKUP, "speedup"]
    words = "Times the speed of plain decoding (line at 1) that each head would reach"
    if len(heads):
        best = heads.iloc[0]
        words += f": {best['option']} {_with_ends(best, 'speedup')}"
    words += f", prompt lookup {lookup.iloc[0]:.2f} without training." if len(lookup) else "."
    if heads["ceiling"].notna().any():
        words += " Ticks: ceilings, what no training exceeds; a recurrent head's is an exact draft."
    if heads["ceiling"].isna().any():
        words += " No tick: no study here fitted that form, rank or horizon."
    draw = partial(
        plots.plot_head_forecast, heads, lookup=float(lookup.iloc[0]) if len(lookup) else None
    )
    return Figure("What each head would bring", words, draw, found.model)


def _ceiling(row: pd.Series, ceilings: pd.DataFrame | None) -> float:
    """Tokens per call of the best possible draft of a head's form, rank and horizon; NaN where it
    is not known.
    """
    if row["form"] == _RECURRENT:
        return float(row["horizon"])
    if ceilings is None:
        return math.nan
    same = (ceilings[_CANDIDATE] == row[_CANDIDATE]).all(axis=1)
    return float(ceilings.loc[same, "ceiling"].iloc[0]) if same.any() else math.nan


def _learning(found: HeadsForecast) -> Figure:
    """Speed by budget, of the heads of the picture at the horizons of the picture."""
    shown = _heads(found)[["option", "horizon"]]
    rows = found.table.merge(shown, on=["option", "horizon"])
    plain = found.table.loc[found.table["kind"] == PLAIN, "tokens_per_second"].iloc[0]
    ends = {
        f"speedup{end}": rows[f"tokens_per_second{end}"] / plain for end in ("", "_low", "_high")
    }
    words = (
        f"Times the speed of plain decoding by positions of training, with the range of "
        f"{shown['option'].iloc[0] if len(shown) else 'none'}; the answer is for the marked budget."
    )
    draw = partial(plots.plot_speed_by_budget, rows.assign(**ends), budget=found.budget)
    return Figure("What more training brings", words, draw, found.model)


def _by_load(found: HeadsForecast) -> Sequence[Table | Text]:
    choices = found.choices
    if len(choices) == 1:
        return [
            Text(
                f"One load was forecast, {requests(choices[0]['load'])}; `cpmtp forecast --loads "
                "1,8` forecasts others, which need other step times."
            )
        ]
    rows = tuple(
        (
            str(one["load"]),
            option_name(one["name"]),
            str(one["horizon"]),
            f"{one['speedup']:.2f}",
            f"{one['tokens_per_call'][0]:.2f}",
            percent(one["sure"]),
        )
        for one in choices
    )
    return [
        Table(("load", "fastest", "horizon", "times the speed", "tokens per call", "sure"), rows)
    ]


def _by_budget(found: HeadsForecast) -> Table:
    """A row for every stretch of budgets with the same winner."""
    rows: list[tuple[str, str, list[pd.Series]]] = []
    for _, part in found.table.groupby("budget"):
        best = part.loc[part["tokens_per_second"].idxmax()]
        named = (_label(best), str(best["horizon"]))
        if not rows or rows[-1][:2] != named:
            rows.append((*named, []))
        rows[-1][2].append(best)
    cells = tuple(
        (
            _span([f"{positions(row['budget']).removesuffix(' positions')}" for row in some]),
            name,
            horizon,
            _span([f"{row['speedup']:.2f}" for row in some]),
            _span([f"{row['tokens_per_call']:.2f}" for row in some]),
            _span([device_hours(row["device_hours"]).split()[0] for row in some])
            if some[0]["kind"] == HEAD
            else "",
        )
        for name, horizon, some in rows
    )
    head = (
        *("positions of training", "fastest", "horizon", "times the speed", "tokens per call"),
        "device-hours to train",
    )
    return Table(head, cells)


def _span(values: list[str]) -> str:
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _losses(found: HeadsForecast, ceilings: pd.DataFrame) -> Iterator[Section]:
    """Exact draft, ceiling, trained head: at the largest horizon that study and forecast share."""
    options = found.options[found.options["kind"] == HEAD]
    shared = set(options["horizon"]) & set(ceilings["horizon"])
    if not shared:
        return
    heads = options[options["horizon"] == max(shared)].head(_MOST)
    heads = heads.assign(
        label=heads["option"], ceiling=[_ceiling(row, ceilings) for _, row in heads.iterrows()]
    )
    rows = tuple(
        (
            row.option,
            f"{row.horizon}",
            *(("not fitted", "") if math.isnan(row.ceiling) else _parts(row)),
            f"{row.tokens_per_call:.2f}",
        )
        for row in heads.itertuples()
    )
    head = ("head", "exact draft", "lost to form and rank", "lost to learning", "trained head")
    words = (
        "Tokens per call of an exact draft, parted into what a trained head is forecast to earn "
        "and what is lost to learning and to form and rank; light where the form was not fitted."
    )
    figure = Figure(
        f"Where tokens are lost, n = {max(shared)}",
        words,
        partial(plots.plot_losses_by_head, heads),
        found.model,
    )
    blocks = (Text(_LOST), Table(head, rows), figure)
    yield Section("Where tokens are lost, by form", blocks, level=3)


def _parts(row) -> tuple[str, str]:
    return f"{row.horizon - row.ceiling:.2f}", f"{row.ceiling - row.tokens_per_call:.2f}"
