"""Least squares by TensorLy: what became of the answer is said, and an exact fit is no failure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from samples import peaked_joint

from cpmtp.decomposition import als
from cpmtp.decomposition.fitting import fit
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


def product(vocab: int, horizon: int) -> JointDistribution:
    """Independent tokens: rank one."""
    return JointDistribution(fit(peaked_joint(vocab, horizon), 1).distribution.to_tensor())


def certain(vocab: int, horizon: int) -> JointDistribution:
    """What a model at temperature zero gives."""
    return exact_joint(separated_hmm(3, vocab), torch.tensor([0]), horizon, temperature=0.0)


def uniform(vocab: int, horizon: int) -> JointDistribution:
    shape = (vocab,) * horizon
    return JointDistribution(torch.full(shape, 1 / vocab**horizon, dtype=torch.float64))


@pytest.mark.parametrize("method", ["als", "hals"])
def test_a_fit_that_fails_gives_the_product_of_the_marginals_and_says_why(method, monkeypatch):
    def singular(*_):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(als, "_decompose", singular)
    joint = peaked_joint(4, 3, power=4)
    result = fit(joint, 3, method)
    assert result.status == "failed"
    assert "Singular matrix" in result.message
    assert result.objective == math.inf
    first, second, third = joint.marginals()
    assert torch.allclose(
        result.distribution.to_tensor(), first[:, None, None] * second[:, None] * third
    )


@pytest.mark.parametrize("make", [product, certain, uniform])
@pytest.mark.parametrize("horizon", [2, 3])
@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_components_than_an_exact_fit_needs_are_no_failure(make, horizon, rank, seed):
    joint = make(6, horizon)
    found = fit(joint, rank, "als", seed=seed)
    assert (found.status, found.message) == ("ok", "")
    assert found.distribution.rank == rank
    # Exact to what TensorLy's stopping rule tells apart.
    assert found.objective <= 1e-6
    assert divergences(joint, found.distribution).relative_frobenius == pytest.approx(
        found.objective, abs=1e-12
    )


def test_an_anchored_fit_at_temperature_zero_is_no_failure():
    found = fit(certain(5, 3), 4, "als", anchored=True)
    assert found.status == "ok" and found.objective <= 1e-6


def test_two_sequences_need_two_components_and_get_them_at_rank_five():
    probs = torch.zeros(5, 5, 5, dtype=torch.float64)
    probs[0, 1, 2], probs[3, 4, 0] = 0.7, 0.3
    for seed in range(4):
        found = fit(JointDistribution(probs), 5, "als", seed=seed)
        assert found.status == "ok" and found.objective <= 1e-6


@pytest.mark.parametrize("method", ["hals", "mu"])
def test_a_non_negative_answer_is_made_to_sum_to_one_and_no_more(method):
    found = fit(peaked_joint(6, 3), 3, method)
    assert found.negative_mass <= 1e-12
    assert abs(found.objective - found.raw_relative_error) <= 2 * abs(found.mass_deficit)
