"""The mixture-of-experts fit: softmax weights and softmax experts, Adam and then L-BFGS on the KL divergence."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures, Targets, expected_counts
from cpmtp.decomposition.quasi_newton import minimise
from cpmtp.decomposition.solution import Runs

_LEARNING_RATE = 0.3
_ADAM_SHARE = 0.3
_ADAM_MOST = 100
# Logits of a start's zeros: probability e^-40, from where a gradient can still bring an expert back.
_LOWEST_LOGIT = -40.0


def gradient_runs(
    targets: Targets, start: Mixtures, *, max_iterations: int, tolerance: float, load_balancing: float = 0.0
) -> Runs:
    """Fit every run from `start`: Adam with a cosine schedule, then L-BFGS; each run on its own.

    The gradient of the KL divergence in the logits is model minus expected counts, ``w_a - n_a`` and ``n_a A_i - N_i``, so one
    pass of the expectation step gives both value and gradient and no tape is kept.

    Parameters
    ----------
    max_iterations : int
        Most passes over the joint, of which at most 100 are Adam's.
    tolerance : float
        L-BFGS stops a run when ten passes have gained less than this (nats).
    load_balancing : float
        Adds ``load_balancing * sum_a w_a log(r w_a)`` (nats), zero at equal weights: the part of the mixture-of-experts
        literature's loss that a single context leaves.

    References
    ----------
    basharin2024faster, kingma2015adam
    """

    def evaluate(runs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        mixtures = from_logits(logits, start)
        counts = expected_counts(targets[runs], mixtures)
        weight_gradient = mixtures.weights - counts.weights
        factor_gradient = mixtures.factors * counts.weights[:, None, :, None] - counts.factors
        value, value_gradient = _imbalance(mixtures.weights)
        gradient = torch.cat([weight_gradient + load_balancing * value_gradient, factor_gradient.flatten(1)], 1)
        return counts.kl + load_balancing * value, gradient

    adam_steps = min(int(_ADAM_SHARE * max_iterations), _ADAM_MOST)
    logits, adam_trace = _adam(evaluate, to_logits(start), adam_steps)
    minima = minimise(evaluate, logits, max_passes=max_iterations - adam_steps, tolerance=tolerance)
    best = from_logits(minima.points, start)
    traces = [[*adam, *rest] for adam, rest in zip(adam_trace, minima.traces, strict=True)]
    converged = torch.tensor(minima.converged, device=logits.device)
    iterations = torch.tensor([len(trace) - 1 for trace in traces])
    return Runs.of(best, minima.values - load_balancing * _imbalance(best.weights)[0], converged, iterations, traces)


def to_logits(mixtures: Mixtures) -> Float[Tensor, "runs size"]:
    """Weights' logits, then all factors' logits."""
    lowest = math.exp(_LOWEST_LOGIT)
    return torch.cat([mixtures.weights.clamp_min(lowest).log(), mixtures.factors.clamp_min(lowest).log().flatten(1)], 1)


def from_logits(logits: Float[Tensor, "runs size"], like: Mixtures) -> Mixtures:
    """The mixtures of given logits, shaped like those of `like`."""
    rank = like.weights.shape[1]
    factors = logits[:, rank:].reshape(len(logits), *like.factors.shape[1:])
    return Mixtures(logits[:, :rank].softmax(-1), factors.softmax(-1))


def _adam(evaluate, logits: Tensor, steps: int) -> tuple[Tensor, list[list[float]]]:
    """Each run's best point on Adam's way, and its objective after every step."""
    moving = logits.clone()
    optimiser = torch.optim.Adam([moving], lr=_LEARNING_RATE, betas=(0.8, 0.95))
    runs = torch.arange(len(logits), device=logits.device)
    best, best_value, history = logits, logits.new_full((len(logits),), torch.inf), []
    for step in range(steps):
        value, moving.grad = evaluate(runs, moving)
        better = value < best_value
        best, best_value = torch.where(better[:, None], moving, best), torch.where(better, value, best_value)
        history.append(best_value)
        optimiser.param_groups[0]["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.step()
    return best, torch.stack(history, 1).tolist() if history else [[] for _ in range(len(logits))]


def _imbalance(weights: Float[Tensor, "runs rank"]) -> tuple[Float[Tensor, " runs"], Float[Tensor, "runs rank"]]:
    """``KL(w || uniform)`` and its gradient in the logits of w."""
    scores = torch.log(weights.clamp_min(1e-300) * weights.shape[1])
    value = (weights * scores).sum(1)
    return value, weights * (scores - value[:, None])
