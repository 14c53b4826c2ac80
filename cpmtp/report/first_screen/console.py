"""What a finished study says on one screen of a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from cpmtp.ranking.parts import reference_form, table_parts
from cpmtp.report.blocks import Text
from cpmtp.report.first_screen.answer import does_not_pay, earned, training_command
from cpmtp.report.first_screen.forecast import forecast_answer
from cpmtp.report.first_screen.stored_forecast import HeadsForecast
from cpmtp.report.subject import Subject, by_forecast, models_of
from cpmtp.report.words import percent


def console_summary(subjects: Sequence[Subject], table: pd.DataFrame, manifest: dict) -> str:
    """The recommendation of every subject, then where its ceilings saturate.

    Parameters
    ----------
    subjects : sequence of Subject
        Of `subjects_of`.
    table, manifest
        Of `read_study`.
    """
    lines = [line for subject in subjects for line in _lines(subject)]
    first = [
        line
        for heads, some in by_forecast(subjects)
        if heads is not None
        for line in _forecast_lines(heads, some)
    ]
    if first:
        first.append("Ceilings, which no training can exceed:")
    missing = left_out(table, manifest)
    rest = [*_footnotes(subjects), *([f"left out  {missing}"] if missing else [])]
    return "\n".join([*first, *_corpora(manifest), *_hopeless(table), *lines, *rest])


def left_out(table: pd.DataFrame, manifest: dict) -> str:
    """What of a study there was no time for; empty where nothing is missing."""
    asked = manifest.get("settings", {}).get("contexts", 0)
    limit = manifest.get("limit")
    if not limit:
        return ""
    contexts = table.groupby(["model", "domain"])["context"].nunique()
    least, most = int(contexts.min()), int(contexts.max())
    if least >= asked:
        return ""
    here = f"{least}" if least == most else f"{least} to {most}"
    time = f" in {limit['minutes']:g} minutes" if limit.get("minutes") else ""
    return (
        f"{here} of {asked} contexts of every model and domain were studied{time}; more time adds "
        "the others"
    )


def _forecast_lines(heads: HeadsForecast, subjects: Sequence[Subject]) -> Iterator[str]:
    said = forecast_answer(heads, subjects[0].extras.price, models_of(subjects))
    yield said.title
    for block in said.blocks:
        assert isinstance(block, Text)  # an answer has nothing else
        yield f"  {block.label or 'Caution'}: {block.text.replace('`', '')}"


def _corpora(manifest: dict) -> Iterator[str]:
    for name, corpus in manifest.get("corpora", {}).items():
        replaced = corpus["replaced_bytes"]
        note = f", {replaced:,} bytes that were not UTF-8 replaced" if replaced else ""
        skipped = len(corpus.get("skipped", ()))
        note += f", {skipped:,} files that hold no text skipped" if skipped else ""
        yield f"domain {name}: {corpus['documents']:,} documents{note}"


def _hopeless(table: pd.DataFrame) -> Iterator[str]:
    for (model, domain), part in table_parts(reference_form(table)):
        if (part["status"] == "failed").all():
            yield f"{model} · contexts from {domain}: every fit failed"


def _footnotes(subjects: Sequence[Subject]) -> Iterator[str]:
    """What the recommendations rest on, each said once."""
    alone = [subject for subject in subjects if subject.extras.heads is None]
    yield from dict.fromkeys(f"forecast  {subject.forecast.words}" for subject in alone)
    yield from dict.fromkeys(f"calls     {subject.economics.source}" for subject in subjects)


def _lines(subject: Subject) -> Iterator[str]:
    yield f"{subject.title} ({', '.join(_facts(subject))})"
    many = subject.recommended.contexts > 1
    sure = f", the fastest in {percent(subject.row.fastest_frequency)} of resamples" if many else ""
    carried = subject.is_carried or subject.extras.heads is not None
    mark = subject.marked_as if carried else "no recommendation, fastest so far"
    yield f"  {mark}: {subject.headline}{sure}"
    if subject.extras.heads is None:
        yield from _earned(subject)
    for sentence in subject.truncation_sentences():
        yield f"  {sentence}"
    for horizon in subject.saturation.rank:
        yield f"  {subject.saturation.sentence(horizon)}"
        cells = subject.saturation.table
        yield f"    {'  '.join(map(_cell, _rows(cells[cells['horizon'] == horizon])))}"
    if subject.recommended.caution:
        yield f"  {subject.recommended.caution}"


def _earned(subject: Subject) -> Iterator[str]:
    yield f"    forecast: {earned(subject)}"
    if does_not_pay(subject):
        yield f"    {does_not_pay(subject)}"
    known = ":" not in str(subject.table["model"].iloc[0])
    if known and subject.is_carried:  # a factory's model has no hidden states
        yield f"    train it: {training_command(subject)}"


def _facts(subject: Subject) -> Iterator[str]:
    yield f"{subject.recommended.contexts} contexts"
    bits = subject.table.get("domain_bits_per_byte")
    if bits is not None and pd.notna(bits.iloc[0]):
        yield f"{bits.iloc[0]:.2f} bits per byte"
    if subject.anchored is not None:
        yield f"drafts {'' if subject.anchored else 'not '}told the first token"


def _rows(cells: pd.DataFrame) -> Iterator[pd.Series]:
    for _, row in cells.iterrows():
        yield row


def _cell(row: pd.Series) -> str:
    upper = f" to {row.tokens_per_call_upper:.2f}" if row.truncated else ""
    ends = f" [{row.tokens_per_call_low:.2f}, {row.tokens_per_call_high:.2f}]"
    known = pd.notna(row.tokens_per_call_low)
    return f"r={row['rank']:.0f}: {row.tokens_per_call:.2f}{upper}{ends if known else ''}"
