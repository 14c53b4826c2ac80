"""Documentation: `sphinx-build -W docs docs/_build/html` after `pip install -e ".[docs]"`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.domains.python import PyObject

import cpmtp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "cpmtp"
version = release = cpmtp.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
    "mathml",
]
html_math_renderer = "mathml"
templates_path = ["_templates"]
html_theme = "furo"
html_title = "cpmtp"
html_static_path = ["_static"]
html_show_copyright = False
html_css_files = ["pages.css"]
exclude_patterns = ["_build", "make_results.py"]
bibtex_bibfiles = ["references.bib"]
autosummary_generate = True
autodoc_typehints = "none"  # shapes and types stand in the docstrings
autodoc_default_options = {"members": True, "member-order": "bysource"}
napoleon_use_ivar = True
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "auto"  # notebooks are stored without outputs
nb_execution_timeout = 300
# Without widgets a bar is plain text; that is no finding of a notebook.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
nb_execution_raise_on_error = True

# Notebooks stand beside the package; a copy stands here while the pages are built.
(HERE / "notebooks").mkdir(exist_ok=True)
for _notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copy2(_notebook, HERE / "notebooks" / _notebook.name)

_KEYS = re.compile(r"\s*\w+(?:,\s*\w+)*\s*$")


def cite_references(app, what, name, obj, options, lines: list[str]) -> None:
    """Keys of the bibliography under a docstring's References become citations."""
    for i, line in enumerate(lines):
        if line.strip() == ".. rubric:: References":
            for j in range(i + 1, len(lines)):
                if lines[j].strip():
                    if _KEYS.match(lines[j]):
                        lines[j] = ", ".join(
                            f":cite:t:`{key.strip()}`" for key in lines[j].split(",")
                        )
                    break


def escape_stars(app, what, name, obj, options, lines: list[str]) -> None:
    """The star of a shape such as (*batch, vocab) begins no emphasis."""
    lines[:] = [re.sub(r"(?<=[(\[])\*(?=\w)", r"\\*", line) for line in lines]


_INTERVAL = re.compile(r"[\[(]([+−-]?[\d.]+%?)(, | to )([+−-]?[\d.]+%?)[\])]")


def unbroken(match: re.Match[str]) -> str:
    """An interval with spaces that do not break."""
    return match[0].replace(" ", "\N{NO-BREAK SPACE}")


def keep_intervals_whole(app, name, source: list[str]) -> None:
    """In a table's cells an interval stays in one line."""
    source[0] = "\n".join(
        _INTERVAL.sub(unbroken, line) if line.startswith("|") else line
        for line in source[0].split("\n")
    )


def setup(app) -> None:
    """Before and after napoleon, which runs at the default priority; the words of a shape
    are no links, since many classes have a horizon.
    """
    for field in PyObject.doc_field_types:
        if field.name in ("parameter", "variable"):
            field.typerolename = ""
    app.connect("source-read", keep_intervals_whole)
    app.connect("autodoc-process-docstring", escape_stars, priority=100)
    app.connect("autodoc-process-docstring", cite_references, priority=900)
