"""Fits by gradients: the gradient is the derivative, and balancing pulls weights together."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from rounding import rounding

from cpmtp.decomposition.descent import gradient as gradient_fits
from cpmtp.decomposition.descent.em import Targets
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.starts import random_starts
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm

VOCAB, HORIZON, RANK = 5, 3, 4


def a_joint(seed: int = 0) -> JointDistribution:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand((VOCAB,) * HORIZON, generator=generator, dtype=torch.float64) ** 4
    return JointDistribution(values / values.sum())


def uneven(rank: int = 3) -> JointDistribution:
    """A mixture whose heaviest component has most of the mass, each over tokens of its own."""
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)[:rank]
    rows = torch.eye(rank, dtype=torch.float64).repeat_interleave(2, 1) * 0.45 + 0.05 / rank
    rows = rows / rows.sum(1, keepdim=True)
    joint = torch.einsum("r,rx,ry,rz->xyz", weights / weights.sum(), rows, rows, rows)
    return JointDistribution(joint)


def imbalance(weights: torch.Tensor) -> torch.Tensor:
    """``KL(w || uniform)``, by the definition."""
    return (weights * (weights * weights.shape[-1]).log()).sum(-1)


def objective(logits: torch.Tensor, joint: JointDistribution, balancing: float) -> torch.Tensor:
    """Divergence of the mixture and its penalty, from logits: weights first, then all factors."""
    weights = logits[:, :RANK].softmax(-1)
    factors = logits[:, RANK:].view(-1, HORIZON, RANK, VOCAB).softmax(-1)
    draft = torch.einsum("nr,nrx,nry,nrz->nxyz", weights, *factors.unbind(1))
    kl = (joint.probs * (joint.probs.log() - draft.log())).sum((1, 2, 3))
    return kl + balancing * imbalance(weights)


@pytest.mark.parametrize("balancing", [0.0, 0.3, 10.0])
def test_value_and_gradient_are_those_of_the_definition(balancing, monkeypatch):
    taken = {}

    def taking(evaluate, start, **options):
        taken["evaluate"] = evaluate
        return usual(evaluate, start, **options)

    usual = gradient_fits.minimise
    monkeypatch.setattr(gradient_fits, "minimise", taking)
    joint, runs = a_joint(), 3
    start = random_starts(joint, RANK, runs, 0)
    gradient_fits.gradient_runs(
        Targets.of(joint, runs), start, max_iterations=0, tolerance=0.0, load_balancing=balancing
    )
    generator = torch.Generator().manual_seed(1)
    size = RANK + HORIZON * RANK * VOCAB
    logits = torch.randn(runs, size, generator=generator, dtype=torch.float64).requires_grad_()
    expected = objective(logits, joint, balancing)
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    value, gradient = taken["evaluate"](torch.arange(runs), logits.detach())
    # Sums over 5 ** 3 sequences of products of four and their logarithms, of at most 20 nats.
    allowed = (1 + balancing) * rounding(torch.float64, 20 * (VOCAB**HORIZON + 8))
    torch.testing.assert_close(value, expected.detach(), atol=allowed, rtol=0)
    torch.testing.assert_close(gradient, slope, atol=allowed, rtol=0)


def test_a_slope_of_the_penalty_is_what_a_small_step_changes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    value, slope = gradient_fits._imbalance(logits.softmax(-1))
    torch.testing.assert_close(value, imbalance(logits.softmax(-1)))
    # The best step for differences over two steps is the cube root of what rounding leaves, and
    # their error its square.
    step = rounding(torch.float64, 16) ** (1 / 3)
    for index in range(4):
        moved = torch.zeros(4, dtype=torch.float64)
        moved[index] = step
        ends = [imbalance((logits + sign * moved).softmax(-1)) for sign in (1, -1)]
        found = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(slope[:, index], found, atol=4 * step**2, rtol=0)


def test_without_balancing_the_fit_is_left_alone():
    plain = fit(a_joint(), RANK, "gradient", restarts=2)
    nothing = fit(a_joint(), RANK, "gradient", restarts=2, load_balancing=0.0)
    assert torch.equal(plain.distribution.to_tensor(), nothing.distribution.to_tensor())
    assert plain.trace == nothing.trace and plain.objective == nothing.objective


def test_the_stronger_the_balancing_the_more_equal_the_weights():
    effort = {"tolerance": 1e-9, "max_iterations": 2000}
    apart, divergence = [], []
    for balancing in (0.0, 0.03, 0.1, 0.3, 1.0, 30.0):
        result = fit(uneven(), 3, "gradient", load_balancing=balancing, **effort)
        apart.append(imbalance(result.distribution.weights).item())
        divergence.append(result.objective)
    assert all(more < less - 1e-6 for less, more in pairwise(apart)), apart
    # Thirty nats of penalty a nat: what the divergence can still gain moves weights by a thirtieth.
    assert apart[0] > 0.1 > 1e-3 > apart[-1]
    assert divergence[0] == min(divergence)


def test_an_uneven_mixture_is_found_as_it_is_and_pulled_together_at_a_price():
    free = fit(uneven(), 3, "gradient", tolerance=1e-10, max_iterations=2000)
    assert free.objective <= 1e-6
    torch.testing.assert_close(
        free.distribution.weights.sort().values,
        torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64),
        atol=2e-3,
        rtol=0,
    )
    pulled = fit(uneven(), 3, "gradient", load_balancing=30.0, tolerance=1e-10)
    assert pulled.objective > 0.05
    assert pulled.distribution.weights.min() > 0.32


@pytest.mark.parametrize("balancing", [0.0, 0.5])
def test_the_objective_said_is_the_divergence_without_the_penalty(balancing):
    joint = exact_joint(separated_hmm(3, VOCAB), torch.empty(0, dtype=torch.long), HORIZON)
    result = fit(joint, RANK, "gradient", load_balancing=balancing, max_iterations=30)
    found = divergences(joint, result.distribution).kl_nats
    allowed = (1 + balancing) * math.log(RANK) + joint.entropy().item() + 40
    assert result.objective == pytest.approx(
        found, abs=allowed * rounding(torch.float64, 2 * VOCAB**HORIZON)
    )
    # The trace is what was minimised, penalty and all: it never rises.
    trace = list(result.trace)
    assert all(later <= earlier for earlier, later in pairwise(trace))
    penalty = balancing * imbalance(result.distribution.weights).item()
    assert trace[-1] == pytest.approx(
        found + penalty, abs=allowed * rounding(torch.float64, 2 * VOCAB**HORIZON)
    )
