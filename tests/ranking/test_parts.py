"""Parts of a table are never mixed without being asked, and methods never at all."""

from __future__ import annotations

import pandas as pd
import pytest
from samples import study_table

import cpmtp
from cpmtp.ranking.parts import partial_methods, table_parts
from cpmtp.ranking.selection import compare_criteria, needed_ranks, paired_gains, select_rank
from cpmtp.ranking.summary import method_summary, partial_gains, survival_by_rank


def loss(rank: int) -> float:
    return 0.4 / rank


def test_the_best_fits_are_those_of_the_best_method_of_every_context():
    table = study_table(loss)
    table["method"] = table["method"].replace({"als": "hals"})
    best = cpmtp.best_fits(table)
    assert len(best) == 64 * 4 and set(best["method"]) == {"em"}
    groups = table.groupby(["context", "rank"])["tokens_per_call_block_target"]
    found = best.set_index(["context", "rank"])["tokens_per_call_block_target"]
    pd.testing.assert_series_equal(found.sort_index(), groups.max())
    # What a mean over all rows says is lower than any rank's ceiling.
    mixed = table.groupby("rank")["tokens_per_call_block_target"].mean()
    assert (best.groupby("rank")["tokens_per_call_block_target"].mean() > mixed + 0.04).all()


def test_the_best_fits_keep_order_and_index_and_leave_out_what_failed():
    table = study_table(loss, contexts=3, documents=3)
    table.index = table.index + 100
    table.loc[100, "status"] = "failed"
    best = cpmtp.best_fits(table)
    assert best.index.is_monotonic_increasing and best.index[0] == 101
    assert best["method"].tolist() == ["als"] + ["em"] * 11
    doubled = cpmtp.best_fits(pd.concat([table, table.assign(model="n")]))
    assert len(doubled) == 24


def test_where_methods_tie_one_row_is_taken():
    table = study_table(loss, contexts=2, documents=2).assign(tokens_per_call_block_target=2.0)
    assert len(cpmtp.best_fits(table)) == 8


def test_temperatures_and_kinds_of_draft_have_best_fits_of_their_own():
    table = study_table(loss, contexts=2, documents=2)
    both = pd.concat(
        [table.assign(temperature=t, anchored=a) for t in (1.0, 0.5) for a in (False, True)]
    )
    assert len(cpmtp.best_fits(both)) == 4 * 8


SEVERAL = [
    ("model", ["m", "n"], "several models (m, n)", "table['model'] == 'm'"),
    ("domain", ["d", "e"], "several domains (d, e)", "table['domain'] == 'd'"),
    ("temperature", [1.0, 0.7], "several temperatures (1.0, 0.7)", "table['temperature'] == 1.0"),
    ("anchored", [True, False], "several kinds of draft", "table['anchored'] == True"),
]


@pytest.mark.parametrize(
    "call",
    [select_rank, compare_criteria, paired_gains, needed_ranks, method_summary, survival_by_rank],
)
@pytest.mark.parametrize(("name", "values", "said", "remedy"), SEVERAL)
def test_several_parts_are_refused_in_one_line_unless_pooled(call, name, values, said, remedy):
    both = pd.concat([study_table(loss).assign(**{name: value}) for value in values])
    with pytest.raises(ValueError) as error:
        call(both)
    assert said in str(error.value) and remedy in str(error.value)
    assert "pooled=True" in str(error.value) and "\n" not in str(error.value)
    call(both, pooled=True)
    for _, part in table_parts(both):
        call(part)


@pytest.mark.parametrize("name", ["temperature", "anchored"])
def test_pooling_takes_means_over_kinds_and_never_the_better_of_them(name):
    low, high = study_table(lambda r: 0.5), study_table(lambda r: 0.1)
    one, other = (True, False) if name == "anchored" else (1.0, 0.5)
    both = pd.concat([low.assign(**{name: one}), high.assign(**{name: other})])
    pooled = select_rank(both, pooled=True).table["tokens_per_call"]
    alone = [select_rank(part).table["tokens_per_call"] for part in (low, high)]
    assert pooled.to_numpy() == pytest.approx((alone[0] + alone[1]).to_numpy() / 2)
    assert set(needed_ranks(both, pooled=True)[name]) == {one, other}


def test_a_table_without_its_columns_or_any_usable_row_has_no_best_fits():
    with pytest.raises(ValueError, match="no column rank"):
        cpmtp.best_fits(study_table(loss).drop(columns="rank"))
    with pytest.raises(ValueError, match="every fit failed"):
        cpmtp.best_fits(study_table(loss).assign(status="failed"))


def test_means_compare_like_with_like_where_a_method_is_of_some_contexts_only():
    table = study_table(loss, contexts=12, documents=12).replace({"method": {"als": "acceptance"}})
    accepted = table["method"] == "acceptance"
    table.loc[accepted, "tokens_per_call_block_target"] += 0.2 / table["rank"]
    few = table[~accepted | (table["context"] < 6)]
    assert partial_methods(few) == {"acceptance": (6, 12)} and partial_methods(table) == {}
    best = cpmtp.best_fits(few)
    assert set(best["method"]) == {"em"} and len(best) == 12 * 4
    alone = select_rank(few[few["method"] == "em"], latency=None).table
    pd.testing.assert_frame_equal(select_rank(few, latency=None).table, alone)
    # what is left out is told beside them: 0.1 below em, and 0.2 / r on top of that
    gains = partial_gains(few, "acceptance")
    assert gains.index.names == ["horizon", "rank"]
    assert 0.05 < gains.loc[3, 1] < 0.15 and gains.loc[3, 8] < 0.05
    # contexts of all methods are as they were, and so are those that share none
    assert set(cpmtp.best_fits(table)["method"]) == {"em", "acceptance"}
    apart = table[accepted == (table["context"] < 6)]
    assert partial_methods(apart) == {} and len(cpmtp.best_fits(apart)) == 12 * 4
