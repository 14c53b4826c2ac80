"""L-BFGS in the logits of a mixture of experts: on the KL divergence, or on tokens per call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.implied import acceptance_profiles
from cpmtp.decomposition.descent.em import CountingTargets, Targets, expected_counts
from cpmtp.decomposition.descent.quasi_newton import Minima, minimise
from cpmtp.decomposition.mixtures import Mixtures, Runs
from cpmtp.decomposition.trees.targets import TreeTargets
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution

# Logits of a start's zeros: probability e^-40, from where a gradient can still bring an expert
# back.
_LOWEST_LOGIT = -40.0
# Logits of rarer tokens are treated like those of this probability: their curvature says nothing
# about a whole step.
_LEAST_CURVATURE = 1e-8
# Entries of the joints differentiated at once: the tape holds some twenty tensors of this size.
AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Goal:
    """Which tokens per call are maximised.

    Attributes
    ----------
    rule, first_token : str
        As for `cpmtp.implied_acceptance`.
    """

    rule: str = "block"
    first_token: str = "target"


def gradient_runs(
    targets: Targets | CountingTargets,
    start: Mixtures,
    *,
    max_iterations: int,
    tolerance: float,
    load_balancing: float = 0.0,
) -> Runs:
    """Fit every run from `start` by L-BFGS on the KL divergence; each run on its own.

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
        mixtures = _from_logits(logits, start)
        counts = expected_counts(targets[runs], mixtures)
        value, value_gradient = _imbalance(mixtures.weights)

        expected = (
            mixtures.factors * counts.weights[:, None, :, None]
        )  # (runs, horizon, rank, vocab)
        by_weight = mixtures.weights - counts.weights + load_balancing * value_gradient
        by_factor = (expected - counts.factors).flatten(1)  # (runs, horizon * rank * vocab)
        gradient = torch.cat([by_weight, by_factor], 1)  # (runs, size)
        return counts.kl + load_balancing * value, gradient

    minima, mixtures = _climbed(evaluate, start, max_iterations, tolerance)
    values = minima.values - load_balancing * _imbalance(mixtures.weights)[0]
    converged = torch.tensor(minima.converged, device=values.device)
    return Runs.of(mixtures, values, converged, minima.traces)


