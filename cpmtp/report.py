"""One self-contained HTML page out of a study's table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from cpmtp.plots import figure_svg, plot_error_against_rank, plot_survival, plot_tokens_per_call
from cpmtp.rank_selection import RankChoice, select_rank
from cpmtp.study_summary import method_summary, survival_by_rank


@dataclass(frozen=True)
class Figure:
    """A picture and what it shows in words."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """One model and domain's part of the report."""

    title: str
    anchor: str
    choice: RankChoice
    sentences: list[str]
    results: list[dict]
    methods: list[dict]
    figures: list[Figure]


def write_report(table: pd.DataFrame, manifest: dict, path: str | Path) -> Path:
    """Write the report of a study as one HTML file that needs nothing else.

    Parameters
    ----------
    table, manifest
        Of `read_study`.
    path : path
        The file to write.

    Raises
    ------
    ValueError
        If the table holds no usable row.
    """
    sections = [_section(part, model, domain) for (model, domain), part in table_parts(table)]
    environment = Environment(
        loader=PackageLoader("cpmtp", "templates"), autoescape=select_autoescape(default=True), undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        sections=sections, setup=_setup(table, manifest), failures=_failures(table), rows=len(table)
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def table_parts(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """What a rank is chosen for: (model, domain), the domain with the temperature and kind of draft where there are several."""
    keys = [name for name in ("temperature", "anchored") if name in table and table[name].nunique() > 1]
    found = []
    for (model, domain, *others), part in table.groupby(["model", "domain", *keys], sort=False):
        told = dict(zip(keys, others, strict=True))
        notes = [f"temperature {told['temperature']:g}"] if "temperature" in told else []
        notes += [("anchored" if told["anchored"] else "unanchored") + " drafts"] if "anchored" in told else []
        found.append(((model, ", ".join([domain, *notes])), part))
    return found


def _section(table: pd.DataFrame, model: str, domain: str) -> Section:
    choice = select_rank(table)
    methods = method_summary(table)
    survival = survival_by_rank(table)
    figures = [
        figure for horizon in choice.rank for figure in _figures(f"{model}, n = {horizon}", horizon, choice, methods, survival)
    ]
    return Section(
        title=f"{model} · contexts from {domain}",
        anchor=re.sub(r"[^a-z0-9]+", "-", f"{model}-{domain}".lower()).strip("-"),
        choice=choice,
        sentences=[choice.sentence(horizon) for horizon in choice.rank],
        results=choice.table.to_dict("records"),
        methods=methods.to_dict("records"),
        figures=figures,
    )


def _figures(label: str, horizon: int, choice: RankChoice, methods: pd.DataFrame, survival: pd.DataFrame) -> list[Figure]:
    ranks = choice.table[choice.table["horizon"] == horizon]
    errors = methods[methods["horizon"] == horizon]
    positions = survival[survival["horizon"] == horizon]
    last = ranks.iloc[-1]
    return [
        Figure(
            Markup(
                figure_svg(
                    lambda ax: plot_tokens_per_call(ranks, ax, recommended=choice.rank[horizon], horizon=horizon),
                    f"Tokens per call against rank ({label})",
                )
            ),
            f"Tokens per call rise from {ranks.iloc[0].tokens_per_call:.2f} at rank {ranks.iloc[0]['rank']:.0f} to "
            f"{last.tokens_per_call:.2f} at rank {last['rank']:.0f}; an exact draft would give {horizon}. "
            f"Recommended: rank {'at least ' if choice.at_grid_edge[horizon] else ''}{choice.rank[horizon]}.",
        ),
        Figure(
            Markup(figure_svg(lambda ax: plot_error_against_rank(errors, ax), f"Error against rank ({label})")),
            "KL divergence from the exact joint to each method's fit, median over contexts with quartiles. A line ends where "
            "the divergence is infinite: the fit gives nothing to what the target can emit.",
        ),
        Figure(
            Markup(figure_svg(lambda ax: plot_survival(positions, ax), f"Survival per position ({label})")),
            "Probability that the first k tokens of a block are emitted unchanged, mean over contexts, per rank.",
        ),
    ]


def _setup(table: pd.DataFrame, manifest: dict) -> list[tuple[str, str]]:
    settings, versions = manifest["settings"], manifest["versions"]
    models = [f"{name} (V = {m['vocab_size']}, sha256 {str(m['sha256'])[:12]})" for name, m in manifest["models"].items()]
    return [
        ("Models", ", ".join(models)),
        ("Contexts", f"{settings['contexts']} per model, {settings['context_length']} tokens each"),
        ("Contexts from", ", ".join(settings["corpus"]) or "samples of each model itself"),
        ("Temperature", ", ".join(map(str, settings.get("temperatures", [settings.get("temperature")])))),
        ("Horizons", ", ".join(map(str, settings["horizons"]))),
        ("Ranks", ", ".join(map(str, settings["ranks"]))),
        ("Methods", f"{', '.join(settings['methods'])}; {settings['restarts']} start(s) each"),
        ("Seed", str(settings["seed"])),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("Time in fits", f"{table['fit_seconds'].sum():.0f} s"),
    ]


def _failures(table: pd.DataFrame) -> list[dict]:
    failed = table[table["status"] == "failed"]
    grouped = failed.groupby(["method", "rank", "message"]).size().reset_index(name="count")
    return grouped.sort_values("count", ascending=False).head(20).to_dict("records")
