"""The report: one file, nothing from outside, everything escaped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
from samples import MANIFEST, study_table

from cpmtp.latency import LatencyModel
from cpmtp.report.document import ReportExtras, read_extras, write_report

HOSTILE = "<script>alert(1)</script>"
QUOTED = """it's a "file".txt"""


def hostile_table() -> pd.DataFrame:
    table = study_table(lambda r: 1 / r).assign(
        joint_entropy_nats=2.0, survival_coupling_target_1=1.0, domain=QUOTED
    )
    table["tokens_per_call_coupling_target"] = table["tokens_per_call_block_target"]
    table.loc[0, ["status", "message"]] = ["failed", f"{HOSTILE} `code` | *star* $x$"]
    return table


LEARNED = ReportExtras(
    latency=LatencyModel(0.01, 0.011, 0.0001, 0.0001),
    waterfall=pd.DataFrame(
        [
            dict(model=HOSTILE, domain="d", horizon=3, rank=4, anchored=True, exact_limit=3.0)
            | dict(acceptance_fit=2.9, em_fit=2.85, learned=2.4, learned_low=2.3, learned_high=2.5)
        ]
    ),
    decoding=pd.DataFrame(
        [
            dict(rank=4, forecast=2.4, forecast_low=2.3, forecast_high=2.5, measured=2.38)
            | dict(tokens_per_second=90.0)
        ]
    ),
    step_times=pd.DataFrame([dict(label="rank 4", target_seconds=0.01, draft_seconds=0.001)]),
)


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    return write_report(
        hostile_table(), MANIFEST, tmp_path_factory.mktemp("report") / "report.html", LEARNED
    )


@pytest.fixture(scope="module")
def page(report_file) -> str:
    return report_file.read_text("utf-8")


@pytest.fixture(scope="module")
def markdown(tmp_path_factory):
    return write_report(
        hostile_table(), MANIFEST, tmp_path_factory.mktemp("markdown") / "report.md", LEARNED
    )


def test_the_first_lines_answer_the_question(page):
    first_screen = re.sub(r"<[^>]*>", "", page[: page.index("How to read this")])
    for said in (
        "Pilot first",
        "horizon 3 with rank",
        "times the speed",
        "tokens per call",
        "a million tokens",
        "How sure",
        "if a component cost",
        "Assumed, not measured: what a trained head reaches.",
        "cpmtp forecast --model m",
    ):
        assert said in first_screen, said
    for said in (
        "Recommended: horizon 3 with rank",
        "assuming a trained head reaches 80 % of its ceiling",
        "would change the answer",
        "ceiling saturates at rank at least 8",
        "95 % interval",
    ):
        assert said in page, said


def test_the_first_screen_is_four_lines_with_cautions_in_colour_above_them(page):
    (card,) = re.findall(r'<div class="answer">(.*?)</div>', page, flags=re.DOTALL)
    kinds = re.findall(r'<p class="(\w+)"', card)
    labels = re.findall(r'<p class="line"><b>([^<]*)</b>', card)
    assert labels == ["Pilot first", "Brings", "How sure", "Next"]
    assert kinds == ["caution"] * (len(kinds) - 4) + ["line"] * 4
    assert "1 of 512 fits failed" in card and "fits failed" not in card[card.index("line") :]
    assert card.count("<p") == len(kinds)
    for words in re.findall(r"<span>(.*?)</span>", card):
        assert len(re.sub(r"<[^>]*>", "", words)) <= 160  # four lines of a phone each
    assert re.search(r"\.caution \{[^}]*background: var\(--warn\)", page)


def test_a_range_of_speed_and_cost_is_on_the_first_screen(page):
    (brings,) = re.findall(r"<b>Brings</b> <span>(.*?)</span>", page)
    low, high, mean = map(float, re.findall(r"([\d.]+) to ([\d.]+) times .*\(([\d.]+)", brings)[0])
    cheap, dear, plain = map(
        float, re.findall(r"at ([\d.]+) to ([\d.]+) .* of ([\d.]+)", brings)[0]
    )
    assert low < mean < high and cheap < dear < plain
    assert plain / cheap == pytest.approx(high, rel=0.02)  # what is faster is cheaper by as much
    assert plain / dear == pytest.approx(low, rel=0.02)