def acceptance_runs(
    joint: JointDistribution,
    owner: Int[Tensor, " runs"],
    start: Mixtures,
    goal: Goal,
    *,
    max_iterations: int,
    tolerance: float,
) -> Runs:
    """L-BFGS on minus the tokens per call; no run ends below its start.

    The objective is a sum of minima, smooth almost everywhere: a step is taken only where it gains.

    Parameters
    ----------
    joint : JointDistribution
        With one batch axis.
    owner : (runs,) long tensor
        Which of the joints each run is fitted to.
    goal : Goal
    max_iterations : int
        Most evaluations of tokens per call.
    tolerance : float
        A run stops when ten of them have gained less than this (tokens per call).
    """
    step = max(AT_ONCE // joint.probs[0].numel(), 1)

    @lru_cache(maxsize=1)
    def targets(items: tuple[int, ...]) -> JointDistribution:
        return JointDistribution(joint.probs[list(items)], joint.horizon)

    def sums(runs: Tensor, mixtures: Mixtures) -> Tensor:
        draft = CPDistribution(mixtures.weights, mixtures.factors.mT.unbind(1))
        here = targets(tuple(owner[runs].tolist()))
        profiles = acceptance_profiles(here, draft, (goal.rule,), first_token=goal.first_token)
        return profiles[goal.rule].survival.sum(-1)  # (runs,)

    return _most_accepted(
        sums, start, goal, step=step, max_iterations=max_iterations, tolerance=tolerance
    )


def tree_acceptance_runs(
    targets: TreeTargets,
    start: Mixtures,
    goal: Goal,
    *,
    max_iterations: int,
    tolerance: float,
) -> Runs:
    """The same on trees: tokens per call of complete ones, of others what the kept prefixes give.

    Parameters
    ----------
    targets : TreeTargets
        As many runs as `start` has.
    """

    def sums(runs: Tensor, mixtures: Mixtures) -> Tensor:
        return targets[runs].survival_sums(mixtures, goal.rule, goal.first_token)

    nodes = int(targets.forest.sizes.amax(0).max())
    step = max(AT_ONCE // (nodes * start.rank), 1)
    return _most_accepted(
        sums, start, goal, step=step, max_iterations=max_iterations, tolerance=tolerance
    )


def _most_accepted(
    sums: Callable[[Tensor, Mixtures], Tensor],
    start: Mixtures,
    goal: Goal,
    *,
    step: int,
    max_iterations: int,
    tolerance: float,
) -> Runs:
    """L-BFGS on minus ``sum S_k`` of numbered runs, `step` of them at a time."""

    def some(runs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        lost = -sums(runs, _from_logits(logits, start))  # (runs,)
        if not lost.requires_grad:  # one token that the target gives: nothing is drafted
            return lost, torch.zeros_like(logits)
        (gradient,) = torch.autograd.grad(lost.sum(), logits)
        return lost.detach(), gradient

    def evaluate(runs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        parts = [some(r, x) for r, x in zip(runs.split(step), logits.split(step), strict=True)]
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)  # (runs,), (runs, size)

    minima, mixtures = _climbed(evaluate, start, max_iterations, tolerance)
    # A draft that gives the first token earns the target's own token after the block as well.
    bonus = float(goal.first_token == "draft")
    traces = [[value - bonus for value in trace] for trace in minima.traces]
    converged = torch.tensor(minima.converged, device=minima.values.device)
    return Runs.of(mixtures, minima.values - bonus, converged, traces)


def _climbed(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Mixtures,
    max_passes: int,
    tolerance: float,
) -> tuple[Minima, Mixtures]:
    """Where L-BFGS in the logits of weights and factors ends."""
    minima = minimise(
        evaluate,
        _to_logits(start),
        curvature=lambda _, logits: _logit_curvature(logits, start),
        max_passes=max_passes,
        tolerance=tolerance,
    )
    return minima, _from_logits(minima.points, start)


def _to_logits(mixtures: Mixtures) -> Float[Tensor, "runs size"]:
    """Weights' logits, then all factors' logits."""
    lowest = math.exp(_LOWEST_LOGIT)
    weights = mixtures.weights.clamp_min(lowest).log()  # (runs, rank)
    factors = mixtures.factors.clamp_min(lowest).log()  # (runs, horizon, rank, vocab)
    return torch.cat([weights, factors.flatten(1)], 1)  # (runs, size)


def _from_logits(logits: Float[Tensor, "runs size"], like: Mixtures) -> Mixtures:
    """The mixtures of given logits, shaped like those of `like`."""
    shape = (len(logits), *like.factors.shape[1:])
    factors = logits[:, like.rank :].reshape(shape)  # (runs, horizon, rank, vocab)
    return Mixtures(logits[:, : like.rank].softmax(-1), factors.softmax(-1))


def _logit_curvature(
    logits: Float[Tensor, "runs size"], like: Mixtures
) -> Float[Tensor, "runs size"]:
    """Diagonal of the complete data's Fisher information: the probabilities of components, and of
    tokens with components.
    """
    mixtures = _from_logits(logits, like)
    tokens = mixtures.weights[:, None, :, None] * mixtures.factors  # (runs, horizon, rank, vocab)
    probs = torch.cat([mixtures.weights, tokens.flatten(1)], 1)  # (runs, size)
    return probs.clamp_min(_LEAST_CURVATURE)


def _imbalance(
    weights: Float[Tensor, "runs rank"],
) -> tuple[Float[Tensor, " runs"], Float[Tensor, "runs rank"]]:
    """``KL(w || uniform)`` and its gradient in the logits of w."""
    scores = torch.log(weights.clamp_min(1e-300) * weights.shape[1])  # (runs, rank)
    value = (weights * scores).sum(1)  # (runs,)
    return value, weights * (scores - value[:, None])
