"""The one entrance to every fit: `fit(joint, rank, method)`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cpmtp.cp_distribution import CPDistribution
from cpmtp.decomposition.als import squared_error_runs
from cpmtp.decomposition.em import em_runs
from cpmtp.decomposition.expectation import Mixtures, Targets
from cpmtp.decomposition.fit_result import FAILED, NOT_CONVERGED, OK, FitResult
from cpmtp.decomposition.gradient import gradient_runs
from cpmtp.decomposition.solution import Runs
from cpmtp.decomposition.sparse_em import TreeTargets, cell_marginals, first_token_cells, tree_cells
from cpmtp.decomposition.starts import disturbed_marginals, marginal_products, random_starts, repeated_marginals
from cpmtp.joint_distribution import DEFAULT_MAX_BYTES, JointDistribution
from cpmtp.prefix_tree import PrefixTree

SQUARED_ERROR_METHODS = ("als", "hals", "mu")
METHODS = (*SQUARED_ERROR_METHODS, "em", "gradient")
# First tokens below this probability get the product of their marginals in an anchored fit: all together they
# cannot change tokens per call in its fifth digit.
NOTICEABLE_MASS = 1e-8


@dataclass(frozen=True)
class _Effort:
    """When a method stops: passes over the joint and gain (nats, or relative error for squared-error methods)."""

    max_iterations: int
    tolerance: float


_DEFAULT_EFFORT = {
    "als": _Effort(50, 1e-6),
    "hals": _Effort(50, 1e-6),
    "mu": _Effort(100, 1e-6),
    "em": _Effort(200, 1e-4),
    "gradient": _Effort(80, 1e-4),
}
# Joints up to this many entries are cheap: more passes are allowed. A gradient pass costs several of em's there, where the
# optimiser's own bookkeeping is the larger part.
_SMALL_JOINT = 50_000
_MORE_PASSES = {"em": 10, "gradient": 3}


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
) -> FitResult:
    """Fit a CP distribution of the given rank to a joint distribution.

    Parameters
    ----------
    joint : JointDistribution or PrefixTree
        With batch axes, every entry is fitted by itself in one go. A truncated joint is fitted by ``em`` to its kept
        prefixes; the objective is then a lower bound of ``KL(P || Q)``.
    rank : int
        Number of components.
    method : {"em", "gradient", "als", "hals", "mu"}
        ``em`` and ``gradient`` minimise ``KL(P || Q)`` in nats, the others the squared error.
    restarts : int
        Random starts; the best answer is returned.
    seed : int
        Restart k begins at the same point whatever the number of restarts and the batch.
    anchored : bool
        Fit the law of the remaining n-1 tokens for every first token of noticeable mass (the product of its marginals
        otherwise): n of at least 3.
    max_iterations : int, optional
        Most passes over the joint (TensorLy methods: outer iterations).
    tolerance : float, optional
        ``em``, ``gradient``: gain in nats below which a run stops; others: TensorLy's ``tol``.

    Raises
    ------
    ValueError
        If rank or restarts is below 1, the method is unknown, or a horizon below 3 is to be fitted anchored.

    Examples
    --------
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> joint = exact_joint(separated_hmm(2, 6), torch.tensor([], dtype=torch.long), 3)
    >>> result = fit(joint, rank=2)
    >>> result.status, result.objective < 1e-6
    ('ok', True)
    """
    _check(joint, rank, method, restarts, anchored)
    effort = _effort(joint, method, max_iterations, tolerance)
    started = time.perf_counter()
    if isinstance(joint, PrefixTree):
        return _fit_tree(joint, rank, anchored, (restarts, seed, effort, started))
    if anchored:
        return _fit_anchored(joint, rank, method, (restarts, seed, effort, started))
    best, table = _solve(joint, rank, method, (restarts, seed, effort))
    return _result(joint.batch_shape, method, best, table, started)


def _effort(joint: JointDistribution | PrefixTree, method: str, max_iterations: int | None, tolerance: float | None) -> _Effort:
    default = _DEFAULT_EFFORT[method]
    more = _MORE_PASSES.get(method, 1) if joint.vocab_size**joint.horizon <= _SMALL_JOINT else 1
    return _Effort(
        default.max_iterations * more if max_iterations is None else max_iterations,
        default.tolerance if tolerance is None else tolerance,
    )


def _solve(joint: JointDistribution, rank: int, method: str, settings: tuple[int, int, _Effort]) -> tuple[Runs, Tensor]:
    restarts, seed, effort = settings
    passes, tolerance = effort.max_iterations, effort.tolerance
    if method in SQUARED_ERROR_METHODS:
        probs = joint.probs.reshape(-1, *(joint.vocab_size,) * joint.horizon)
        runs = squared_error_runs(probs, rank, method, restarts=restarts, seed=seed, max_iterations=passes, tolerance=tolerance)
        return runs.best_of(restarts)
    targets, start = Targets.of(joint, restarts), random_starts(joint, rank, restarts, seed)
    by = em_runs if method == "em" else gradient_runs
    return by(targets, start, max_iterations=passes, tolerance=tolerance).best_of(restarts)


def _fit_anchored(joint: JointDistribution, rank: int, method: str, settings) -> FitResult:
    """All first tokens of noticeable mass as one batch; one answer per joint, weighted by their mass."""
    restarts, seed, effort, started = settings
    first = joint.prefix_probs(1).reshape(-1)
    rest = joint.horizon - 1
    given = joint.given_first_token()
    flat = JointDistribution(given.probs.reshape(-1, *(joint.vocab_size,) * rest), rest)
    noticed = (first > NOTICEABLE_MASS).nonzero().squeeze(1)
    best, table = _solve(JointDistribution(flat.probs[noticed], rest), rank, method, (restarts, seed, effort))
    mixtures = marginal_products(flat, rank).replaced(noticed, best.mixtures)
    summary, restart_objectives = _pooled(first, noticed, (best, table), mixtures)
    return _result(joint.batch_shape, method, summary, restart_objectives, started)


def _pooled(first: Tensor, noticed: Tensor, solved: tuple[Runs, Tensor], mixtures: Mixtures) -> tuple[Runs, Tensor]:
    """One answer per joint from those of its noticed first tokens, weighted by their mass; with the restarts' objectives."""
    best, table = solved
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
        failures=tuple(next(filter(None, failures[i * shape[1] : (i + 1) * shape[1]]), "") for i in range(shape[0])),
        traces=((),) * shape[0],
        raw=(share[..., None] * spread(best.raw, 0.0)).sum(1),
    )
    return summary, (share[..., None] * spread(table, 0.0)).sum(1)


