"""Squared-error fits by TensorLy, made proper distributions. The only module that uses TensorLy."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import tensorly
import torch
from tensorly.decomposition import non_negative_parafac, non_negative_parafac_hals, parafac
from tensorly.tenalg import khatri_rao
from torch import Tensor

from cpmtp.decomposition.floors import rank_floors
from cpmtp.decomposition.mixtures import Mixtures, Runs
from cpmtp.decomposition.starts import marginal_products, restart_generator
from cpmtp.drafts.cp_distribution import normalised_cp
from cpmtp.joint_distribution import JointDistribution

# TensorLy's stopping rule knows its errors to about this; a fit below it is exact.
_EXACT = 1e-6


@dataclass(frozen=True)
class Solver:
    """A method of TensorLy's and how long it may take.

    Attributes
    ----------
    method : {"als", "hals", "mu"}
    max_iterations : int
    tolerance : float
        TensorLy's ``tol``.
    """

    method: str
    max_iterations: int
    tolerance: float


@dataclass(frozen=True)
class _RawFit:
    """TensorLy's answer: signed or non-negative weights (rank,) and factors (vocab, rank), with the
    errors after each iteration.
    """

    weights: np.ndarray
    factors: list[np.ndarray]
    errors: list[float]


@dataclass(frozen=True)
class _ProperFit:
    """The same made a distribution.

    Attributes
    ----------
    mixture : Mixtures
        One run.
    error : float
        Its relative Frobenius error; infinite where TensorLy failed.
    raw : tuple of float
        Relative error, negative mass and mass deficit of TensorLy's answer.
    errors : list of float
    failure : str
        Why there is no fit; empty otherwise.
    """

    mixture: Mixtures
    error: float
    raw: tuple[float, float, float]
    errors: list[float]
    failure: str = ""

    @property
    def is_exact(self) -> bool:
        return not self.failure and max(self.error, self.raw[0]) <= _EXACT

    @property
    def lost_all(self) -> bool:
        """Whether an exact answer did not live through the projection, or there is none."""
        return bool(self.failure) or self.raw[0] <= _EXACT < self.error


def squared_error_runs(
    joint: JointDistribution, rank: int, solver: Solver, *, restarts: int, seed: int
) -> Runs:
    """Fit every entry of a joint with one batch axis, one restart after another.

    Above the rank that fits a joint exactly the normal equations are singular: the exact fit is
    returned then, the components it does not need with weight zero. A run that TensorLy cannot
    finish for other reasons (overflow, say) is recorded as failed.
    """
    fits = []
    for probs in joint.probs.double().cpu():
        for restart in range(restarts):
            generator = restart_generator(seed, restart)
            start_seed = int(torch.randint(1 << 31, (1,), generator=generator))
            fits.append(_best_fit(probs, rank, solver, start_seed))
    return Runs(
        Mixtures.joined([fit.mixture for fit in fits]),
        objective=torch.tensor([fit.error for fit in fits], dtype=torch.float64),  # (runs,)
        converged=torch.tensor([0 < len(fit.errors) < solver.max_iterations for fit in fits]),
        iterations=torch.tensor([len(fit.errors) for fit in fits]),  # (runs,)
        failures=tuple(fit.failure for fit in fits),
        traces=tuple(tuple(fit.errors) for fit in fits),
        raw=torch.tensor([fit.raw for fit in fits], dtype=torch.float64),  # (runs, 3)
    )


def _best_fit(probs: Tensor, rank: int, solver: Solver, seed: int) -> _ProperFit:
    """The fit of this rank, or the exact one of a lower rank where this one came to nothing."""
    if probs.ndim == 1:  # one token is its own factor
        product = marginal_products(JointDistribution(probs), rank)
        return _ProperFit(product, 0.0, (0.0, 0.0, 0.0), [0.0])
    found = _proper_fit(probs, rank, solver, seed)
    if rank == 1 or not found.lost_all:
        return found
    lower = range(1, rank)
    floors = rank_floors(JointDistribution(probs), lower).relative_frobenius  # (rank - 1,)
    enough = [fewer for fewer, floor in zip(lower, floors.tolist(), strict=True) if floor <= _EXACT]
    fewer = min(enough, default=rank)
    while fewer < rank:
        exact = _proper_fit(probs, fewer, solver, seed)
        if exact.is_exact or (found.failure and exact.raw[0] <= _EXACT):
            return replace(exact, mixture=_padded(exact.mixture, rank))
        fewer *= 2
    return found


def _padded(mixture: Mixtures, rank: int) -> Mixtures:
    """Components repeated with weight zero until there are `rank`."""
    places = torch.arange(rank) % mixture.rank  # (rank,)
    first = torch.arange(rank) < mixture.rank  # (rank,)
    return Mixtures(
        mixture.weights[:, places] * first,  # (1, rank)
        mixture.factors[:, :, places],  # (1, horizon, rank, vocab)
    )


def _proper_fit(probs: Tensor, rank: int, solver: Solver, seed: int) -> _ProperFit:
    """TensorLy's answer made a distribution; where it has none, the product of the marginals."""
    try:
        # TensorLy warns and divides by zero on its way to an answer that is checked below.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            raw = _decompose(probs.numpy(), rank, solver, seed)
        if not all(np.isfinite(f).all() for f in [raw.weights, *raw.factors]):
            raise FloatingPointError("TensorLy returned NaN or infinite factors")
        weights, factors = (
            _projected(probs.numpy(), raw) if solver.method == "als" else _renormalised(raw)
        )
        proper = normalised_cp(torch.from_numpy(weights), [torch.from_numpy(f) for f in factors])
        mixture = Mixtures.of(proper)
        factors = list(mixture.factors[0].mT.numpy())  # (vocab, rank) each
        error, _, _ = _compared(probs.numpy(), mixture.weights[0].numpy(), factors)
        numbers = _compared(probs.numpy(), raw.weights, raw.factors)
        return _ProperFit(mixture, error, numbers, raw.errors)
    except (np.linalg.LinAlgError, ArithmeticError, ValueError, IndexError) as error:
        product = marginal_products(JointDistribution(probs), rank)
        reason = f"{type(error).__name__}: {error}"
        return _ProperFit(product, math.inf, (math.nan,) * 3, [], reason)


