"""Many CP distributions at once, where their fits stand, and how alike two of them are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution

# Gains are compared over this many passes: a single pass of a fit that still moves can gain almost
# nothing.
_WINDOW = 10
# Near a perfect fit the gain must also be small beside what is left, down to what float64 sums
# resolve.
_SHARE = 1e-3
_RESOLUTION = 1e-10


@dataclass(frozen=True)
class Mixtures:
    """Parameters of many CP distributions at once: one run is one restart on one joint.

    Attributes
    ----------
    weights : (runs, rank) tensor
    factors : (runs, horizon, rank, vocab) tensor
        Rows on the simplex: the layout in which the matrix products run fastest.
    """

    weights: Float[Tensor, "runs rank"]
    factors: Float[Tensor, "runs horizon rank vocab"]

    def __getitem__(self, index) -> Mixtures:
        return Mixtures(self.weights[index], self.factors[index])

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.weights.shape[1]

    def replaced(self, index: Tensor, other: Mixtures) -> Mixtures:
        """A copy with the runs at `index` (long or bool) taken from `other`."""
        return Mixtures(
            self.weights.index_put((index,), other.weights),  # (runs, rank)
            self.factors.index_put((index,), other.factors),  # (runs, horizon, rank, vocab)
        )

    @classmethod
    def joined(cls, parts: list[Mixtures]) -> Mixtures:
        """All runs of several mixtures, one after another."""
        return cls(
            torch.cat([part.weights for part in parts]),  # (runs, rank)
            torch.cat([part.factors for part in parts]),  # (runs, horizon, rank, vocab)
        )

    def of_width(self, width: int) -> Mixtures:
        """The same over so many places: what is cut off or added has no mass."""
        more = width - self.factors.shape[-1]
        return Mixtures(self.weights, torch.nn.functional.pad(self.factors, (0, more)))

    @classmethod
    def of(cls, distribution: CPDistribution) -> Mixtures:
        """One run per entry of a distribution, its batch axes flattened."""
        rank = distribution.rank
        columns = torch.stack(list(distribution.factors), -3)  # (*batch, horizon, vocab, rank)
        factors = columns.reshape(-1, *columns.shape[-3:]).mT  # (runs, horizon, rank, vocab)
        return cls(distribution.weights.reshape(-1, rank), factors.contiguous())  # (runs, rank), …


@dataclass(frozen=True)
class Counts:
    """Expected component counts under the target, per unit of its mass.

    Attributes
    ----------
    weights : (runs, rank) tensor
        ``n_a = E_P[Q(a | x)]``.
    factors : (runs, horizon, rank, vocab) tensor
        ``N_i[a, v] = E_P[Q(a | x) 1(x_i = v)]``; sums to n_a over v.
    kl : (runs,) tensor
        ``KL(P || Q)`` in nats of the mixtures that were counted.
    """

    weights: Float[Tensor, "runs rank"]
    factors: Float[Tensor, "runs horizon rank vocab"]
    kl: Float[Tensor, " runs"]

    def __getitem__(self, index) -> Counts:
        return Counts(self.weights[index], self.factors[index], self.kl[index])

    def replaced(self, index: Tensor, other: Counts) -> Counts:
        """A copy with the runs at `index` (long or bool) taken from `other`."""
        return Counts(
            self.weights.index_put((index,), other.weights),  # (runs, rank)
            self.factors.index_put((index,), other.factors),  # (runs, horizon, rank, vocab)
            self.kl.index_put((index,), other.kl),  # (runs,)
        )


P = TypeVar("P", bound="Point")


@runtime_checkable
class Point(Protocol):
    """Where some runs are on their way down."""

    @property
    def values(self) -> Tensor:
        """Objective of each run, (runs,)."""
        ...

    def __getitem__(self: P, runs: Tensor) -> P: ...


@dataclass(frozen=True)
class Descent(Generic[P]):
    """Runs that went down until each stopped gaining or had taken all its passes.

    Attributes
    ----------
    ends : tuple of points
        Where the runs ended, those that ended together in one.
    order : (runs,) long tensor
        The place of each run in `ends` one after another.
    converged : (runs,) bool tensor
        Whether each stopped gaining.
    traces : tuple of lists of float
        Objective of each run after every pass.
    """

    ends: tuple[P, ...]
    order: Int[Tensor, " runs"]
    converged: Bool[Tensor, " runs"]
    traces: tuple[list[float], ...]


def descend(
    start: P,
    advance: Callable[[Tensor, P], tuple[P, list[int]]],
    *,
    max_passes: int,
    tolerance: float,
) -> Descent[P]:
    """Advance every run until it ends; what happens to one depends on no other.

    A run ends when ten passes have gained less than `tolerance` and less than a thousandth of a
    positive objective, or when it has taken `max_passes`; then it leaves the batch.

    Parameters
    ----------
    start : Point
    advance : callable
        ``(numbers of the runs, where they are) -> (where they are next, passes each took)``.
    max_passes : int
    tolerance : float
        In the objective's unit.
    """
    runs = len(start.values)
    alive = torch.arange(runs, device=start.values.device)  # (alive,)
    traces: tuple[list[float], ...] = tuple([] for _ in range(runs))
    converged = torch.zeros(runs, dtype=torch.bool, device=alive.device)
    point, spent = start, [1] * runs
    ends: list[P] = []
    left: list[Tensor] = []

    while len(alive):
        tracks = [traces[run] for run in alive.tolist()]
        for track, value, passes in zip(tracks, point.values.tolist(), spent, strict=True):
            track.extend([value] * passes)
        stopped = [_has_stopped(track, tolerance) for track in tracks]
        converged[alive] = torch.tensor(stopped, device=alive.device)
        over = [
            stop or len(track) > max_passes for stop, track in zip(stopped, tracks, strict=True)
        ]
        going = ~torch.tensor(over, device=alive.device)  # (alive,)

        if not bool(going.all()):
            ends.append(point[~going])
            left.append(alive[~going])
            alive, point = alive[going], point[going]  # those that go on
        if len(alive):
            point, spent = advance(alive, point)

    order = torch.cat(left).argsort()  # (runs,)
    return Descent(tuple(ends), order, converged, traces)


def _has_stopped(trace: list[float], tolerance: float) -> bool:
    """Whether the last ten passes gained too little."""
    if len(trace) <= _WINDOW:
        return False
    least = min(tolerance, max(_SHARE * trace[-1], _RESOLUTION)) if trace[-1] >= 0 else tolerance
    return trace[-_WINDOW - 1] - trace[-1] < least


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
    objective: Float[Tensor, " runs"]
    converged: Bool[Tensor, " runs"]
    iterations: Int[Tensor, " runs"]
    failures: tuple[str, ...]
    traces: tuple[tuple[float, ...], ...]
    raw: Float[Tensor, "runs 3"]

    @classmethod
    def of(cls, mixtures: Mixtures, objective: Tensor, converged: Tensor, traces) -> Runs:
        """Runs of a method that cannot fail and has no raw answer; traces begin at the start."""
        count = len(objective)
        return cls(
            mixtures,
            objective,
            converged,
            torch.tensor([len(trace) - 1 for trace in traces]),  # (runs,)
            ("",) * count,
            tuple(map(tuple, traces)),
            torch.full((count, 3), torch.nan, dtype=torch.float64),
        )

    def __getitem__(self, index: Tensor) -> Runs:
        """The runs at `index` (long)."""
        chosen = index.tolist()
        return Runs(
            self.mixtures[index],
            self.objective[index],
            self.converged[index],
            self.iterations[index],
            tuple(self.failures[run] for run in chosen),
            tuple(self.traces[run] for run in chosen),
            self.raw[index],
        )

    def of_width(self, width: int) -> Runs:
        """The same over so many places, see `Mixtures.of_width`."""
        return replace(self, mixtures=self.mixtures.of_width(width))

    @classmethod
    def joined(cls, parts: Sequence[Runs]) -> Runs:
        """All runs of several, one after another."""
        names = ("objective", "converged", "iterations", "raw")
        return cls(
            Mixtures.joined([part.mixtures for part in parts]),
            failures=tuple(failure for part in parts for failure in part.failures),
            traces=tuple(trace for part in parts for trace in part.traces),
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
        )

    def replaced(self, index: Tensor, other: Runs) -> Runs:
        """A copy with the runs at `index` (long) taken from `other`."""
        failures, traces = list(self.failures), list(self.traces)
        for place, failure, trace in zip(index.tolist(), other.failures, other.traces, strict=True):
            failures[place], traces[place] = failure, trace
        return Runs(
            self.mixtures.replaced(index, other.mixtures),
            self.objective.index_put((index,), other.objective),  # (runs,)
            self.converged.index_put((index,), other.converged),  # (runs,)
            self.iterations.index_put((index.cpu(),), other.iterations),  # (runs,)
            tuple(failures),
            tuple(traces),
            self.raw.index_put((index.cpu(),), other.raw),  # (runs, 3)
        )


@dataclass(frozen=True)
class Solved:
    """The best run of each joint beside all of them.

    Attributes
    ----------
    best : Runs
        One run per joint.
    objectives, matches : (items, restarts) tensor
        Of all runs: objectives, and match scores with the best one (NaN where a run failed).
    """

    best: Runs
    objectives: Float[Tensor, "items restarts"]
    matches: Float[Tensor, "items restarts"]

    @classmethod
    def of(cls, runs: Runs, runs_per_item: int) -> Solved:
        """The best of every `runs_per_item` consecutive runs."""
        objectives = runs.objective.reshape(-1, runs_per_item)  # (items, restarts)
        first = runs_per_item * torch.arange(len(objectives), device=objectives.device)
        chosen = first + objectives.argmin(1)  # (items,)
        return cls(runs[chosen], objectives, _match_scores(runs, chosen, runs_per_item))

    @classmethod
    def joined(cls, parts: Sequence[Solved], order: Int[Tensor, " items"], width: int) -> Solved:
        """Those of several groups of joints, widened to so many places, in another order."""
        return cls(
            Runs.joined([part.best.of_width(width) for part in parts])[order],
            torch.cat([part.objectives for part in parts])[order],  # (items, restarts)
            torch.cat([part.matches for part in parts])[order],  # (items, restarts)
        )


def factor_match_score(first: CPDistribution, second: CPDistribution) -> float:
    """How alike two fits are component by component.

    Mean over the best one-to-one matching of components of
    ``(1 - |w - v| / max(w, v)) prod_i cos(A_i, B_i)``: between 0 and 1, and 1 only for the same
    components up to their order. A fit whose restarts disagree has no components to interpret.

    Raises
    ------
    ValueError
        If shapes differ or there are batch axes.

    References
    ----------
    acar2011scalable

    Examples
    --------
    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    >>> dist = CPDistribution(half, [torch.eye(2, dtype=torch.float64)] * 2)
    >>> swapped = CPDistribution(half, [torch.eye(2, dtype=torch.float64).flip(1)] * 2)
    >>> factor_match_score(dist, swapped)
    1.0
    """
    shapes = [(tuple(d.batch_shape), d.rank, d.horizon, d.vocab_size) for d in (first, second)]
    if shapes[0] != shapes[1] or shapes[0][0]:
        raise ValueError(
            f"fits of (batch, rank, horizon, vocabulary) {shapes[0]} and {shapes[1]}: expected "
            "equal ones, no batch"
        )
    return _match_score(Mixtures.of(first), Mixtures.of(second))


def _match_scores(
    runs: Runs, chosen: Int[Tensor, " items"], runs_per_item: int
) -> Float[Tensor, "items restarts"]:
    """Of every run with its item's chosen one; NaN where a run failed."""
    scores = torch.full((len(chosen), runs_per_item), torch.nan, dtype=torch.float64)
    for item, best in enumerate(chosen.tolist()):
        for place in range(runs_per_item):
            run = item * runs_per_item + place
            if run == best:
                scores[item, place] = 1.0
            elif not runs.failures[run] and not runs.failures[best]:
                scores[item, place] = _match_score(runs.mixtures[[best]], runs.mixtures[[run]])
    return scores


def _match_score(first: Mixtures, second: Mixtures) -> float:
    """Of two single runs."""
    a, b = (
        mixture.factors[0] / mixture.factors[0].norm(dim=-1, keepdim=True)
        for mixture in (first, second)
    )  # (horizon, rank, vocab) each
    cosines = (a @ b.mT).prod(0)  # (rank, rank)

    w, v = first.weights[0][:, None], second.weights[0][None, :]  # (rank, 1), (1, rank)
    largest = torch.maximum(w, v)  # (rank, rank)
    similar = torch.where(largest > 0, 1 - (w - v).abs() / largest.clamp_min(1e-300), 1.0)

    table = (similar * cosines).cpu().numpy()  # (rank, rank)
    return float(table[linear_sum_assignment(table, maximize=True)].mean())
