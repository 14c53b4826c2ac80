"""Hidden Markov distributions, many at once: tables, expected counts, EM and L-BFGS, starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.descent.quasi_newton import Minima, minimise
from cpmtp.decomposition.descent.squarem import Sweeps, swept
from cpmtp.decomposition.forms.acceptance import climbed
from cpmtp.decomposition.forms.chains import LOWEST_LOGIT
from cpmtp.decomposition.forms.ends import Ends, Plans
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.forms.likelihood import HalvedTargets
from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.decomposition.restarts import CORE_FROM, Items, Plan, all_runs, solve
from cpmtp.decomposition.starts import disturbed_marginals
from cpmtp.decomposition.trees.hidden import HiddenTrees
from cpmtp.decomposition.trees.neighbours import TreeGroups

# What of its weight a state of a fit's start gives to the other states: exact zeros would stay.
_LEAK = 0.05
_LEAST_CURVATURE = 1e-8
# Random starts tried for each restart, and the sweeps each gets: of 20 planted distributions of
# four tokens and three states 19 are found by the best of 16, 13 from a CP fit alone. Large joints
# afford fewer.
_TRIALS, _FEWER_TRIALS, _TRIAL_SWEEPS = 16, 4, 20
# Logarithms of probabilities below e to this no longer matter to any sum of them.
_LOWEST = -600.0


@dataclass(frozen=True)
class Hidden:
    """Parameters of many hidden Markov distributions as logarithms, up to constants.

    Attributes
    ----------
    weights : (runs, rank) tensor
    transitions : (runs, steps, rank, rank) tensor
        From the state of position i (rows) to that of position i + 1.
    factors : (runs, positions, rank, vocab) tensor
    """

    weights: Float[Tensor, "runs rank"]
    transitions: Float[Tensor, "runs steps rank rank2"]
    factors: Float[Tensor, "runs positions rank vocab"]

    def __getitem__(self, index) -> Hidden:
        return Hidden(self.weights[index], self.transitions[index], self.factors[index])

    @classmethod
    def of(cls, mixtures: Mixtures, *, leak: float = _LEAK) -> Hidden:
        """CP distributions whose components change with a little probability."""
        rank, steps = mixtures.rank, mixtures.factors.shape[1] - 1
        lowest = math.exp(LOWEST_LOGIT)
        stay = torch.eye(rank).to(mixtures.weights)  # (rank, rank)
        moves = (1 - leak) * stay + leak / rank
        return cls(
            mixtures.weights.clamp_min(lowest).log(),  # (runs, rank)
            moves.log().expand(len(mixtures), steps, rank, rank),
            mixtures.factors.clamp_min(lowest).log(),  # (runs, positions, rank, vocab)
        )

    def __len__(self) -> int:
        return len(self.weights)

    @classmethod
    def joined(cls, parts: list[Hidden]) -> Hidden:
        """All runs of several, one after another."""
        return cls(*(torch.cat(same) for same in zip(*(p.parts for p in parts), strict=True)))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All parameters."""
        return self.weights, self.transitions, self.factors

    def packed(self) -> Float[Tensor, "runs size"]:
        """All parameters as one vector per run."""
        return torch.cat([part.flatten(1) for part in self.parts], 1)  # (runs, size)

    def unpacked(self, vectors: Float[Tensor, "runs size"]) -> Hidden:
        """Vectors as parameters of this one's shapes."""
        shapes = [part.shape[1:] for part in self.parts]
        parts = vectors.split([math.prod(shape) for shape in shapes], 1)
        shaped = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return Hidden(*shaped)

    def probs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, transitions and factors as probabilities, rows on the simplex."""
        weights, transitions, factors = (part.softmax(-1) for part in self.parts)
        return weights, transitions, factors

    def occupancy(self) -> Float[Tensor, "runs positions rank"]:
        """Probability of every state at every position."""
        weights, transitions, _ = self.probs()
        found = [weights.unsqueeze(1)]  # (runs, 1, rank)
        for step in range(transitions.shape[1]):
            found.append(found[-1] @ transitions[:, step])  # (runs, 1, rank)
        return torch.cat(found, 1)  # (runs, positions, rank)

    def spread(self) -> Float[Tensor, "runs size"]:
        """What a step in each parameter matters: the probability of what it is about."""
        weights, transitions, factors = self.probs()
        occupancy = self.occupancy().unsqueeze(-1)  # (runs, positions, rank, 1)
        moves, tokens = transitions * occupancy[:, :-1], factors * occupancy
        return Hidden(weights, moves, tokens).packed().clamp_min(_LEAST_CURVATURE)

    def dense(self) -> Float[Tensor, "runs 1 ..."]:
        """All probabilities, (runs, 1, vocab, …, vocab)."""
        weights, transitions, factors = self.probs()
        left, right = _halves(weights, transitions, factors)
        model = left.mT @ right  # (runs, 1, sequences before the cut, sequences after it)
        return model.reshape(len(weights), 1, *(factors.shape[-1],) * factors.shape[1])


@dataclass(frozen=True)
class HiddenCounts:
    """Expected counts under the target; those of every position sum to one.

    Attributes
    ----------
    weights : (runs, rank) tensor
    transitions : (runs, steps, rank, rank) tensor
        ``N_i(y, z)``.
    factors : (runs, positions, rank, vocab) tensor
        ``C_i(z, x)``.
    kl : (runs,) tensor
        Divergence in nats of what was counted.
    """

    weights: Float[Tensor, "runs rank"]
    transitions: Float[Tensor, "runs steps rank rank2"]
    factors: Float[Tensor, "runs positions rank vocab"]
    kl: Float[Tensor, " runs"]

    def __getitem__(self, index) -> HiddenCounts:
        parts = (self.weights, self.transitions, self.factors, self.kl)
        return HiddenCounts(*(part[index] for part in parts))


def hidden_counts(
    targets: HalvedTargets | HiddenTrees,
    owner: Int[Tensor, " runs"],
    hidden: Hidden,
    *,
    with_kl: bool = True,
) -> HiddenCounts:
    """The E step of every run: counts are parameters times their gradients of the log-likelihood.

    Forward ``f_i[x_1:i, z] = A_i(x_i, z) sum_y f_{i-1}[x_<i, y] T_i(z | y)`` up to the middle, the
    same backward from the end; the two halves are all that is as long as half a sequence's number
    of values. On trees along their paths.
    """
    tables = hidden.probs()
    leaves = [table.detach().requires_grad_() for table in tables]
    with torch.enable_grad():
        if isinstance(targets, HiddenTrees):
            kl = targets.divergence(leaves[0], leaves[1], leaves[2], owner)  # (runs,)
        else:
            kl = targets.divergence(*_halves(*leaves), owner, with_value=with_kl)  # (runs,)
    gradients = torch.autograd.grad(kl.sum(), leaves)
    found = (-table * slope for table, slope in zip(tables, gradients, strict=True))
    start, moves, tokens = found
    return HiddenCounts(start, moves, tokens, kl.detach())


def _halves(weights: Tensor, transitions: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Up to the middle and from there on, given the middle's state: (runs, 1, rank, sequences)."""
    positions = factors.shape[1]
    cut = positions // 2
    before = weights.unsqueeze(-1) * factors[:, 0]  # (runs, rank, vocab)
    for i in range(1, cut):
        moved = transitions[:, i - 1].mT @ before  # (runs, rank, sequences)
        before = (moved.unsqueeze(-1) * factors[:, i].unsqueeze(-2)).flatten(2)
    after = factors[:, -1]  # (runs, rank, vocab)
    for i in range(positions - 2, cut - 1, -1):
        moved = transitions[:, i] @ after  # (runs, rank, sequences)
        after = (factors[:, i].unsqueeze(-1) * moved.unsqueeze(-2)).flatten(2)
    after = transitions[:, cut - 1] @ after  # (runs, rank, sequences)
    return before.unsqueeze(1), after.unsqueeze(1)