def _fit_tree(tree: PrefixTree, rank: int, anchored: bool, settings) -> FitResult:
    """Sparse expectation-maximisation over the kept prefixes."""
    restarts, seed, effort, started = settings
    cells, vocab = tree_cells(tree), tree.vocab_size
    first = torch.zeros(vocab + 1, dtype=torch.float64).index_add_(0, cells.tokens[:, 0], cells.weights)[:-1]
    noticed = (first > NOTICEABLE_MASS).nonzero().squeeze(1)
    items = tuple(first_token_cells(cells, token) for token in noticed.tolist()) if anchored else (cells,)
    start = disturbed_marginals(torch.stack([cell_marginals(item, vocab) for item in items]), rank, restarts, seed)
    runs = em_runs(
        TreeTargets.of(items, vocab, restarts), start, max_iterations=effort.max_iterations, tolerance=effort.tolerance
    )
    best, table = runs.best_of(restarts)
    if anchored:
        others = cell_marginals(cells, vocab)[1:].expand(vocab, -1, -1)
        mixtures = repeated_marginals(others, rank).replaced(noticed, best.mixtures)
        best, table = _pooled(first, noticed, (best, table), mixtures)
    return _result(torch.Size(), "em", best, table, started)


def _result(batch_shape: torch.Size, method: str, best: Runs, table: Tensor, started: float) -> FitResult:
    weights, factors = best.mixtures.weights, best.mixtures.factors
    lead = batch_shape if len(weights) == math.prod(batch_shape) else (*batch_shape, factors.shape[-1])
    columns = tuple(f.mT.reshape(*lead, *f.mT.shape[1:]).contiguous() for f in factors.unbind(1))
    distribution = CPDistribution(weights.reshape(*lead, -1), columns)
    status, message = zip(*(_status(f, c) for f, c in zip(best.failures, best.converged.tolist(), strict=True)), strict=True)
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
        restart_objectives=table.reshape(*batch_shape, -1),
        trace=best.traces if batched else best.traces[0],
        method=method,
    )


def _status(failure: str, converged: bool) -> tuple[str, str]:
    if failure:
        return FAILED, f"{failure}; the product of the marginals is returned: lower the rank or use em"
    if not converged:
        return NOT_CONVERGED, "stopped at the last iteration allowed: raise max_iterations for a closer fit"
    return OK, ""


def _check(joint: JointDistribution | PrefixTree, rank: int, method: str, restarts: int, anchored: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if isinstance(joint, PrefixTree):
        _check_tree(joint, rank, method, anchored)
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1 (1 is the product of the marginals)")
    if restarts < 1:
        raise ValueError(f"restarts {restarts}: expected at least 1")
    if anchored and joint.horizon < 3:
        raise ValueError(
            f"an anchored fit of horizon {joint.horizon}: expected at least 3; fit it plainly, or raise the horizon"
        )


def _check_tree(tree: PrefixTree, rank: int, method: str, anchored: bool) -> None:
    if method != "em":
        raise ValueError(f"method {method!r} on a truncated joint: only 'em' fits one; use it, or an exact joint")
    needed = 8 * rank * tree.vocab_size**2 * (tree.horizon - 1)
    if anchored and needed > DEFAULT_MAX_BYTES:
        raise ValueError(
            f"anchored fits over {tree.vocab_size} tokens need {needed / 1e9:.3g} GB; the limit is "
            f"{DEFAULT_MAX_BYTES / 1e9:.3g} GB: lower the rank or fit it unanchored"
        )
