"""The choice of a rank and its uncertainty."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from samples import study_table, with_samples, with_trees
from scipy import stats

from cpmtp.latency import LatencyModel
from cpmtp.ranking.criteria import hull_choice
from cpmtp.ranking.selection import compare_criteria, needed_ranks, paired_gains, select_rank
from cpmtp.resampling import detectable


def test_the_smallest_rank_within_one_percent_is_chosen():
    choice = select_rank(study_table(lambda r: {1: 0.5, 2: 0.2, 4: 0.01, 8: 0.0}[r]))
    assert choice.rank == {3: 4}
    assert choice.at_grid_edge == {3: False}
    assert choice.frequency[3][4] > 0.95


def test_a_choice_at_the_edge_of_the_grid_says_at_least():
    choice = select_rank(study_table(lambda r: 1.0 / r))
    assert choice.rank == {3: 8}
    assert choice.at_grid_edge == {3: True}
    assert choice.sentence(3).startswith("horizon 3: ceiling saturates at rank at least 8, ")
    assert "recommend" not in choice.sentence(3)


def test_ranks_are_compared_paired_so_that_noise_common_to_a_context_does_not_matter():
    quiet = select_rank(study_table(lambda r: 0.4 / r, noise=0.01))
    loud = select_rank(study_table(lambda r: 0.4 / r, noise=0.5))
    common_only = loud.table["shortfall_standard_error"].max()
    assert (
        common_only
        < 0.1 * (loud.table["tokens_per_call_high"] - loud.table["tokens_per_call_low"]).max()
    )
    assert quiet.rank == {3: 8}


def two_ranks(shortfalls: np.ndarray, best: float = 2.0) -> pd.DataFrame:
    """One context per document: rank 2 earns `best` everywhere, rank 1 less by its shortfall."""
    values = {1: best - shortfalls, 2: np.full(len(shortfalls), best)}
    rows = [
        {
            "model": "m",
            "domain": "d",
            "document": str(context),
            "context": context,
            "horizon": 3,
            "rank": rank,
            "method": "em",
            "status": "ok",
            "tokens_per_call_block_target": value,
        }
        for rank, of_rank in values.items()
        for context, value in enumerate(of_rank)
    ]
    return pd.DataFrame(rows)


def with_mean(numbers: np.ndarray, mean: float) -> np.ndarray:
    return numbers - numbers.mean() + mean


@pytest.mark.parametrize(("times", "chosen"), [(0.98, 1), (1.02, 2)])
def test_the_tolerance_is_one_standard_error_where_that_is_more_than_one_percent(times, chosen):
    noise = np.random.default_rng(0).standard_normal(25)
    error = stats.sem(noise)
    assert 0.9 * error > 0.01 * 2.0
    choice = select_rank(two_ranks(with_mean(noise, times * error)))
    assert choice.rank == {3: chosen}
    rows = choice.table.set_index("rank")
    assert rows.loc[1, "shortfall_standard_error"] == pytest.approx(error)
    assert rows["tolerated"].tolist() == [chosen == 1, True]


@pytest.mark.parametrize(("share", "chosen"), [(0.0098, 1), (0.0102, 2)])
def test_the_tolerance_is_one_percent_where_that_is_more_than_one_standard_error(share, chosen):
    noise = 1e-3 * np.random.default_rng(0).standard_normal(25)
    assert stats.sem(noise) < 0.5 * 0.01 * 2.0
    assert select_rank(two_ranks(with_mean(noise, share * 2.0))).rank == {3: chosen}


def test_contexts_of_one_document_count_as_one_for_the_interval():
    def width(documents):
        table = study_table(lambda r: 0.0, contexts=64, documents=64, noise=0.0)
        by_document = table["context"] % documents
        table["document"] = by_document.astype(str)
        table["tokens_per_call_block_target"] += np.random.default_rng(1).standard_normal(64)[
            by_document
        ]
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


LATENCY = LatencyModel(plain_step=0.01, base=0.01, per_component=0.0003)


def test_only_throughput_chooses_a_horizon_and_needs_to_know_what_calls_cost():
    table = pd.concat([study_table(lambda r: 0.4 / r, horizon=n) for n in (2, 3)])
    found = compare_criteria(table, latency=LATENCY)
    assert list(found) == ["tolerance", "marginal_gain", "convex_hull", "throughput"]
    assert [choice.horizon for choice in found.values()] == [None, None, None, 3]
    assert found["throughput"].horizon_frequency[3] == 1
    assert found["throughput"].table["fastest_frequency"].sum() == pytest.approx(1)
    assert list(compare_criteria(table)) == ["tolerance", "marginal_gain", "convex_hull"]
    with pytest.raises(ValueError, match="needs to know what a call costs"):
        select_rank(table, "throughput")


def test_side_by_side_and_one_by_one_are_the_same():
    table = study_table(lambda r: 0.4 / r)
    for name, choice in compare_criteria(table, latency=LATENCY).items():
        alone = select_rank(table, name, latency=LATENCY)
        assert (alone.rank, alone.frequency, alone.horizon) == (
            choice.rank,
            choice.frequency,
            choice.horizon,
        )
        pd.testing.assert_frame_equal(alone.table, choice.table)


def test_a_dearer_component_lowers_the_fastest_rank():
    table = study_table(lambda r: 0.4 / r)
    chosen = [
        select_rank(table, "throughput", latency=LatencyModel(0.01, 0.01, per_component=c)).rank[3]
        for c in (1e-6, 1e-4, 3e-3)
    ]
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) == 3


def test_throughput_compares_horizons_on_the_same_contexts():
    both = pd.concat([study_table(lambda r: 0.4 / r, horizon=n) for n in (2, 3)])
    lost = both[~((both["horizon"] == 3) & (both["context"] < 10))]
    assert select_rank(lost, "throughput", latency=LATENCY).contexts == 54
    assert select_rank(lost).contexts == 64


def test_a_planted_elbow_is_found_and_a_straight_line_has_none():
    means = np.array([[1.0, 2.0, 2.1, 2.2], [1.0, 1.1, 1.3, 1.7]])
    assert hull_choice(means, np.array([1.0, 2.0, 4.0, 8.0])).tolist() == [1, 3]


def test_the_interval_is_that_of_scipy_on_contexts_when_every_context_is_a_document():
    table = study_table(lambda r: 0.4 / r, contexts=40, documents=40)
    values = table[(table["rank"] == 2) & (table["method"] == "em")].sort_values("document")[
        "tokens_per_call_block_target"
    ]
    drawn = stats.bootstrap(
        (values.to_numpy(),), np.mean, n_resamples=9999, rng=np.random.default_rng(0)
    )
    expected = drawn.confidence_interval
    row = select_rank(table).table.set_index("rank").loc[2]
    assert row.tokens_per_call_low == pytest.approx(expected.low, abs=0.003)
    assert row.tokens_per_call_high == pytest.approx(expected.high, abs=0.003)


def test_paired_gains_say_how_many_contexts_improved():
    gains = paired_gains(
        study_table(lambda r: {1: 0.5, 2: 0.2, 4: 0.2, 8: 0.2}[r], noise=0.01)
    ).set_index("rank")
    assert gains.loc[1, "share_improved"] == 1 and gains.loc[1, "gain"] == pytest.approx(
        0.3, abs=0.01
    )
    assert gains.loc[2, "gain_low"] < 0 < gains.loc[2, "gain_high"]
    assert gains.loc[2, "detectable_gain"] > 2 * gains.loc[2, "standard_error"]


def test_the_smallest_gain_seen_is_found_in_four_fifths_of_tables_that_have_it():
    generator, found, error = np.random.default_rng(0), 0, 0.1 / np.sqrt(40)
    gain = detectable(error, 40)
    for _ in range(2000):
        sample = gain + 0.1 * generator.standard_normal(40)
        found += abs(stats.ttest_1samp(sample, 0).statistic) > stats.t.ppf(0.975, 39)
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_a_context_needs_the_smallest_rank_close_to_its_own_best():
    needed = needed_ranks(study_table(lambda r: {1: 0.5, 2: 0.2, 4: 0.0, 8: 0.0}[r], noise=1e-6))
    assert set(needed["needed_rank"]) == {4} and len(needed) == 64


def test_a_single_document_is_resampled_by_its_contexts_and_told():
    choice = select_rank(study_table(lambda r: 0.4 / r, contexts=3, documents=1))
    row = choice.table.iloc[0]
    assert row.tokens_per_call_low < row.tokens_per_call < row.tokens_per_call_high
    assert choice.documents == 1 and "intervals speak of it alone" in choice.caution


def test_a_single_context_has_no_interval():
    row = select_rank(study_table(lambda r: 0.4 / r, contexts=1, documents=1)).table.iloc[0]
    assert np.isnan(row.tokens_per_call_low)
    assert "nan" not in choice_of_one_context().sentence(3)


def choice_of_one_context():
    return select_rank(study_table(lambda r: 0.4 / r, contexts=1, documents=1))


def test_each_criterion_says_what_it_found():
    table = study_table(lambda r: {1: 0.5, 2: 0.2, 4: 0.01, 8: 0.0}[r])
    said = {name: c.sentence(3) for name, c in compare_criteria(table, latency=LATENCY).items()}
    assert said["tolerance"].startswith("horizon 3: ceiling saturates at rank 4, 2.9")
    assert said["throughput"].startswith("horizon 3: fastest at rank 2, 2.8")
    assert said["marginal_gain"].startswith("horizon 3: rank 4 by marginal_gain, 2.9")


def test_where_joints_are_truncated_the_choice_has_both_bounds_and_an_interval_of_both():
    table = study_table(lambda r: 0.4 / r)
    exact = select_rank(table).table
    found = select_rank(with_trees(table, width=0.08, kept_mass=0.97)).table
    assert found["truncated"].all() and not exact["truncated"].any()
    pd.testing.assert_series_equal(found["tokens_per_call"], exact["tokens_per_call"])
    np.testing.assert_allclose(found["tokens_per_call_upper"], exact["tokens_per_call"] + 0.08)
    np.testing.assert_allclose(found["tokens_per_call_low"], exact["tokens_per_call_low"])
    np.testing.assert_allclose(found["tokens_per_call_high"], exact["tokens_per_call_high"] + 0.08)
    np.testing.assert_allclose(found["kept_mass"], 0.96)
    np.testing.assert_allclose(found["kept_mass_lowest"], 0.95)
    assert (exact["tokens_per_call_upper"] == exact["tokens_per_call"]).all()


def test_estimates_are_ranked_as_they_are_with_the_interval_of_the_documents():
    table = study_table(lambda r: 0.4 / r)
    exact, found = select_rank(table), select_rank(with_samples(table))
    assert found.table["sampled"].all() and not found.table["truncated"].any()
    assert not exact.table["sampled"].any() and found.rank == exact.rank
    for name in ("tokens_per_call", "tokens_per_call_low", "tokens_per_call_high"):
        pd.testing.assert_series_equal(found.table[name], exact.table[name])
    assert "tokens per call (estimated, 95 % interval" in found.sentence(3)
    # Of one document there is no more than what the sampling leaves open.
    one = with_samples(study_table(lambda r: 0.4 / r, contexts=1))
    alone = select_rank(one).table
    for end, sign in (("low", -1), ("high", 1)):
        expected = alone["tokens_per_call"] + sign * 0.05
        np.testing.assert_allclose(alone[f"tokens_per_call_{end}"], expected)


def test_where_some_contexts_have_bounds_the_interval_of_estimates_holds_both_of_them():
    table = study_table(lambda r: 0.4 / r)
    mixed, even = with_samples(table), table["context"] % 2 == 0
    column = "tokens_per_call_upper_block_target"
    mixed.loc[even, "computed"] = "certified"
    mixed.loc[even, column] = table["tokens_per_call_block_target"] + 0.04
    found, exact = select_rank(mixed).table, select_rank(table).table
    assert found["sampled"].all() and not found["truncated"].any()
    pd.testing.assert_series_equal(found["tokens_per_call_low"], exact["tokens_per_call_low"])
    np.testing.assert_allclose(found["tokens_per_call_upper"], exact["tokens_per_call"] + 0.02)
    assert (found["tokens_per_call_high"] > exact["tokens_per_call_high"]).all()
    # Under a rule that samples do not judge there are the others' bounds alone.
    renamed = {
        name: name.replace("block", "coupling") for name in mixed if name.endswith("block_target")
    }
    coupling = mixed.rename(columns=renamed)
    coupling.loc[~even, "tokens_per_call_coupling_target"] = np.nan
    bounds = select_rank(coupling, column="tokens_per_call_coupling_target").table
    assert bounds["truncated"].all() and not bounds["sampled"].any()


def test_a_table_of_complete_and_truncated_joints_is_right_per_horizon():
    table = with_trees(
        pd.concat([study_table(lambda r: 0.4 / r, horizon=n) for n in (2, 3)]), horizons=(3,)
    )
    choice = select_rank(table)
    assert choice.table.groupby("horizon")["truncated"].first().to_dict() == {2: False, 3: True}
    assert "truncated" not in choice.sentence(2)
    bounds = choice.row(3)
    assert (
        f"between {bounds.tokens_per_call:.2f} and {bounds.tokens_per_call_upper:.2f} tokens per "
        "call (truncated joints; 95 % interval" in choice.sentence(3)
    )
    fast = select_rank(table, "throughput", latency=LATENCY).table.set_index("horizon")
    assert (fast.loc[2, "speedup_upper"] == fast.loc[2, "speedup"]).all()
    assert (fast.loc[3, "speedup_upper"] > fast.loc[3, "speedup"]).all()
