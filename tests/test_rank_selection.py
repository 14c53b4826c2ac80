"""The choice of a rank and its uncertainty."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cpmtp.rank_selection import select_rank

RANKS = (1, 2, 4, 8)


def study_table(gain, contexts=64, documents=32, noise=0.05, seed=0, horizon=3) -> pd.DataFrame:
    """A study's table in which rank r reaches ``horizon - gain(r)`` tokens per call plus what is common to a context."""
    generator = np.random.default_rng(seed)
    rows = []
    for context in range(contexts):
        common = noise * generator.standard_normal()
        for rank in RANKS:
            for method, loss in (("em", 0.0), ("als", 0.1)):
                value = horizon - gain(rank) - loss + common + 0.1 * noise * generator.standard_normal()
                rows.append(
                    {
                        "model": "m",
                        "domain": "d",
                        "document": str(context % documents),
                        "context": context,
                        "horizon": horizon,
                        "rank": rank,
                        "method": method,
                        "status": "ok",
                        "message": "",
                        "tokens_per_call_block_target": value,
                        "survival_block_target_1": 1.0,
                        "survival_block_target_2": value / horizon,
                        "kl_nats": gain(rank),
                        "total_variation": 0.1,
                        "relative_frobenius": 0.1,
                        "fit_seconds": 1.0,
                    }
                )
    return pd.DataFrame(rows)


def test_the_smallest_rank_within_one_percent_is_chosen():
    choice = select_rank(study_table(lambda r: {1: 0.5, 2: 0.2, 4: 0.01, 8: 0.0}[r]))
    assert choice.rank == {3: 4}
    assert choice.at_grid_edge == {3: False}
    assert choice.frequency[3][4] > 0.95


def test_a_choice_at_the_edge_of_the_grid_says_at_least():
    choice = select_rank(study_table(lambda r: 1.0 / r))
    assert choice.rank == {3: 8}
    assert choice.at_grid_edge == {3: True}
    assert "at least 8" in choice.sentence(3)


def test_ranks_are_compared_paired_so_that_noise_common_to_a_context_does_not_matter():
    quiet = select_rank(study_table(lambda r: 0.4 / r, noise=0.01))
    loud = select_rank(study_table(lambda r: 0.4 / r, noise=0.5))
    common_only = loud.table["shortfall_standard_error"].max()
    assert common_only < 0.1 * (loud.table["tokens_per_call_high"] - loud.table["tokens_per_call_low"]).max()
    assert quiet.rank == {3: 8}


def test_the_tolerance_is_one_standard_error_where_that_is_more_than_one_percent():
    table = study_table(lambda r: 0.0, contexts=4, documents=4, noise=2.0)
    choice = select_rank(table)
    row = choice.table[choice.table["rank"] == choice.rank[3]].iloc[0]
    assert row.shortfall <= max(row.shortfall_standard_error, 0.01 * choice.table["tokens_per_call"].max()) + 1e-12
    smaller = choice.table[choice.table["rank"] < choice.rank[3]]
    assert not smaller["tolerated"].any()


def test_contexts_of_one_document_count_as_one_for_the_interval():
    def width(documents):
        table = study_table(lambda r: 0.0, contexts=64, documents=64, noise=0.0)
        by_document = table["context"] % documents
        table["document"] = by_document.astype(str)
        table["tokens_per_call_block_target"] += np.random.default_rng(1).standard_normal(64)[by_document]
        row = select_rank(table).table.iloc[0]
        return row.tokens_per_call_high - row.tokens_per_call_low

    assert width(8) > 1.5 * width(64)


def test_the_same_seed_gives_the_same_answer():
    table = study_table(lambda r: 0.4 / r)
    assert select_rank(table, seed=3).frequency == select_rank(table, seed=3).frequency


def test_failed_fits_do_not_count_and_the_best_method_does():
    table = study_table(lambda r: {1: 0.5, 2: 0.2, 4: 0.01, 8: 0.0}[r])
    table.loc[(table["rank"] == 4) & (table["method"] == "em"), "status"] = "failed"
    assert select_rank(table).rank == {3: 8}


def test_frequencies_of_a_horizon_sum_to_one():
    choice = select_rank(study_table(lambda r: 0.03 / r, noise=1.0, documents=8))
    assert sum(choice.frequency[3].values()) == pytest.approx(1)
    assert choice.few_documents


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: select_rank(t, "aic"), "unknown criterion 'aic'"),
        (lambda t: select_rank(t.drop(columns="rank")), "no column rank"),
        (lambda t: select_rank(t.assign(status="failed")), "every fit failed"),
        (lambda t: select_rank(t.assign(tokens_per_call_block_target=np.nan)), "usable"),
    ],
)
def test_a_table_that_allows_no_choice_is_refused(call, said):
    with pytest.raises(ValueError) as error:
        call(study_table(lambda r: 1 / r))
    assert said in str(error.value)