def _decompose(probs: np.ndarray, rank: int, solver: Solver, seed: int) -> _RawFit:
    methods = {"als": parafac, "hals": non_negative_parafac_hals, "mu": non_negative_parafac}
    # The backend is global state: set for this thread and put back.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        (weights, factors), errors = methods[solver.method](
            probs,
            rank,
            n_iter_max=solver.max_iterations,
            init="random",
            tol=solver.tolerance,
            random_state=np.random.RandomState(seed),
            return_errors=True,
        )
    return _RawFit(
        np.asarray(weights, np.float64),
        [np.asarray(f, np.float64) for f in factors],
        [float(e) for e in errors],
    )


def _projected(probs: np.ndarray, raw: _RawFit) -> tuple[np.ndarray, list[np.ndarray]]:
    """Flip signs per component, clip, normalise columns, refit the weights by non-negative least
    squares.
    """
    factors = [np.maximum(f, 0.0) for f in _with_signs_aligned(raw)]
    sums = [f.sum(0) for f in factors]  # (rank,) each
    alive = np.prod([s > 0 for s in sums], axis=0).astype(bool)  # (rank,)
    if not alive.any():
        raise FloatingPointError("nothing of the fit is left after clipping negative factors")
    factors = [
        np.where(alive, f / np.where(alive, s, 1.0), 1.0 / len(f))
        for f, s in zip(factors, sums, strict=True)
    ]
    return np.where(alive, _refitted_weights(probs, factors, alive), 0.0), factors


def _with_signs_aligned(raw: _RawFit) -> list[np.ndarray]:
    """Each factor column made mostly positive; a component that is negative then is negative in its
    last factor.
    """
    factors, sign = [], np.sign(raw.weights) + (raw.weights == 0)
    for factor in raw.factors:
        side = np.where(factor.sum(0) < 0, -1.0, 1.0)  # (rank,)
        factors.append(factor * side)
        sign = sign * side
    factors[-1] = factors[-1] * sign
    return factors


def _refitted_weights(
    probs: np.ndarray, factors: list[np.ndarray], alive: np.ndarray
) -> np.ndarray:
    """``argmin_{w >= 0} ||P - sum_a w_a A_1[:, a] o … o A_n[:, a]||`` from the normal equations'
    square root.
    """
    gram = np.prod([f.T @ f for f in factors], axis=0) * np.outer(alive, alive)  # (rank, rank)
    projection = _contracted(probs, factors) * alive  # (rank,)
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * 1e-12
    root = np.sqrt(values[kept])  # (kept,)
    weights, _ = scipy.optimize.nnls(
        root[:, None] * vectors[:, kept].T,  # (kept, rank)
        vectors[:, kept].T @ projection / root,  # (kept,)
    )
    if not weights.sum() > 0:
        raise FloatingPointError("non-negative least squares left no component any weight")
    return weights


def _contracted(probs: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """``<P, component a>`` for every a: (rank,)."""
    partial = probs.reshape(len(factors[0]), -1).T @ factors[0]  # (rest, rank)
    for factor in factors[1:]:
        split = partial.reshape(len(factor), -1, factor.shape[1])  # (vocab, rest, rank)
        partial = np.einsum("vra,va->ra", split, factor)  # (rest, rank)
    return partial.reshape(-1)  # (rank,)


def _renormalised(raw: _RawFit) -> tuple[np.ndarray, list[np.ndarray]]:
    # TensorLy's non-negative solvers may return entries of -1e-17.
    return np.maximum(raw.weights, 0.0), [np.maximum(f, 0.0) for f in raw.factors]


def _compared(
    probs: np.ndarray, weights: np.ndarray, factors: list[np.ndarray]
) -> tuple[float, float, float]:
    """Relative Frobenius error, negative mass and mass deficit of any weights and factors."""
    rest = np.ones((1, len(weights)))  # (sequences, rank)
    if len(factors) > 1:
        with tensorly.backend_context("numpy", local_threadsafe=True):
            rest = khatri_rao(factors[1:])  # (sequences, rank)
    squared, negative, total = 0.0, 0.0, 0.0
    for row, scaled in zip(probs.reshape(len(probs), -1), factors[0] * weights, strict=True):
        entries = rest @ scaled  # (sequences,)
        squared += float(np.square(row - entries).sum())
        negative -= float(np.minimum(entries, 0.0).sum())
        total += float(entries.sum())
    return math.sqrt(squared) / float(np.linalg.norm(probs)), negative, 1.0 - total
