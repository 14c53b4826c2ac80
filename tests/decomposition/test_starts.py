"""Where fits begin: on laws, the same in any company, and where a joint's mass is."""

from __future__ import annotations

import pytest
import torch
from rounding import rounding

from cpmtp.decomposition.descent.em import Targets, em_runs
from cpmtp.decomposition.starts import fibre_starts, random_starts
from cpmtp.joint_distribution import JointDistribution


def a_joint(seed: int, vocab: int = 5, horizon: int = 3) -> torch.Tensor:
    values = (
        torch.rand(
            (vocab,) * horizon, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        ** 4
    )
    return values / values.sum()


@pytest.mark.parametrize("make", [random_starts, fibre_starts])
def test_weights_and_factors_are_laws_and_reach_every_possible_token(make):
    probs = a_joint(0)
    probs[2] = 0
    start = make(JointDistribution(probs / probs.sum()), 4, 3, seed=1)
    assert torch.allclose(start.weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(start.factors.sum(-1), torch.ones(3, 3, 4, dtype=torch.float64))
    possible = torch.tensor([True, True, False, True, True])
    assert (start.factors[:, 0, :, possible] > 0).all() and (
        start.factors[:, 0, :, ~possible] == 0
    ).all()


@pytest.mark.parametrize("make", [random_starts, fibre_starts])
def test_a_joints_starts_do_not_depend_on_what_is_beside_it_nor_on_the_number_of_restarts(make):
    first, second = a_joint(0), a_joint(1)
    alone = make(JointDistribution(second), 3, 1, seed=7)
    beside = make(JointDistribution(torch.stack([first, second]), 3), 3, 2, seed=7)
    # The same numbers are drawn; what they disturb are sums over the joint.
    allowed = rounding(torch.float64, 2 * 5**3)
    torch.testing.assert_close(alone.factors[0], beside.factors[2], rtol=allowed, atol=0)
    assert not torch.allclose(beside.factors[2], beside.factors[3])


def test_every_fibre_of_a_product_is_a_marginal():
    laws = [
        torch.rand(4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) + 0.1
        for i in range(3)
    ]
    laws = [law / law.sum() for law in laws]
    start = fibre_starts(JointDistribution(torch.einsum("i,j,k->ijk", *laws)), 5, 2, seed=0)
    for position, law in enumerate(laws):
        assert torch.allclose(start.factors[:, position], law.expand(2, 5, 4))


def test_components_begin_around_different_sequences_while_there_are_any():
    probs = torch.full((4, 4, 4), 1e-9, dtype=torch.float64)
    heavy = [(0, 0, 0), (1, 2, 3), (3, 3, 1)]
    for place, mass in zip(heavy, (0.98, 0.01, 0.01), strict=True):
        probs[place] = mass
    start = fibre_starts(JointDistribution(probs / probs.sum()), 3, 1, seed=0)
    tokens = start.factors[0].argmax(-1).T.tolist()
    assert sorted(map(tuple, tokens)) == heavy


def test_on_a_peaked_joint_fibres_end_below_marginals():
    generator = torch.Generator().manual_seed(3)
    probs = 1e-6 * torch.rand(12, 12, 12, generator=generator, dtype=torch.float64)
    probs[0, 0, 0] = 1.0
    for place in torch.randint(12, (10, 3), generator=generator).tolist():
        probs[tuple(place)] += 0.01
    joint = JointDistribution(probs / probs.sum())
    least = []
    for make in (random_starts, fibre_starts):
        runs = em_runs(
            Targets.of(joint, 8), make(joint, 8, 8, seed=0), max_iterations=300, tolerance=1e-6
        )
        least.append(float(runs.objective.median()))
    assert least[1] < 0.9 * least[0]
