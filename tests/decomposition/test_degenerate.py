"""Joints at the edge of what a joint can be: a fit is a distribution all the same, never NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding

from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.restarts import KL_METHODS, METHODS
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


def one_hot(vocab: int, horizon: int) -> torch.Tensor:
    probs = torch.zeros((vocab,) * horizon, dtype=torch.float64)
    probs[(1,) * horizon] = 1.0
    return probs


def zero_rows(vocab: int, horizon: int) -> torch.Tensor:
    probs = torch.rand(
        (vocab,) * horizon, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    probs[::2] = 0.0
    return probs / probs.sum()


def two_sequences(vocab: int, horizon: int) -> torch.Tensor:
    return 0.75 * one_hot(vocab, horizon) + 0.25 * one_hot(vocab, horizon).flip(
        tuple(range(horizon))
    )


DEGENERATE = {
    "one-hot": one_hot(4, 3),
    "uniform": torch.full((4, 4, 4), 1 / 64, dtype=torch.float64),
    "zero rows": zero_rows(4, 3),
    "fewer sequences than components": two_sequences(4, 3),
    "a vocabulary of one token": torch.ones(1, 1, 1, dtype=torch.float64),
    "subnormal probabilities": one_hot(3, 3) + 1e-310,
}


def assert_is_a_fit(joint: JointDistribution, result) -> None:
    assert result.status in ("ok", "not_converged", "failed")
    dist = result.distribution
    total = dist.to_tensor().sum(dim=tuple(range(-dist.horizon, 0)))
    # Weights and columns sum to one, and so do the sums of their products.
    terms = dist.vocab_size**dist.horizon + dist.rank * (dist.horizon + 1) * dist.vocab_size
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=0, atol=2 * rounding(torch.float64, terms)
    )
    assert not math.isnan(result.objective)
    found = divergences(joint, result.distribution)
    assert not any(
        math.isnan(v)
        for v in (found.kl_nats, found.total_variation, found.relative_frobenius, found.hellinger)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("anchored", [False, True])
def test_a_degenerate_joint_gives_a_distribution(method, name, anchored):
    joint = JointDistribution(DEGENERATE[name])
    for rank in (1, 3):
        assert_is_a_fit(joint, fit(joint, rank, method, anchored=anchored, max_iterations=60))


@pytest.mark.parametrize(
    "name", ["one-hot", "uniform", "fewer sequences than components", "a vocabulary of one token"]
)
def test_em_is_exact_where_few_components_suffice(name):
    assert fit(JointDistribution(DEGENERATE[name]), 3, "em", restarts=2).objective <= 1e-6


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 4),
    horizon=st.integers(1, 4),
    rank=st.integers(1, 7),
    share=st.floats(0.05, 1.0),
    method=st.sampled_from(("em", "gradient", "als", "hals", "mu")),
)
def test_any_sparse_joint_gives_a_distribution(seed, vocab, horizon, rank, share, method):
    generator = torch.Generator().manual_seed(seed)
    size = (vocab,) * horizon
    values = torch.rand(size, generator=generator, dtype=torch.float64) ** 6
    values = torch.where(torch.rand(size, generator=generator) < share, values, 0.0)
    values.view(-1)[0] += 1e-3
    joint = JointDistribution(values / values.sum())
    assert_is_a_fit(joint, fit(joint, rank, method, seed=seed, max_iterations=40))


@pytest.mark.slow
@pytest.mark.parametrize("method", KL_METHODS)
@pytest.mark.parametrize("states", [3, 4, 8])
def test_twenty_planted_ranks_are_recovered_exactly(method, states):
    short = []
    for seed in range(20):
        joint = exact_joint(separated_hmm(states, 16, seed=seed), EMPTY, 3)
        planted = fit(
            joint, states, method, restarts=4, seed=seed, max_iterations=3000, tolerance=1e-9
        )
        at_rank = divergences(joint, planted.distribution).kl_nats
        below = divergences(
            joint, fit(joint, states - 1, method, restarts=4, seed=seed).distribution
        ).kl_nats
        assert below >= 1e-3
        short += [seed] if at_rank > (1e-4 if method == "acceptance" else 1e-6) else []
    assert not short


@pytest.mark.parametrize("method", ["em", "gradient", "acceptance", "als", "hals", "mu"])
def test_one_token_is_fitted_exactly_by_every_method(method):
    probs = torch.rand(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = fit(JointDistribution(probs / probs.sum()), 2, method)
    assert result.status == "ok", result.message
    assert torch.allclose(result.distribution.to_tensor(), probs / probs.sum(), rtol=1e-12)
