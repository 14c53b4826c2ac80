"""The first screen: what is recommended, what it earns, how sure that is, what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cpmtp.ranking.criteria import throughput_choice
from cpmtp.ranking.scores import tokens_in_words
from cpmtp.report.blocks import Section, Text
from cpmtp.report.subject import Subject

_COSTS = (0.25, 0.5, 1, 2, 4, 8)


def answer(subject: Subject) -> Section:
    """The recommendation of one subject, before anything else."""
    blocks = [Text(f"Recommended: {subject.headline}.", "strong")]
    if does_not_pay(subject):
        blocks.append(Text(does_not_pay(subject), "strong"))
    blocks += [
        Text(_earnings(subject)),
        Text(" ".join(_ceiling(subject))),
        Text(f"How sure: {_certainty(subject)}"),
        Text(f"What would change the answer: {'; '.join(_changes(subject))}."),
        Text(
            "Whatever a call costs (smallest rank within 1 % or one standard error of the best): "
            + "; ".join(subject.saturation.sentence(n) for n in subject.saturation.rank)
            + "."
        ),
    ]
    if subject.recommended.caution:
        blocks.append(Text(subject.recommended.caution, "note"))
    return Section(subject.title, tuple(blocks), level=2)


def does_not_pay(subject: Subject) -> str:
    """What to say where plain decoding is faster than the forecast; empty where it is not."""
    forecast = subject.forecast
    if subject.speedup(forecast.tokens_per_call) > 1:
        return ""
    sure = "" if forecast.high < subject.break_even else "probably "
    return (
        f"It {sure}does not pay at this cost: plain decoding is faster below "
        f"{subject.break_even:.2f} tokens per call."
    )


def earned(subject: Subject) -> str:
    """Tokens per call and speed of a trained head of the recommendation."""
    found = subject.forecast
    tokens = (found.tokens_per_call, found.low, found.high)
    mean, low, high = (subject.speedup(value) for value in tokens)
    return (
        f"{tokens[0]:.2f} tokens per call ({tokens[1]:.2f} to {tokens[2]:.2f}), {mean:.2f} times "
        f"the speed of plain decoding ({low:.2f} to {high:.2f})"
    )


def _earnings(subject: Subject) -> str:
    found, economics = subject.forecast, subject.economics
    return (
        f"It earns, {found.words}, {earned(subject)}, {subject.cost(found.tokens_per_call):.2f} "
        f"per million tokens instead of {subject.plain_cost:.2f} at a price of "
        f"{economics.price:.2f} per device-hour. Calls: {economics.source}."
    )


def _ceiling(subject: Subject) -> Iterator[str]:
    horizon, _ = subject.best
    kinds = {True: ", drafts told the first token", False: ", drafts not told the first token"}
    kind = "" if subject.anchored is None else kinds[subject.anchored]
    yield (
        f"Its ceiling (the best fit of that rank to each context's joint{kind}): "
        f"{tokens_in_words(subject.row)}; an exact draft gives {horizon}."
    )
    yield from subject.truncation_sentences()
    inexact = (*subject.truncated, *subject.sampled)
    complete = [str(n) for n in subject.recommended.rank if n not in inexact]
    if subject.truncated:
        yield "Ranks and horizons are compared by the lower bounds."
    if inexact and complete:
        yield f"Figures of horizon {', '.join(complete)} are exact."


def _certainty(subject: Subject) -> str:
    choice, (horizon, rank) = subject.recommended, subject.best
    if choice.contexts == 1:
        return "one context was studied: nothing can be said about others."
    found = f"in {choice.frequency[horizon][rank]:.0%} of resamples of {choice.documents} documents"
    if len(choice.rank) > 1:
        share = choice.horizon_frequency[horizon]
        found = f"horizon {horizon} is the fastest in {share:.0%} and, at it, rank {rank} {found}"
    else:
        found = f"rank {rank} is the fastest {found}"
    gain = choice.detectable_gain[horizon]
    if math.isfinite(gain):
        found += (
            f"; a gain below {gain:.3f} tokens per call would not be seen with these "
            f"{choice.contexts} contexts"
        )
    return (
        f"{found}. Ranks are compared by their ceilings; trained heads keep that order, with "
        "smaller differences."
    )


def _changes(subject: Subject) -> Iterator[str]:
    """The recommendation if a component cost more or less, by the means, and by upper bounds."""
    cells, latency = subject.recommended.table, subject.economics.latency
    found: dict[tuple[int, int], list[str]] = {}
    for factor in _COSTS:
        changed = replace(latency, per_component=latency.per_component * factor)
        pairs = zip(cells["horizon"], cells["rank"], strict=True)
        seconds = np.array([changed.call_seconds(int(n), int(r)) for n, r in pairs])
        chosen = throughput_choice(cells[["tokens_per_call"]].to_numpy().T, seconds)[0]
        row = cells.iloc[int(chosen)]
        found.setdefault((int(row["horizon"]), int(row["rank"])), []).append(f"{factor:g}")
    others = [
        f"horizon {n}, rank {r} if a component cost {' or '.join(factors)} times as much"
        for (n, r), factors in found.items()
        if (n, r) != subject.best
    ]
    yield from others or [
        f"nothing that was tried: a component may cost {_COSTS[0]:g} to {_COSTS[-1]:g} times as "
        "much"
    ]
    if subject.truncated:
        n, r = subject.best_by_upper_bounds
        changed_by = "the same" if (n, r) == subject.best else f"horizon {n}, rank {r}"
        yield f"{changed_by} if every ceiling were its upper bound"
