"""A report of a large table within seconds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from samples import MANIFEST, study_table

from cpmtp.report.document import Report

ROWS = 20_000
LIMIT_SECONDS = 15.0


def large_table() -> pd.DataFrame:
    """Two models, three horizons, seven ranks' worth of contexts until there are enough rows."""
    parts = []
    contexts = ROWS // (2 * 3 * 8)
    for model in ("a", "b"):
        for horizon in (2, 3, 4):
            part = study_table(
                lambda r: 0.4 / r, contexts=contexts, documents=contexts, horizon=horizon
            )
            parts.append(
                part.assign(model=model, joint_entropy_nats=part["tokens_per_call_block_target"])
            )
    table = pd.concat(parts, ignore_index=True)
    for k in (3, 4):
        table[f"survival_block_target_{k}"] = np.where(table["horizon"] >= k, 0.5, np.nan)
    return table


@pytest.mark.benchmark
def test_a_report_of_twenty_thousand_rows_is_written_in_time(benchmark, tmp_path):
    table = large_table()
    assert len(table) >= 0.95 * ROWS

    def both():
        report = Report.of(table, MANIFEST)
        report.write_html(tmp_path / "report.html")
        report.write_markdown(tmp_path / "report.md")

    benchmark.pedantic(both, rounds=1)
    assert benchmark.stats.stats.max <= LIMIT_SECONDS
