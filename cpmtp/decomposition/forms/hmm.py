"""Fits of hidden Markov distributions: EM, L-BFGS on the divergence."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.decomposition.forms.hidden import Hidden, HiddenCounts, hidden_counts
from cpmtp.decomposition.forms.likelihood import HalvedTargets
from cpmtp.decomposition.forms.squarem import Sweeps, swept
from cpmtp.decomposition.quasi_newton import Minima, minimise

# Logarithms of probabilities below e to this no longer matter to any sum of them.
_LOWEST = -600.0


def em(
    targets: HalvedTargets,
    owner: Int[Tensor, " runs"],
    start: Hidden,
    *,
    max_passes: int,
    tolerance: float,
) -> tuple[Hidden, Minima]:
    """Fit every run from `start` by forward and backward sweeps; the divergence never rises."""

    def count(runs: Tensor, vectors: Tensor, with_kl: bool) -> HiddenCounts:
        return hidden_counts(targets, owner[runs], start.unpacked(vectors), with_kl=with_kl)

    def maximise(runs: Tensor, vectors: Tensor, counts: HiddenCounts) -> Tensor:
        before = start.unpacked(vectors)
        parts = zip((counts.weights, counts.transitions, counts.factors), before.parts, strict=True)
        return Hidden(*(_normalised(found, old) for found, old in parts)).packed()

    def spread(runs: Tensor, vectors: Tensor) -> Tensor:
        return start.unpacked(vectors).spread()

    found = swept(
        Sweeps(count, maximise, spread),
        start.packed(),
        max_passes=max_passes,
        tolerance=tolerance,
    )
    return start.unpacked(found.points), found


def gradient(
    targets: HalvedTargets,
    owner: Int[Tensor, " runs"],
    start: Hidden,
    *,
    max_passes: int,
    tolerance: float,
) -> tuple[Hidden, Minima]:
    """The same by L-BFGS: the gradient is model minus expected counts."""

    def evaluate(runs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        hidden = start.unpacked(vectors)
        counts = hidden_counts(targets, owner[runs], hidden)
        parts = zip(
            (counts.weights, counts.transitions, counts.factors), hidden.probs(), strict=True
        )
        slopes = [found.sum(-1, keepdim=True) * probs - found for found, probs in parts]
        return counts.kl, Hidden(*slopes).packed()

    found = minimise(
        evaluate,
        start.packed(),
        curvature=lambda _, vectors: start.unpacked(vectors).spread(),
        max_passes=max_passes,
        tolerance=tolerance,
    )
    return start.unpacked(found.points), found


def _normalised(counts: Tensor, before: Tensor) -> Tensor:
    """Logarithms of counts' shares; rows without any stay."""
    total = counts.sum(-1, keepdim=True)
    share = counts / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, share.log().clamp_min(_LOWEST), before.log_softmax(-1))