_RAW = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b")


def test_no_raw_column_name_reaches_a_reader(page):
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text) + re.findall(r'data-name="(.*?)"', text)
    assert len(cells) > 100
    assert not [cell for cell in cells if _RAW.search(cell)]
    heads = " ".join(re.findall(r"<th [^>]*>(.*?)</th>", text))
    for raw in ("parameters", "em fit", "learned low", "target seconds", "acceptance fit"):
        assert raw not in heads
    assert "trained head (interval)" in heads and "numbers in a fit" in heads
    # The only underscores left in prose are names that a server's options have.
    prose = re.sub(r"<[^>]*>", " ", text)
    assert {name for name in _RAW.findall(prose)} <= {
        "rejection_sample_method",
        "synthetic_acceptance_rates",
    }


def test_important_columns_come_first_and_every_cell_knows_its_column(page):
    tables = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
    heads = [re.findall(r"<th [^>]*>(.*?)</th>", table) for table in tables]
    for head, table in zip(heads, tables, strict=True):
        for row in re.findall(r"<tr role=\"row\"[^>]*>((?:<td.*?</td>)+)</tr>", table):
            assert re.findall(r'data-name="(.*?)"', row) == head
    by_rank = next(head for head in heads if "fastest in" in head)
    assert by_rank.index("fastest in") < 4 and by_rank[-1] == "numbers in a fit"
    fits = next(head for head in heads if "not converged" in head)
    assert fits[3:5] == ["not converged", "failed"]


def test_fits_are_folded_and_answers_are_not(page):
    folded = "".join(re.findall(r"<details>.*?</details>", page, flags=re.DOTALL))
    titles = re.findall(r"<summary><h3>(.*?)</h3>", folded)
    assert titles == ["Fits by method", "Every head&#39;s losses", "Every run"]
    assert "not converged" in folded and "fastest in" not in folded
    assert "<details open" not in page


def test_the_layout_of_a_phone_is_for_screens_alone(page):
    narrow = re.findall(r"@media ([^{]*max-width[^{]*)\{", page)
    assert narrow and all(rule.startswith("screen and ") for rule in narrow)


