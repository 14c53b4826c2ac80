"""What the components of a draft say, at one context."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

from cpmtp.report import plots
from cpmtp.report.blocks import Figure, Section, Table, Text
from cpmtp.report.words import as_written, percent

_WORDS = (
    "A draft of form cp is a mixture: with its weight a component is drawn, and then all tokens of "
    "the block from that component alone, each from its own list. One component can only say what "
    "each place would hold by itself; several say which tokens go together."
)
_SHOWN, _LEAST, _TAIL = 3, 0.01, 48  # tokens of a place, probability of a token, characters


def component_sections(components: pd.DataFrame | None) -> Iterator[Section]:
    """A picture and a table of each model's components; nothing where none were kept."""
    if components is None or not len(components):
        return
    blocks: list[Text | Table | Figure] = [Text(_WORDS)]
    for (model, domain), rows in components.groupby(["model", "domain"], sort=False):
        after = as_written(rows["context_text"].iloc[0][-_TAIL:])
        count = rows["component"].nunique()
        blocks += [
            Text(f"{model} · contexts from {domain}, after “…{after}”:"),
            _table(rows),
            Figure(
                "Components",
                f"The {count} components of the closest mixture to what {model} says after "
                f"“…{after}”, the heaviest first: a bar per place in the block, its tokens by "
                "their probabilities.",
                partial(plots.plot_components, rows),
                str(model),
            ),
        ]
    yield Section("What components say", tuple(blocks))


def _table(rows: pd.DataFrame) -> Table:
    places = sorted(rows["position"].unique())
    cells = []
    for _, own in rows.groupby("component"):
        said = (", ".join(_tokens(own[own["position"] == place])) for place in places)
        cells.append((f"{own['weight'].iloc[0]:.2f}", *said))
    return Table(("weight", *(f"token {place}" for place in places)), tuple(cells), wide=True)


def _tokens(rows: pd.DataFrame) -> Iterator[str]:
    shown = rows[rows["probability"] >= _LEAST].head(_SHOWN)
    for token, share in zip(shown["token"], shown["probability"], strict=True):
        yield f"“{as_written(token)}” {percent(share)}"
