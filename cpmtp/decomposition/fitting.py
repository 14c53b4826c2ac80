"""The one entrance to every fit: `fit(joint, rank, method)`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures
from cpmtp.decomposition.fit_result import FAILED, NOT_CONVERGED, OK, FitResult
from cpmtp.decomposition.solution import Runs
from cpmtp.decomposition.solving import METHODS, Plan, Solved, solve, solve_counting
from cpmtp.decomposition.sparse_em import TreeTargets, cell_marginals, first_token_cells, tree_cells
from cpmtp.decomposition.starts import marginal_products, repeated_marginals
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import DEFAULT_MAX_BYTES, JointDistribution
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
        With batch axes, every entry is fitted by itself in one go. A truncated joint is fitted by
        ``em`` to its kept prefixes; the objective is then a lower bound of ``KL(P || Q)``.
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
        Fit the law of the remaining n-1 tokens for every first token of noticeable mass (the
        product of its marginals otherwise): n of at least 3.
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
    >>> joint = exact_joint(separated_hmm(2, 6), torch.tensor([], dtype=torch.long), 3)
    >>> result = fit(joint, rank=2)
    >>> result.status, result.objective < 1e-6
    ('ok', True)
    """
    plan = plan_of(
        joint,
        method,
        max_iterations=max_iterations,
        tolerance=tolerance,
        restarts=restarts,
        seed=seed,
    )
    plan = replace(plan, load_balancing=load_balancing, rule=rule, first_token=first_token)
    check(joint, rank, plan, anchored)
    started = time.perf_counter()
    if isinstance(joint, PrefixTree):
        solved = _fit_tree(joint, rank, anchored, plan)
        return _result((), (joint.vocab_size,) if anchored else (), plan.method, solved, started)
    problem = Problem.of(joint, anchored)
    return problem.result(problem.solve(rank, plan), plan.method, started)


