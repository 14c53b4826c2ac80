"""From a plan to the best mixture of every joint: which starts are tried, which are kept, and on
which tokens a large joint is begun.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.als import Solver, squared_error_runs
from cpmtp.decomposition.descent.em import (
    CountingTargets,
    Targets,
    em_runs,
    expected_counts,
    promising,
)
from cpmtp.decomposition.descent.gradient import (
    Goal,
    acceptance_runs,
    gradient_runs,
    tree_acceptance_runs,
)
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.starts import (
    disturbed_marginals,
    doubled,
    fibre_starts,
    grown,
    repeated_marginals,
    stacked_marginals,
)
from cpmtp.decomposition.trees.starts import tree_fibre_starts
from cpmtp.decomposition.trees.targets import TreeTargets
from cpmtp.joint_distribution import JointDistribution
from cpmtp.prefix_tree import PrefixTree

SQUARED_ERROR_METHODS = ("als", "hals", "mu")
KL_METHODS = ("em", "gradient", "acceptance")
METHODS = (*SQUARED_ERROR_METHODS, *KL_METHODS)
# Most passes over the joint (TensorLy methods: outer iterations) and the gain below which a run
# stops.
_DEFAULT_EFFORT = {
    "als": (50, 1e-6),
    "hals": (50, 1e-6),
    "mu": (100, 1e-6),
    "em": (200, 1e-4),
    "gradient": (200, 1e-4),
    "acceptance": (80, 1e-4),
}
# Joints up to this many entries are cheap: more passes are allowed.
_SMALL_JOINT = 50_000
_MORE_PASSES = {"em": 10, "acceptance": 3}
# Starts tried for a few sweeps for each restart: the best of four ends 3 to 5 % lower (code and
# prose joints, ranks 4 to 32) for a third more sweeps. Half of them begin from marginals, half from
# fibres.
_TRIALS = 4
# The rarest tokens are left out of the core as long as their probabilities at all positions sum to
# less than this share of the joint's entropy in nats: what is lost is small beside what there is to
# fit. On the embedded models' joints of three of 104 tokens half the tokens stay, with some 99.5 %
# of the mass, and a sweep costs a sixth.
_LOST_PER_NAT = 2e-3
# A fit by tokens per call that begins from a given fit takes one in so many of its passes on all
# tokens: 80 on the core and then 20 reach what 80 on all tokens reach, in half the time (three
# tokens, ranks 1 to 32: at most 0.0036 tokens per call less on average of a rank).
_SHARE_ON_ALL = 4
# Components of less mass on a core than this are of its rare tokens: what they weigh there says
# little of what they weigh.
_LEAST_KEPT = 1e-6
# First tokens below this probability get the product of their marginals in an anchored fit: all
# together they cannot change tokens per call in its fifth digit.
NOTICEABLE_MASS = 1e-8
# Below this many entries a sweep costs next to nothing, and a batch of whole joints is the faster
# way.
CORE_FROM = 200_000


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


def planned(
    joint: JointDistribution | PrefixTree,
    method: str,
    *,
    max_iterations: int | None,
    tolerance: float | None,
    restarts: int,
    seed: int,
) -> Plan:
    """A method's plan with the defaults for a joint of this size filled in.

    Raises
    ------
    ValueError
        If the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    passes, gain = _DEFAULT_EFFORT[method]
    more = _MORE_PASSES.get(method, 1) if joint.vocab_size**joint.horizon <= _SMALL_JOINT else 1
    return Plan(
        method,
        restarts,
        seed,
        passes * more if max_iterations is None else max_iterations,
        gain if tolerance is None else tolerance,
    )


