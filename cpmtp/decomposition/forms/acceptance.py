"""L-BFGS on tokens per call themselves, for any form whose probabilities can be written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.implied import acceptance_profiles
from cpmtp.decomposition.descent.gradient import AT_ONCE, Goal
from cpmtp.decomposition.descent.quasi_newton import Minima, minimise
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.joint_distribution import JointDistribution

# (runs, vectors, members) -> probabilities (runs, members, vocab, …, vocab), differentiable.
Dense = Callable[[Tensor, Tensor, slice], Tensor]


def climbed(
    groups: Groups,
    owner: Int[Tensor, " runs"],
    goal: Goal,
    dense: Dense,
    start: Float[Tensor, "runs size"],
    *,
    curvature: Callable[[Tensor, Tensor], Tensor],
    max_passes: int,
    tolerance: float,
) -> Minima:
    """Minimise minus the tokens per call, those of a run's members by their masses.

    Values are never above the start's. The tape is of the joint's size: members are taken some at a
    time.
    """
    entries = groups.vocab**groups.positions
    members = groups.mass.shape[1]
    wide = max(AT_ONCE // entries, 1)  # members at once
    slices = [slice(at, at + wide) for at in range(0, members, wide)]
    step = max(AT_ONCE // (entries * members), 1)

    def some(runs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        vectors = vectors.detach().requires_grad_()
        lost, slope = vectors.new_zeros(len(vectors)), torch.zeros_like(vectors)
        for here in slices:
            part = _lost(groups, owner[runs], here, dense(runs, vectors, here), goal)  # (runs,)
            lost = lost + part.detach()
            if part.requires_grad:  # else one token that the target gives: nothing is drafted
                slope = slope + torch.autograd.grad(part.sum(), vectors)[0]
        return lost, slope

    def evaluate(runs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(runs.split(step), vectors.split(step), strict=True)
        values, slopes = zip(*(some(*piece) for piece in pieces), strict=True)
        return torch.cat(values), torch.cat(slopes)  # (runs,), (runs, size)

    return minimise(
        evaluate, start, curvature=curvature, max_passes=max_passes, tolerance=tolerance
    )


def _lost(
    groups: Groups, owner: Tensor, members: slice, draft: Tensor, goal: Goal
) -> Float[Tensor, " runs"]:
    """Minus the tokens per call that some members contribute."""
    mass, positions = groups.mass[owner, members], groups.positions  # (runs, some)
    target = groups.probs[owner, members].flatten(0, 1)  # (runs * some, vocab, …, vocab)
    profile = acceptance_profiles(
        JointDistribution(target, positions),
        JointDistribution(draft.flatten(0, 1), positions),
        (goal.rule,),
        first_token=goal.first_token,
    )[goal.rule]
    # A draft that gives the first token earns the target's own token after the block as well.
    earned = profile.survival.sum(-1) + float(goal.first_token == "draft")  # (runs * some,)
    return -(mass * earned.reshape(mass.shape)).sum(1)
