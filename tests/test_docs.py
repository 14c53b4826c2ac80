"""Links inside the documentation lead somewhere, its examples run, and its results are those of the
stored tables.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

_LINK = re.compile(r"(?<!`)\[[^\]`]*\]\(([^)\s]+)\)")
# What a browser fetches by itself: scripts, style sheets, pictures, frames; not links to follow.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//[^"']*"""
    r"""|<link[^>]*rel=["'](?:stylesheet|preload|icon)["'][^>]*href=["'](?:https?:)?//[^"']*"""
    r"""|@import[^;]*//[^;]*|url\(["']?(?:https?:)?//[^)]*"""
)
_ROLE = re.compile(r"\{doc\}`(?:[^`<]*<)?([\w/.-]+)>?`")


def pages(root):
    return [*(root / "docs").glob("*.md"), root / "README.md", root / "data" / "README.md"]


def test_links_between_pages_lead_to_files_that_exist(root):
    for page in pages(root):
        for target in _LINK.findall(page.read_text("utf-8")):
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.scheme == "https" and parts.netloc, f"{page.name}: {target}"
            elif parts.path:
                assert (page.parent / unquote(parts.path)).exists(), f"{page.name}: {target}"


def test_documents_named_by_others_exist(root):
    for page in pages(root):
        for name in _ROLE.findall(page.read_text("utf-8")):
            folder = root if name.startswith("notebooks/") else root / "docs"
            assert (folder / f"{name}.md").exists() or (folder / f"{name}.ipynb").exists(), (
                f"{page.name}: {name}"
            )


def test_every_page_is_in_the_table_of_contents(root):
    listed = set(
        re.findall(r"^[\w/]+$", (root / "docs" / "index.md").read_text("utf-8"), flags=re.MULTILINE)
    )
    pages = {page.stem: page.read_text("utf-8") for page in (root / "docs").glob("*.md")}
    # A page without results yet is linked to, and not in the navigation.
    waiting = {name for name, text in pages.items() if text.startswith("---\norphan: true")}
    assert set(pages) - {"index"} - waiting <= listed and not waiting & listed
    assert all(f"{{doc}}`{name}`" in "".join(pages.values()) for name in waiting)
    assert {f"notebooks/{page.stem}" for page in (root / "notebooks").glob("*.ipynb")} <= listed


def run_examples(page) -> dict:
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), space)
    return space


def test_the_tutorial_runs(root):
    space = run_examples(root / "docs" / "tutorial.md")
    assert space["profile"].tokens_per_call <= 2
    assert space["choices"]["tolerance"].rank[2] == 4


def test_what_is_added_by_the_page_for_contributors_runs(root):
    space = run_examples(root / "docs" / "extending.md")
    fitted, smoothed = space["earned"]
    assert smoothed != fitted and abs(smoothed - fitted) < 0.05
    mine, em = space["divergence"]
    assert abs(mine - em) < 1e-9  # rank 1 in closed form is what em finds
    emitted = space["first"].sum() + space["second"].sum()
    assert abs(float(emitted) - 11 / 9) < 1e-12
    assert space["half_of_the_gain"](space["np"].array([[2.0, 2.3, 2.4]])).tolist() == [1]


def test_the_page_on_heads_runs(root, monkeypatch):
    monkeypatch.chdir(root)
    space = run_examples(root / "docs" / "heads.md")
    assert 2 < space["forecast"].tokens_per_call < space["forecast"].unweighted <= 4
    assert len(space["out"].token_ids) == 40
    assert space["text"].shape[1] == space["ids"].shape[1] + 20


def test_the_results_are_those_of_the_stored_tables(root, tmp_path):
    runpy.run_path(str(root / "docs" / "make_results.py"))["main"](tmp_path)
    assert (tmp_path / "results.md").read_text("utf-8") == (root / "docs" / "results.md").read_text(
        "utf-8"
    )
    assert {f.name for f in (tmp_path / "figures").iterdir()} <= {
        f.name for f in (root / "docs" / "figures").iterdir()
    }


def test_the_page_on_forms_is_made_from_the_stored_tables(root):
    made = runpy.run_path(str(root / "docs" / "make_which_form.py"))["page"]()
    assert made == (root / "docs" / "which_form.md").read_text("utf-8")


def rows_of_other_widths(text: str) -> list[str]:
    """Rows of tables with more or fewer cells than their table's head: a bare bar cuts a cell."""
    found, head = [], None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        if head and cells and cells != head:
            found.append(line)
        head = head if head and cells else cells
    return found


def test_no_cell_of_a_table_is_cut_by_a_bar_inside_it(root):
    assert rows_of_other_widths("| a | b |\n|---|---|\n| x | `p(x|y)` |") == ["| x | `p(x|y)` |"]
    for page in pages(root):
        assert not rows_of_other_widths(page.read_text("utf-8")), page.name


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.names = [], set()

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.targets += [known[name] for name in ("href", "src") if known.get(name)]
        if known.get("id"):
            self.names.add(known["id"])


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning_and_no_link_in_it_is_dead(root, tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    pytest.importorskip("sphinxcontrib.bibtex")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(tmp_path / "trees"),
    ]
    done = subprocess.run(
        [*command, str(root / "docs"), str(tmp_path / "html")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    asked = [
        f"{file.name}: {text}"
        for file in (tmp_path / "html").rglob("*")
        if file.suffix in (".html", ".css")
        for text in _FETCHED.findall(file.read_text("utf-8"))
    ]
    assert not asked  # a reader without a network sees all of it
    found = {}
    for file in (tmp_path / "html").rglob("*.html"):
        found[file] = _Links()
        found[file].feed(file.read_text("utf-8"))
    for file, links in found.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            aim = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert aim.exists(), f"{file.name}: {target}"
            if parts.fragment and aim in found:
                assert unquote(parts.fragment) in found[aim].names, f"{file.name}: {target}"


def test_the_interface_page_is_made_from_the_list_of_public_names(root):
    make = runpy.run_path(str(root / "docs" / "make_api.py"))["interface_page"]
    listed = (root / "cpmtp" / "__init__.pyi").read_text("utf-8")
    assert (root / "docs" / "api.md").read_text("utf-8") == make(listed)


def test_readers_are_shown_public_names_only(root):
    shown = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "notebooks").glob("*.py")]
    shown.remove(root / "docs" / "extending.md")  # for those who change what is inside
    inside = [
        f"{path.name}: {line}"
        for path in shown
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"(from|import) cpmtp\.", line)
    ]
    assert not inside
