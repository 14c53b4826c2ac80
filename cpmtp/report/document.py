"""One self-contained HTML page, or the same as Markdown, out of a study's table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cpmtp.latency import LatencyModel, memory_bound_latency
from cpmtp.report.plots import figure_svg, theme_css, themed_svg
from cpmtp.report.sections import (
    Economics,
    Figure,
    Section,
    Subject,
    Table,
    Text,
    answer,
    findings,
    learned_sections,
    pilot,
)
from cpmtp.whole_files import write_text

PRICE = 2.5
_ASSUMED_STEP, _ASSUMED_LAYERS = 0.02, 32
_MARKDOWN = re.compile(r"([\\`*_\[\]|$~])")


@dataclass(frozen=True)
class ReportExtras:
    """What a report can show beside the study; a part that is None is left out.

    Attributes
    ----------
    latency : LatencyModel, optional
        As measured. Without it calls are assumed to cost what reading the weights of 32 layers
        costs, and the report says so.
    price : float
        Per device-hour.
    waterfall : pandas.DataFrame, optional
        `model`, `domain`, `horizon`, `rank`, `anchored`, and in tokens per call `exact_limit`,
        `acceptance_fit`, `em_fit`, `learned` with `learned_low` and `learned_high`.
    decoding : pandas.DataFrame, optional
        `forecast` and `measured` tokens per call, each with `_low` and `_high`, and `rank`.
    step_times : pandas.DataFrame, optional
        `label` and one column of seconds per part of a call.
    """

    latency: LatencyModel | None = None
    price: float = PRICE
    waterfall: pd.DataFrame | None = None
    decoding: pd.DataFrame | None = None
    step_times: pd.DataFrame | None = None


def read_extras(
    folder: str | Path, latency: str | Path | None = None, price: float = PRICE
) -> ReportExtras:
    """What lies beside a study's table: `latency.json`, `waterfall.parquet`, `decoding.parquet`,
    `step_times.parquet`.

    Parameters
    ----------
    folder : path
    latency : path, optional
        JSON with the fields of `LatencyModel`, in seconds; default: the folder's own if there is
        one.
    price : float
        Per device-hour.

    Raises
    ------
    ValueError
        If the latency file does not hold a latency model.
    """
    folder = Path(folder)
    tables = {name: folder / f"{name}.parquet" for name in ("waterfall", "decoding", "step_times")}
    found = {name: pd.read_parquet(path) for name, path in tables.items() if path.is_file()}
    path = Path(latency) if latency else folder / "latency.json"
    model = _read_latency(path) if latency or path.is_file() else None
    return ReportExtras(latency=model, price=price, **found)


def _read_latency(path: Path) -> LatencyModel:
    try:
        return LatencyModel(**json.loads(path.read_text("utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r}: {error}; expected JSON such as "
            '{"plain_step": 0.02, "base": 0.02, "per_position": 0.0001, "per_component": '
            "0.00005}, in seconds"
        ) from error


@dataclass(frozen=True)
class Report:
    """What there is to say, once; written as HTML or Markdown.

    Attributes
    ----------
    answers, sections : tuple of Section
        The first screen, one per model and kind of contexts; and the rest.
    drawings : dict of str to str
        Name of every figure to its SVG on white.
    """

    answers: tuple[Section, ...]
    sections: tuple[Section, ...]
    drawings: dict[str, str]

    @classmethod
    def of(cls, table: pd.DataFrame, manifest: dict, extras: ReportExtras | None = None) -> Report:
        """From a study's table and manifest; parameters and errors as of `write_report`."""
        answers, sections = _content(table, manifest, extras or ReportExtras())
        return cls.of_sections(sections, answers)

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
        page = (
            _environment(autoescape=True)
            .get_template("report.html")
            .render(
                answers=self.answers,
                sections=self.sections,
                light=light,
                dark=dark,
                kind=_kind,
                svg=lambda figure: Markup(themed_svg(self.drawings[figure.name])),
                anchor=_slug,
            )
        )
        return write_text(Path(path), page)

    def write_markdown(self, path: str | Path) -> Path:
        """The same text, and the figures as files in a folder beside it."""
        path = Path(path)
        folder = path.with_name(f"{path.stem}_figures")

        def stored(figure: Figure) -> str:
            file = write_text(folder / f"{_slug(figure.name)}.svg", self.drawings[figure.name])
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


