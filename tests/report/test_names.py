"""What goes out: no two figures or anchors of one name, no NaN, no rate that rises."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import MANIFEST, study_table

from cpmtp.acceptance.implied import AcceptanceProfile
from cpmtp.report.document import Report, _slugs

DOMAINS = ["Größe", "大小", "大大", "a b", "a-b"]


@given(st.lists(st.text(max_size=200), max_size=8))
def test_no_two_names_become_one_file(names):
    slugs = _slugs(names)
    assert len(set(slugs.values())) == len(set(names))
    for slug in slugs.values():
        assert slug and len(f".{slug}.svg.4000000.12345678.partial".encode()) <= 255
        assert re.fullmatch(r"[\w-]+", slug) and slug == slug.casefold()


def test_every_domain_has_its_own_anchor_and_figures_whatever_its_alphabet(tmp_path):
    import pandas as pd

    names = DOMAINS
    parts = [study_table(lambda r: 1 / r, contexts=2).assign(domain=name) for name in names]
    report = Report.of(pd.concat(parts), MANIFEST)
    page = report.write_html(tmp_path / "r.html").read_text("utf-8")
    anchors = re.findall(r'<h2 id="([^"]*)"', page)
    assert len(anchors) == len(set(anchors)) >= len(names)
    assert set(re.findall(r'<a href="#([^"]*)"', page)) <= set(anchors)
    text = report.write_markdown(tmp_path / "r.md").read_text("utf-8")
    shown = re.findall(r"\]\((r_figures/[^)]*\.svg)\)", text)
    assert len(shown) == len(set(shown)) == len(list((tmp_path / "r_figures").glob("*.svg")))


@pytest.mark.parametrize("contexts", [1, 2])
def test_few_contexts_leave_no_nan_and_one_no_interval(tmp_path, contexts):
    table = study_table(lambda r: 1 / r, contexts=contexts)
    table["joint_entropy_nats"] = np.nan if contexts == 1 else 1.0
    report = Report.of(table, MANIFEST)
    text = report.write_markdown(tmp_path / "r.md").read_text("utf-8") + report.summary
    assert not re.search(r"\b(nan|inf|NaN)\b", text)
    if contexts == 1:
        assert "a single context gives no interval" in text
        assert not re.search(r"95 % interval \d|r=\d+: \d\.\d+ \[", text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1.0 + 1e-12), min_size=1, max_size=6), st.booleans())
def test_rates_for_a_server_stay_within_one_and_never_rise(survival, told):
    first = "target" if told else "draft"
    profile = AcceptanceProfile(torch.tensor(survival, dtype=torch.float64), "block", first)
    rates = json.loads(profile.to_vllm_synthetic())["synthetic_acceptance_rates"]
    assert len(rates) == len(survival) - told
    assert all(0 <= rate <= 1 for rate in rates) and rates == sorted(rates, reverse=True)


def test_a_command_breaks_before_options_only_and_scrolls_in_a_box_of_its_own(tmp_path):
    page = Report.of(study_table(lambda r: 1 / r), MANIFEST).write_html(tmp_path / "r.html")
    text = page.read_text("utf-8")
    box = re.findall(r"^code \{([^}]*)\}", text, flags=re.MULTILINE)[0]
    assert "max-width: 100%" in box and "overflow-x: auto" in box and "white-space: nowrap" in box
    assert "white-space: normal" in re.findall(r"code\.command \{([^}]*)\}", text)[0]
    assert "white-space: nowrap" in re.findall(r"code\.command span \{([^}]*)\}", text)[0]
    commands = re.findall(r'<code class="command">(.*?)</code>', text)
    assert commands
    for command in commands:
        parts = re.findall(r"<span>(.*?)</span>", command)
        assert " ".join(f"<span>{part}</span>" for part in parts) == command
        assert parts[0].count("--") == 0 and all(part.count("--") == 1 for part in parts[1:])


def test_names_in_the_contents_are_short_and_whole_where_one_points_at_them(tmp_path):
    long = "/a/folder/with/a-model-whose-name-is-long.Q4_1.gguf"
    table = study_table(lambda r: 1 / r, contexts=2).assign(model=long)
    page = Report.of(table, MANIFEST).write_html(tmp_path / "r.html").read_text("utf-8")
    contents = re.search(r"<nav.*?</nav>", page)[0]
    shown = re.findall(r'<a href="[^"]*"(?: title="([^"]*)")?>([^<]*)</a>', contents)
    assert all(len(name) <= 38 for _, name in shown)
    assert [title for title, name in shown if "…" in name] == [f"{long} · contexts from d"]


def test_no_line_ends_between_a_number_and_its_unit(tmp_path):
    page = Report.of(study_table(lambda r: 1 / r), MANIFEST).write_html(tmp_path / "r.html")
    main = re.search(r"<main>.*</main>", page.read_text("utf-8"), flags=re.DOTALL)[0]
    shown = re.sub(r"<svg.*?</svg>|<[^>]*>", "", main, flags=re.DOTALL)
    assert not re.findall(r"\d %|\d ms", shown)
    assert "95\N{NO-BREAK SPACE}% interval" in shown and not re.search(r"\d%", shown)


def test_what_is_folded_is_not_printed_as_an_empty_box_and_cards_name_no_what(tmp_path):
    page = Report.of(study_table(lambda r: 1 / r), MANIFEST).write_html(tmp_path / "r.html")
    phone, printed = (
        page.read_text("utf-8").split("@media screen and (max-width")[1].split("@media print")
    )
    assert re.search(r"details:not\(\[open\]\) \{ display: none; \}", printed)
    assert 'td[data-name="what"]::before' in phone and "content: none" in phone


def test_a_gain_that_a_test_would_find_is_not_called_one_that_was_seen(tmp_path):
    report = Report.of(study_table(lambda r: 1 / r), MANIFEST)
    section = next(s for s in report.sections if s.title.startswith("What a higher rank gains"))
    table, note = section.blocks
    assert table.head[-1] == "gain that would show" and note.text.startswith("Gain that would show")
