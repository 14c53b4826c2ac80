"""From a plan to the best mixture of every joint: which starts are tried, which are kept, and on
which tokens a large joint is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.als import Solver, squared_error_runs
from cpmtp.decomposition.em import CountingTargets, Targets, em_runs, promising
from cpmtp.decomposition.gradient import Goal, acceptance_runs, gradient_runs
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.starts import (
    disturbed_marginals,
    fibre_starts,
    random_starts,
    stacked_marginals,
)
from cpmtp.joint_distribution import JointDistribution

SQUARED_ERROR_METHODS = ("als", "hals", "mu")
KL_METHODS = ("em", "gradient", "acceptance")
METHODS = (*SQUARED_ERROR_METHODS, *KL_METHODS)
# Starts tried for a few sweeps for each restart: the best of four ends 3 to 5 % lower (code and
# prose joints, ranks 4 to 32) for a third more sweeps. Half of them begin from marginals, half from
# fibres; sparse joints know no fibres.
_TRIALS = 4
# The rarest tokens are left out of the core as long as their probabilities at all positions sum to
# less than this share of the joint's entropy in nats: what is lost is small beside what there is to
# fit. On the embedded models' joints of three of 104 tokens half the tokens stay, with some 99.5 %
# of the mass, and a sweep costs a sixth.
_LOST_PER_NAT = 2e-3
# Below this many entries a sweep costs next to nothing, and a batch of whole joints is the faster
# way.
_CORE_FROM = 200_000


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
    goal : Goal
        Of ``acceptance``.
    """

    method: str
    restarts: int
    seed: int
    max_iterations: int
    tolerance: float
    load_balancing: float = 0.0
    goal: Goal = field(default_factory=Goal)


def solve(joint: JointDistribution, rank: int, plan: Plan, warm: Mixtures | None = None) -> Solved:
    """Fit every entry of a joint with one batch axis, from random starts and, if given, from one
    more start each.
    """
    if plan.method in SQUARED_ERROR_METHODS:
        solver = Solver(plan.method, plan.max_iterations, plan.tolerance)
        runs = squared_error_runs(joint, rank, solver, restarts=plan.restarts, seed=plan.seed)
        return Solved.of(runs, plan.restarts)
    targets, start, runs_per_item = _started(joint, rank, plan, warm)
    return Solved.of(_kl_runs(joint, targets, start, plan), runs_per_item)


def solve_counting(
    make_targets: Callable[[int], CountingTargets],
    marginals: Float[Tensor, "items horizon vocab"],
    rank: int,
    plan: Plan,
) -> Solved:
    """The same by ``em`` for targets that count for themselves: `make_targets` gives them for a
    number of runs per item.
    """
    trials = _trials(rank)
    targets = make_targets(plan.restarts * trials)
    starts = disturbed_marginals(marginals, rank, plan.restarts * trials, plan.seed)
    chosen, start = promising(targets, starts, trials)
    return Solved.of(_em(targets[chosen], start, plan), plan.restarts)


def _kl_runs(joint: JointDistribution, targets: Targets, start: Mixtures, plan: Plan) -> Runs:
    if plan.method == "gradient":
        return _gradient(targets, start, plan)
    if plan.method == "em":
        return _em(targets, start, plan)
    near = em_runs(
        targets, start, max_iterations=2 * plan.max_iterations, tolerance=plan.tolerance
    ).mixtures
    return acceptance_runs(
        joint,
        targets.owner,
        near,
        plan.goal,
        max_iterations=plan.max_iterations,
        tolerance=plan.tolerance,
    )


def _em(targets: Targets | CountingTargets, start: Mixtures, plan: Plan) -> Runs:
    return em_runs(targets, start, max_iterations=plan.max_iterations, tolerance=plan.tolerance)


def _gradient(targets: Targets, start: Mixtures, plan: Plan) -> Runs:
    return gradient_runs(
        targets,
        start,
        max_iterations=plan.max_iterations,
        tolerance=plan.tolerance,
        load_balancing=plan.load_balancing,
    )


