"""Ceilings of all parts of a study in one table: domains, temperatures, kinds of draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cpmtp.report.blocks import Section, Table, Text
from cpmtp.report.subject import Subject

_NOTE = (
    "Ceilings in tokens per call by rank, of drafts of form cp; saturates: the smallest rank "
    "within 1 % or one standard error of the best."
)


def side_by_side(subjects: Sequence[Subject]) -> Iterator[Section]:
    """A row per part and horizon; nothing where there is one part only."""
    if len(subjects) < 2:
        return
    ranks = sorted({int(r) for s in subjects for r in s.saturation.table["rank"]})
    rows = []
    for subject in subjects:
        for horizon, cells in subject.saturation.table.groupby("horizon"):
            ceilings = cells.set_index("rank")["tokens_per_call"]
            edge = "at least " if subject.saturation.at_grid_edge[horizon] else ""
            rows.append(
                (
                    subject.title.replace(" · contexts from ", ": "),
                    f"{horizon}",
                    *(f"{ceilings[rank]:.2f}" if rank in ceilings else "" for rank in ranks),
                    f"{edge}{subject.saturation.rank[horizon]}",
                    f"{subject.saturation.contexts}",
                )
            )
    named = (f"rank {rank}" for rank in ranks)
    head = ("contexts from", "horizon", *named, "saturates at", "contexts")
    yield Section("Ceilings side by side", (Table(head, tuple(rows)), Text(_NOTE, "note")))
