"""One self-contained HTML page, or the same as Markdown, out of a study's table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cpmtp.latency import read_latency
from cpmtp.report.blocks import Figure, Section, Table, Text
from cpmtp.report.findings.ceilings import findings
from cpmtp.report.findings.components import component_sections
from cpmtp.report.findings.forecast import ceilings_beside, forecast_sections
from cpmtp.report.findings.set_up import forecast_set_up, study_set_up
from cpmtp.report.findings.side_by_side import side_by_side
from cpmtp.report.first_screen.answer import answer
from cpmtp.report.first_screen.console import console_summary
from cpmtp.report.first_screen.forecast import forecast_answer
from cpmtp.report.first_screen.stored_forecast import HeadsForecast
from cpmtp.report.learned import LEARNED_SHARE, form_sections, learned_sections
from cpmtp.report.pilot import pilot, pilot_of_forecast
from cpmtp.report.plots import figure_svg
from cpmtp.report.plots.theme import theme_css, themed_svg
from cpmtp.report.subject import (
    PRICE,
    ReportExtras,
    Subject,
    by_forecast,
    forecasts_beside,
    models_of,
    subjects_of,
)
from cpmtp.report.words import shortened, unbroken, with_code
from cpmtp.whole_files import write_text

_MOST_OPEN = 3  # parts of a study whose findings are not folded
_BESIDE = ("waterfall", "decoding", "step_times", "components")
_SLUG_BYTES = 180  # a file system takes 255, with an ending and a number
_MARKDOWN = re.compile(r"([\\`*_\[\]|$~])")


def read_extras(
    folder: str | Path,
    latency: str | Path | None = None,
    price: float = PRICE,
    learned_share: float = LEARNED_SHARE,
    forecast: str | Path | None = None,
) -> ReportExtras:
    """What lies beside a study's table: `latency.json`, `waterfall.parquet`, `decoding.parquet`,
    `step_times.parquet`, `components.parquet`, `forecast.parquet` with `forecast.json`.

    Parameters
    ----------
    folder : path
    latency : path, optional
        What `cpmtp latency` wrote, or JSON with the fields of `LatencyModel`, in seconds; default:
        the folder's own if there is one.
    price : float
        Per device-hour.
    learned_share : float
        See `ReportExtras`.
    forecast : path, optional
        A folder that `cpmtp forecast` wrote; default: the study's own if there is a forecast in it.

    Raises
    ------
    ValueError
        If the latency file does not hold a latency model, or the forecast's folder no forecast.
    """
    folder = Path(folder)
    tables = {name: folder / f"{name}.parquet" for name in _BESIDE}
    found = {name: pd.read_parquet(path) for name, path in tables.items() if path.is_file()}
    places = [folder / "latency.json", Path(forecast or folder) / "latency.json"]
    path = Path(latency) if latency else next((p for p in places if p.is_file()), None)
    measured = read_latency(path) if path is not None else None
    told: dict[str, Any] = {}
    if measured is not None:
        told = {"latency": measured.model, "latency_source": measured.where}
    if forecast or (folder / "forecast.json").is_file():
        told["heads"] = HeadsForecast.read(forecast or folder)
    of_models = forecasts_beside(folder) if not told.get("heads") and latency is None else {}
    return ReportExtras(
        **told, price=price, learned_share=learned_share, **found, of_models=of_models
    )


@dataclass(frozen=True)
class Report:
    """What there is to say, once; written as HTML or Markdown.

    Attributes
    ----------
    answers, sections : tuple of Section
        The first screen, one per model and kind of contexts; and the rest.
    drawings : dict of str to str
        Name of every figure to its SVG on white.
    summary : str
        What a console shows: the recommendation first.
    """

    answers: tuple[Section, ...]
    sections: tuple[Section, ...]
    drawings: dict[str, str]
    summary: str = ""

    @classmethod
    def of(cls, table: pd.DataFrame, manifest: dict, extras: ReportExtras | None = None) -> Report:
        """From a study's table and manifest; parameters and errors as of `write_report`."""
        subjects = subjects_of(table, extras or ReportExtras())
        sections = _sections(subjects, table, manifest)
        written = cls.of_sections(sections, _answers(subjects))
        return replace(written, summary=console_summary(subjects, table, manifest))

    @classmethod
    def of_forecast(cls, found: HeadsForecast, price: float = PRICE) -> Report:
        """From a forecast alone, without a study's ceilings."""
        sections: list[Section] = []
        if found.known:
            sections += forecast_sections(found)
            sections.append(Section("How to read this", (Text(_TOKENS),)))
        sections.append(forecast_set_up(found))
        if found.known:
            sections.append(Section("Pilot plan", tuple(Text(text) for text in _PILOT)))
            sections += pilot_of_forecast(found, price)
        return cls.of_sections(sections, [forecast_answer(found, price)])

    @classmethod
    def of_sections(cls, sections: Sequence[Section], answers: Sequence[Section] = ()) -> Report:
        """From sections of one's own; `answers` stand on the first screen."""
        figures = [
            block for section in sections for block in section.blocks if isinstance(block, Figure)
        ]
        drawings = {
            figure.name: figure_svg(figure.draw, figure.title, name=figure.name)
            for figure in figures
        }
        return cls(tuple(answers), tuple(sections), drawings)

    def write_html(self, path: str | Path) -> Path:
        """One file that needs nothing else."""
        light, dark = theme_css()
        environment = _environment(autoescape=True)
        environment.filters["spoken"] = with_code
        environment.filters["shortened"] = shortened
        environment.filters["unbroken"] = unbroken
        page = environment.get_template("report.html").render(
            answers=self.answers,
            sections=self.sections,
            light=light,
            dark=dark,
            kind=_kind,
            svg=lambda figure: Markup(themed_svg(self.drawings[figure.name])),
            anchor=_slugs(s.title for s in self.sections if s.level == 2).get,
        )
        return write_text(Path(path), page)

    def write_markdown(self, path: str | Path) -> Path:
        """The same text, and the figures as files in a folder beside it."""
        path = Path(path)
        folder = path.with_name(f"{path.stem}_figures")

        slugs = _slugs(self.drawings)

        def stored(figure: Figure) -> str:
            file = write_text(folder / f"{slugs[figure.name]}.svg", self.drawings[figure.name])
            return f"{folder.name}/{file.name}"

        environment = _environment(autoescape=False)
        environment.filters["plain"] = _plain_markdown
        template = environment.get_template("report.md")
        text = template.render(
            answers=self.answers, sections=self.sections, kind=_kind, stored=stored
        )
        return write_text(path, re.sub(r"\n{3,}", "\n\n", text))


