"""Expectation-maximisation (latent class analysis), accelerated by SQUAREM with a monotone
safeguard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import (
    CountingTargets,
    Counts,
    Mixtures,
    Targets,
    expected_counts,
)
from cpmtp.decomposition.solution import Runs, record_passes

# Sweeps before the first extrapolation; from the best of some starts more of them (5, 10) change
# nothing.
_BURN_IN = 2
# Logarithms of probabilities below this no longer matter to any sum of float64 probabilities.
_LOWEST = 1e-280
_FIRST_STEP_LIMIT = 4.0
_TRIAL_SWEEPS = 12


def em_runs(
    targets: Targets | CountingTargets,
    start: Mixtures,
    *,
    max_iterations: int,
    tolerance: float,
    accelerate: bool = True,
) -> Runs:
    """Fit every run from `start`; the KL divergence never rises.

    Two sweeps ``x0 -> x1 -> x2`` and the point ``x0 + 2 s (x1 - x0) + s^2 (x2 - 2 x1 + x0)`` in the
    logarithms of the parameters, kept if its divergence is not above that of x0 (else x2 is taken).
    A run stops when ten sweeps have gained less than `tolerance` nats and less than a thousandth of
    what is left, and leaves the batch: what happens to one run depends on no other.

    Parameters
    ----------
    max_iterations : int
        Most passes over the joint, rejected extrapolations included.
    tolerance : float
        In nats.
    accelerate : bool
        False: plain sweeps.

    References
    ----------
    varadhan2008squarem, goodman1974exploratory
    """
    count, device = len(start), start.weights.device
    best, alive, current = start, torch.arange(count, device=device), start
    kl, step_limit = (
        start.weights.new_full((count,), torch.inf),
        start.weights.new_full((count,), _FIRST_STEP_LIMIT),
    )
    converged = torch.zeros(count, dtype=torch.bool, device=device)
    traces: list[list[float]] = [[] for _ in range(count)]
    counts, spent, rounds = expected_counts(targets, start), [1] * count, 0
    while True:
        kl[alive] = counts.kl
        best = best.replaced(alive, current)
        ended = record_passes(
            [traces[run] for run in alive.tolist()], counts.kl.tolist(), spent, tolerance
        )
        converged[alive] = torch.tensor(ended, device=device)
        going = [
            not end and len(traces[run]) <= max_iterations
            for end, run in zip(ended, alive.tolist(), strict=True)
        ]
        if not any(going):
            break
        if not all(going):
            keep = torch.tensor(going, device=device)
            alive, current, counts, step_limit = (
                alive[keep],
                current[keep],
                counts[keep],
                step_limit[keep],
            )
        rounds += 1
        if accelerate and rounds > _BURN_IN:
            current, counts, step_limit, spent = _squarem_cycle(
                targets[alive], (current, counts), step_limit
            )
        else:
            current = m_step(counts, current)
            counts, spent = expected_counts(targets[alive], current), [1] * len(alive)
    iterations = torch.tensor([len(trace) - 1 for trace in traces])
    return Runs.of(best, kl, converged, iterations, traces)


def promising(
    targets: Targets | CountingTargets, starts: Mixtures, trials: int
) -> tuple[Tensor, Mixtures]:
    """Of every `trials` consecutive runs the one with the least divergence after twelve sweeps: its
    number, and where it is.

    Divergences after a few sweeps foretell those at the end well enough: the chosen run ends about
    where the best of all would have ended.

    References
    ----------
    biernacki2003choosing
    """
    if trials == 1:
        return torch.arange(len(starts), device=starts.weights.device), starts
    tried = starts
    for _ in range(_TRIAL_SWEEPS):
        tried = m_step(expected_counts(targets, tried, with_kl=False), tried)
    groups = expected_counts(targets, tried).kl.reshape(-1, trials)
    chosen = groups.argmin(1) + trials * torch.arange(len(groups), device=groups.device)
    return chosen, tried[chosen]


def m_step(counts: Counts, previous: Mixtures) -> Mixtures:
    """Counts normalised; a component without any keeps its factors."""
    total = counts.factors.sum(-1, keepdim=True)
    factors = torch.where(
        total > 0, counts.factors / torch.where(total > 0, total, 1.0), previous.factors
    )
    return Mixtures(counts.weights / counts.weights.sum(-1, keepdim=True), factors)


def _squarem_cycle(
    targets: Targets | CountingTargets, here: tuple[Mixtures, Counts], step_limit: Tensor
) -> tuple[Mixtures, Counts, Tensor, list[int]]:
    """Next mixtures with their counts, the new step limits, and the passes over the joint this took
    (3 after a
    rejected point, otherwise 2).
    """
    current, counts_here = here
    once = m_step(counts_here, current)
    counts_once = expected_counts(targets, once, with_kl=False)
    twice = m_step(counts_once, once)
    proposed, step = _extrapolated((current, once, twice), step_limit)
    counts = expected_counts(targets, proposed)
    risen = ~(counts.kl <= counts_here.kl)
    # Steps that reach their limit and help may grow; steps that do not help must shrink.
    step_limit = torch.where(
        risen,
        (step_limit / 4).clamp_min(2.0),
        torch.where(step >= step_limit, 4 * step_limit, step_limit),
    )
    spent = [3 if up else 2 for up in risen.tolist()]
    if any(risen.tolist()):
        proposed = proposed.replaced(risen, twice[risen])
        counts = counts.replaced(risen, expected_counts(targets[risen], twice[risen]))
    return proposed, counts, step_limit, spent


def _extrapolated(
    path: tuple[Mixtures, Mixtures, Mixtures], step_limit: Tensor
) -> tuple[Mixtures, Tensor]:
    """SQUAREM's point beyond ``x0 -> x1 -> x2`` and its step ``s = |x1 - x0| / |x2 - 2 x1 + x0|``
    in 1 to the limit.

    Lengths are weighted by the probabilities themselves (Fisher's metric): entries on their way to
    zero move for ever in their logarithm and mean nothing.
    """
    (w0, f0), (w1, f1), (w2, f2) = (
        (m.weights.clamp_min(_LOWEST).log(), m.factors.clamp_min(_LOWEST).log()) for m in path
    )
    w_step, f_step, w_bend, f_bend = w1 - w0, f1 - f0, w2 - 2 * w1 + w0, f2 - 2 * f1 + f0
    mass = path[1].weights[:, None, :, None] * path[1].factors
    length = (path[1].weights * w_step.square()).sum(1) + (mass * f_step.square()).sum((1, 2, 3))
    bend = (path[1].weights * w_bend.square()).sum(1) + (mass * f_bend.square()).sum((1, 2, 3))
    step = (length / bend.clamp_min(1e-300)).sqrt().clamp_min(1.0).minimum(step_limit)
    s = step[:, None]
    weights = (w0 + 2 * s * w_step + s.square() * w_bend).softmax(-1)
    s = step[:, None, None, None]
    factors = (f0 + 2 * s * f_step + s.square() * f_bend).softmax(-1)
    return Mixtures(weights, factors), step