def em(
    targets: HalvedTargets | HiddenTrees,
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
    targets: HalvedTargets | HiddenTrees,
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


def solve_hidden(
    groups: Groups | TreeGroups, rank: int, plans: Plans, below: Ends | None = None
) -> Ends:
    """The best hidden Markov distribution of every group, which has one member each, or of every
    tree.

    Up to three tokens it is the CP distribution of its rank. Beyond, every restart begins from a CP
    fit and from the best of some random starts, whose components change with probability 0.05; the
    CP distribution itself is the answer where nothing beats it.

    Parameters
    ----------
    plans : Plans
    below : Ends, optional
        The answer at a smaller rank.
    """
    plan, of_cp, items = plans.form, plans.cp, groups.items
    if groups.positions <= 3:
        best = solve(items, rank, of_cp).best
        found = Ends.standing(Hidden.of(best.mixtures, leak=0.0), best.objective)
        return found if below is None else found.or_better(_grown(below, rank))
    targets = _targets(groups)
    by_kl = plan if plan.method != "acceptance" else replace(plan, method="em")
    from_cp = all_runs(items, rank, replace(of_cp, method="em"))
    tried = _promising(targets, items, rank, by_kl)
    # (items, restarts of both kinds): those of one item consecutive
    both = Hidden.joined([Hidden.of(from_cp.mixtures), tried])
    # (both kinds of runs,)
    order = torch.arange(len(both)).reshape(2, len(items), -1).transpose(0, 1).flatten()
    near = _run(targets, groups, both[order], by_kl)
    found = near if by_kl is plan else _run(targets, groups, near.found, plan)

    cp = solve(items, rank, of_cp).best
    found = found.or_better(Ends.standing(Hidden.of(cp.mixtures, leak=0.0), cp.objective))
    return found if below is None else found.or_better(_grown(below, rank))


def _targets(groups: Groups | TreeGroups) -> HalvedTargets | HiddenTrees:
    """What the runs are fitted to."""
    if isinstance(groups, TreeGroups):
        return HiddenTrees(groups.forest)
    probs = groups.probs[:, 0]
    cut = groups.vocab ** (groups.positions // 2)
    # (items, 1, rows, columns)
    return HalvedTargets(probs.reshape(len(probs), 1, cut, -1), groups.negative_entropy)


def _grown(ends: Ends, rank: int) -> Ends:
    """The same distributions with states that are never visited, until there are `rank`."""
    weights, transitions, factors = ends.found.parts
    missing = rank - weights.shape[1]
    never = -torch.inf
    more = factors[:, :, :1].expand(-1, -1, missing, -1)  # (items, positions, missing, vocab)
    moves = torch.nn.functional.pad(transitions, (0, missing), value=never)
    again = moves[:, :, :1].expand(-1, -1, missing, -1)  # (items, steps, missing, rank)
    found = Hidden(
        torch.nn.functional.pad(weights, (0, missing), value=never),  # (items, rank)
        torch.cat([moves, again], 2),  # (items, steps, rank, rank)
        torch.cat([factors, more], 2),  # (items, positions, rank, vocab)
    )
    return replace(ends, found=found)


def _promising(targets: HalvedTargets | HiddenTrees, items: Items, rank: int, plan: Plan) -> Hidden:
    """The best of some random starts for each restart, a few sweeps on."""
    trials = _TRIALS if targets.entries < CORE_FROM else _FEWER_TRIALS
    disturbed = disturbed_marginals(items.marginals, rank, plan.restarts * trials, plan.seed)
    starts = Hidden.of(disturbed)
    owner = items.owners(len(starts))
    tried, found = em(targets, owner, starts, max_passes=_TRIAL_SWEEPS, tolerance=0.0)
    groups = found.values.reshape(-1, trials)  # (items * restarts, trials)
    return tried[groups.argmin(1) + trials * torch.arange(len(groups), device=owner.device)]


def _run(
    targets: HalvedTargets | HiddenTrees, groups: Groups | TreeGroups, start: Hidden, plan: Plan
) -> Ends:
    """The method's runs from `start`, the same number for each item in turn."""
    owner = groups.items.owners(len(start))
    each = len(start) // len(groups.items)
    passes, tolerance = plan.max_iterations, plan.tolerance
    if plan.method != "acceptance":
        method = em if plan.method == "em" else gradient
        hidden, minima = method(targets, owner, start, max_passes=passes, tolerance=tolerance)
        return Ends.of(hidden, minima, each)

    def spread(_: Tensor, vectors: Tensor) -> Tensor:
        return start.unpacked(vectors).spread()

    def evaluate(runs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        vectors = vectors.detach().requires_grad_()
        assert isinstance(targets, HiddenTrees)
        lost = targets.tokens_lost(*start.unpacked(vectors).probs(), owner[runs], plan.goal)
        if not lost.requires_grad:  # one token that the target gives: nothing is drafted
            return lost, torch.zeros_like(vectors)
        return lost.detach(), torch.autograd.grad(lost.sum(), vectors)[0]

    if isinstance(groups, TreeGroups):
        minima = minimise(
            evaluate, start.packed(), curvature=spread, max_passes=passes, tolerance=tolerance
        )
    else:
        minima = climbed(
            groups,
            owner,
            plan.goal,
            lambda _, vectors, members: start.unpacked(vectors).dense(),
            start.packed(),
            curvature=spread,
            max_passes=passes,
            tolerance=tolerance,
        )
    return Ends.of(start.unpacked(minima.points), minima, each)
