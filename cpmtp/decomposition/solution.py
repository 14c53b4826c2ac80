"""What a method hands to `fit`: one best mixture per joint and the record of every restart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures


@dataclass(frozen=True)
class Runs:
    """Finished runs, those of one joint consecutive.

    Attributes
    ----------
    mixtures : Mixtures
    objective : (runs,) tensor
        Infinite where a run failed.
    converged : (runs,) bool tensor
    iterations : (runs,) long tensor
    failures : tuple of str
        Per run, why it failed; empty otherwise.
    traces : tuple of tuples of float
        Per run, the recorded objectives.
    raw : (runs, 3) tensor
        Raw relative error, negative mass and mass deficit; NaN where not meant.
    """

    mixtures: Mixtures
    objective: Tensor
    converged: Tensor
    iterations: Tensor
    failures: tuple[str, ...]
    traces: tuple[tuple[float, ...], ...]
    raw: Tensor

    @classmethod
    def of(
        cls, mixtures: Mixtures, objective: Tensor, converged: Tensor, iterations: Tensor, traces
    ) -> Runs:
        """Runs of a method that does not fail and has no raw answer."""
        raw = torch.full((len(objective), 3), torch.nan, dtype=torch.float64)
        return cls(
            mixtures,
            objective,
            converged,
            iterations,
            ("",) * len(objective),
            tuple(map(tuple, traces)),
            raw,
        )

    def __getitem__(self, index: Tensor) -> Runs:
        """The runs at `index` (long)."""
        chosen = index.tolist()
        failures, traces = (
            tuple(self.failures[i] for i in chosen),
            tuple(self.traces[i] for i in chosen),
        )
        numbers = (self.objective[index], self.converged[index], self.iterations[index])
        return Runs(self.mixtures[index], *numbers, failures, traces, self.raw[index])

    def best_of(self, runs_per_item: int) -> Tensor:
        """The number of the best run of each joint."""
        table = self.objective.reshape(-1, runs_per_item)
        return table.argmin(1) + runs_per_item * torch.arange(len(table), device=table.device)


# Gains are compared over this many passes: a single pass of a fit that still moves can gain almost
# nothing.
_WINDOW = 10
# Near a perfect fit the gain must also be small beside what is left, down to what float64 sums
# resolve.
_SHARE = 1e-3
_RESOLUTION = 1e-10


def record_passes(
    traces: list[list[float]], values: list[float], spent: list[int], tolerance: float
) -> list[bool]:
    """Append each run's objective, once for every pass it took; whether the run has stopped
    gaining.

    It has when ten passes gained less than `tolerance` (the objective's unit) and less than a
    thousandth of a positive objective.
    """
    for trace, value, passes in zip(traces, values, spent, strict=True):
        trace.extend([value] * passes)
    return [_stopped(trace, tolerance) for trace in traces]


def _stopped(trace: list[float], tolerance: float) -> bool:
    if len(trace) <= _WINDOW:
        return False
    least = min(tolerance, max(_SHARE * trace[-1], _RESOLUTION)) if trace[-1] >= 0 else tolerance
    return trace[-_WINDOW - 1] - trace[-1] < least
