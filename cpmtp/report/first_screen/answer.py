"""The first screen: what to train, what it brings, how sure that is, what to do next: four lines.

What they rest on stands with the findings (`details`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cpmtp.ranking.criteria import throughput_choice
from cpmtp.ranking.scores import tokens_in_words
from cpmtp.report.blocks import Section, Text
from cpmtp.report.subject import Subject
from cpmtp.report.words import percent

TRAIN, PILOT, NOT, UNDECIDED = "Train", "Pilot first", "Do not train", "Undecided"
_AS_MUCH = {
    0.25: "a quarter as much",
    0.5: "half as much",
    1: "as much",
    2: "twice as much",
    4: "four times as much",
    8: "eight times as much",
}
_COSTS = tuple(_AS_MUCH)


def answer(subject: Subject) -> Section:
    """One subject in four lines, cautions above them."""
    lines = (
        (verdict(subject), _verdict_words(subject)),
        ("Brings", _brings(subject)),
        ("How sure", _short_certainty(subject)),
        ("Next", _next_step(subject)),
    )
    blocks = [Text(text, "caution") for text in _cautions(subject)]
    blocks += [Text(text, "line", label) for label, text in lines]
    return Section(subject.title, tuple(blocks), level=2)


def details(subject: Subject) -> tuple[Text, ...]:
    """What the four lines rest on; where a forecast answers, what ceilings say beside it."""
    heads = subject.extras.heads
    if heads is None:
        blocks = [Text(f"Recommended: {subject.headline}.", "strong")]
        if does_not_pay(subject):
            blocks.append(Text(does_not_pay(subject), "strong"))
        blocks.append(Text(_earnings(subject)))
        beside = [
            Text(f"How sure: {_certainty(subject)}"),
            Text(f"What would change the answer: {'; '.join(_changes(subject))}."),
        ]
    else:
        why = _FORECAST if heads.known else _NO_FORECAST
        blocks, beside = [Text(f"{_DIAGNOSIS.format(subject.headline)} {why}", "strong")], []
    if subject.recommended.caution:
        blocks.insert(0, Text(subject.recommended.caution, "caution"))
    return (
        *blocks,
        Text(" ".join(_ceiling(subject))),
        *beside,
        Text(
            "Whatever a call costs (smallest rank within 1 % or one standard error of the best): "
            + "; ".join(subject.saturation.sentence(n) for n in subject.saturation.rank)
            + "."
        ),
    )


_DIAGNOSIS = (
    "What the best possible drafts of form cp give on these contexts. By these ceilings alone {} "
    "would be the fastest."
)
_FORECAST = "What a trained head brings is forecast above."
_NO_FORECAST = "What a trained head brings is not known: there was not enough time to forecast it."


def verdict(subject: Subject) -> str:
    """Train, pilot first, do not, or undecided: train only what is faster over its whole range,
    with step times and heads of this model and documents enough.
    """
    found = subject.forecast
    if subject.speedup(found.tokens_per_call) <= 1:
        return NOT
    if not subject.is_carried:
        return UNDECIDED
    sure = subject.speedup(found.low) > 1 and not subject.recommended.few_documents
    return TRAIN if sure and not _assumed(subject) else PILOT


def _verdict_words(subject: Subject) -> str:
    if verdict(subject) == NOT:
        return (
            f"{does_not_pay(subject)} The best found is {subject.headline}, "
            f"{subject.forecast.tokens_per_call:.2f}."
        )
    told = {True: ", told the first token", False: ", not told the first token", None: ""}
    words = f"{subject.headline} (form cp{told[subject.anchored]})"
    if not subject.is_carried:
        return f"no recommendation yet; fastest so far: {words}."
    return f"{words}{'; it may not beat plain decoding' * _may_not_pay(subject)}."


def _may_not_pay(subject: Subject) -> bool:
    return subject.speedup(subject.forecast.low) <= 1


def _brings(subject: Subject) -> str:
    found = subject.forecast
    mean, low, high = map(subject.speedup, (found.tokens_per_call, found.low, found.high))
    dear, cheap = subject.cost(found.low), subject.cost(found.high)
    return (
        f"{low:.2f} to {high:.2f} times the speed of plain decoding ({mean:.2f} expected): "
        f"{found.low:.2f} to {found.high:.2f} tokens per call, at {cheap:.2f} to {dear:.2f} a "
        f"million tokens instead of {subject.plain_cost:.2f} at {subject.economics.price:.2f} an "
        "hour."
    )


def _short_certainty(subject: Subject) -> str:
    choice, cell = subject.recommended, subject.row
    if choice.contexts == 1:
        found = "not at all: one context was studied"
    else:
        found = (
            f"the fastest in {percent(cell.fastest_frequency)} of resamples of {choice.documents} "
            f"document{'s' if choice.documents > 1 else ''}"
        )
    where = "reaches below" if _may_not_pay(subject) else "is above"
    found += f"; its range {where} plain decoding"
    others = [(key, factor) for key, factors in _by_cost(subject).items() for factor in factors]
    others = [(key, factor) for key, factor in others if key != subject.best]
    if not others:
        return (
            f"{found}; the same if a component cost {_COSTS[0]:g} to {_COSTS[-1]:g} times as much."
        )
    (n, r), factor = min(others, key=lambda other: abs(math.log(other[1])))
    other = f"rank {r}" if n == subject.best[0] else f"horizon {n}, rank {r}"
    return f"{found}; {other} instead if a component cost {_AS_MUCH[factor]}."


def _next_step(subject: Subject) -> str:
    model, horizon, rank = subject.table["model"].iloc[0], *subject.best
    factory = ":" in str(model)  # such a model has no hidden states
    if verdict(subject) == NOT:
        known = subject.extras.latency is not None
        change = "a cheaper call could" if known else "step times of your own (`cpmtp latency`) may"
        return f"decode plainly, or by prompt lookup; {change} change this."
    if subject.recommended.few_documents:
        more = "study 32 documents or more"
        return f"{more}." if factory else f"{more}, then `cpmtp forecast --model {model}`."
    if _assumed(subject) and not factory:
        return f"`cpmtp forecast --model {model}` measures step times and probes heads."
    if factory:
        return f"pilot a head of horizon {horizon} with rank {rank} by the plan at the end."
    return f"(1) `{training_command(subject)}` (2) the pilot plan at the end."


def training_command(subject: Subject) -> str:
    """The command that trains what is recommended."""
    horizon, rank = subject.best
    kind = {True: " --anchored", False: " --no-anchored", None: ""}[subject.anchored]
    model = subject.table["model"].iloc[0]
    named = shlex.quote(str(model))
    return f"cpmtp train-head --model {named} --horizon {horizon} --rank {rank}{kind}"


def _assumed(subject: Subject) -> list[str]:
    """What the forecast takes for granted."""
    named = {
        "step times": subject.extras.latency is None,
        "what a trained head reaches": not subject.knows_trained_heads,
    }
    return [name for name, assumed in named.items() if assumed]


def _cautions(subject: Subject) -> Iterator[str]:
    choice = subject.recommended
    if choice.contexts == 1:
        yield "One context: a single context gives no interval. Study 32 or more."
    elif choice.documents == 1:
        yield "All contexts are from one document: study more before you decide."
    elif choice.few_documents:
        yield f"Only {choice.documents} documents: intervals are too narrow. Study 32 or more."
    if subject.truncated:
        told = ", ".join(map(str, subject.truncated))
        yield f"Horizon {told} is truncated: its figures are certified lower bounds."
    if subject.sampled:
        told = ", ".join(map(str, subject.sampled))
        yield f"Horizon {told} is sampled: its figures are estimates, with their intervals."
    failed = int((subject.table["status"] == "failed").sum())
    if failed:
        yield f"{failed:,} of {len(subject.table):,} fits failed."
    if _assumed(subject):
        yield f"Assumed, not measured: {' and '.join(_assumed(subject))}."


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
    often = percent(choice.frequency[horizon][rank])
    found = f"in {often} of resamples of {choice.documents} documents"
    if len(choice.rank) > 1:
        share = percent(choice.horizon_frequency[horizon])
        found = f"horizon {horizon} is the fastest in {share} and, at it, rank {rank} {found}"
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


def _by_cost(subject: Subject) -> dict[tuple[int, int], list[float]]:
    """Horizon and rank that would be the fastest, to what a component would have to cost."""
    cells, latency = subject.recommended.table, subject.economics.latency
    found: dict[tuple[int, int], list[float]] = {}
    for factor in _COSTS:
        changed = replace(latency, per_component=latency.per_component * factor)
        pairs = zip(cells["horizon"], cells["rank"], strict=True)
        seconds = np.array([changed.call_seconds(int(n), int(r)) for n, r in pairs])
        chosen = throughput_choice(cells[["tokens_per_call"]].to_numpy().T, seconds)[0]
        row = cells.iloc[int(chosen)]
        found.setdefault((int(row["horizon"]), int(row["rank"])), []).append(factor)
    return found


def _changes(subject: Subject) -> Iterator[str]:
    """The recommendation if a component cost more or less, by the means, and by upper bounds."""
    others = [
        f"horizon {n}, rank {r} if a component cost {_either(factors)} times as much"
        for (n, r), factors in _by_cost(subject).items()
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


def _either(factors: list[float]) -> str:
    return " or ".join(f"{factor:g}" for factor in factors)
