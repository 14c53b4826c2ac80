"""The fit of what a draft is for: tokens per call itself, uphill from an expectation-maximisation
fit.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.acceptance.implied import acceptance_profiles
from cpmtp.decomposition.expectation import Mixtures
from cpmtp.decomposition.gradient import from_logits, logit_curvature, to_logits
from cpmtp.decomposition.quasi_newton import minimise
from cpmtp.decomposition.solution import Runs
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution

# Entries of the joints differentiated at once: the tape holds some twenty tensors of this size.
_AT_ONCE = 1 << 21


def acceptance_runs(
    joint: JointDistribution,
    owner: Int[Tensor, " runs"],
    start: Mixtures,
    goal: tuple[str, str],
    *,
    max_iterations: int,
    tolerance: float,
) -> Runs:
    """L-BFGS on minus the tokens per call, in the logits of weights and factors; no run ends below
    its start.

    The objective is a sum of minima, smooth almost everywhere: a step is taken only where it gains.

    Parameters
    ----------
    joint : JointDistribution
        With one batch axis.
    owner : (runs,) long tensor
        Which of the joints each run is fitted to.
    goal : tuple of str
        Rule and first token of `implied_acceptance`.
    """
    rule, first_token = goal
    step = max(_AT_ONCE // joint.probs[0].numel(), 1)

    def some(runs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        mixtures = from_logits(logits, start)
        draft = CPDistribution(mixtures.weights, mixtures.factors.mT.unbind(1))
        targets = JointDistribution(joint.probs[owner[runs]], joint.horizon)
        lost = -acceptance_profiles(targets, draft, (rule,), first_token=first_token)[
            rule
        ].survival.sum(-1)
        (gradient,) = torch.autograd.grad(lost.sum(), logits)
        return lost.detach(), gradient

    def evaluate(runs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        parts = [some(r, x) for r, x in zip(runs.split(step), logits.split(step), strict=True)]
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)

    def curvature(logits: Tensor) -> Tensor:
        return logit_curvature(logits, start)

    minima = minimise(
        evaluate,
        to_logits(start),
        curvature=curvature,
        max_passes=max_iterations,
        tolerance=tolerance,
    )
    # A draft that gives the first token earns the target's own token after the block as well.
    bonus = float(first_token == "draft")
    traces = [[value - bonus for value in trace] for trace in minima.traces]
    converged = torch.tensor(minima.converged, device=owner.device)
    iterations = torch.tensor([len(trace) - 1 for trace in traces])
    return Runs.of(
        from_logits(minima.points, start), minima.values - bonus, converged, iterations, traces
    )
