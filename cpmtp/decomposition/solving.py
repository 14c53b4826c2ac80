"""From a plan to the best mixture of every joint: starts, the method's runs, and their spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpmtp.decomposition.acceptance_ascent import acceptance_runs
from cpmtp.decomposition.als import squared_error_runs
from cpmtp.decomposition.core import Core, has_core
from cpmtp.decomposition.em import em_runs, promising
from cpmtp.decomposition.expectation import CountingTargets, Mixtures, Targets, joined
from cpmtp.decomposition.gradient import gradient_runs
from cpmtp.decomposition.matching import run_match_scores
from cpmtp.decomposition.solution import Runs
from cpmtp.decomposition.starts import disturbed_marginals, fibre_starts, random_starts
from cpmtp.joint_distribution import JointDistribution

SQUARED_ERROR_METHODS = ("als", "hals", "mu")
KL_METHODS = ("em", "gradient", "acceptance")
METHODS = (*SQUARED_ERROR_METHODS, *KL_METHODS)
# Starts tried for a few sweeps for each restart: the best of four ends 3 to 5 % lower (code and
# prose joints, ranks 4 to 32) for a third more sweeps. Half of them begin from marginals, half from
# fibres; sparse joints know no fibres.
_TRIALS = 4


@dataclass(frozen=True)
class Plan:
    """How a joint is to be fitted.

    Attributes
    ----------
    method : str
    restarts, seed : int
    max_iterations : int
        Passes over the joint (TensorLy methods: outer iterations).
    tolerance : float
        Gain below which a run stops, in the objective's unit.
    load_balancing : float
        Of ``gradient``.
    rule, first_token : str
        Of ``acceptance``.
    """

    method: str
    restarts: int
    seed: int
    max_iterations: int
    tolerance: float
    load_balancing: float = 0.0
    rule: str = "block"
    first_token: str = "target"


@dataclass(frozen=True)
class Solved:
    """The best run of each joint, and objectives and match scores of all, (items, restarts)."""

    best: Runs
    objectives: Tensor
    matches: Tensor

    @classmethod
    def of(cls, runs: Runs, runs_per_item: int) -> Solved:
        """The best of every `runs_per_item` consecutive runs."""
        chosen = runs.best_of(runs_per_item)
        return cls(
            runs[chosen],
            runs.objective.reshape(-1, runs_per_item),
            run_match_scores(runs, chosen, runs_per_item),
        )


def solve(joint: JointDistribution, rank: int, plan: Plan, warm: Mixtures | None = None) -> Solved:
    """Fit every entry of a joint with one batch axis, from random starts and, if given, from one
    more start each.
    """
    if plan.method in SQUARED_ERROR_METHODS:
        runs = squared_error_runs(
            joint.probs,
            rank,
            plan.method,
            restarts=plan.restarts,
            seed=plan.seed,
            max_iterations=plan.max_iterations,
            tolerance=plan.tolerance,
        )
        return Solved.of(runs, plan.restarts)
    targets, start, runs_per_item = _started(joint, rank, plan, warm)
    return Solved.of(_kl_runs(joint, targets, start, plan), runs_per_item)


def solve_counting(make_targets, marginals: Tensor, rank: int, plan: Plan) -> Solved:
    """The same by ``em`` for targets that count for themselves: `make_targets` gives them for a
    number of runs per item.
    """
    trials = _trials(rank)
    targets: CountingTargets = make_targets(plan.restarts * trials)
    starts = disturbed_marginals(marginals, rank, plan.restarts * trials, plan.seed)
    chosen, start = promising(targets, starts, trials)
    runs = em_runs(
        targets[chosen], start, max_iterations=plan.max_iterations, tolerance=plan.tolerance
    )
    return Solved.of(runs, plan.restarts)


def _started(
    joint: JointDistribution, rank: int, plan: Plan, warm: Mixtures | None
) -> tuple[Targets, Mixtures, int]:
    """Targets and a start for every run, and the number of runs per entry."""
    if has_core(joint):
        parts = [
            _core_starts(Core.of(JointDistribution(probs)), rank, plan) for probs in joint.probs
        ]
        targets, start = Targets.of(joint, plan.restarts), joined(parts)
    else:
        targets, start = _selected(joint, rank, plan)
    if warm is None:
        return targets, start, plan.restarts
    runs = torch.arange(len(start), device=start.weights.device).reshape(-1, plan.restarts)
    runs = torch.cat([runs, runs[:, :1]], 1).flatten()
    return targets[runs], _interleaved(start, warm, plan.restarts), plan.restarts + 1


def _selected(joint: JointDistribution, rank: int, plan: Plan) -> tuple[Targets, Mixtures]:
    """The best of some random starts for each restart."""
    trials = _trials(rank)
    targets = Targets.of(joint, plan.restarts * trials)
    chosen, start = promising(targets, _tried(joint, rank, plan), trials)
    return targets[chosen], start


def _tried(joint: JointDistribution, rank: int, plan: Plan) -> Mixtures:
    """All starts, those of one restart of one entry consecutive."""
    if rank == 1:
        return random_starts(joint, rank, plan.restarts, plan.seed)
    half = _TRIALS // 2
    kinds = [
        make(joint, rank, plan.restarts * half, plan.seed) for make in (random_starts, fibre_starts)
    ]
    weights = torch.cat([kind.weights.unflatten(0, (-1, half)) for kind in kinds], 1).flatten(0, 1)
    return Mixtures(
        weights,
        torch.cat([kind.factors.unflatten(0, (-1, half)) for kind in kinds], 1).flatten(0, 1),
    )


def _core_starts(core: Core, rank: int, plan: Plan) -> Mixtures:
    """The same on a joint's core, and on to convergence there: by gradients for `gradient`,
    otherwise by `em`.
    """
    targets, start = _selected(core.joint, rank, plan)
    if plan.method == "gradient":
        return core.lifted(_gradient(targets, start, plan).mixtures)
    return core.lifted(
        em_runs(
            targets, start, max_iterations=plan.max_iterations, tolerance=plan.tolerance
        ).mixtures
    )


def _trials(rank: int) -> int:
    # With one component every start leads to the product of the marginals.
    return _TRIALS if rank > 1 else 1


def _interleaved(start: Mixtures, extra: Mixtures, restarts: int) -> Mixtures:
    """One extra run after each item's restarts."""

    def woven(values: Tensor, more: Tensor) -> Tensor:
        return torch.cat([values.unflatten(0, (-1, restarts)), more[:, None]], 1).flatten(0, 1)

    return Mixtures(woven(start.weights, extra.weights), woven(start.factors, extra.factors))


def _kl_runs(joint: JointDistribution, targets: Targets, start: Mixtures, plan: Plan) -> Runs:
    passes, tolerance = plan.max_iterations, plan.tolerance
    if plan.method == "gradient":
        return _gradient(targets, start, plan)
    if plan.method == "em":
        return em_runs(targets, start, max_iterations=passes, tolerance=tolerance)
    nearest = em_runs(targets, start, max_iterations=2 * passes, tolerance=tolerance)
    goal = (plan.rule, plan.first_token)
    return acceptance_runs(
        joint, targets.owner, nearest.mixtures, goal, max_iterations=passes, tolerance=tolerance
    )


def _gradient(targets: Targets, start: Mixtures, plan: Plan) -> Runs:
    return gradient_runs(
        targets,
        start,
        max_iterations=plan.max_iterations,
        tolerance=plan.tolerance,
        load_balancing=plan.load_balancing,
    )
