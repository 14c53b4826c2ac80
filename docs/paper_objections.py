"""The strongest objections to the page, each answered by a stored figure or admitted."""

from __future__ import annotations

import pandas as pd
from page import Page
from paper import ALIKE, LEVELS, MODELS, POPULATION, both, by_model, draft, every, more
from paper_forecast import (
    BACKTEST,
    CHOICES,
    choice_losses,
    errors,
    judged,
    straight_errors,
)
from paper_temperature import HEAD, REAL, TIMES

CURVES = "curves/curves.parquet"


def objections_section(page: Page) -> None:
    """Five, the hardest first."""
    page.heading("Five objections")
    _order_may_turn(page)
    _tuned_on_what_judges(page)
    _ceilings_of_nobody(page)
    _forecast_of_no_use(page)
    _weak_opponents(page)


def _order_may_turn(page: Page) -> None:
    """Scale, seeds and training."""
    levels = page.stored(LEVELS)
    leads = {
        budget: more(
            *(
                by_model(rows[rows["candidate"] == name], "tokens_per_call")
                for name in ("markov 64", "cp 16")
            )
        )
        for budget, rows in levels.groupby("budget")
    }
    last, before = sorted(leads)[:-3:-1]
    page.say(
        '1. *"Form before rank is a fact about short trainings of toy models, from one seed."* Admitted for what lies beyond. '
        f"The lead of the Markov head over sixteen components falls from {both(leads[before])} to {both(leads[last])} within the last eightfold of training: another eightfold could end it.",
        LEVELS,
        holds=every(leads[before], leads[last]) and min(leads[last].values()) > 0,
    )
    twice = levels[levels["seeds"] > 1]["between_seeds"]
    page.add(
        f"Two trainings of one head at smaller budgets differ by {twice.median():.3f} in the median and {twice.max():.3f} at most, which is near the lead itself. "
        "What stands clear of that are the trunk, and the recurrent head over every head of form cp on its trunk.",
        LEVELS,
        holds=twice.max() > 0.5 * min(leads[last].values())
        and _recurrent_leads(levels, twice.max()),
    )


def _recurrent_leads(levels: pd.DataFrame, scatter: float) -> bool:
    """Whether it is above sixteen components, and wide above eight wide ones, by more than that."""
    last = levels[levels["budget"] == levels["budget"].max()]
    earned = last.pivot(index="candidate", columns="model", values="tokens_per_call")
    pairs = (("recurrent", "cp 16"), ("recurrent, wide", "cp 8, wide"), ("cp 8, wide", "cp 8"))
    return all((earned.loc[a] - earned.loc[b]).min() > scatter for a, b in pairs)


def _tuned_on_what_judges(page: Page) -> None:
    """Learning rates, and choices on the judging texts."""
    tried = page.stored(CURVES)
    tried = tried[tried["tuning"].astype(bool)].pivot_table(
        index=["model", "candidate"], columns="learning_rate", values="chosen_by"
    )  # (searches, rates)
    best = tried.idxmax(axis=1) == tried.columns.max()
    ahead = tried[best].iloc[:, -1] - tried[best].iloc[:, -2]
    page.say(
        '2. *"Learning rates are chosen at the edge of three, at the smallest budget, and settings on the texts that judge."* True. '
        f"In {best.sum()} of {len(tried)} searches the largest rate won, by {ahead.median():.3f} tokens in the median, and it was kept at every budget.",
        CURVES,
    )
    alike = page.stored(ALIKE).set_index(["variant", "model"])
    half, best = (
        {m: float(alike.loc[(f"cp 8 {name}", m), "tokens_less_usual"]) for m in MODELS}
        for name in ("rate 0.5", "apart 0.1")
    )
    others = page.stored(ALIKE)
    variants = others[others["tokens_less_usual"].abs() > 0]["variant"].nunique()
    page.add(
        f"At 131,072 positions half of the rate changes what eight components earn by {both(half, '{:+.3f}')}: as much as half of the lead that the first objection is about. "
        f"That components should begin alike ({both(best, '{:+.3f}')}) was chosen among {variants} variants on the texts that judged them. No correction for many comparisons is made; a single figure near zero is no finding.",
        ALIKE,
        holds=max(half.values()) > 0.02 and min(best.values()) > 0,
    )


def _ceilings_of_nobody(page: Page) -> None:
    shared = page.stored(POPULATION)
    chain, eight = (draft(shared, n, "gain") for n in ("markov 64 gated", "cp 8"))
    page.say(
        '3. *"A ceiling per context is nobody\'s: no head has factors, or a draft, for every context."* It is an upper bound and is called one. '
        f"Where factors are shared, a gated correction of rank 64 gains {both(chain)} on rank 1 and eight components {both(eight)}; with a context's own it is the other way round, and so it is after training. "
        "So neither kind of ceiling says which form to train; they say what none can exceed, and that is why the recommendation comes from probes where there are any.",
        POPULATION,
        holds=every(eight, chain),
    )


def _forecast_of_no_use(page: Page) -> None:
    losses, table = choice_losses(page), judged(page)
    probe = losses["best probe"]
    page.say(
        '4. *"The forecast wins nothing: take the candidate whose probe is best."* '
        f"{'For the choice, yes' if probe <= losses['forecast'] else 'For the choice, little'}: by the forecast {losses['forecast']:.2%} of the best candidate's tokens per second are given away, by the best probe {probe:.2%}, "
        f"by always taking the recurrent head {losses['always recurrent']:.2%}, by a random choice {losses['random']:.1%}.",
        CHOICES,
        holds=losses["forecast"] < losses["random"],
    )
    error, straight = errors(page), straight_errors(page)
    page.add(
        f"What is shown is that levels are forecast better than by a straight line ({error.median():.1%} against {straight.median():.1%}), from {table['group'].nunique()} groups, all of small models, with a method that was thought of with most of them in view. "
        "What that makes of speeds was tried on three heads.",
        BACKTEST,
        holds=error.median() < straight.median(),
    )


def _weak_opponents(page: Page) -> None:
    real, times = page.stored(REAL), page.stored(TIMES)
    rows = times[times["head"] == HEAD]
    page.say(
        '5. *"Opponents are weak and speeds are a laptop\'s: no EAGLE, no engine, no tree, and plain decoding of a 135M model."* Admitted; none of these was run. '
        f"The opponent that was run often wins: prompt lookup at temperature 0, by {real[real['temperature'] == 0].eval('lookup - measured').min():.2f} tokens per call and more.",
        REAL,
        holds=real[real["temperature"] == 0].eval("lookup - measured").min() > 0,
    )
    page.add(
        f"So does plain decoding with four requests that wait for each other (the head at {rows[rows['batch'] == 4]['speedup'].min():.2f} to {rows[rows['batch'] == 4]['speedup'].max():.2f} of its speed). "
        "Nothing here says what a head brings in a serving engine; `cpmtp latency` takes its step curve, and the forecast is then made with that.",
        TIMES,
        holds=rows[rows["batch"] == 4]["speedup"].max() < 1,
    )