def write_report(
    table: pd.DataFrame, manifest: dict, path: str | Path, extras: ReportExtras | None = None
) -> Path:
    """Write the report of a study: a path that ends in `.md` gets Markdown, any other one HTML file
    that needs nothing else.

    Parameters
    ----------
    table, manifest
        Of `read_study`.
    path : path
        The file to write.
    extras : ReportExtras, optional

    Raises
    ------
    ValueError
        If the table holds no usable row.
    """
    report = Report.of(table, manifest, extras)
    return report.write_markdown(path) if Path(path).suffix == ".md" else report.write_html(path)


def _answers(subjects: Sequence[Subject]) -> list[Section]:
    """A forecast of trained heads answers alone: ceilings are diagnosis then."""
    found: list[Section] = []
    for heads, some in by_forecast(subjects):
        if heads is None:
            found += [answer(subject) for subject in some]
        else:
            found.append(forecast_answer(heads, some[0].extras.price, models_of(some)))
    return found


def _sections(subjects: Sequence[Subject], table: pd.DataFrame, manifest: dict) -> list[Section]:
    extras = subjects[0].extras
    truncated = any(subject.truncated for subject in subjects)
    reading = (*_READING, *([_TRUNCATED] if truncated else []))
    if any(subject.sampled for subject in subjects):
        reading = (*reading, _SAMPLED)
    sections: list[Section] = []
    for heads, some in by_forecast(subjects):
        if heads is not None and heads.known:
            (model, *others) = models_of(some)
            ceilings = None if others else ceilings_beside(heads, table, model)
            sections += forecast_sections(heads, ceilings)
    sections.append(Section("How to read this", tuple(Text(text) for text in reading)))
    sections += side_by_side(subjects)
    for subject in subjects:
        sections += findings(subject, folded=len(subjects) > _MOST_OPEN)
    sections += component_sections(extras.components)
    sections += form_sections(table)
    sections += learned_sections(extras.waterfall, extras.decoding, extras.step_times)
    forecasts = [heads for heads, _ in by_forecast(subjects) if heads is not None]
    sections.append(study_set_up(table, manifest, forecasts))
    if (table["status"] == "failed").any():
        sections.append(Section("Failed fits", (_failures(table),)))
    sections.append(Section("Pilot plan", tuple(Text(text) for text in _PILOT)))
    for heads, some in by_forecast(subjects):
        if heads is None:
            sections += map(pilot, some)
        elif heads.known:
            sections += pilot_of_forecast(heads, extras.price)
    return sections


