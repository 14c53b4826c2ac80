"""Writes results.md and its figures from stored tables: python docs/make_results.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import paper
import paper_abstract
import paper_forecast
import paper_objections
import paper_temperature
from page import Page

STUDIES = Path(__file__).parents[1] / "data" / "studies"
SECTIONS = (
    paper_abstract.abstract,
    paper.setting,
    paper.learning_section,
    paper_temperature.forms_lost_section,
    paper.forms_section,
    paper_temperature.temperature_section,
    paper.rank_section,
    paper.told_section,
    paper.vocabulary_section,
    paper_forecast.backtest_section,
    paper.decoding_section,
    paper.puzzles_section,
    paper_objections.objections_section,
)


def made(studies: Path = STUDIES, figures: Path | None = None) -> Page:
    """The page from the tables of a folder; figures are drawn where a folder is given."""
    page = Page(studies, figures)
    for section in SECTIONS:
        section(page)
    page.say(paper.LIMITS)
    return page


def main(folder: Path) -> None:
    """The page and its figures."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(made(figures=figures).text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