def test_everything_from_outside_is_shown_as_text(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "it&#39;s a &#34;file&#34;.txt" in page


def test_the_page_needs_nothing_else(page):
    assert not re.search(
        r"""(?:src|href)\s*=\s*["'](?!#)""", page.replace("xlink:href", "xlink:ref")
    )
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
    figures = re.findall(r"<figure>(.*?)</figure>", page, flags=re.DOTALL)
    assert len(figures) == 10
    for figure in figures:
        assert len(re.search(r'role="img" aria-label="([^"]*)"', figure)[1]) > 30
        assert "<figcaption>" in figure


def test_figures_take_their_colours_from_the_theme_and_share_no_names(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert all("var(--figure-ink" in drawing for drawing in drawings)
    assert not any(re.search(r"(?<!, )#1b1f24", drawing) for drawing in drawings)
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_the_same_table_gives_the_same_page(report_file, tmp_path):
    again = write_report(hostile_table(), MANIFEST, tmp_path / "b.html", LEARNED)
    assert again.read_bytes() == report_file.read_bytes()


def test_without_tables_of_a_head_their_sections_are_left_out(tmp_path):
    text = write_report(study_table(lambda r: 1 / r), MANIFEST, tmp_path / "a.html").read_text(
        "utf-8"
    )
    assert "Forecast against measurement" not in text
    assert "Where tokens per call are lost" not in text
    assert "assumed, not measured" in text


def test_the_markdown_says_the_same_and_names_figures_that_exist(markdown, page):
    text = markdown.read_text("utf-8")
    figures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(figures) == 10
    assert all((markdown.parent / name).is_file() for name in figures)
    assert "<" not in text.replace("<br>", "")
    assert "\\*star\\*" in text
    headings = re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page)
    assert len(headings) == len(re.findall(r"^##", text, flags=re.MULTILINE))


def test_the_pilot_plan_says_what_to_measure_when_to_stop_and_what_cannot_change(page):
    plan = page[page.index('id="pilot-plan"') :]
    for said in (
        "tokens per call",
        "throughput",
        "edits",
        "cost",
        "O&#39;Brien",
        "requests in each arm",
        "Break-even",
    ):
        assert said in plan, said
    assert "distribution of the output" in plan


def test_a_measured_latency_beside_the_table_is_used(tmp_path):
    fields = {"plain_step": 0.01, "base": 0.01, "per_position": 0.001, "per_component": 0.0001}
    (tmp_path / "latency.json").write_text(json.dumps(fields))
    assert read_extras(tmp_path).latency == LatencyModel(**fields)
    (tmp_path / "latency.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match="expected JSON such as"):
        read_extras(tmp_path)


_PROBE = """<script>
const e = document.documentElement;
const all = what => [...document.querySelectorAll(what)];
all("details").forEach(x => { x.open = true; });
const box = x => x.getBoundingClientRect();
const wide = all("body *").filter(
  x => !x.closest(".scroll, svg") && box(x).right > e.clientWidth + 1);
const clipped = all("svg text").filter(x => {
  const [own, whole] = [box(x), box(x.closest("svg"))];
  return own.left < whole.left - 1 || own.right > whole.right + 1 ||
    own.top < whole.top - 1 || own.bottom > whole.bottom + 1; });
parent.postMessage(JSON.stringify({page: e.scrollWidth, window: e.clientWidth,
  wide: wide.map(x => x.tagName), clipped: clipped.map(x => x.textContent),
  scrolling: all(".scroll").filter(x => x.scrollWidth > x.clientWidth + 1)
    .map(x => x.getAttribute("aria-label")),
  answer: Math.max(...all(".answer").map(x => box(x).bottom)),
  figure: Math.max(...all("figure").map(x => box(x).width)),
  requests: performance.getEntriesByType("resource").length}), "*");
</script></body>"""
_FRAME = """<title></title>
<script>addEventListener("message", m => { document.title = m.data; })</script>
<iframe style="width: %dpx; height: 900px; border: 0" src="%s"></iframe>"""
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium(tmp_path, *options: str) -> subprocess.CompletedProcess:
    command = ["chromium", "--headless", *_QUIET, f"--user-data-dir={tmp_path / 'profile'}"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_it_prints_on_few_pages_two_figures_a_row(report_file, tmp_path):
    printed = tmp_path / "report.pdf"
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={printed}", report_file.as_uri())
    pages = re.findall(rb"/Type\s*/Page\b", printed.read_bytes())
    assert 1 <= len(pages) <= 6  # of one model and one horizon, with all tables of heads
    page = report_file.read_text("utf-8")
    (style,) = re.findall(r"@media print \{.*?\n\}", page, flags=re.DOTALL)
    assert ".figures { grid-template-columns: 1fr 1fr;" in style


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_overflow_error_or_request(page, tmp_path, width):
    file = tmp_path / """report "quoted" it's.html"""
    file.write_text(page.replace("</body>", _PROBE), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME % (width, file.as_uri()))
    dump = ["--virtual-time-budget=5000", "--window-size=1300,1000", "--dump-dom"]
    done = chromium(tmp_path, "--enable-logging=stderr", *dump, frame.as_uri())
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert found["window"] <= width
    assert found["page"] <= found["window"], found
    assert not found["wide"] and not found["clipped"] and not found["scrolling"]
    assert found["answer"] <= 844  # of the window of a phone
    assert found["figure"] <= 560
    assert found["requests"] == 0
    assert "CONSOLE" not in done.stderr