_TOKENS = (
    "Tokens per call: expected tokens emitted per forward pass of the target by lossless block "
    "verification, the first token of a block drawn from the target itself."
)
_READING = (
    f"{_TOKENS} A rank's ceiling is that of the best fit of that rank to each context's own exact "
    "joint; a trained head has to find such fits from a hidden state and stays below.",
    "Recommended: most tokens per second, over all horizons and ranks. Where the ceiling saturates "
    "(tolerance) is another question, whatever a call costs: per horizon, the smallest rank whose "
    "mean shortfall to the best rank, paired by context, is at most one standard error or 1 % of "
    'tokens per call, whichever is larger. "At least" stands before a rank at the edge of the '
    "grid. Intervals: bias-corrected and accelerated bootstrap over documents; shares: how often "
    "resamples of the documents choose the same.",
)
_TRUNCATED = (
    "Truncated joints: where a vocabulary is too large, a joint holds its most probable sequences "
    "only. Tokens per call are then certified lower bounds, with certified upper bounds beside "
    "them, and intervals reach from the lower bounds' lower end to the upper bounds' upper end. "
    "Ranks are compared by the lower bounds."
)
_SAMPLED = (
    "Sampled: where a joint is too large and bounds would be too far apart, drafts are fitted to "
    "its most probable sequences, and what they earn on all of it is estimated from texts drawn "
    "from the model, the same for all ranks of a context. Tokens per call are then estimates with "
    "95 % intervals; nothing bounds them."
)
_PILOT = (
    "Begin with a workload where a slow or failed answer hurts nobody (batch jobs, internal "
    "tools), at a small share of it; "
    "then a tenth of the traffic, then half, each step as an A/B test by request against plain "
    "decoding of the same target.",
    "What cannot change is the distribution of the output: verification is lossless, so no new "
    "review of quality is needed. What can go wrong is the implementation; that is why edits are "
    "counted, and why the test suite compares output distributions before traffic does.",
)


def _failures(table: pd.DataFrame) -> Table:
    failed = table[table["status"] == "failed"]
    grouped = failed.groupby(["method", "rank", "message"]).size().reset_index(name="count")
    rows = grouped.sort_values("count", ascending=False).head(20)[
        ["method", "rank", "count", "message"]
    ]
    cells = tuple(tuple(str(value) for value in row) for row in rows.itertuples(index=False))
    return Table(("method", "rank", "count", "message"), cells, wide=True)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("cpmtp.report", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _kind(block: Text | Table | Figure) -> str:
    return type(block).__name__


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Each name as a file or an anchor of a page may be called, no two alike.

    Examples
    --------
    >>> _slugs(["A b", "a-b", "大小", "…"])
    {'A b': 'a-b', 'a-b': 'a-b-2', '大小': '大小', '…': 'part'}
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        words = re.sub(r"[\W_]+", "-", name.casefold()).encode()[:_SLUG_BYTES]
        base = words.decode(errors="ignore").strip("-") or "part"
        tried = (f"{base}-{k}" if k > 1 else base for k in itertools.count(1))
        found[name] = next(slug for slug in tried if slug not in found.values())
    return found


def _plain_markdown(text: str) -> str:
    """Text from outside with nothing left that Markdown or HTML would read."""
    escaped = (
        _MARKDOWN.sub(r"\\\1", str(text))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )
    return " ".join(escaped.split())
