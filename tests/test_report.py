"""The report: one file, nothing from outside, everything escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from test_rank_selection import study_table

from cpmtp.report import write_report

MANIFEST = {
    "settings": {
        "contexts": 64,
        "context_length": 8,
        "corpus": ['<script>alert(1)</script>"quoted".txt'],
        "temperature": 1.0,
        "horizons": [3],
        "ranks": [1, 2, 4, 8],
        "methods": ["em", "als"],
        "restarts": 1,
        "seed": 0,
    },
    "versions": {"cpmtp": "0"},
    "models": {"m": {"vocab_size": 6, "sha256": None}},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    table = study_table(lambda r: 1 / r)
    table.loc[0, ["status", "message"]] = ["failed", "<script>alert(1)</script>"]
    return write_report(table, MANIFEST, tmp_path_factory.mktemp("report") / "report.html").read_text("utf-8")


def test_the_first_lines_answer_the_question(page):
    before_setup = page[: page.index("Set-up")]
    assert "rank at least 8" in before_setup
    assert "95 % interval" in before_setup


def test_everything_from_outside_is_shown_as_text(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page.replace("xlink:href", "xlink:ref"))
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_every_tag_is_closed(page):
    class Checker(HTMLParser):
        void = frozenset(["meta", "br", "link"])

        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert not checker.open


def test_every_figure_says_in_words_what_it_shows(page):
    figures = re.findall(r"<figure[^>]*>", page)
    assert len(figures) == 3
    assert all("aria-label=" in figure for figure in figures)


def test_the_same_table_gives_the_same_page(page, tmp_path):
    table = study_table(lambda r: 1 / r)
    first = write_report(table, MANIFEST, tmp_path / "a.html").read_bytes()
    assert write_report(table, MANIFEST, tmp_path / "b.html").read_bytes() == first
