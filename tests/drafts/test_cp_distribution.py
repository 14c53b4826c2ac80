"""Laws of the CP distribution."""

from __future__ import annotations

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding
from samples import random_cp
from unchecked import unchecked

from cpmtp.drafts.cp_distribution import CPDistribution, normalised_cp


def naive_tensor(dist: CPDistribution) -> torch.Tensor:
    """The definition, entry by entry (no batch)."""
    total = torch.zeros((dist.vocab_size,) * dist.horizon, dtype=dist.weights.dtype)
    for index in (
        torch.cartesian_prod(*[torch.arange(dist.vocab_size)] * dist.horizon)
        .reshape(-1, dist.horizon)
        .tolist()
    ):
        for a in range(dist.rank):
            term = dist.weights[a]
            for i, token in enumerate(index):
                term = term * dist.factors[i][token, a]
            total[tuple(index)] += term
    return total


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_the_tensor_is_the_definition_and_sums_to_one(shape):
    vocab, horizon, rank, seed = shape
    dist = random_cp((), vocab, horizon, rank, seed)
    torch.testing.assert_close(
        dist.to_tensor(),
        naive_tensor(dist),
        atol=0,
        rtol=2 * rounding(torch.float64, rank + horizon),
    )
    assert dist.to_tensor().sum().item() == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_prefix_laws_are_marginals_of_the_tensor(shape):
    vocab, horizon, rank, seed = shape
    dist = random_cp((), vocab, horizon, rank, seed)
    for length in range(1, horizon + 1):
        expected = dist.to_tensor().reshape((vocab,) * length + (-1,)).sum(-1)
        torch.testing.assert_close(dist.prefix_probs(length), expected)


def test_log_prob_reads_the_tensor_with_and_without_batch_axes():
    dist = random_cp((3,), 4, 3, 5)
    tokens = torch.randint(4, (3, 7, 3), generator=torch.Generator().manual_seed(1))
    batch = torch.arange(3)[:, None].expand(3, 7)
    expected = dist.to_tensor()[batch, tokens[..., 0], tokens[..., 1], tokens[..., 2]].log()
    torch.testing.assert_close(dist.log_prob(tokens), expected)
    torch.testing.assert_close(dist[1].log_prob(tokens[1]), expected[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_conditioning_obeys_the_chain_rule(vocab, horizon, rank, seed):
    dist = random_cp((), vocab, horizon, rank, seed)
    for token in range(vocab):
        prefix = torch.tensor([token])
        torch.testing.assert_close(
            dist.prefix_probs(1)[token] * dist.condition(prefix).to_tensor(),
            dist.to_tensor()[token],
            atol=0,
            rtol=4 * rounding(torch.float64, rank + horizon * vocab + horizon),
        )
        torch.testing.assert_close(
            dist.condition(prefix).prefix_probs(1), dist.next_token_probs(prefix)
        )


def test_conditioning_a_batch_is_conditioning_each_entry():
    dist = random_cp((4,), 5, 3, 2)
    prefix = torch.tensor([[0], [1], [2], [3]])
    together = dist.condition(prefix).to_tensor()
    for i in range(4):
        torch.testing.assert_close(together[i], dist[i].condition(prefix[i]).to_tensor())


def test_a_prefix_without_mass_leaves_the_prior_weights():
    factor = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    dist = CPDistribution(
        torch.tensor([0.3, 0.7], dtype=torch.float64), [factor, torch.eye(2, dtype=torch.float64)]
    )
    assert dist.condition(torch.tensor([1])).weights.tolist() == [0.3, 0.7]
    assert dist.next_token_probs(torch.tensor([1])).tolist() == [0.3, 0.7]


def test_samples_follow_the_law_and_repeat_with_the_seed():
    dist = random_cp((), 3, 2, 2, seed=5)
    tokens = dist.sample(20_000, seed=1)
    assert torch.equal(tokens, dist.sample(20_000, seed=1))
    counts = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9).double()
    expected = dist.to_tensor().flatten()
    error = (counts / 20_000 - expected).abs() / (expected * (1 - expected) / 20_000).sqrt()
    assert error.max() < 4.5


def test_samples_of_a_batch_come_from_their_own_entry():
    certain = torch.eye(3, dtype=torch.float64).unsqueeze(-1)
    dist = CPDistribution(torch.ones(3, 1, dtype=torch.float64), [certain, certain])
    assert torch.equal(dist.sample(2)[..., 0], torch.tensor([[0, 0], [1, 1], [2, 2]]))


def test_tensorly_rebuilds_the_same_tensor():
    dist = random_cp((), 4, 3, 2)
    torch.testing.assert_close(
        torch.from_numpy(tensorly.cp_to_tensor(dist.to_tensorly())), dist.to_tensor()
    )


def test_parameters_are_counted_without_the_simplex_constraints():
    assert random_cp((), 5, 3, 2).parameter_count == 1 + 3 * 2 * 4
    assert random_cp((7,), 5, 3, 2).parameter_count == 7 * (1 + 3 * 2 * 4)


def test_normalising_moves_column_sums_into_the_weights_and_buries_dead_columns():
    factors = [torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])]
    dist = normalised_cp(torch.tensor([1.0, 5.0]), factors)
    assert dist.weights.tolist() == [1.0, 0.0]
    assert dist.factors[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


half = torch.full((2, 1), 0.5)
one = torch.ones(1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CPDistribution(one, []), "at least one factor"),
        (lambda: CPDistribution(torch.ones(0), [torch.ones(2, 0)]), "rank of at least 1"),
        (lambda: CPDistribution(one, [half, torch.full((3, 1), 1 / 3)]), "expected (2, 1)"),
        (lambda: CPDistribution(one, [torch.tensor([[1.5], [-0.5]])]), "non-negative"),
        (lambda: CPDistribution(one, [torch.tensor([[float("nan")], [1.0]])]), "NaN"),
        (lambda: CPDistribution(2 * one, [half]), "must sum to 1"),
        (lambda: CPDistribution(one, [half]).condition(torch.tensor([0])), "leaves nothing"),
        (lambda: CPDistribution(one, [half]).log_prob(torch.tensor([2])), "[0, 2)"),
        (lambda: CPDistribution(one, [half]).log_prob(torch.tensor([0, 0])), "at most that many"),
        (
            lambda: unchecked(
                CPDistribution.log_prob, CPDistribution(one, [half]), torch.tensor([0.0])
            ),
            "integer ids",
        ),
        (lambda: normalised_cp(one, [torch.zeros(2, 1)]), "no mass is left"),
        (lambda: random_cp((2,), 2, 2, 1).to_tensorly(), "no batch axes"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_was_expected(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert said in str(error.value)
