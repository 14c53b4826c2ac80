"""Squared-error fits by TensorLy, made proper distributions. The only module that uses TensorLy."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import tensorly
import torch
from tensorly.decomposition import non_negative_parafac, non_negative_parafac_hals, parafac
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures
from cpmtp.decomposition.solution import Runs
from cpmtp.decomposition.starts import restart_generator
from cpmtp.drafts.cp_distribution import normalised_cp


@dataclass(frozen=True)
class _RawFit:
    """TensorLy's answer: signed or non-negative weights (rank,) and factors, with the errors after
    each iteration.
    """

    weights: np.ndarray
    factors: list[np.ndarray]
    errors: list[float]


def squared_error_runs(
    probs: Tensor,
    rank: int,
    method: str,
    *,
    restarts: int,
    seed: int,
    max_iterations: int,
    tolerance: float,
) -> Runs:
    """Fit every joint of `probs` (items, vocab, …, vocab), one restart after another.

    A run that TensorLy cannot finish (a singular normal equation, overflow) is recorded as failed.
    """
    runs = []
    for item in probs.double().cpu():
        for restart in range(restarts):
            start_seed = int(
                torch.randint(1 << 31, (1,), generator=restart_generator(seed, restart))
            )
            runs.append(
                _one_run(item.numpy(), rank, method, (start_seed, max_iterations, tolerance))
            )
    mixtures, numbers, errors, failures = zip(*runs, strict=True)
    table = torch.tensor(numbers, dtype=torch.float64)
    return Runs(
        Mixtures(
            torch.cat([m.weights for m in mixtures]), torch.cat([m.factors for m in mixtures])
        ),
        objective=table[:, 0],
        converged=torch.tensor([0 < len(e) < max_iterations for e in errors]),
        iterations=torch.tensor([len(e) for e in errors]),
        failures=failures,
        traces=tuple(tuple(e) for e in errors),
        raw=table[:, 1:],
    )


def _one_run(probs: np.ndarray, rank: int, method: str, settings: tuple[int, int, float]):
    """Mixture, (objective, raw relative error, negative mass, mass deficit), error trace, reason of
    failure.
    """
    try:
        # TensorLy warns and divides by zero on its way to an answer that is checked below.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            raw = _decompose(probs, rank, method, settings)
        if not all(np.isfinite(f).all() for f in [raw.weights, *raw.factors]):
            raise FloatingPointError("TensorLy returned NaN or infinite factors")
        mixture = _projected(probs, raw) if method == "als" else _renormalised(raw)
        error = _relative_error(
            probs, mixture.weights[0].numpy(), list(mixture.factors[0].mT.numpy())
        )
        return mixture, (error, *_raw_numbers(probs, raw)), raw.errors, ""
    except (np.linalg.LinAlgError, ArithmeticError, ValueError, IndexError) as error:
        return (
            _marginal_product(probs, rank),
            (math.inf,) + (math.nan,) * 3,
            [],
            f"{type(error).__name__}: {error}",
        )


def _decompose(
    probs: np.ndarray, rank: int, method: str, settings: tuple[int, int, float]
) -> _RawFit:
    seed, max_iterations, tolerance = settings
    solver = {"als": parafac, "hals": non_negative_parafac_hals, "mu": non_negative_parafac}[method]
    # The backend is global state: set for this thread and put back.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        (weights, factors), errors = solver(
            probs,
            rank,
            n_iter_max=max_iterations,
            init="random",
            tol=tolerance,
            random_state=np.random.RandomState(seed),
            return_errors=True,
        )
    return _RawFit(
        np.asarray(weights, np.float64),
        [np.asarray(f, np.float64) for f in factors],
        [float(e) for e in errors],
    )


def _projected(probs: np.ndarray, raw: _RawFit) -> Mixtures:
    """Flip signs per component, clip, normalise columns, refit the weights by non-negative least
    squares.
    """
    factors = [np.maximum(f, 0.0) for f in _with_signs_aligned(raw)]
    sums = [f.sum(0) for f in factors]
    alive = np.prod([s > 0 for s in sums], axis=0).astype(bool)
    if not alive.any():
        raise FloatingPointError("nothing of the fit is left after clipping negative factors")
    factors = [
        np.where(alive, f / np.where(alive, s, 1.0), 1.0 / len(f))
        for f, s in zip(factors, sums, strict=True)
    ]
    weights = np.where(alive, _refitted_weights(probs, factors, alive), 0.0)
    return _mixture(weights, factors)


def _with_signs_aligned(raw: _RawFit) -> list[np.ndarray]:
    """Each factor column made mostly positive; a component that is negative then is negative in its
    last factor.
    """
    factors, sign = [], np.sign(raw.weights) + (raw.weights == 0)
    for factor in raw.factors:
        side = np.where(factor.sum(0) < 0, -1.0, 1.0)
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
    gram = np.prod([f.T @ f for f in factors], axis=0) * np.outer(alive, alive)
    projection = _contract_all(probs, factors) * alive
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * 1e-12
    root = np.sqrt(values[kept])
    weights, _ = scipy.optimize.nnls(
        root[:, None] * vectors[:, kept].T, vectors[:, kept].T @ projection / root
    )
    if not weights.sum() > 0:
        raise FloatingPointError("non-negative least squares left no component any weight")
    return weights


def _contract_all(probs: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """``<P, component a>`` for every a: (rank,)."""
    partial = probs.reshape(len(factors[0]), -1).T @ factors[0]
    for factor in factors[1:]:
        partial = np.einsum("vra,va->ra", partial.reshape(len(factor), -1, factor.shape[1]), factor)
    return partial.reshape(-1)


def _renormalised(raw: _RawFit) -> Mixtures:
    # TensorLy's non-negative solvers may return entries of -1e-17.
    return _mixture(np.maximum(raw.weights, 0.0), [np.maximum(f, 0.0) for f in raw.factors])


def _mixture(weights: np.ndarray, factors: list[np.ndarray]) -> Mixtures:
    proper = normalised_cp(torch.from_numpy(weights), [torch.from_numpy(f) for f in factors])
    return Mixtures(proper.weights[None], torch.stack(list(proper.factors)).mT[None].contiguous())


def _marginal_product(probs: np.ndarray, rank: int) -> Mixtures:
    axes = range(probs.ndim)
    marginals = [probs.sum(tuple(a for a in axes if a != axis)) for axis in axes]
    return _mixture(np.full(rank, 1.0 / rank), [np.repeat(m[:, None], rank, 1) for m in marginals])


def _raw_numbers(probs: np.ndarray, raw: _RawFit) -> tuple[float, float, float]:
    """Relative error, negative mass and mass deficit of the raw answer."""
    negative, total = 0.0, 0.0
    rest = _khatri_rao(raw.factors[1:])
    for row in raw.factors[0] * raw.weights:
        entries = rest @ row
        negative -= float(np.minimum(entries, 0.0).sum())
        total += float(entries.sum())
    return _relative_error(probs, raw.weights, raw.factors), negative, 1.0 - total


def _relative_error(probs: np.ndarray, weights: np.ndarray, factors: list[np.ndarray]) -> float:
    rest = _khatri_rao(factors[1:])
    rows = zip(probs.reshape(len(probs), -1), factors[0] * weights, strict=True)
    squared = sum(float(np.square(p - rest @ row).sum()) for p, row in rows)
    return math.sqrt(squared) / float(np.linalg.norm(probs))


def _khatri_rao(factors: list[np.ndarray]) -> np.ndarray:
    product = np.ones((1, factors[0].shape[1])) if not factors else factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).reshape(-1, factor.shape[1])
    return product
