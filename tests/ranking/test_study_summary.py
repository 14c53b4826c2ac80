"""Summaries over contexts."""

from __future__ import annotations

from samples import RANKS, study_table

from cpmtp.ranking.summary import method_summary, survival_by_rank


def test_summaries_keep_every_method_and_position():
    table = study_table(lambda r: 1 / r)
    assert len(method_summary(table)) == len(RANKS) * 2
    survival = survival_by_rank(table)
    assert set(survival["position"]) == {1, 2}
    assert (survival[survival["position"] == 1]["survival"] == 1).all()
