"""What a page is made of: sections of text, tables and figures that neither know HTML nor
Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "", "strong", "note", "caution", or "line" with a `label`: one of the
    few lines that are read first.
    """

    text: str
    kind: str = ""
    label: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells as text; `marked` are the indices of rows to stand out, `wide` is said of cells
    with sentences.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture, what it is and what it shows in words; `subject` tells apart pictures of the same
    title.
    """

    title: str
    words: str
    draw: Callable[[Any], object]
    subject: str = ""

    @property
    def name(self) -> str:
        """Title and subject."""
        return f"{self.title} ({self.subject})" if self.subject else self.title


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; one that is `folded` is opened by who wants it."""

    title: str
    blocks: tuple[Text | Table | Figure, ...]
    level: int = 2
    folded: bool = False