def plan_of(
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
class Problem:
    """What is fitted: the joint's entries, or, anchored, the laws after each first token of
    noticeable mass.

    Attributes
    ----------
    joint : JointDistribution
        As the caller gave it.
    flat : JointDistribution
        One batch axis: the entries, or the laws after every first token.
    noticed : (items,) long tensor, optional
        Anchored only: which of `flat` are fitted.
    """

    joint: JointDistribution
    flat: JointDistribution
    noticed: Tensor | None

    @classmethod
    def of(cls, joint: JointDistribution, anchored: bool) -> Problem:
        """What there is to fit of a joint."""
        given = joint.given_first_token() if anchored else joint
        shape = (-1, *(joint.vocab_size,) * given.horizon)
        flat = JointDistribution(given.probs.reshape(shape), given.horizon)
        noticed = (
            (joint.prefix_probs(1).reshape(-1) > NOTICEABLE_MASS).nonzero().squeeze(1)
            if anchored
            else None
        )
        return cls(joint, flat, noticed)

    def solve(self, rank: int, plan: Plan, warm: Mixtures | None = None) -> Solved:
        """Best runs of the fitted entries."""
        if self.noticed is None:
            return solve(self.flat, rank, plan, warm)
        # What follows a known first token is all the draft's: its tokens per call are those of a
        # drafted first token.
        given = JointDistribution(self.flat.probs[self.noticed], self.flat.horizon)
        return solve(given, rank, replace(plan, first_token="draft"), warm)

    def result(self, solved: Solved, method: str, started: float) -> FitResult:
        """The answer to the caller, one per joint."""
        if self.noticed is not None:
            first = self.joint.prefix_probs(1).reshape(-1)
            others = marginal_products(self.flat, solved.best.mixtures.weights.shape[1])
            solved = _pooled(
                first, self.noticed, solved, others.replaced(self.noticed, solved.best.mixtures)
            )
        batch_shape = tuple(self.joint.batch_shape)
        lead = batch_shape if self.noticed is None else (*batch_shape, self.joint.vocab_size)
        return _result(batch_shape, lead, method, solved, started)


def _pooled(first: Tensor, noticed: Tensor, solved: Solved, mixtures: Mixtures) -> Solved:
    """One answer per joint from those of its noticed first tokens, weighted by their mass."""
    best = solved.best
    vocab = mixtures.factors.shape[-1]
    shape = (len(first) // vocab, vocab)

    def spread(values: Tensor, fill: float) -> Tensor:
        full = values.new_full((len(first), *values.shape[1:]), fill)
        full[noticed] = values
        return full.reshape(*shape, *values.shape[1:])

    mass = first.reshape(shape) / first.reshape(shape).sum(1, keepdim=True)
    share = mass * spread(torch.ones_like(mass.flatten()[noticed]), 0.0)
    failures = [""] * len(first)
    for index, failure in zip(noticed.tolist(), best.failures, strict=True):
        failures[index] = failure
    summary = Runs(
        mixtures,
        objective=(share * spread(best.objective, 0.0)).sum(1),
        converged=spread(best.converged, True).all(1),
        iterations=spread(best.iterations, 0).amax(1),
        failures=tuple(
            next(filter(None, failures[i * shape[1] : (i + 1) * shape[1]]), "")
            for i in range(shape[0])
        ),
        traces=((),) * shape[0],
        raw=(share[..., None] * spread(best.raw, 0.0)).sum(1),
    )
    weighted = (
        (share[..., None] * spread(table, 0.0)).sum(1)
        for table in (solved.objectives, solved.matches)
    )
    return Solved(summary, *weighted)


def _fit_tree(tree: PrefixTree, rank: int, anchored: bool, plan: Plan) -> Solved:
    """Sparse expectation-maximisation over the kept prefixes."""
    cells, vocab = tree_cells(tree), tree.vocab_size
    first = torch.zeros(vocab + 1, dtype=torch.float64).index_add_(
        0, cells.tokens[:, 0], cells.weights
    )[:-1]
    noticed = (first > NOTICEABLE_MASS).nonzero().squeeze(1)
    items = (
        tuple(first_token_cells(cells, token) for token in noticed.tolist())
        if anchored
        else (cells,)
    )
    marginals = torch.stack([cell_marginals(item, vocab) for item in items])
    solved = solve_counting(lambda runs: TreeTargets.of(items, vocab, runs), marginals, rank, plan)
    if not anchored:
        return solved
    others = repeated_marginals(cell_marginals(cells, vocab)[1:].expand(vocab, -1, -1), rank)
    return _pooled(first, noticed, solved, others.replaced(noticed, solved.best.mixtures))


def _result(
    batch_shape: tuple[int, ...], lead: tuple[int, ...], method: str, solved: Solved, started: float
) -> FitResult:
    """The answer for joints of these batch axes, with a distribution of the leading axes `lead`."""
    best = solved.best
    weights, factors = best.mixtures.weights, best.mixtures.factors
    columns = tuple(f.mT.reshape(*lead, *f.mT.shape[1:]).contiguous() for f in factors.unbind(1))
    distribution = CPDistribution(weights.reshape(*lead, -1), columns)
    status, message = zip(
        *(_status(f, c) for f, c in zip(best.failures, best.converged.tolist(), strict=True)),
        strict=True,
    )
    batched = len(batch_shape) > 0

    def shaped(values: Tensor):
        return values.reshape(batch_shape) if batched else values.item()

    return FitResult(
        distribution,
        objective=shaped(best.objective),
        converged=shaped(best.converged),
        iterations=shaped(best.iterations),
        seconds=time.perf_counter() - started,
        status=status if batched else status[0],
        message=message if batched else message[0],
        raw_relative_error=shaped(best.raw[:, 0]),
        negative_mass=shaped(best.raw[:, 1]),
        mass_deficit=shaped(best.raw[:, 2]),
        restart_objectives=solved.objectives.reshape(*batch_shape, -1),
        restart_match_scores=solved.matches.reshape(*batch_shape, -1),
        trace=best.traces if batched else best.traces[0],
        method=method,
    )


def _status(failure: str, converged: bool) -> tuple[str, str]:
    if failure:
        return (
            FAILED,
            f"{failure}; the product of the marginals is returned: lower the rank or use em",
        )
    if not converged:
        return (
            NOT_CONVERGED,
            "stopped at the last iteration allowed: raise max_iterations for a closer fit",
        )
    return OK, ""


def check(joint: JointDistribution | PrefixTree, rank: int, plan: Plan, anchored: bool) -> None:
    """Refuse what cannot be fitted.

    Raises
    ------
    ValueError
        Saying what was got, what was expected and what to do.
    """
    if isinstance(joint, PrefixTree):
        _check_tree(joint, rank, plan.method, anchored)
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
        _check_goal(plan, anchored)


def _check_goal(plan: Plan, anchored: bool) -> None:
    if plan.rule not in ("token", "block", "coupling"):
        raise ValueError(
            f"rule {plan.rule!r}: tokens per call can be maximised under token, block or coupling"
        )
    if plan.first_token not in ("target", "draft"):
        raise ValueError(f"first_token {plan.first_token!r}: expected 'target' or 'draft'")
    if anchored and plan.first_token == "draft":
        raise ValueError(
            "an anchored draft is told the first token and cannot give it: use first_token='target'"
        )


def _check_tree(tree: PrefixTree, rank: int, method: str, anchored: bool) -> None:
    if method != "em":
        raise ValueError(
            f"method {method!r} on a truncated joint: only 'em' fits one; use it, or an exact joint"
        )
    needed = 8 * rank * tree.vocab_size**2 * (tree.horizon - 1)
    if anchored and needed > DEFAULT_MAX_BYTES:
        raise ValueError(
            f"anchored fits over {tree.vocab_size} tokens need {needed / 1e9:.3g} GB; the limit is "
            f"{DEFAULT_MAX_BYTES / 1e9:.3g} GB: lower the rank or fit it unanchored"
        )
