"""From groups of joints to the best Markov mixture of each: starts, parents, cores, methods."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.descent.quasi_newton import Minima, minimise
from cpmtp.decomposition.forms import markov
from cpmtp.decomposition.forms.acceptance import climbed
from cpmtp.decomposition.forms.chains import PER_MEMBER, Chains, chains_of
from cpmtp.decomposition.forms.ends import Ends, Plans
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.forms.markov import Problem
from cpmtp.decomposition.forms.starts import (
    grown,
    lifted,
    one_chain,
    one_full_chain,
    repeated,
    split,
)
from cpmtp.decomposition.restarts import CORE_FROM, Plan, solve, solve_rank_one
from cpmtp.decomposition.trees.chains import tree_tokens_lost
from cpmtp.decomposition.trees.neighbours import TreeGroups

# Of an acceptance fit that a parent's beats: the share of its passes that it gets from there.
_SHARE_AGAIN = 4
# Splits tried for each restart of a joint without a core, and the passes each gets.
_TRIALS, _TRIAL_PASSES = 4, 20
# Passes on all tokens after those on the noticeable ones: one in so many.
_SHARE_ON_ALL = 4


@dataclass(frozen=True)
class Shape:
    """Which Markov mixtures are fitted.

    Attributes
    ----------
    rank : int
    width : int
        Transition rank; at the vocabulary's size or above every pair has a number of its own.
    gated : bool
        Whether every member scales the products of left and right factors.
    given : (left, right), optional
        Factors of others, (steps, vocab, width) and (steps, width, vocab), which stay as they are.
    """

    rank: int
    width: int
    gated: bool = False
    given: tuple[Tensor, Tensor] | None = None

    @property
    def contains_cp(self) -> bool:
        """Whether the transitions can vanish."""
        return self.given is None or self.gated

    def is_complete(self, vocab: int) -> bool:
        """Whether every pair of tokens has a number of its own."""
        return self.given is None and self.width >= vocab

    def is_closed(self, groups: Groups | TreeGroups) -> bool:
        """Whether the best chain is known: the conditionals of a single member."""
        return self.is_complete(groups.vocab) and groups.mass.shape[1] == 1 and self.rank == 1

    def free(self, vocab: int) -> tuple[str, ...]:
        """Names of what is fitted."""
        gate = ("gate",) if self.gated else ()
        if self.given is not None:
            return (*PER_MEMBER, *gate)
        return (*PER_MEMBER, *gate, "left") + (("right",) if self.width < vocab else ())

    def start(self, groups: Groups | TreeGroups) -> Chains:
        """One chain per group to begin from."""
        if self.given is None:
            return (
                one_full_chain(groups) if self.is_complete(groups.vocab) else self._padded(groups)
            )
        left, right = (part.to(groups.mass) for part in self.given)
        count, width = len(groups.mass), left.shape[-1]
        return replace(
            one_chain(groups, 1),
            gate=groups.mass.new_ones(*groups.mass.shape, groups.positions - 1, width),
            left=left.expand(count, *left.shape).contiguous(),
            right=right.expand(count, *right.shape).contiguous(),
        )

    def _padded(self, groups: Groups | TreeGroups) -> Chains:
        """Of the transition rank even where fewer tokens are left."""
        return _widened(one_chain(groups, self.width), self.width)

    def narrowed(self, tokens: Tensor) -> Shape:
        """The same over some of the tokens."""
        if self.given is None:
            return self
        left, right = self.given
        return replace(self, given=(left[..., tokens, :], right[..., tokens]))


def solve_markov(
    groups: Groups | TreeGroups, shape: Shape, plans: Plans, below: Ends | None = None
) -> Ends:
    """The best Markov mixture of every group; never worse than the forms it contains.

    A mixture begins from the chain of its transition rank, whose components are disturbed copies.
    Where the CP distribution of its rank, the chain itself, or `below` (a smaller mixture's answer)
    is better than what that leads to, it begins from there as well. Large groups begin on their
    noticeable tokens.

    Parameters
    ----------
    groups : Groups
    shape : Shape
    plans : Plans
    below : Ends, optional
        The answer at a smaller rank and the same transition rank.
    """
    if isinstance(groups, Groups) and len(groups.mass) > 1 and groups.probs[0].numel() >= CORE_FROM:
        rows = [torch.tensor([number]) for number in range(len(groups.mass))]
        parts = [
            solve_markov(groups[row], shape, plans, None if below is None else below[row])
            for row in rows
        ]
        return Ends.joined(parts)
    plan = plans.form if shape.rank > 1 else plans.chain
    by_kl = plan if plan.method != "acceptance" else replace(plan, method="em")
    if shape.rank == 1:
        near = _one_chain(groups, shape, by_kl)
    else:
        near = _mixture(groups, shape, by_kl, plans.chain)
    found = near if by_kl is plan else _run(groups, shape, near.found, plan)
    for parent in _parents(groups, shape, plans, found.objective, below):
        if bool((parent.objective < found.objective).any()):
            share = 1 if by_kl is plan else _SHARE_AGAIN
            again = replace(plan, max_iterations=plan.max_iterations // share)
            found = found.or_better(_run(groups, shape, parent.found, again))
        found = found.or_better(parent)
    return found


def _one_chain(groups: Groups | TreeGroups, shape: Shape, plan: Plan) -> Ends:
    """The best chain by the divergence: a complete one of a single member in closed form."""
    core = _core(groups, shape)
    if core is None:
        start = shape.start(groups)
        if not shape.is_closed(groups):
            return _run(groups, shape, start, plan)
        found = _run(groups, shape, start, replace(plan, max_iterations=0))
        return replace(found, converged=torch.ones_like(found.converged))
    tokens, some = core
    narrow = shape.narrowed(tokens)
    chains = _run(some, narrow, narrow.start(some), plan).found
    return _run(groups, shape, _lifted(chains, groups, tokens, shape), plan)


def _mixture(groups: Groups | TreeGroups, shape: Shape, plan: Plan, of_chain: Plan) -> Ends:
    """The best mixture by the divergence, from disturbed copies of a chain: where members share
    its transitions of one that is fitted to its end.
    """
    several = groups.mass.shape[1] > 1
    before = replace(of_chain, method=plan.method) if several else plan
    core = _core(groups, shape)
    if core is None:
        chain = _one_chain(groups, replace(shape, rank=1), before).found
        copies = split(chain, shape.rank, groups, plan.restarts * _TRIALS, plan.seed)
        brief = replace(plan, max_iterations=min(_TRIAL_PASSES, plan.max_iterations))
        tried = Ends.of(*_descended(groups, shape, copies, brief), _TRIALS)
        return _run(groups, shape, tried.found, plan)
    tokens, some = core
    narrow = shape.narrowed(tokens)
    single = replace(narrow, rank=1)
    chain = _run(some, single, single.start(some), before).found
    copies = split(chain, shape.rank, some, plan.restarts, plan.seed)
    chains = _run(some, narrow, copies, plan).found
    rest = replace(plan, max_iterations=plan.max_iterations // _SHARE_ON_ALL)
    return _run(groups, shape, _lifted(chains, groups, tokens, shape), rest)


def _core(groups: Groups | TreeGroups, shape: Shape) -> tuple[Tensor, Groups] | None:
    """The tokens that a large group is begun on, and the group over them."""
    if isinstance(groups, TreeGroups) or groups.probs.numel() < CORE_FROM:
        return None
    if shape.is_complete(groups.vocab):
        return None
    tokens = groups.noticeable
    return tokens, groups.narrowed(tokens)


def _lifted(chains: Chains, groups: Groups | TreeGroups, tokens: Tensor, shape: Shape) -> Chains:
    """What is known of some tokens as chains over all."""
    owner = torch.zeros(len(chains), dtype=torch.long, device=tokens.device)
    wide = _widened(lifted(chains, groups, owner, tokens), shape.width)
    if shape.given is None:
        return wide
    given = shape.start(groups)
    return replace(wide, left=given.left, right=given.right)


def _run(groups: Groups | TreeGroups, shape: Shape, start: Chains, plan: Plan) -> Ends:
    """The method's runs from `start`, the same number for each group in turn."""
    each = len(start) // len(groups.mass)
    return Ends.of(*_descended(groups, shape, start, plan), each)


def _descended(
    groups: Groups | TreeGroups, shape: Shape, start: Chains, plan: Plan
) -> tuple[Chains, Minima]:
    """Where all runs end."""
    each = len(start) // len(groups.mass)
    numbers = torch.arange(len(groups.mass), device=groups.mass.device)
    problem = Problem(groups, numbers.repeat_interleave(each), start, shape.free(groups.vocab))
    if plan.method == "acceptance" and isinstance(groups, TreeGroups):
        return _climbed_on_trees(groups, problem, start, plan)
    if plan.method == "acceptance":
        assert isinstance(groups, Groups)
        found = climbed(
            groups,
            problem.owner,
            plan.goal,
            lambda runs, x, members: problem.chains(runs, x).of_members(members).dense(),
            start.packed(problem.free),
            curvature=problem.curvature,
            max_passes=plan.max_iterations,
            tolerance=plan.tolerance,
        )
        return start.unpacked(found.points, problem.free), found
    method = markov.em if plan.method == "em" else markov.gradient
    return method(problem, max_passes=plan.max_iterations, tolerance=plan.tolerance)


def _climbed_on_trees(
    groups: TreeGroups, problem: Problem, start: Chains, plan: Plan
) -> tuple[Chains, Minima]:
    """Where runs by tokens per call end."""

    def evaluate(runs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = tree_tokens_lost(groups, problem.chains(runs, vectors), plan.goal)
        return value, slope.packed(problem.free)

    found = minimise(
        evaluate,
        start.packed(problem.free),
        curvature=problem.curvature,
        max_passes=plan.max_iterations,
        tolerance=plan.tolerance,
    )
    return start.unpacked(found.points, problem.free), found


def _parents(
    groups: Groups | TreeGroups,
    shape: Shape,
    plans: Plans,
    reached: Float[Tensor, " groups"],
    below: Ends | None,
) -> list[Ends]:
    """What the mixtures contain, fitted by the same method, written as mixtures of this shape.

    A chain is left out where what is `reached` is below all of them.
    """
    standing = replace(plans.form, max_iterations=0)
    found = []
    if shape.contains_cp:
        found.append(_run(groups, shape, _cp_parent(groups, shape, plans.cp), standing))
    beaten = plans.form.method != "acceptance" and bool((reached <= groups.chain_floor).all())
    if shape.rank > 1 and not beaten:
        one = solve_markov(groups, replace(shape, rank=1), plans).found
        found.append(_run(groups, shape, repeated(one, shape.rank), standing))
    if below is not None:
        chains = grown(below.found, shape.rank)
        found.append(_run(groups, shape, chains, standing))
    return found


def _cp_parent(groups: Groups | TreeGroups, shape: Shape, plan: Plan) -> Chains:
    """The CP distributions of the rank, as chains whose transitions do nothing."""
    items = groups.items
    if plan.method != "acceptance" and shape.rank == 1:
        mixtures = solve_rank_one(items).best.mixtures
    else:
        mixtures = solve(items, shape.rank, plan).best.mixtures
    start = shape.start(groups)
    owner = torch.arange(len(groups.mass), device=groups.mass.device)
    chains = chains_of(mixtures, groups, owner, start.left.shape[-1])
    if shape.given is not None:
        return replace(chains, gate=0 * chains.gate, left=start.left, right=start.right)
    return replace(chains, right=start.right)


def _widened(chains: Chains, width: int) -> Chains:
    """More left and right factors, the left ones zero, until there are `width`."""
    missing = width - chains.left.shape[-1]
    if missing <= 0:
        return chains
    runs, steps, vocab, _ = chains.left.shape
    generator = torch.Generator().manual_seed(width)
    more = torch.randn(steps, missing, vocab, generator=generator, dtype=torch.float64)
    more = more.to(chains.right).expand(runs, -1, -1, -1)  # (runs, steps, missing, vocab)
    return replace(
        chains,
        gate=torch.cat([chains.gate, chains.gate.new_ones(*chains.gate.shape[:3], missing)], -1),
        left=torch.cat([chains.left, chains.left.new_zeros(runs, steps, vocab, missing)], -1),
        right=torch.cat([chains.right, more], 2),  # (runs, steps, width, vocab)
    )
