"""Fits of one joint at several ranks, each begun from the one before as well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures
from cpmtp.decomposition.fit_result import FitResult
from cpmtp.decomposition.fitting import Problem, check, plan_of
from cpmtp.decomposition.solution import Runs
from cpmtp.decomposition.solving import KL_METHODS, Solved
from cpmtp.decomposition.starts import restart_generator
from cpmtp.joint_distribution import JointDistribution

# How far the halves of a split component start from each other, as the power of exponential noise.
_SPLIT_SHARPNESS = 2.0


def fit_path(
    joint: JointDistribution,
    ranks: Sequence[int],
    method: str = "em",
    *,
    restarts: int = 1,
    seed: int = 0,
    anchored: bool = False,
    max_iterations: int | None = None,
    tolerance: float | None = None,
) -> tuple[FitResult, ...]:
    """One fit per rank in increasing order; the objective never rises with the rank.

    Every rank is fitted from its own random starts and from the fit of the rank below with its
    heaviest components split. Should all of them end above the rank below, that fit is kept, some
    of its components counted twice.

    Parameters
    ----------
    joint, method, restarts, seed, anchored, max_iterations, tolerance
        As for `fit`; methods ``em``, ``gradient`` and ``acceptance`` only.
    ranks : sequence of int
        Sorted and without repetition in the answer.

    Returns
    -------
    tuple of FitResult
        From the second rank on `restart_objectives` has one more entry, the warm start's.

    Raises
    ------
    ValueError
        As for `fit`, or if there are no ranks or the method cannot start from a given fit.

    Examples
    --------
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> joint = exact_joint(separated_hmm(3, 6), torch.tensor([], dtype=torch.long), 3)
    >>> one, two, three = fit_path(joint, [1, 2, 3])
    >>> one.objective > two.objective > three.objective
    True
    """
    if method not in KL_METHODS:
        raise ValueError(
            f"method {method!r}: a path needs one that can start from a fit: "
            f"{', '.join(KL_METHODS)}"
        )
    if not ranks:
        raise ValueError("no ranks: expected at least one")
    plan = plan_of(
        joint,
        method,
        max_iterations=max_iterations,
        tolerance=tolerance,
        restarts=restarts,
        seed=seed,
    )
    check(joint, min(ranks), plan, anchored)
    problem, results = Problem.of(joint, anchored), []
    below: Solved | None = None
    for rank in sorted(set(ranks)):
        started = time.perf_counter()
        warm = None if below is None else _grown(below.best.mixtures, rank, seed)
        solved = problem.solve(rank, plan, warm)
        below = solved if below is None else replace(solved, best=_better(solved.best, below.best))
        results.append(problem.result(below, method, started))
    return tuple(results)


def _grown(mixtures: Mixtures, rank: int, seed: int) -> Mixtures:
    """Components added until there are `rank`: disturbed copies of the heaviest, which give half
    their weight.
    """
    grown = mixtures
    generator = restart_generator(seed, rank)
    while grown.weights.shape[1] < rank:
        count = min(rank - grown.weights.shape[1], grown.weights.shape[1])
        shape = (*grown.factors.shape[1:2], count, grown.factors.shape[-1])
        noise = (
            torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12).log().neg()
            ** _SPLIT_SHARPNESS
        )
        grown = _split(grown, count, noise.to(mixtures.factors) + 0.02)
    return grown


def _split(mixtures: Mixtures, count: int, change: Tensor) -> Mixtures:
    """The `count` heaviest components halved; the second halves' factors times `change`,
    normalised.
    """
    heaviest = mixtures.weights.topk(count).indices
    half = mixtures.weights.gather(1, heaviest) / 2
    weights = torch.cat([mixtures.weights.scatter(1, heaviest, half), half], 1)
    index = heaviest[:, None, :, None].expand(
        -1, mixtures.factors.shape[1], -1, mixtures.factors.shape[3]
    )
    children = mixtures.factors.gather(2, index) * change
    children = children / children.sum(-1, keepdim=True)
    return Mixtures(weights, torch.cat([mixtures.factors, children], 2))


def _better(best: Runs, below: Runs) -> Runs:
    """The runs of the higher rank, or the lower rank's fit with components counted twice where they
    are worse.
    """
    worse = best.objective > below.objective
    if not bool(worse.any()):
        return best
    rank = best.mixtures.weights.shape[1]
    padded = below.mixtures
    while padded.weights.shape[1] < rank:
        count = min(rank - padded.weights.shape[1], padded.weights.shape[1])
        padded = _split(padded, count, padded.factors.new_ones(()))
    return replace(
        best,
        mixtures=best.mixtures.replaced(worse, padded[worse]),
        objective=torch.where(worse, below.objective, best.objective),
        converged=torch.where(worse, below.converged, best.converged),
    )
