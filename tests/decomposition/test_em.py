"""Expectation-maximisation: it never rises, finds planted ranks, and ends where an independent
implementation ends.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import kl_rounding, rounding

from cpmtp.decomposition.descent.em import Targets, em_runs
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.decomposition.starts import random_starts
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm
from cpmtp.pretrained import load_language_model

EMPTY = torch.empty(0, dtype=torch.long)


@pytest.fixture(scope="module")
def embedded_joint() -> JointDistribution:
    lm = load_language_model("code")
    return exact_joint(lm, lm.encode("def add(a, b):\n    return "), 3)


def naive_sweep(probs: torch.Tensor, dist: CPDistribution) -> CPDistribution:
    """One sweep by the definition (three tokens): the responsibilities of every component for every
    sequence.
    """
    a, b, c = dist.factors
    terms = torch.einsum("r,xr,yr,zr->xyzr", dist.weights, a, b, c)
    counts = probs[..., None] * torch.nan_to_num(terms / terms.sum(-1, keepdim=True))
    weights = counts.sum((0, 1, 2))
    factors = [counts.sum([d for d in range(3) if d != axis]) / weights for axis in range(3)]
    return CPDistribution(weights / weights.sum(), factors)


def as_distribution(mixtures: Mixtures) -> CPDistribution:
    return CPDistribution(mixtures.weights[0], list(mixtures.factors[0].mT))


@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_plain_sweeps_are_the_definition_and_so_is_the_trace(sweeps):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(4, 4, 4, generator=generator, dtype=torch.float64) ** 3
    joint = JointDistribution(probs / probs.sum())
    start = random_starts(joint, 3, 1, 0)
    runs = em_runs(Targets.of(joint), start, max_iterations=sweeps, tolerance=0.0, accelerate=False)
    expected = [as_distribution(start)]
    for _ in range(sweeps):
        expected.append(naive_sweep(joint.probs, expected[-1]))
    # Every count adds 4 ** 3 quotients of products of four by a sum of three; what is off before
    # these sweeps is forty times as much after them (the largest row sum of their Jacobian).
    allowed = 40 * (sweeps + 1) * rounding(torch.float64, 4**3 + 8)
    found = as_distribution(runs.mixtures)
    assert int(runs.iterations[0]) == sweeps and len(runs.traces[0]) == sweeps + 1
    torch.testing.assert_close(found.weights, expected[-1].weights, atol=allowed, rtol=0)
    for factor, slow in zip(found.factors, expected[-1].factors, strict=True):
        torch.testing.assert_close(factor, slow, atol=allowed, rtol=0)
    kl = [torch.sum(joint.probs * (joint.probs / q.to_tensor()).log()).item() for q in expected]
    assert list(runs.traces[0]) == pytest.approx(kl, abs=allowed * (1 + joint.entropy().item()))
    assert runs.objective.item() == runs.traces[0][-1]


# Two states that keep themselves with probability one half forget at once: their tokens are
# independent, of rank one.
@pytest.mark.parametrize("states", [3, 4, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_rank_is_found_and_one_less_does_not_do(states, seed):
    joint = exact_joint(separated_hmm(states, 16, seed=seed), EMPTY, 3)
    assert fit(joint, states, "em", restarts=4, seed=seed).objective <= 1e-6
    assert fit(joint, states - 1, "em", restarts=4, seed=seed).objective >= 1e-3


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("accelerate", [False, True])
def test_the_objective_never_rises(embedded_joint, rank, accelerate):
    start = random_starts(embedded_joint, rank, 1, 0)
    runs = em_runs(
        Targets.of(embedded_joint), start, max_iterations=60, tolerance=0.0, accelerate=accelerate
    )
    trace = np.array(runs.traces[0])
    assert len(trace) > 10
    assert (np.diff(trace) <= kl_rounding(embedded_joint.probs.numel())).all()


def test_the_objective_is_the_divergence_of_what_is_returned(embedded_joint):
    result = fit(embedded_joint, 8, "em", seed=0, max_iterations=40)
    assert result.objective == pytest.approx(
        divergences(embedded_joint, result.distribution).kl_nats,
        abs=2 * kl_rounding(embedded_joint.probs.numel()),
    )


def test_rank_one_is_the_product_of_the_marginals(embedded_joint):
    result = fit(embedded_joint, 1, "em", seed=0)
    entropies = [-torch.special.xlogy(m, m).sum().item() for m in embedded_joint.marginals()]
    assert result.objective == pytest.approx(
        sum(entropies) - embedded_joint.entropy().item(),
        abs=4 * kl_rounding(embedded_joint.probs.numel()),
    )


def poisson_cp(joint: JointDistribution, start: Mixtures, iterations: int) -> float:
    """The divergence at which an independent Poisson tensor factorisation ends from there."""
    import pyttb

    dist = as_distribution(start)
    initial = pyttb.ktensor([f.numpy().copy() for f in dist.factors], dist.weights.numpy().copy())
    data = pyttb.tensor(joint.probs.numpy().copy())
    found, _, _ = pyttb.cp_apr(
        data,
        dist.rank,
        algorithm="mu",
        init=initial,
        maxiters=iterations,
        maxinneriters=10,
        stoptol=1e-6,
        printitn=0,
    )
    found.normalize(normtype=1)
    weights = torch.from_numpy(np.asarray(found.weights, float)).reshape(-1)
    factors = [torch.from_numpy(np.array(f, float)).clamp_min(0) for f in found.factor_matrices]
    proper = CPDistribution(weights / weights.sum(), [f / f.sum(0) for f in factors])
    return divergences(joint, proper).kl_nats


def common_start(joint: JointDistribution, rank: int) -> Mixtures:
    """A random start and a few sweeps: from the random start itself the two roads lead into
    different valleys.
    """
    start = random_starts(joint, rank, 1, 0)
    return em_runs(
        Targets.of(joint), start, max_iterations=60, tolerance=0.0, accelerate=False
    ).mixtures


@pytest.mark.parametrize("rank", [2, 4])
def test_an_independent_poisson_factorisation_ends_at_the_same_divergence(embedded_joint, rank):
    joint = embedded_joint.marginal(2)
    start = common_start(joint, rank)
    ours = em_runs(Targets.of(joint), start, max_iterations=20_000, tolerance=1e-8).objective.item()
    assert ours == pytest.approx(poisson_cp(joint, start, 400), rel=0.02)


@pytest.mark.slow
def test_an_independent_poisson_factorisation_ends_at_the_same_divergence_for_three_tokens(
    embedded_joint,
):
    start = common_start(embedded_joint, 4)
    ours = em_runs(
        Targets.of(embedded_joint), start, max_iterations=3000, tolerance=1e-7
    ).objective.item()
    assert ours == pytest.approx(poisson_cp(embedded_joint, start, 60), rel=0.02)
