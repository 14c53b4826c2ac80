"""The one entrance to every fit: `fit(joint, rank, method)`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.descent.gradient import Goal
from cpmtp.decomposition.fit_result import FitResult, pooled
from cpmtp.decomposition.forms.entrance import Form, fit_form
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.restarts import (
    KL_METHODS,
    NOTICEABLE_MASS,
    Items,
    Plan,
    climb,
    not_above,
    noticed,
    planned,
    solve,
    solve_rank_one,
)
from cpmtp.decomposition.starts import repeated_marginals, stacked_marginals
from cpmtp.decomposition.trees.problem import TreeProblem, groups_by_width, solved_apart
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.prefix_tree import PrefixTree


@takes_what_is_given
def fit(
    joint: JointDistribution | PrefixTree,
    rank: int,
    method: str = "em",
    *,
    form: str = "cp",
    transition_rank: int | str = 0,
    gated: bool = False,
    transitions: tuple[Tensor, Tensor] | None = None,
    restarts: int = 1,
    seed: int = 0,
    anchored: bool = False,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    load_balancing: float = 0.0,
    rule: str = "block",
    first_token: str = "target",
) -> FitResult:
    """Fit a draft of the given form and rank to a joint distribution.

    The answer is never worse than that of the forms it contains with the same seed and one restart:
    a Markov mixture contains the CP distribution of its rank and the chain of its transition rank,
    a hidden Markov distribution the CP distribution.

    Parameters
    ----------
    joint : JointDistribution or PrefixTree
        With batch axes, every entry is fitted by itself in one go. To a tree ``em``, ``gradient``
        and ``acceptance`` fit over the ids that it keeps: of a complete one what they would fit to
        the dense joint; of a truncated one the objective is a lower bound of ``KL(P || Q)``, or of
        tokens per call.
    rank : int
        Number of components; 1 for ``markov``.
    method : {"em", "gradient", "acceptance", "als", "hals", "mu"}
        ``em`` and ``gradient`` minimise ``KL(P || Q)`` in nats, ``acceptance`` minus the tokens per
        call (from an ``em`` fit, and never worse than it), the others the squared error (``cp``
        only).
    form : {"cp", "markov", "markov_mixture", "hmm"}
    transition_rank : int or "full"
        Of the Markov forms: the rank of what a token's logits owe to the one before.
    gated : bool
        Anchored Markov forms: left and right factors are always shared by the first tokens of a
        joint; True lets each scale their products by a gate of its own. Not anchored, a joint has
        factors of its own, and a gate says nothing.
    transitions : (left, right), optional
        Markov forms: factors from elsewhere, (horizon - 1 or 1, vocab, k) and (horizon - 1 or 1, k,
        vocab), anchored one position fewer. They stay as they are; `gated` then says whether the
        gates are fitted.
    restarts : int
        The best answer is returned. For all but the squared-error methods each restart is the best
        of four random starts after twelve sweeps of ``em``; large joints are fitted on their
        noticeable tokens first.
    seed : int
        Restart k begins at the same point whatever the number of restarts and the batch.
    anchored : bool
        Fit the remaining n-1 tokens for every first token of noticeable mass (the product of their
        marginals otherwise): n of at least 3.
    max_iterations : int, optional
        Most passes over the joint (TensorLy methods: outer iterations).
    tolerance : float, optional
        ``em``, ``gradient``: gain in nats over ten passes below which a run stops; ``acceptance``:
        the same in tokens per call; others: TensorLy's ``tol``.
    load_balancing : float
        ``gradient`` only: strength of a pull towards equal weights.
    rule, first_token : str
        ``acceptance`` only: what tokens per call are counted under, as for `implied_acceptance`.

    Raises
    ------
    ValueError
        If rank or restarts is below 1, the method, rule or first token is unknown, or a horizon
        below 3 is to be fitted anchored.

    Examples
    --------
    >>> import torch
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> joint = exact_joint(separated_hmm(2, 6), [], 3)
    >>> result = fit(joint, rank=2)
    >>> result.status, result.objective < 1e-6
    ('ok', True)
    """
    plan = planned(
        joint,
        method,
        max_iterations=max_iterations,
        tolerance=tolerance,
        restarts=restarts,
        seed=seed,
    )
    plan = replace(plan, load_balancing=load_balancing, goal=Goal(rule, first_token))
    asked = Form(form, transition_rank, gated, transitions)
    _check(joint, rank, plan, anchored, asked)
    if form != "cp":
        return fit_form(joint, [rank], asked, plan, anchored=anchored, effort=max_iterations)[0]
    started = time.perf_counter()
    problem = _problem(joint, anchored, rank)
    own = problem.plan(plan)
    groups = groups_by_width(problem.items)
    solved = solved_apart(groups, lambda items, *_: solve(items, rank, own))
    return problem.result(solved, method, started)


@takes_what_is_given
def fit_path(
    joint: JointDistribution | PrefixTree,
    ranks: Sequence[int],
    method: str = "em",
    *,
    form: str = "cp",
    transition_rank: int | str = 0,
    gated: bool = False,
    transitions: tuple[Tensor, Tensor] | None = None,
    restarts: int = 1,
    seed: int = 0,
    anchored: bool = False,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    rule: str = "block",
    first_token: str = "target",
    starts: Sequence[FitResult] | None = None,
) -> tuple[FitResult, ...]:
    """One fit per rank in increasing order; the objective never rises with the rank.

    ``em`` and ``gradient`` begin every rank from the random starts that `fit` begins from, and
    ``acceptance`` from the ``em`` fit of the same rank. Where that ends above the rank below, the
    fit of the rank below with its heaviest components split is one more start; should this end
    above it, too, that fit is kept, some of its components counted twice.

    Parameters
    ----------
    joint, method, form, transition_rank, gated, transitions, restarts, seed, anchored
        As for `fit`; forms of more than one component only.
    max_iterations, tolerance, rule, first_token
        As for `fit`; methods ``em``, ``gradient`` and ``acceptance`` only.
    ranks : sequence of int
        Sorted and without repetition in the answer.
    starts : sequence of FitResult, optional
        ``acceptance`` of form ``cp`` only: fits of the same joint at the same ranks to begin from,
        in increasing order (default: a path of ``em``, whose time is counted).

    Raises
    ------
    ValueError
        As for `fit`, or if there are no ranks, the method cannot begin from a fit, or `starts`
        are of other ranks.

    Examples
    --------
    >>> import torch
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> joint = exact_joint(separated_hmm(3, 6), [], 3)
    >>> one, two, three = fit_path(joint, [1, 2, 3])
    >>> one.objective > two.objective > three.objective
    True
    """
    if method not in KL_METHODS:
        raise ValueError(
            f"method {method!r}: a path needs one that can start from a fit: "
            f"{', '.join(KL_METHODS)}"
        )
    if not ranks:
        raise ValueError("no ranks: expected at least one")
    plan = planned(
        joint,
        method,
        max_iterations=max_iterations,
        tolerance=tolerance,
        restarts=restarts,
        seed=seed,
    )
    plan = replace(plan, goal=Goal(rule, first_token))
    ranks = sorted(set(ranks))
    asked = Form(form, transition_rank, gated, transitions)
    _check(joint, ranks[0], plan, anchored, asked)
    _check(joint, ranks[-1], plan, anchored, asked)
    if starts is not None and (method != "acceptance" or form != "cp"):
        raise ValueError(
            f"starts for {method!r} of form {form!r}: only 'acceptance' of 'cp' begins from fits"
        )
    if form != "cp":
        found = fit_form(joint, ranks, asked, plan, anchored=anchored, effort=max_iterations)
        return tuple(found)
    given = starts is not None
    if method == "acceptance" and starts is None:
        starts = fit_path(joint, ranks, restarts=restarts, seed=seed, anchored=anchored)
    if starts is not None and [start.distribution.rank for start in starts] != ranks:
        given_ranks = [start.distribution.rank for start in starts]
        raise ValueError(f"starts of ranks {given_ranks}: expected {ranks}, one each")

    problem, results = _problem(joint, anchored, ranks[-1]), []
    groups = groups_by_width(problem.items)
    plan = problem.plan(plan)
    below: Runs | None = None
    for place, rank in enumerate(ranks):
        started = time.perf_counter()
        start = None
        if starts is not None:
            started -= 0.0 if given else starts[place].seconds
            start = problem.mixtures(starts[place])
        solved = solved_apart(groups, partial(_step, rank, plan), start, below)
        below = solved.best
        results.append(problem.result(solved, method, started))
    return tuple(results)


def _step(
    rank: int, plan: Plan, items: Items, start: Mixtures | None, below: Runs | None
) -> Solved:
    """One rank of a path: from its start, where there is one, and never above the rank below."""
    if start is not None:
        solved = climb(items, start, plan)
    elif rank == 1:
        solved = solve_rank_one(items)
    else:
        solved = solve(items, rank, plan)
    return solved if below is None else not_above(items, solved, below, plan)


@dataclass(frozen=True)
class _Problem:
    """What is fitted of the caller's joints: they themselves or, anchored, what follows each first
    token of noticeable mass.

    Attributes
    ----------
    items : Items
    first : (joints, vocab) tensor, optional
        Anchored only: probability of every first token.
    marginals : (joints * vocab, horizon, vocab) tensor, optional
        Anchored only: of what follows every first token.
    batch_shape : tuple of int
        Of the joints.
    """

    items: Items
    batch_shape: tuple[int, ...] = ()
    first: Float[Tensor, "joints vocab"] | None = None
    marginals: Float[Tensor, "all_items horizon vocab"] | None = None

    @classmethod
    def of(cls, joint: JointDistribution, anchored: bool) -> _Problem:
        """What there is to fit of a joint."""
        batch_shape = tuple(joint.batch_shape)
        given = joint.given_first_token() if anchored else joint
        probs = given.probs.reshape(-1, *(joint.vocab_size,) * given.horizon)  # (items, vocab, …)
        flat = JointDistribution(probs, given.horizon)
        if not anchored:
            return cls(Items(flat), batch_shape)
        first = joint.prefix_probs(1).reshape(-1, joint.vocab_size)  # (joints, vocab)
        some = JointDistribution(probs[noticed(first)], given.horizon)
        return cls(Items(some), batch_shape, first, stacked_marginals(flat))

    def plan(self, plan: Plan) -> Plan:
        """For the items what `plan` is for the joints."""
        if self.first is None:
            return plan
        # What follows a known first token is all the draft's: its tokens per call are those of a
        # drafted first token.
        return replace(plan, goal=replace(plan.goal, first_token="draft"))

    def mixtures(self, found: FitResult) -> Mixtures:
        """A fit's answers to the items."""
        if not isinstance(found.distribution, CPDistribution):
            raise ValueError(f"a start of {type(found.distribution).__name__}: expected form 'cp'")
        mixtures = Mixtures.of(found.distribution)
        return mixtures if self.first is None else mixtures[noticed(self.first)]

    def result(self, solved: Solved, method: str, started: float) -> FitResult:
        """The answer to the caller, one per joint."""
        first_tokens = None
        if self.first is not None and self.marginals is not None:
            others = repeated_marginals(self.marginals, solved.best.mixtures.rank)
            solved = pooled(solved, self.first, noticed(self.first), others)
            first_tokens = self.first.shape[1]
        return FitResult.of(
            solved,
            method,
            batch_shape=self.batch_shape,
            first_tokens=first_tokens,
            started=started,
        )


