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
    def of(cls, mixtures: Mixtures, objective: Tensor, converged: Tensor, iterations: Tensor, traces) -> Runs:
        """Runs of a method that does not fail and has no raw answer."""
        raw = torch.full((len(objective), 3), torch.nan, dtype=torch.float64)
        return cls(mixtures, objective, converged, iterations, ("",) * len(objective), tuple(map(tuple, traces)), raw)

    def best_of(self, restarts: int) -> tuple[Runs, Tensor]:
        """The best run of each joint, and all objectives as (items, restarts)."""
        table = self.objective.reshape(-1, restarts)
        best = table.argmin(1) + restarts * torch.arange(len(table), device=table.device)
        chosen = best.tolist()
        failures, traces = tuple(self.failures[i] for i in chosen), tuple(self.traces[i] for i in chosen)
        picked = Runs(
            self.mixtures[best],
            self.objective[best],
            self.converged[best],
            self.iterations[best],
            failures,
            traces,
            self.raw[best],
        )
        return picked, table
