"""Expectation-maximisation (latent class analysis): the KL fit that needs no step size."""

from __future__ import annotations

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import Counts, Mixtures, Targets, expected_counts
from cpmtp.decomposition.solution import Runs


def em_runs(targets: Targets, start: Mixtures, *, max_iterations: int, tolerance: float) -> Runs:
    """Plain sweeps from `start`; a run stops when ten sweeps have gained less than `tolerance` nats."""
    count = len(start)
    mixtures, alive = start, torch.arange(count, device=start.weights.device)
    kl = start.weights.new_full((count,), torch.inf)
    converged = torch.zeros(count, dtype=torch.bool)
    iterations = torch.zeros(count, dtype=torch.long)
    traces: list[list[float]] = [[] for _ in range(count)]
    for sweep in range(max_iterations + 1):
        current = mixtures[alive]
        counts = expected_counts(targets[alive], current)
        kl[alive], iterations[alive] = counts.kl, sweep
        for run, value in zip(alive.tolist(), counts.kl.tolist(), strict=True):
            traces[run].append(value)
        done = torch.tensor([len(traces[r]) > 10 and traces[r][-11] - traces[r][-1] < tolerance for r in alive.tolist()])
        converged[alive] = done
        keep = ~done
        if not bool(keep.any()) or sweep == max_iterations:
            break
        alive = alive[keep]
        mixtures = mixtures.replaced(alive, m_step(_select(counts, keep), current[keep]))
    return Runs.of(mixtures, kl, converged, iterations, traces)


def m_step(counts: Counts, previous: Mixtures) -> Mixtures:
    """Counts normalised; a component without any keeps its factors."""
    total = counts.factors.sum(-2, keepdim=True)
    factors = torch.where(total > 0, counts.factors / torch.where(total > 0, total, 1.0), previous.factors)
    return Mixtures(counts.weights / counts.weights.sum(-1, keepdim=True), factors)


def _select(counts: Counts, keep: Tensor) -> Counts:
    return Counts(counts.weights[keep], counts.factors[keep], counts.kl[keep])