@dataclass(frozen=True)
class Items:
    """What is fitted, made ready once for all ranks and restarts.

    Attributes
    ----------
    joints : JointDistribution or TreeTargets
        Dense ones along one batch axis.
    on_cores : bool
        Whether large dense ones are begun on their cores.
    """

    joints: JointDistribution | TreeTargets
    on_cores: bool = True

    def __len__(self) -> int:
        joints = self.joints
        return len(joints.forest if isinstance(joints, TreeTargets) else joints.probs)

    def owners(self, runs: int) -> Int[Tensor, " runs"]:
        """The item of each of so many runs, those of one item consecutive."""
        numbers = torch.arange(len(self), device=self.marginals.device)  # (items,)
        return numbers.repeat_interleave(runs // len(self))  # (runs,)

    @property
    def dense(self) -> JointDistribution:
        """The joints, which must be dense."""
        assert isinstance(self.joints, JointDistribution)
        return self.joints

    @cached_property
    def targets(self) -> Targets | CountingTargets:
        """One run per item."""
        joints = self.joints
        return joints if isinstance(joints, TreeTargets) else Targets.of(joints)

    @cached_property
    def marginals(self) -> Float[Tensor, "items horizon vocab"]:
        """The distribution of each position."""
        joints = self.joints
        if isinstance(joints, TreeTargets):
            return joints.forest.marginals
        return stacked_marginals(joints)

    @cached_property
    def cores(self) -> tuple[Core, ...]:
        """Of large dense items, one each; of others none."""
        joints = self.joints
        if isinstance(joints, TreeTargets) or not self.on_cores:
            return ()
        if joints.vocab_size**joints.horizon < CORE_FROM:
            return ()
        return tuple(Core.of(JointDistribution(probs)) for probs in joints.probs)

    def starts(self, rank: int, restarts: int, seed: int) -> tuple[Mixtures, int]:
        """Random starts, those of one restart of one item consecutive, and how many these are."""
        # With one component every start leads to the product of the marginals.
        trials = _TRIALS if rank > 1 else 1
        if trials == 1:
            return disturbed_marginals(self.marginals, rank, restarts * trials, seed), trials

        half = trials // 2
        broad = disturbed_marginals(self.marginals, rank, restarts * half, seed)
        if isinstance(self.joints, TreeTargets):
            peaked = tree_fibre_starts(self.joints.forest, rank, restarts * half, seed)
        else:
            peaked = fibre_starts(self.joints, rank, restarts * half, seed)

        def woven(first: Tensor, second: Tensor) -> Tensor:
            groups = [part.unflatten(0, (-1, half)) for part in (first, second)]  # (…, half, …)
            return torch.cat(groups, 1).flatten(0, 1)  # (items * restarts * trials, …)

        factors = woven(broad.factors, peaked.factors)
        return Mixtures(woven(broad.weights, peaked.weights), factors), trials


def solve(items: Items, rank: int, plan: Plan) -> Solved:
    """Fit every item from random starts."""
    return Solved.of(all_runs(items, rank, plan), plan.restarts)


def all_runs(items: Items, rank: int, plan: Plan) -> Runs:
    """Every restart of every item, those of one item consecutive."""
    if plan.method in SQUARED_ERROR_METHODS:
        solver = Solver(plan.method, plan.max_iterations, plan.tolerance)
        restarts, seed = plan.restarts, plan.seed
        return squared_error_runs(items.dense, rank, solver, restarts=restarts, seed=seed)

    if items.cores:
        parts = [
            core.lifted(_run(core.items, _promising(core.items, rank, plan), _near(plan)).mixtures)
            for core in items.cores
        ]
        start = Mixtures.joined(parts)
    else:
        start = _promising(items, rank, plan)
    if plan.method == "acceptance":
        start = _run(items, start, _near(plan, passes=2)).mixtures
    return _run(items, start, plan)


def solve_rank_one(items: Items) -> Solved:
    """The least divergence of one component: the product of the marginals, without a search."""
    product = repeated_marginals(items.marginals, 1)
    kl = expected_counts(items.targets, product).kl  # (items,)
    found = torch.ones_like(kl, dtype=torch.bool)
    return Solved.of(Runs.of(product, kl, found, [[value] for value in kl.tolist()]), 1)


def climb(items: Items, start: Mixtures, plan: Plan) -> Solved:
    """Fit every item by tokens per call from one given start each, never to end below it.

    Large joints climb on their cores, and then for a quarter of the passes on all tokens.
    """
    if not items.cores:
        return Solved.of(_run(items, start, plan), 1)
    parts = []
    for item, core in enumerate(items.cores):
        wide = start[item : item + 1]
        parts.append(core.lifted(_run(core.items, core.narrowed(wide), plan).mixtures, wide))
    climbed = Mixtures.joined(parts)
    standing = replace(plan, max_iterations=0)
    before, after = (_run(items, here, standing).objective for here in (start, climbed))
    gained = (after < before).nonzero().squeeze(1)  # (gained,)
    begin = start.replaced(gained, climbed[gained])
    rest = replace(plan, max_iterations=plan.max_iterations // _SHARE_ON_ALL)
    return Solved.of(_run(items, begin, rest), 1)


def not_above(items: Items, solved: Solved, below: Runs, plan: Plan) -> Solved:
    """Fits of one rank, none of them worse than those of a lower rank.

    Where random starts end above the lower rank, its fit with the heaviest components split is one
    more start. Should it end above it, too, the lower rank's fit is kept, some components counted
    twice.
    """
    best, rank = solved.best, solved.best.mixtures.rank
    worse = (best.objective > below.objective).nonzero().squeeze(1)  # (worse,)
    if not len(worse):
        return solved
    kept = replace(below, mixtures=doubled(below.mixtures, rank))[worse]
    warm = _run(items, grown(below.mixtures[worse], rank, plan.seed), plan, worse)
    gained = (warm.objective < kept.objective).nonzero().squeeze(1)
    return replace(solved, best=best.replaced(worse, kept.replaced(gained, warm[gained])))


def _promising(items: Items, rank: int, plan: Plan) -> Mixtures:
    """The best of some random starts for each restart, a few sweeps on."""
    starts, trials = items.starts(rank, plan.restarts, plan.seed)
    return promising(items.targets.for_runs(items.owners(len(starts))), starts, trials)


def _near(plan: Plan, passes: int = 1) -> Plan:
    """How a fit by tokens per call is prepared: by `em`; other methods by themselves."""
    if plan.method != "acceptance":
        return plan
    return replace(plan, method="em", max_iterations=passes * plan.max_iterations)


def _run(items: Items, start: Mixtures, plan: Plan, owner: Tensor | None = None) -> Runs:
    """The method's runs from `start`: as many for each item in turn, or one for each in `owner`."""
    owner = items.owners(len(start)) if owner is None else owner
    passes, tolerance = plan.max_iterations, plan.tolerance
    targets = items.targets.for_runs(owner)
    if plan.method == "acceptance" and isinstance(targets, TreeTargets):
        return tree_acceptance_runs(
            targets, start, plan.goal, max_iterations=passes, tolerance=tolerance
        )
    if plan.method == "acceptance":
        return acceptance_runs(
            items.dense, owner, start, plan.goal, max_iterations=passes, tolerance=tolerance
        )
    if plan.method == "em":
        return em_runs(targets, start, max_iterations=passes, tolerance=tolerance)
    return gradient_runs(
        targets,
        start,
        max_iterations=passes,
        tolerance=tolerance,
        load_balancing=plan.load_balancing,
    )


def noticed(
    first: Float[Tensor, "*joints vocab"], least: float = NOTICEABLE_MASS
) -> Int[Tensor, " items"]:
    """Numbers of the first tokens that are fitted, over all joints."""
    return (first.reshape(-1) > least).nonzero().squeeze(1)  # (items,)


def noticeable_tokens(
    marginals: Float[Tensor, "horizon vocab"], entropy: Float[Tensor, ""]
) -> Int[Tensor, " kept"]:
    """All tokens but the rarest, whose loss is small beside the joint's entropy in nats."""
    ascending, order = marginals.sum(0).sort()  # (vocab,), (vocab,)
    noticeable = ascending.cumsum(0) > _LOST_PER_NAT * entropy  # (vocab,)
    return order[noticeable].sort().values  # (kept,)


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
        tokens = noticeable_tokens(marginals[0], joint.entropy())  # (kept,)
        kept = joint.probs
        for axis in range(joint.horizon):
            kept = kept.index_select(axis, tokens)  # (kept, …, kept, vocab, …)
        return cls(JointDistribution((kept / kept.sum())[None], joint.horizon), tokens, marginals)

    @cached_property
    def items(self) -> Items:
        """The core by itself."""
        return Items(self.joint, on_cores=False)

    def narrowed(self, mixtures: Mixtures) -> Mixtures:
        """What mixtures over all tokens say of the kept ones."""
        kept = mixtures.factors[..., self.tokens]  # (runs, horizon, rank, kept)
        mass = kept.sum(-1, keepdim=True)  # (runs, horizon, rank, 1)
        marginals = self.items.marginals[:, :, None]  # (1, horizon, 1, kept)
        factors = torch.where(mass > 0, kept / torch.where(mass > 0, mass, 1.0), marginals)
        weights = mixtures.weights * mass.squeeze(-1).prod(1)  # (runs, rank)
        return Mixtures(weights / weights.sum(-1, keepdim=True), factors)

    def lifted(self, mixtures: Mixtures, wide: Mixtures | None = None) -> Mixtures:
        """Mixtures over all tokens: the left-out ones keep the probabilities that they have in
        `wide`, from which the mixtures were narrowed; without it, every component gets their
        marginals.
        """
        runs, _, rank, _ = mixtures.factors.shape
        marginals = self.marginals[:, :, None].expand(runs, -1, rank, -1)  # (…, rank, vocab)
        factors = (marginals if wide is None else wide.factors).clone()
        mass = factors[..., self.tokens].sum(-1, keepdim=True)  # (runs, horizon, rank, 1)
        factors[..., self.tokens] = mixtures.factors * mass  # (runs, horizon, rank, kept)
        factors = factors / factors.sum(-1, keepdim=True)
        if wide is None:
            return Mixtures(mixtures.weights, factors)
        weights = mixtures.weights / mass.squeeze(-1).prod(1).clamp_min(_LEAST_KEPT)  # (runs, rank)
        return Mixtures(weights / weights.sum(-1, keepdim=True), factors)