def _content(
    table: pd.DataFrame, manifest: dict, extras: ReportExtras
) -> tuple[list[Section], list[Section]]:
    subjects = [
        Subject.of(f"{model} · contexts from {domain}", part, _economics(extras))
        for (model, domain), part in table_parts(table)
    ]
    sections = [Section("How to read this", tuple(Text(text) for text in _READING))]
    for subject in subjects:
        sections += findings(subject)
    sections += learned_sections(extras.waterfall, extras.decoding, extras.step_times)
    sections.append(Section("Set-up", (_setup(table, manifest),)))
    if (table["status"] == "failed").any():
        sections.append(Section("Failed fits", (_failures(table),)))
    sections.append(Section("Pilot plan", tuple(Text(text) for text in _PILOT)))
    sections += [pilot(subject) for subject in subjects]
    return [answer(subject) for subject in subjects], sections


_READING = (
    "Tokens per call: expected tokens emitted per forward pass of the target by lossless block "
    "verification, the first token "
    "of a block drawn from the target itself. These are ceilings of a rank: the best of the fits "
    "to each context's exact "
    "joint.",
    "Fastest: most tokens per second, over all horizons and ranks. Tolerance: per horizon, the "
    "smallest rank whose mean "
    "shortfall to "
    "the best rank, paired by context, is at most one standard error or 1 % of tokens per call, "
    'whichever is larger. "At '
    'least" '
    "stands before a rank at the edge of the grid. Intervals: bias-corrected and accelerated "
    "bootstrap over documents; shares: "
    "how often resamples of the documents choose the same.",
)
_PILOT = (
    "Begin with a workload where a slow or failed answer hurts nobody (batch jobs, internal "
    "tools), at a small share of it; "
    "then a tenth of the traffic, then half, each step as an A/B test by request against plain "
    "decoding of the same target.",
    "What cannot change is the law of the output: verification is lossless, so no new review of "
    "quality is needed. What can go "
    "wrong is the implementation; that is why edits are counted, and why the test suite compares "
    "output laws before traffic "
    "does.",
)


def table_parts(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """What a rank is chosen for: (model, domain), the domain with the temperature and kind of draft
    where there are several.
    """
    keys = [
        name for name in ("temperature", "anchored") if name in table and table[name].nunique() > 1
    ]
    found = []
    for (model, domain, *others), part in table.groupby(["model", "domain", *keys], sort=False):
        told = dict(zip(keys, others, strict=True))
        notes = [f"temperature {told['temperature']:g}"] if "temperature" in told else []
        notes += (
            [("anchored" if told["anchored"] else "unanchored") + " drafts"]
            if "anchored" in told
            else []
        )
        found.append(((model, ", ".join([domain, *notes])), part))
    return found


def _economics(extras: ReportExtras) -> Economics:
    if extras.latency is not None:
        t = extras.latency
        words = (
            f"measured as {1e3 * t.base:.3g} + {1e3 * t.per_position:.3g} n + "
            f"{1e3 * t.per_component:.3g} n r ms, a plain step "
            f"{1e3 * t.plain_step:.3g} ms"
        )
        return Economics(t, words, extras.price)
    words = (
        "assumed, not measured: one request at a time on a device that only reads weights, "
        f"{_ASSUMED_LAYERS} layers, "
        f"{1e3 * _ASSUMED_STEP:.0f} ms a plain step; give your own with --latency"
    )
    return Economics(memory_bound_latency(_ASSUMED_STEP, _ASSUMED_LAYERS), words, extras.price)


def _setup(table: pd.DataFrame, manifest: dict) -> Table:
    settings, versions = manifest["settings"], manifest["versions"]
    models = [
        f"{name} (V = {m['vocab_size']}, sha256 {str(m['sha256'])[:12]})"
        for name, m in manifest["models"].items()
    ]
    rows = (
        ("Models", ", ".join(models)),
        ("Contexts", f"{settings['contexts']} per model, {settings['context_length']} tokens each"),
        ("Contexts from", ", ".join(settings["corpus"]) or "samples of each model itself"),
        ("Temperature", ", ".join(map(str, _several(settings, "temperature")))),
        ("Horizons", ", ".join(map(str, settings["horizons"]))),
        ("Ranks", ", ".join(map(str, settings["ranks"]))),
        ("Methods", f"{', '.join(settings['methods'])}; {settings['restarts']} start(s) each"),
        ("Seed", str(settings["seed"])),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("Time in fits", f"{table['fit_seconds'].sum():.0f} s"),
        ("Rows", f"{len(table):,}"),
    )
    return Table(("what", "value"), rows, wide=True)


def _several(settings: dict, name: str) -> list:
    """A setting's values, whether the study knows it as one or as an axis."""
    value = settings.get(name, settings.get(f"{name}s", ""))
    return list(value) if isinstance(value, list) else [value]


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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _plain_markdown(text: str) -> str:
    """Text from outside with nothing left that Markdown or HTML would read."""
    escaped = (
        _MARKDOWN.sub(r"\\\1", str(text))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )
    return " ".join(escaped.split())
