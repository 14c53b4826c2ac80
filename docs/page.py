"""A page made of sentences that know which stored tables they are from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cpmtp.report.plots import figure_svg
from cpmtp.study.running import read_study


class Refuted(ValueError):
    """A sentence that the tables no longer bear out."""


@dataclass(frozen=True)
class Sentence:
    """Text, and the names of the tables that it was made from; none for what is not a finding."""

    text: str
    sources: tuple[str, ...]


@dataclass
class Page:
    """Headings, sentences, tables and figures in their order.

    Attributes
    ----------
    studies : Path
        The folder of stored tables.
    figures : Path, optional
        Where figures go; without it none is drawn.
    """

    studies: Path
    figures: Path | None = None
    blocks: list[list[Sentence]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A heading; what is said next begins a paragraph."""
        self.blocks.append([Sentence(f"## {text}", ())])

    def say(self, text: str, *sources: str, holds: object = True) -> None:
        """A paragraph of one sentence; raises `Refuted` where it does not hold."""
        self.blocks.append([])
        self.add(text, *sources, holds=holds)

    def add(self, text: str, *sources: str, holds: object = True) -> None:
        """One more sentence of the paragraph."""
        if not bool(holds):
            raise Refuted(f"no longer true: {text}")
        self.blocks[-1].append(Sentence(text, sources))

    def table(self, frame: pd.DataFrame, *sources: str) -> None:
        """A table of text."""
        head = [f"| {' | '.join(map(str, frame.columns))} |", f"|{' --- |' * len(frame.columns)}"]
        rows = (f"| {' | '.join(map(str, row))} |" for row in frame.itertuples(index=False))
        self.blocks.append([Sentence("\n".join([*head, *rows]), sources)])

    def figure(self, name: str, title: str, words: str, draw: Callable | None) -> None:
        """A figure of the house; without `draw` one that lies there already."""
        if self.figures is not None and draw is not None:
            text = figure_svg(draw, title, name=name)
            (self.figures / f"{name}.svg").write_text(text, encoding="utf-8")
        said = f"![{title}. {words}](figures/{name}.svg)\n\n*{title}. {words}*"
        self.blocks.append([Sentence(said, ())])

    @property
    def sentences(self) -> Iterable[Sentence]:
        """All of them in order."""
        return [sentence for block in self.blocks for sentence in block]

    @property
    def text(self) -> str:
        """The page as Markdown."""
        paragraphs = (
            ("\n" if block[0].text.startswith("* ") else " ").join(one.text for one in block)
            for block in self.blocks
        )
        return "\n\n".join(paragraphs) + "\n"

    def study(self, name: str) -> pd.DataFrame:
        """A stored study, brought to today's columns."""
        return read_study(self.studies / name)[0]

    def stored(self, name: str) -> pd.DataFrame:
        """A stored table by its path below the studies."""
        path = self.studies / name
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)

    def has(self, name: str) -> bool:
        """Whether a table is stored."""
        return (self.studies / name).is_file()
