"""The mixture-of-experts fit: softmax weights and softmax experts, L-BFGS on the KL divergence."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures, Targets, expected_counts
from cpmtp.decomposition.quasi_newton import minimise
from cpmtp.decomposition.solution import Runs

# Logits of a start's zeros: probability e^-40, from where a gradient can still bring an expert
# back.
_LOWEST_LOGIT = -40.0
# Logits of rarer tokens are treated like those of this probability: their curvature says nothing
# about a whole step.
_LEAST_CURVATURE = 1e-8


def gradient_runs(
    targets: Targets,
    start: Mixtures,
    *,
    max_iterations: int,
    tolerance: float,
    load_balancing: float = 0.0,
) -> Runs:
    """Fit every run from `start` by L-BFGS; each run on its own.

    The gradient of the KL divergence in the logits is model minus expected counts, ``w_a - n_a``
    and ``n_a A_i - N_i``, so one pass of the expectation step gives both value and gradient and no
    tape is kept. Steps are scaled by the probabilities ``w_a`` and ``w_a A_i``, with which the
    gradients of rare tokens vanish; without history such a step is close to one of
    expectation-maximisation.

    Parameters
    ----------
    max_iterations : int
        Most passes over the joint.
    tolerance : float
        A run stops when ten passes have gained less than this (nats).
    load_balancing : float
        Adds ``load_balancing * sum_a w_a log(r w_a)`` (nats), zero at equal weights: the part of
        the mixture-of-experts literature's loss that a single context leaves.

    References
    ----------
    basharin2024faster, jamshidian1997acceleration
    """

    def evaluate(runs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        mixtures = from_logits(logits, start)
        counts = expected_counts(targets[runs], mixtures)
        weight_gradient = mixtures.weights - counts.weights
        factor_gradient = mixtures.factors * counts.weights[:, None, :, None] - counts.factors
        value, value_gradient = _imbalance(mixtures.weights)
        gradient = torch.cat(
            [weight_gradient + load_balancing * value_gradient, factor_gradient.flatten(1)], 1
        )
        return counts.kl + load_balancing * value, gradient

    def curvature(logits: Tensor) -> Tensor:
        return logit_curvature(logits, start)

    minima = minimise(
        evaluate,
        to_logits(start),
        curvature=curvature,
        max_passes=max_iterations,
        tolerance=tolerance,
    )
    best = from_logits(minima.points, start)
    converged = torch.tensor(minima.converged, device=best.weights.device)
    iterations = torch.tensor([len(trace) - 1 for trace in minima.traces])
    values = minima.values - load_balancing * _imbalance(best.weights)[0]
    return Runs.of(best, values, converged, iterations, minima.traces)


def to_logits(mixtures: Mixtures) -> Float[Tensor, "runs size"]:
    """Weights' logits, then all factors' logits."""
    lowest = math.exp(_LOWEST_LOGIT)
    return torch.cat(
        [
            mixtures.weights.clamp_min(lowest).log(),
            mixtures.factors.clamp_min(lowest).log().flatten(1),
        ],
        1,
    )


def from_logits(logits: Float[Tensor, "runs size"], like: Mixtures) -> Mixtures:
    """The mixtures of given logits, shaped like those of `like`."""
    rank = like.weights.shape[1]
    factors = logits[:, rank:].reshape(len(logits), *like.factors.shape[1:])
    return Mixtures(logits[:, :rank].softmax(-1), factors.softmax(-1))


def logit_curvature(
    logits: Float[Tensor, "runs size"], like: Mixtures
) -> Float[Tensor, "runs size"]:
    """Diagonal of the complete data's Fisher information: the probabilities of components, and of
    tokens with components.
    """
    mixtures = from_logits(logits, like)
    tokens = mixtures.weights[:, None, :, None] * mixtures.factors
    return torch.cat([mixtures.weights, tokens.flatten(1)], 1).clamp_min(_LEAST_CURVATURE)


def _imbalance(
    weights: Float[Tensor, "runs rank"],
) -> tuple[Float[Tensor, " runs"], Float[Tensor, "runs rank"]]:
    """``KL(w || uniform)`` and its gradient in the logits of w."""
    scores = torch.log(weights.clamp_min(1e-300) * weights.shape[1])
    value = (weights * scores).sum(1)
    return value, weights * (scores - value[:, None])
