"""Formulas as MathML, made while the pages are built: readers need no script and no network."""

from __future__ import annotations

from latex2mathml.converter import convert


def visit_inline(writer, node) -> None:
    """A formula in a line."""
    _write(writer, convert(node.astext()))


def visit_block(writer, node) -> None:
    """A formula of its own."""
    _write(writer, f'<div class="math">{convert(node.astext(), display="block")}</div>')


def _write(writer, text: str) -> None:
    from docutils import nodes

    writer.body.append(text)
    raise nodes.SkipNode


def setup(app) -> dict[str, bool]:
    """Make it the way formulas are written in HTML."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
