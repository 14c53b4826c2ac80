"""Summaries over contexts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from samples import RANKS, study_table

from cpmtp.ranking.summary import method_summary, objective_gap, survival_by_rank


def test_summaries_keep_every_method_and_position():
    table = study_table(lambda r: 1 / r)
    assert len(method_summary(table)) == len(RANKS) * 2
    survival = survival_by_rank(table)
    assert set(survival["position"]) == {1, 2}
    assert (survival[survival["position"] == 1]["survival"] == 1).all()


def rows(method: str, tokens: list[float], **columns) -> pd.DataFrame:
    """One row per context of one horizon and rank."""
    contexts = range(len(tokens))
    return pd.DataFrame(
        {
            "model": "m",
            "domain": "d",
            "document": [str(c) for c in contexts],
            "context": contexts,
            "horizon": 3,
            "rank": 2,
            "method": method,
            "status": "ok",
            "tokens_per_call_block_target": tokens,
            "kl_nats": 0.0,
            "total_variation": 0.0,
            "relative_frobenius": 0.0,
            "fit_seconds": 0.0,
        }
        | columns
    )


def test_a_method_is_summed_up_by_means_of_tokens_and_medians_and_quartiles_of_errors():
    table = rows(
        "em",
        [2.0, 2.0, 2.0, 3.0, 3.0],
        kl_nats=[0.5, 0.1, 0.2, 0.4, 0.3],
        total_variation=[0.01, 0.02, 0.03, 0.04, 0.9],
        relative_frobenius=[0.5, 0.4, 0.3, 0.2, 0.1],
        fit_seconds=[1.0, 2.0, 3.0, 4.0, 100.0],
        status=["ok", "ok", "failed", "not_converged", "not_converged"],
    )
    (found,) = method_summary(table).to_dict("records")
    assert (found["horizon"], found["rank"], found["method"]) == (3, 2, "em")
    assert (found["contexts"], found["failed"], found["not_converged"]) == (5, 1, 2)
    assert (found["kl_nats_low"], found["kl_nats"], found["kl_nats_high"]) == (0.2, 0.3, 0.4)
    assert found["total_variation"] == 0.03 and found["relative_frobenius"] == 0.3
    assert found["fit_seconds"] == 3.0
    assert found["tokens_per_call"] == pytest.approx(12 / 5)


def test_an_infinite_divergence_counts_and_leaves_no_nan():
    table = rows("als", [2.0] * 4, kl_nats=[0.1, 0.2, 0.3, math.inf])
    (found,) = method_summary(table).to_dict("records")
    assert (found["kl_nats_low"], found["kl_nats"]) == (0.1, 0.2)
    assert found["kl_nats_high"] == math.inf


def test_methods_ranks_and_horizons_are_summed_up_apart():
    table = pd.concat(
        [
            rows("em", [2.0, 3.0]),
            rows("als", [1.0, 1.5]),
            rows("em", [1.0, 2.0]).assign(rank=4),
            rows("em", [1.0, 1.0]).assign(horizon=2),
        ]
    )
    found = method_summary(table).set_index(["horizon", "rank", "method"])["tokens_per_call"]
    assert found.to_dict() == {
        (2, 2, "em"): 1.0,
        (3, 2, "als"): 1.25,
        (3, 2, "em"): 2.5,
        (3, 4, "em"): 1.5,
    }


def test_another_column_may_be_what_is_averaged():
    table = rows("em", [2.0, 3.0]).assign(tokens_per_call_token_target=[1.0, 2.0])
    found = method_summary(table, "tokens_per_call_token_target")
    assert found["tokens_per_call"].tolist() == [1.5]


def test_what_is_lost_before_learning_is_split_between_rank_and_objective():
    table = pd.concat([rows("acceptance", [2.5, 2.7, 2.6]), rows("em", [2.0, 2.4, 2.5])])
    (found,) = objective_gap(table).to_dict("records")
    assert (found["model"], found["domain"], found["horizon"], found["rank"]) == ("m", "d", 3, 2)
    assert found["exact_limit"] == 3.0
    assert found["acceptance_fit"] == pytest.approx(2.6)
    assert found["em_fit"] == pytest.approx(2.3)
    assert found["lost_to_rank"] == pytest.approx(3.0 - 2.6)
    assert found["lost_to_objective"] == pytest.approx(2.6 - 2.3)
    assert found["contexts"] == 3


def test_only_contexts_with_both_fits_are_compared():
    table = pd.concat([rows("acceptance", [2.5, 2.7, 2.9]), rows("em", [2.0, 2.4])])
    table.loc[(table["method"] == "em") & (table["context"] == 1), "status"] = "failed"
    (found,) = objective_gap(table).to_dict("records")
    assert (found["acceptance_fit"], found["em_fit"], found["contexts"]) == (2.5, 2.0, 1)


def test_gaps_stand_apart_by_model_domain_horizon_and_rank_and_pool_documents():
    parts = []
    for model, domain, horizon, rank, gap in (
        ("m", "d", 2, 1, 0.1),
        ("m", "d", 3, 1, 0.2),
        ("m", "d", 3, 2, 0.3),
        ("m", "e", 3, 1, 0.4),
        ("n", "d", 3, 1, 0.5),
    ):
        key = dict(model=model, domain=domain, horizon=horizon, rank=rank)
        parts += [
            rows("acceptance", [1.8, 1.9]).assign(**key),
            rows("em", [1.8 - gap, 1.9 - gap]).assign(**key),
        ]
    found = objective_gap(pd.concat(parts, ignore_index=True))
    assert len(found) == 5 and (found["contexts"] == 2).all()
    np.testing.assert_allclose(found["lost_to_objective"], [0.1, 0.2, 0.3, 0.4, 0.5])
    np.testing.assert_allclose(found["exact_limit"], [2, 3, 3, 3, 3])


@pytest.mark.parametrize("missing", ["em", "acceptance"])
def test_without_both_methods_there_is_no_gap(missing):
    table = pd.concat([rows("acceptance", [2.5]), rows("em", [2.0]), rows("als", [1.9])])
    found = objective_gap(table[table["method"] != missing])
    assert found.empty and {"exact_limit", "acceptance_fit", "em_fit"} <= set(found.columns)
