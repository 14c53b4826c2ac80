"""Where the runs of a form ended: the best of each group, and what its starts came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpmtp.decomposition.descent.quasi_newton import Minima
from cpmtp.decomposition.restarts import Plan

# Parameters of many runs: selected by index, joined from a list.
P = TypeVar("P")


@dataclass(frozen=True)
class Plans:
    """How a form is fitted, and what it contains.

    Attributes
    ----------
    form : Plan
        Of the form itself.
    cp : Plan
        Of the CP distributions of its rank, as they are fitted by themselves.
    chain : Plan
        Of one chain, as it is fitted by itself.
    """

    form: Plan
    cp: Plan
    chain: Plan


@dataclass(frozen=True)
class Ends(Generic[P]):
    """The best run of each group.

    Attributes
    ----------
    found : Chains or Hidden
        One run per group.
    objective : (groups,) tensor
    converged : (groups,) bool tensor
    traces : tuple of tuples of float
    objectives : (groups, starts) tensor
        Of every start; what a form contains counts as one.
    """

    found: P
    objective: Float[Tensor, " groups"]
    converged: Bool[Tensor, " groups"]
    traces: tuple[tuple[float, ...], ...]
    objectives: Float[Tensor, "groups starts"]

    @classmethod
    def of(cls, runs: Any, minima: Minima, starts: int) -> Ends:
        """The best of every `starts` consecutive runs."""
        values = minima.values.reshape(-1, starts)  # (groups, starts)
        chosen = values.argmin(1) + starts * torch.arange(len(values), device=values.device)
        converged = torch.tensor(minima.converged, device=values.device)
        traces = tuple(tuple(minima.traces[run]) for run in chosen.tolist())
        return cls(runs[chosen], minima.values[chosen], converged[chosen], traces, values)

    @classmethod
    def standing(cls, runs: Any, objective: Tensor) -> Ends:
        """One run per group, as it is."""
        traces = tuple((value,) for value in objective.tolist())
        converged = torch.ones_like(objective, dtype=torch.bool)
        return cls(runs, objective, converged, traces, objective.unsqueeze(1))

    def __getitem__(self, index: Tensor) -> Ends:
        """Some of the groups."""
        return Ends(
            self.found[index],  # type: ignore[index]
            self.objective[index],
            self.converged[index],
            tuple(self.traces[number] for number in index.tolist()),
            self.objectives[index],
        )

    @classmethod
    def joined(cls, parts: list[Ends]) -> Ends:
        """All groups of several."""
        return cls(
            type(parts[0].found).joined([part.found for part in parts]),
            torch.cat([part.objective for part in parts]),  # (groups,)
            torch.cat([part.converged for part in parts]),  # (groups,)
            tuple(trace for part in parts for trace in part.traces),
            torch.cat([part.objectives for part in parts]),  # (groups, starts)
        )

    def or_better(self, other: Ends) -> Ends:
        """Group by group the better of two; the starts of both are counted."""
        objectives = torch.cat([self.objectives, other.objectives], 1)  # (groups, more starts)
        count = len(self.objective)
        order = torch.arange(count, device=self.objective.device)  # (groups,)
        order = torch.where(other.objective < self.objective, order + count, order)
        both = Ends.joined([self._counting(objectives), other._counting(objectives)])
        return both[order]

    def _counting(self, objectives: Tensor) -> Ends:
        return Ends(self.found, self.objective, self.converged, self.traces, objectives)
