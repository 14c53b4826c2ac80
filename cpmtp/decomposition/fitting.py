"""The one entrance to every fit: `fit(joint, rank, method)`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.fit_result import FitResult, pooled
from cpmtp.decomposition.gradient import Goal
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.restarts import (
    KL_METHODS,
    METHODS,
    Items,
    Plan,
    climb,
    not_above,
    solve,
    solve_rank_one,
)
from cpmtp.decomposition.starts import repeated_marginals, stacked_marginals
from cpmtp.decomposition.trees.problem import TreeProblem
from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.prefix_tree import PrefixTree

# First tokens below this probability get the product of their marginals in an anchored fit: all
# together they cannot change tokens per call in its fifth digit.
NOTICEABLE_MASS = 1e-8
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


@takes_what_is_given
def fit(
    joint: JointDistribution | PrefixTree,
    rank: int,
    method: str = "em",
    *,
    restarts: int = 1,
    seed: int = 0,
    anchored: bool = False,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    load_balancing: float = 0.0,
    rule: str = "block",
    first_token: str = "target",
) -> FitResult:
    """Fit a CP distribution of the given rank to a joint distribution.

    Parameters
    ----------
    joint : JointDistribution or PrefixTree
        With batch axes, every entry is fitted by itself in one go. To a tree ``em``, ``gradient``
        and ``acceptance`` fit over the ids that it keeps: of a complete one what they would fit to
        the dense joint; of a truncated one the objective is a lower bound of ``KL(P || Q)``, or of
        tokens per call.
    rank : int
        Number of components.
    method : {"em", "gradient", "acceptance", "als", "hals", "mu"}
        ``em`` and ``gradient`` minimise ``KL(P || Q)`` in nats, ``acceptance`` minus the tokens per
        call (from an ``em`` fit, and never worse than it), the others the squared error.
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
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> joint = exact_joint(separated_hmm(2, 6), [], 3)
    >>> result = fit(joint, rank=2)
    >>> result.status, result.objective < 1e-6
    ('ok', True)
    """
    plan = _plan(
        joint,
        method,
        max_iterations=max_iterations,
        tolerance=tolerance,
        restarts=restarts,
        seed=seed,
    )
    plan = replace(plan, load_balancing=load_balancing, goal=Goal(rule, first_token))
    _check(joint, rank, plan, anchored)
    started = time.perf_counter()
    problem = _problem(joint, anchored, rank)
    solved = solve(problem.items, rank, problem.plan(plan))
    return problem.result(solved, method, started)


@takes_what_is_given
def fit_path(
    joint: JointDistribution | PrefixTree,
    ranks: Sequence[int],
    method: str = "em",
    *,
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
    joint, method, restarts, seed, anchored, max_iterations, tolerance, rule, first_token
        As for `fit`; methods ``em``, ``gradient`` and ``acceptance`` only.
    ranks : sequence of int
        Sorted and without repetition in the answer.
    starts : sequence of FitResult, optional
        ``acceptance`` only: fits of the same joint at the same ranks to begin from, in increasing
        order (default: a path of ``em``, whose time is counted).

    Raises
    ------
    ValueError
        As for `fit`, or if there are no ranks, the method cannot begin from a fit, or `starts`
        are of other ranks.

    Examples
    --------
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
    plan = _plan(
        joint,
        method,
        max_iterations=max_iterations,
        tolerance=tolerance,
        restarts=restarts,
        seed=seed,
    )
    plan = replace(plan, goal=Goal(rule, first_token))
    ranks = sorted(set(ranks))
    _check(joint, ranks[0], plan, anchored)
    _check(joint, ranks[-1], plan, anchored)
    if starts is not None and method != "acceptance":
        raise ValueError(f"starts for {method!r}: only 'acceptance' begins from given fits")
    given = starts is not None
    if method == "acceptance" and starts is None:
        starts = fit_path(joint, ranks, restarts=restarts, seed=seed, anchored=anchored)
    if starts is not None and [start.distribution.rank for start in starts] != ranks:
        found = [start.distribution.rank for start in starts]
        raise ValueError(f"starts of ranks {found}: expected {ranks}, one each")

    problem, results = _problem(joint, anchored, ranks[-1]), []
    plan = problem.plan(plan)
    below: Runs | None = None
    for place, rank in enumerate(ranks):
        started = time.perf_counter()
        if starts is not None:
            started -= 0.0 if given else starts[place].seconds
            solved = climb(problem.items, problem.mixtures(starts[place]), plan)
        elif rank == 1:
            solved = solve_rank_one(problem.items)
        else:
            solved = solve(problem.items, rank, plan)
        if below is not None:
            solved = not_above(problem.items, solved, below, plan)
        below = solved.best
        results.append(problem.result(solved, method, started))
    return tuple(results)


def _plan(
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
        some = JointDistribution(probs[_noticed(first)], given.horizon)
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
        mixtures = Mixtures.of(found.distribution)
        return mixtures if self.first is None else mixtures[_noticed(self.first)]

    def result(self, solved: Solved, method: str, started: float) -> FitResult:
        """The answer to the caller, one per joint."""
        first_tokens = None
        if self.first is not None and self.marginals is not None:
            others = repeated_marginals(self.marginals, solved.best.mixtures.rank)
            solved = pooled(solved, self.first, _noticed(self.first), others)
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


def _noticed(first: Float[Tensor, "joints vocab"]) -> Int[Tensor, " items"]:
    """Numbers of the first tokens that are fitted, over all joints."""
    return (first.reshape(-1) > NOTICEABLE_MASS).nonzero().squeeze(1)  # (items,)


def _check(joint: JointDistribution | PrefixTree, rank: int, plan: Plan, anchored: bool) -> None:
    """Refuse what cannot be fitted, with what was got, what was expected and what to do."""
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