def _started(
    joint: JointDistribution, rank: int, plan: Plan, warm: Mixtures | None
) -> tuple[Targets, Mixtures, int]:
    """Targets and a start for every run, and the number of runs per entry."""
    if joint.vocab_size**joint.horizon >= _CORE_FROM:
        parts = [
            _core_starts(Core.of(JointDistribution(probs)), rank, plan) for probs in joint.probs
        ]
        targets, start = Targets.of(joint, plan.restarts), Mixtures.joined(parts)
    else:
        targets, start = _selected(joint, rank, plan)
    if warm is None:
        return targets, start, plan.restarts
    runs = torch.arange(len(start), device=start.weights.device).reshape(-1, plan.restarts)
    runs = torch.cat([runs, runs[:, :1]], 1).flatten()  # (items * (restarts + 1),)
    both = _interleaved([start, warm], [plan.restarts, 1])
    return targets[runs], both, plan.restarts + 1


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
    return _interleaved(kinds, [half, half])


def _interleaved(kinds: list[Mixtures], counts: list[int]) -> Mixtures:
    """So many consecutive runs of each kind in turn."""

    def woven(values: list[Tensor]) -> Tensor:
        groups = [
            part.unflatten(0, (-1, count)) for part, count in zip(values, counts, strict=True)
        ]  # (groups, count, …) each
        return torch.cat(groups, 1).flatten(0, 1)  # (runs of all kinds, …)

    return Mixtures(
        woven([kind.weights for kind in kinds]), woven([kind.factors for kind in kinds])
    )


def _trials(rank: int) -> int:
    # With one component every start leads to the product of the marginals.
    return _TRIALS if rank > 1 else 1


@dataclass(frozen=True)
class Core:
    """A joint restricted to its noticeable tokens, and the way back.

    Attributes
    ----------
    joint : JointDistribution
        Over the kept tokens only, normalised; one batch axis of length 1.
    tokens : (kept,) long tensor
    marginals : (1, horizon, vocab) tensor
        Of the whole joint.
    """

    joint: JointDistribution
    tokens: Int[Tensor, " kept"]
    marginals: Float[Tensor, "1 horizon vocab"]

    @classmethod
    def of(cls, joint: JointDistribution) -> Core:
        """The core of a joint without batch axes."""
        marginals = stacked_marginals(joint)
        ascending, order = marginals[0].sum(0).sort()  # (vocab,), (vocab,)
        noticeable = ascending.cumsum(0) > _LOST_PER_NAT * joint.entropy()  # (vocab,)
        tokens = order[noticeable].sort().values  # (kept,)
        kept = joint.probs
        for axis in range(joint.horizon):
            kept = kept.index_select(axis, tokens)  # (kept, …, kept, vocab, …)
        return cls(JointDistribution((kept / kept.sum())[None], joint.horizon), tokens, marginals)

    def lifted(self, mixtures: Mixtures) -> Mixtures:
        """Mixtures over all tokens: each left-out token gets its marginal probability in every
        component.
        """
        runs, _, rank, _ = mixtures.factors.shape
        factors = self.marginals[:, :, None].expand(runs, -1, rank, -1).clone()  # (…, rank, vocab)
        mass = self.marginals[..., self.tokens].sum(-1)  # (1, horizon)
        factors[..., self.tokens] = mixtures.factors * mass[:, :, None, None]  # (…, rank, kept)
        return Mixtures(mixtures.weights, factors / factors.sum(-1, keepdim=True))


def _core_starts(core: Core, rank: int, plan: Plan) -> Mixtures:
    """The best starts on a joint's core, and on to convergence there: by gradients for `gradient`,
    otherwise by `em`.
    """
    targets, start = _selected(core.joint, rank, plan)
    run = _gradient if plan.method == "gradient" else _em
    return core.lifted(run(targets, start, plan).mixtures)
