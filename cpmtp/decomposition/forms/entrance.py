"""The entrance to fits of the forms that are more than CP: from joints to distributions."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.fit_result import FitResult
from cpmtp.decomposition.forms.chains import IMPOSSIBLE, Chains
from cpmtp.decomposition.forms.ends import Ends, Plans
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.forms.hmm import solve_hidden
from cpmtp.decomposition.forms.solving import Shape, solve_markov
from cpmtp.decomposition.restarts import KL_METHODS, NOTICEABLE_MASS, Plan, noticed
from cpmtp.decomposition.starts import stacked_marginals
from cpmtp.decomposition.trees.forms import TreeForms
from cpmtp.decomposition.trees.neighbours import TreeGroups
from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.joint_distribution import JointDistribution
from cpmtp.prefix_tree import PrefixTree

FORMS = ("cp", "markov", "markov_mixture", "hmm")
FULL = "full"
# Logits up to this are of what a position never has.
_NEVER = IMPOSSIBLE / 2
# Passes over a joint: on its noticeable tokens where it is large (a quarter of them on all), and in
# all where it is small.
_PASSES = {"em": (20, 400), "gradient": (60, 1000), "acceptance": (80, 240)}
# A large joint's first tokens share much, and 20 passes end above their chain's divergence: three
# times as many do not.
_MORE_ANCHORED = 3
# One chain needs no walk over the joint: its passes are cheap.
_PASSES_OF_ONE = {"em": (100, 400), "gradient": (100, 1000), "acceptance": (80, 240)}
_SMALL_JOINT = 50_000
# Trees have no core: passes of a form, and of one chain.
_PASSES_ON_TREES = {"em": (60, 200), "gradient": (150, 300), "acceptance": (80, 80)}


@dataclass(frozen=True)
class Form:
    """What is asked for beside the rank.

    Attributes
    ----------
    name : str
    transition_rank : int or "full"
    gated : bool
    transitions : (left, right), optional
        Factors that stay as they are.
    """

    name: str = "cp"
    transition_rank: int | str = 0
    gated: bool = False
    transitions: tuple[Tensor, Tensor] | None = None

    def check(
        self, joint: JointDistribution | PrefixTree, rank: int, plan: Plan, anchored: bool
    ) -> None:
        """Refuse what means nothing.

        Raises
        ------
        ValueError
            With what was got, what was expected and what to do.
        """
        if self.name not in FORMS:
            raise ValueError(f"form {self.name!r}: expected one of {', '.join(FORMS)}")
        if not self.name.startswith("markov"):
            self._check_plain()
        if self.name == "cp":
            return
        if plan.method not in KL_METHODS:
            raise ValueError(
                f"method {plan.method!r} for form {self.name!r}: expected {', '.join(KL_METHODS)}"
            )
        if plan.load_balancing:
            raise ValueError(f"load_balancing for form {self.name!r}: only 'cp' has it; leave it 0")
        if self.name == "markov" and rank != 1:
            raise ValueError(
                f"rank {rank} for form 'markov': expected 1; of more components it is a "
                "'markov_mixture'"
            )
        if self.name.startswith("markov"):
            self._check_transitions(joint, anchored)

    def _check_plain(self) -> None:
        if self.transition_rank != 0 or self.gated or self.transitions is not None:
            raise ValueError(
                f"transitions for form {self.name!r}: it has none; leave transition_rank, gated "
                "and transitions out, or fit a 'markov_mixture'"
            )

    def _check_transitions(self, joint: JointDistribution | PrefixTree, anchored: bool) -> None:
        steps, vocab = joint.horizon - 1 - anchored, joint.vocab_size
        if self.transitions is not None:
            shapes = [tuple(part.shape) for part in self.transitions]
            k = shapes[0][-1] if shapes[0] else 0
            expected = [[(count, vocab, k), (count, k, vocab)] for count in sorted({1, steps})]
            if shapes not in expected or self.transition_rank not in (0, k):
                raise ValueError(
                    f"transitions of shapes {shapes} at transition_rank {self.transition_rank}: "
                    f"expected left (1 or {steps}, {vocab}, k) and right (1 or {steps}, k, {vocab})"
                )
            return
        width = self.transition_rank
        if width != FULL and (not isinstance(width, int) or width < 1):
            raise ValueError(
                f"transition_rank {width!r}: expected at least 1, or 'full'; without transitions "
                "the form is 'cp'"
            )
        if self.gated and (not anchored or self.width(vocab) == vocab):
            raise ValueError(
                "gated: gates say nothing beside left and right factors of a joint's own, unless "
                "several first tokens share them (anchored) and they are no full matrix; leave it "
                "out, or give transitions"
            )

    def width(self, vocab: int) -> int:
        """The transition rank as a number; none beyond the vocabulary says more."""
        if self.transitions is not None:
            return self.transitions[0].shape[-1]
        return vocab if isinstance(self.transition_rank, str) else min(self.transition_rank, vocab)

    def shape(self, rank: int, steps: int, vocab: int) -> Shape:
        """For the Markov forms."""
        given = None
        if self.transitions is not None:
            left, right = (part.expand(steps, -1, -1) for part in self.transitions)
            given = (left, right)  # (steps, vocab, width), (steps, width, vocab)
        return Shape(rank, self.width(vocab), self.gated, given)


def fit_form(
    joint: JointDistribution | PrefixTree,
    ranks: list[int],
    form: Form,
    plan: Plan,
    *,
    anchored: bool,
    effort: int | None,
) -> list[FitResult]:
    """One answer per rank, none worse than the one before.

    Parameters
    ----------
    effort : int, optional
        Most passes (default: by the method and the joint's size).
    """
    passes, single = _efforts(joint, plan.method, anchored)
    goal = replace(plan.goal, first_token="draft") if anchored else plan.goal
    # What a form contains is fitted as it would be by itself.
    of_cp = replace(plan, goal=goal)
    plans = Plans(
        replace(of_cp, max_iterations=passes if effort is None else effort),
        of_cp,
        replace(of_cp, max_iterations=single if effort is None else effort),
    )
    problem = problem_of(joint, anchored)
    results: list[FitResult] = []
    below: list[Ends] | None = None
    for rank in ranks:
        started = time.perf_counter()
        below = problem.solved(form, rank, plans, below)
        results.append(problem.result(below, form, plan.method, started))
    return results


def problem_of(
    joint: JointDistribution | PrefixTree, anchored: bool, least: float = NOTICEABLE_MASS
) -> FormProblem | TreeFormProblem:
    """What there is to fit of a joint or a tree; anchored, of first tokens of more than this."""
    if isinstance(joint, PrefixTree):
        return TreeFormProblem.of(joint, anchored, least)
    return FormProblem.of(joint, anchored, least)


def _efforts(joint: JointDistribution | PrefixTree, method: str, anchored: bool) -> tuple[int, int]:
    """Most passes of a form, and of one chain."""
    if isinstance(joint, PrefixTree):
        return _PASSES_ON_TREES[method]
    small = joint.vocab_size**joint.horizon <= _SMALL_JOINT
    more = _MORE_ANCHORED if anchored and not small and method == "em" else 1
    return more * _PASSES[method][small], _PASSES_OF_ONE[method][small]


@dataclass(frozen=True)
class FormProblem:
    """What is fitted of the caller's joints.

    Attributes
    ----------
    parts : tuple of Groups
        Not anchored: one, with a group for each joint. Anchored: one for each joint, whose group
        holds the continuations of its first tokens of noticeable mass.
    batch_shape : tuple of int
    first : (joints, vocab) tensor, optional
        Anchored only: probability of every first token.
    marginals : (joints, vocab, positions, vocab) tensor, optional
        Anchored only: of what follows every first token.
    least : float
        First tokens of no more than this are not fitted.
    """

    parts: tuple[Groups, ...]
    batch_shape: tuple[int, ...]
    first: Float[Tensor, "joints vocab"] | None = None
    marginals: Float[Tensor, "joints vocab positions vocab"] | None = None
    least: float = NOTICEABLE_MASS

    @property
    def groups(self) -> Groups:
        """Of a single joint."""
        return self.parts[0]

    @classmethod
    def of(
        cls, joint: JointDistribution, anchored: bool, least: float = NOTICEABLE_MASS
    ) -> FormProblem:
        """What there is to fit of a joint."""
        vocab, batch_shape = joint.vocab_size, tuple(joint.batch_shape)
        if not anchored:
            # (joints, 1, vocab, …)
            probs = joint.probs.double().reshape(-1, 1, *(vocab,) * joint.horizon)
            return cls((Groups(probs, probs.new_ones(len(probs), 1)),), batch_shape)
        given = joint.given_first_token()
        probs = given.probs.double().reshape(-1, vocab, *(vocab,) * given.horizon)
        first = joint.prefix_probs(1).double().reshape(-1, vocab)  # (joints, vocab)
        parts = []
        for row, mass in zip(probs, first, strict=True):
            some = noticed(mass, least)
            parts.append(Groups(row[some][None], (mass[some] / mass[some].sum())[None]))
        # (joints, vocab, horizon - 1, vocab)
        marginals = stacked_marginals(given).unflatten(0, first.shape)
        return cls(tuple(parts), batch_shape, first, marginals, least)

    def solved(self, form: Form, rank: int, plans: Plans, below: list[Ends] | None) -> list[Ends]:
        """The best of every part; of a hidden Markov form every first token is by itself."""
        found = []
        for number, groups in enumerate(self.parts):
            under = None if below is None else below[number]
            if form.name == "hmm":
                probs = groups.probs.flatten(0, 1)[:, None]  # (items, 1, vocab, …)
                alone = Groups(probs, probs.new_ones(len(probs), 1))
                found.append(solve_hidden(alone, rank, plans, under))
            else:
                shape = form.shape(rank, groups.positions - 1, groups.vocab)
                found.append(solve_markov(groups, shape, plans, under))
        return found

    def result(self, ends: list[Ends], form: Form, method: str, started: float) -> FitResult:
        """The answer to the caller."""
        if form.name == "hmm":
            draft: HMMDistribution | MarkovMixture = self._hidden(ends)
            if self.first is not None:
                pairs = zip(ends, self.parts, strict=True)
                ends = [_averaged(end, groups.mass[0]) for end, groups in pairs]
        else:
            draft = self._markov(ends, form)
        return FitResult.of_form(
            draft, Ends.joined(ends), method, batch_shape=self.batch_shape, started=started
        )

    def _markov(self, ends: list[Ends], form: Form) -> MarkovMixture:
        chains = [end.found for end in ends]
        own = form.transitions is None
        lead = self.batch_shape if self.first is None else (*self.batch_shape, self.first.shape[1])
        if self.first is not None and self.marginals is not None:
            chains = [
                _spread(chain, noticed(mass, self.least), marginals)
                for chain, mass, marginals in zip(chains, self.first, self.marginals, strict=True)
            ]
        every = Chains.joined(chains)  # a run per joint, its members the first tokens
        logits = torch.where(every.logits > _NEVER, every.logits, -torch.inf)
        left, right = every.left, every.right  # (joints, steps, …)
        if not own or not self.batch_shape:
            left, right = left[0], right[0]
        else:
            left, right = (self._own(part, lead) for part in (left, right))
        return MarkovMixture(
            every.weights.softmax(-1).reshape(*lead, -1),  # (*lead, rank)
            logits.reshape(*lead, *logits.shape[2:]),  # (*lead, positions, rank, vocab)
            left,
            right,
            every.gate.reshape(*lead, *every.gate.shape[2:]),  # (*lead, steps, width)
        )

    def _own(self, part: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Factors of every joint, the same for all its first tokens: (*lead, steps, …)."""
        each = part.reshape(*self.batch_shape, *part.shape[1:])  # (*batch_shape, …)
        if self.first is None:
            return each
        return each.unsqueeze(len(self.batch_shape)).expand(*lead, *part.shape[1:])  # (*lead, …)

    def _hidden(self, ends: list[Ends]) -> HMMDistribution:
        tables = [end.found.probs() for end in ends]  # weights, transitions, factors of items
        lead = self.batch_shape
        if self.first is not None and self.marginals is not None:
            lead = (*lead, self.first.shape[1])
            rows = zip(tables, self.first, self.marginals, strict=True)
            tables = [_filled(found, noticed(mass, self.least), rest) for found, mass, rest in rows]
        weights, transitions, factors = (torch.cat(same) for same in zip(*tables, strict=True))
        columns = [
            factor.mT.reshape(*lead, *factor.mT.shape[1:]).contiguous()  # (*lead, vocab, rank)
            for factor in factors.unbind(1)
        ]
        moves = transitions.reshape(*lead, *transitions.shape[1:])  # (*lead, steps, rank, rank)
        return HMMDistribution(weights.reshape(*lead, -1), moves, columns)


@dataclass(frozen=True)
class TreeFormProblem:
    """What is fitted of the caller's tree.

    Attributes
    ----------
    trees : TreeForms
    """

    trees: TreeForms

    @classmethod
    def of(
        cls, tree: PrefixTree, anchored: bool, least: float = NOTICEABLE_MASS
    ) -> TreeFormProblem:
        """What there is to fit of a tree."""
        return cls(TreeForms.of(tree, anchored, least))

    @property
    def groups(self) -> TreeGroups:
        """The trees that are fitted."""
        return self.trees.groups

    def solved(self, form: Form, rank: int, plans: Plans, below: list[Ends] | None) -> list[Ends]:
        """The best of the form."""
        groups, shape = self.trees.groups, None
        if form.name != "hmm":
            shape = form.shape(rank, groups.positions - 1, groups.forest.support.vocab_size)
        return [self.trees.solved(shape, rank, plans, None if below is None else below[0])]

    def result(self, ends: list[Ends], form: Form, method: str, started: float) -> FitResult:
        """The answer to the caller."""
        found = ends[0].found
        draft = self.trees.hidden(found) if form.name == "hmm" else self.trees.markov(found)
        pooled = self.trees.pooled(ends[0], method)
        return FitResult.of_form(draft, pooled, method, batch_shape=(), started=started)


def _spread(
    chains: Chains, some: Int[Tensor, " noticed"], marginals: Float[Tensor, "vocab positions vocab"]
) -> Chains:
    """Chains of some first tokens as chains of all: the others have their marginals' logits."""
    rank, width = chains.rank, chains.gate.shape[-1]
    vocab, positions, _ = marginals.shape
    weights = chains.weights.new_zeros(1, vocab, rank)
    rest = marginals.clamp_min(1e-300).log()  # (vocab, positions, vocab)
    logits = rest[None, :, :, None].expand(-1, -1, -1, rank, -1).clone()  # (1, …, rank, vocab)
    gate = chains.gate.new_ones(1, vocab, positions - 1, width)
    weights[:, some], logits[:, some], gate[:, some] = chains.weights, chains.logits, chains.gate
    return Chains(weights, logits, gate, chains.left, chains.right)


def _filled(
    tables: tuple[Tensor, Tensor, Tensor],
    some: Int[Tensor, " noticed"],
    marginals: Float[Tensor, "vocab positions vocab"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of some first tokens as tables of all: the others have their marginals."""
    weights, rank = tables[0], tables[0].shape[1]
    vocab, positions, _ = marginals.shape
    every = (
        weights.new_full((vocab, rank), 1 / rank),
        torch.eye(rank).to(weights).expand(vocab, positions - 1, rank, rank).clone(),
        marginals[:, :, None].expand(-1, -1, rank, -1).clone(),  # (vocab, positions, rank, vocab)
    )
    for table, found in zip(every, tables, strict=True):
        table[some] = found
    return every


def _averaged(ends: Ends, mass: Float[Tensor, " items"]) -> Ends:
    """One answer for a joint from those of its first tokens."""
    return Ends(
        ends.found[:1],
        (mass * ends.objective).sum()[None],
        ends.converged.all()[None],
        ((),),
        (mass[:, None] * ends.objectives).sum(0)[None],  # (1, starts)
    )
