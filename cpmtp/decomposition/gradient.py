"""The mixture-of-experts fit: softmax weights and softmax experts, Adam and then L-BFGS on the KL divergence."""

from __future__ import annotations

import torch

from cpmtp.decomposition.expectation import Mixtures, Targets, expected_counts
from cpmtp.decomposition.solution import Runs


def gradient_runs(targets: Targets, start: Mixtures, *, max_iterations: int, tolerance: float) -> Runs:
    """Adam from `start`; a run stops when twenty steps have gained less than `tolerance` nats."""
    logits = [start.weights.clamp_min(1e-30).log(), start.factors.clamp_min(1e-30).log()]
    optimiser = torch.optim.Adam(logits, lr=0.1)
    count = len(start)
    best, best_kl = start, start.weights.new_full((count,), torch.inf)
    history = []
    for step in range(max_iterations + 1):
        current = Mixtures(logits[0].softmax(-1), logits[1].softmax(-2))
        counts = expected_counts(targets, current)
        better = counts.kl < best_kl
        best, best_kl = best.replaced(better, current[better]), torch.minimum(best_kl, counts.kl)
        history.append(counts.kl)
        # The gradient of the KL divergence in the logits is model minus expected counts: no tape is needed.
        logits[0].grad = current.weights - counts.weights
        logits[1].grad = current.factors * counts.weights[:, None, None] - counts.factors
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * (1 - step / (max_iterations + 1))
        optimiser.step()
    traces = torch.stack(history, 1).cummin(1).values
    converged = traces[:, -min(21, traces.shape[1])] - traces[:, -1] < tolerance
    return Runs.of(best, best_kl, converged, torch.full((count,), max_iterations), traces.tolist())