def _problem(
    joint: JointDistribution | PrefixTree, anchored: bool, rank: int
) -> _Problem | TreeProblem:
    """What there is to fit of a joint or of a tree, at ranks up to this."""
    if isinstance(joint, PrefixTree):
        problem = TreeProblem.of(joint, NOTICEABLE_MASS if anchored else None)
        problem.check(rank)
        return problem
    return _Problem.of(joint, anchored)


def _check(
    joint: JointDistribution | PrefixTree,
    rank: int,
    plan: Plan,
    anchored: bool,
    form: Form,
) -> None:
    """Refuse what cannot be fitted, with what was got, what was expected and what to do."""
    form.check(joint, rank, plan, anchored)
    if isinstance(joint, PrefixTree) and plan.method not in KL_METHODS:
        raise ValueError(
            f"method {plan.method!r} on a tree: expected one of {', '.join(KL_METHODS)}; the "
            "squared error needs an exact joint"
        )
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1 (1 is the product of the marginals)")
    if plan.restarts < 1:
        raise ValueError(f"restarts {plan.restarts}: expected at least 1")
    if anchored and joint.horizon < 3:
        raise ValueError(
            f"an anchored fit of horizon {joint.horizon}: expected at least 3; drop anchored, or "
            "raise the horizon"
        )
    if plan.method == "acceptance":
        _check_goal(plan.goal, anchored)


def _check_goal(goal: Goal, anchored: bool) -> None:
    if goal.rule not in ("token", "block", "coupling"):
        raise ValueError(
            f"rule {goal.rule!r}: tokens per call can be maximised under token, block or coupling"
        )
    if goal.first_token not in ("target", "draft"):
        raise ValueError(f"first_token {goal.first_token!r}: expected 'target' or 'draft'")
    if anchored and goal.first_token == "draft":
        raise ValueError(
            "an anchored draft is told the first token and cannot give it: use first_token='target'"
        )
