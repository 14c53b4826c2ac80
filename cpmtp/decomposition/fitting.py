"""The one entrance to every fit: `fit(joint, rank, method)`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.fit_result import FitResult
from cpmtp.decomposition.gradient import Goal
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.decomposition.restarts import METHODS, Plan, solve, solve_counting
from cpmtp.decomposition.sparse_em import (
    Cells,
    TreeTargets,
    cell_marginals,
    first_token_cells,
    tree_cells,
)
from cpmtp.decomposition.starts import repeated_marginals, stacked_marginals
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
    problem = _Problem.of(joint, anchored)
    return problem.result(problem.solve(rank, plan), plan.method, started)


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
    """What is fitted: the joints themselves or, anchored, what follows each first token of
    noticeable mass.

    Attributes
    ----------
    items : JointDistribution or tuple of Cells
        What is fitted, one item per run: dense ones along one batch axis.
    marginals : (all items, horizon, vocab) tensor
        Anchored: of what follows every first token.
    first : (joints, vocab) tensor, optional
        Anchored only: probability of every first token.
    batch_shape : tuple of int
        Of the joints.
    """

    items: JointDistribution | tuple[Cells, ...]
    marginals: Float[Tensor, "all_items horizon vocab"]
    first: Float[Tensor, "joints vocab"] | None
    batch_shape: tuple[int, ...]

    @classmethod
    def of(cls, joint: JointDistribution | PrefixTree, anchored: bool) -> _Problem:
        """What there is to fit of a joint."""
        return (
            cls._of_tree(joint, anchored)
            if isinstance(joint, PrefixTree)
            else cls._of_dense(joint, anchored)
        )

    @classmethod
    def _of_dense(cls, joint: JointDistribution, anchored: bool) -> _Problem:
        given = joint.given_first_token() if anchored else joint
        probs = given.probs.reshape(-1, *(joint.vocab_size,) * given.horizon)  # (items, vocab, …)
        flat, first = JointDistribution(probs, given.horizon), None
        marginals, batch_shape = stacked_marginals(flat), tuple(joint.batch_shape)
        if anchored:
            first = joint.prefix_probs(1).reshape(-1, joint.vocab_size)  # (joints, vocab)
            flat = JointDistribution(probs[_noticed(first)], given.horizon)
        return cls(flat, marginals, first, batch_shape)

    @classmethod
    def _of_tree(cls, tree: PrefixTree, anchored: bool) -> _Problem:
        cells, vocab = tree_cells(tree), tree.vocab_size
        marginals = cell_marginals(cells, vocab)  # (horizon, vocab)
        if not anchored:
            return cls((cells,), marginals[None], None, ())
        first = torch.zeros(vocab + 1, dtype=torch.float64)
        first = first.index_add_(0, cells.tokens[:, 0], cells.weights)[None, :-1]  # (1, vocab)
        items = tuple(first_token_cells(cells, token) for token in _noticed(first).tolist())
        return cls(items, marginals[1:].expand(vocab, -1, -1), first, ())

    def solve(self, rank: int, plan: Plan, warm: Mixtures | None = None) -> Solved:
        """Best runs of the fitted items."""
        if not isinstance(self.items, JointDistribution):
            items, vocab = self.items, self.marginals.shape[-1]
            marginals = torch.stack([cell_marginals(item, vocab) for item in items])
            return solve_counting(
                lambda runs: TreeTargets.of(items, vocab, runs), marginals, rank, plan
            )
        if self.first is not None:
            # What follows a known first token is all the draft's: its tokens per call are those of
            # a drafted first token.
            plan = replace(plan, goal=replace(plan.goal, first_token="draft"))
        return solve(self.items, rank, plan, warm)

    def result(self, solved: Solved, method: str, started: float) -> FitResult:
        """The answer to the caller, one per joint."""
        if self.first is None:
            return FitResult.of(
                solved, method, batch_shape=self.batch_shape, first_tokens=None, started=started
            )
        return FitResult.of(
            self._pooled(solved, self.first),
            method,
            batch_shape=self.batch_shape,
            first_tokens=self.first.shape[1],
            started=started,
        )

    def _pooled(self, solved: Solved, first: Float[Tensor, "joints vocab"]) -> Solved:
        """One answer per joint from those of its noticed first tokens, weighted by their mass."""
        best, noticed = solved.best, _noticed(first)
        rank = best.mixtures.rank

        def spread(values: Tensor, fill: float) -> Tensor:
            full = values.new_full((first.numel(), *values.shape[1:]), fill)
            full[noticed] = values
            return full.reshape(*first.shape, *values.shape[1:])  # (joints, vocab, …)

        def averaged(values: Tensor) -> Tensor:
            return (share.view(*share.shape, *(1,) * (values.ndim - 1)) * spread(values, 0.0)).sum(
                1
            )

        mass = first / first.sum(1, keepdim=True)  # (joints, vocab)
        share = mass * (first > NOTICEABLE_MASS)  # (joints, vocab)
        others = repeated_marginals(self.marginals, rank)
        failures: list[list[str]] = [[] for _ in first]
        for item, failure in zip(noticed.tolist(), best.failures, strict=True):
            failures[item // first.shape[1]] += [failure] if failure else []
        summary = Runs(
            others.replaced(noticed, best.mixtures),
            objective=averaged(best.objective),
            converged=spread(best.converged, True).all(1),
            iterations=spread(best.iterations, 0).amax(1),
            failures=tuple(reasons[0] if reasons else "" for reasons in failures),
            traces=((),) * len(first),
            raw=averaged(best.raw),
        )
        return Solved(summary, averaged(solved.objectives), averaged(solved.matches))


def _noticed(first: Float[Tensor, "joints vocab"]) -> Int[Tensor, " items"]:
    """Numbers of the first tokens that are fitted, over all joints."""
    return (first.reshape(-1) > NOTICEABLE_MASS).nonzero().squeeze(1)  # (items,)


def _check(joint: JointDistribution | PrefixTree, rank: int, plan: Plan, anchored: bool) -> None:
    """Refuse what cannot be fitted, with what was got, what was expected and what to do."""
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
