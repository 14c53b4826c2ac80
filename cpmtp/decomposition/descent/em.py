"""Expectation-maximisation (latent class analysis): the expectation step from three matrix products
at any horizon, the maximisation step, and SQUAREM with a monotone safeguard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.descent.squarem import BURN_IN, FIRST_STEP_LIMIT, limits_after
from cpmtp.decomposition.mixtures import Counts, Mixtures, Runs, descend
from cpmtp.joint_distribution import JointDistribution

# Entries of the joint in flight: quotients of a block this large stay in a core's cache between the
# three products.
_CPU_BLOCK = 1 << 18
_CUDA_BLOCK = 1 << 28
# Below any probability a float64 joint can hold to some digits; keeps 0 / 0 at 0.
_TINY = 1e-290
# Logarithms of probabilities below this no longer matter to any sum of float64 probabilities.
_LOWEST = 1e-280
_TRIAL_SWEEPS = 12


@dataclass(frozen=True)
class Targets:
    """Joints as matrices, positions split in two halves: ``P[(x_1..x_h), (x_{h+1}..x_n)]``.

    Attributes
    ----------
    matrices : (items, vocab**h, vocab**(n-h)) tensor
    negative_entropy : (items,) tensor
        ``sum P log P``.
    owner : (runs,) tensor
        Which joint each run is fitted to.
    scratch : (2, block) tensor
        Room for one block's model and quotients, kept from sweep to sweep: fresh pages cost more
        than the arithmetic.
    horizon, vocab : int
    """

    matrices: Float[Tensor, "items rows columns"]
    negative_entropy: Float[Tensor, " items"]
    owner: Int[Tensor, " runs"]
    scratch: Float[Tensor, "2 block"]
    horizon: int
    vocab: int

    @classmethod
    def of(cls, joint: JointDistribution, runs_per_item: int = 1) -> Targets:
        """Targets of a joint (batch axes flattened), each for `runs_per_item` consecutive runs."""
        vocab, horizon = joint.vocab_size, joint.horizon
        head = horizon // 2
        shape = (-1, vocab**head, vocab ** (horizon - head))
        matrices = joint.probs.double().reshape(shape)  # (items, rows, columns)
        owner = torch.arange(len(matrices), device=matrices.device)  # (items,)
        negative_entropy = -JointDistribution(matrices.flatten(1), 1).entropy()  # (items,)
        scratch = matrices.new_empty(2, 0)
        once = cls(matrices, negative_entropy, owner, scratch, horizon, vocab)
        return once.for_runs(owner.repeat_interleave(runs_per_item))  # (items * runs_per_item,)

    def for_runs(self, owner: Int[Tensor, " runs"]) -> Targets:
        """The same joints for other runs."""
        block = max(_block(self.matrices), self.matrices.shape[-1])
        block = min(block, len(owner) * self.matrices[0].numel())
        return replace(self, owner=owner, scratch=self.matrices.new_empty(2, block))

    def __getitem__(self, runs) -> Targets:
        return replace(self, owner=self.owner[runs])

    def __len__(self) -> int:
        return len(self.owner)


@runtime_checkable
class CountingTargets(Protocol):
    """Targets that are no matrices and do their own expectation step."""

    def expected_counts(self, mixtures: Mixtures) -> Counts:
        """Do the expectation step for every run."""
        ...

    def for_runs(self, owner: Int[Tensor, " runs"]) -> CountingTargets:
        """The same joints for other runs: which of them each is fitted to."""
        ...

    def __getitem__(self, runs) -> CountingTargets: ...


def em_runs(
    targets: Targets | CountingTargets,
    start: Mixtures,
    *,
    max_iterations: int,
    tolerance: float,
    accelerate: bool = True,
) -> Runs:
    """Fit every run from `start`; the KL divergence never rises.

    Two sweeps ``x0 -> x1 -> x2`` and the point ``x0 + 2 s (x1 - x0) + s^2 (x2 - 2 x1 + x0)`` in the
    logarithms of the parameters, kept if its divergence is not above that of x0 (else x2 is taken).
    Runs end as `descend` says.

    Parameters
    ----------
    max_iterations : int
        Most passes over the joint, rejected extrapolations included.
    tolerance : float
        In nats.
    accelerate : bool
        False: plain sweeps.

    References
    ----------
    varadhan2008squarem, goodman1974exploratory
    """

    def advance(alive: Tensor, point: _Point) -> tuple[_Point, list[int]]:
        if accelerate and point.rounds >= BURN_IN:
            return _squarem_cycle(targets[alive], point)
        mixtures = m_step(point.counts, point.mixtures)
        counts = expected_counts(targets[alive], mixtures)
        point = replace(point, mixtures=mixtures, counts=counts, rounds=point.rounds + 1)
        return point, [1] * len(alive)

    step_limit = start.weights.new_full((len(start),), FIRST_STEP_LIMIT)
    begin = _Point(start, expected_counts(targets, start), step_limit, 0)
    found = descend(begin, advance, max_passes=max_iterations, tolerance=tolerance)

    mixtures = Mixtures.joined([end.mixtures for end in found.ends])[found.order]
    kl = torch.cat([end.values for end in found.ends])[found.order]  # (runs,)
    return Runs.of(mixtures, kl, found.converged, found.traces)


@dataclass(frozen=True)
class _Point:
    """Where some runs are.

    Attributes
    ----------
    counts : Counts
        Of `mixtures`.
    step_limit : (runs,) tensor
        Longest extrapolation each run may try.
    rounds : int
        Steps taken so far.
    """

    mixtures: Mixtures
    counts: Counts
    step_limit: Float[Tensor, " runs"]
    rounds: int

    @property
    def values(self) -> Float[Tensor, " runs"]:
        return self.counts.kl

    def __getitem__(self, runs: Tensor) -> _Point:
        return _Point(self.mixtures[runs], self.counts[runs], self.step_limit[runs], self.rounds)


def promising(targets: Targets | CountingTargets, starts: Mixtures, trials: int) -> Mixtures:
    """Of every `trials` consecutive runs where the one with the least divergence after twelve
    sweeps is.

    Divergences after a few sweeps foretell those at the end well enough: the chosen run ends about
    where the best of all would have ended.

    References
    ----------
    biernacki2003choosing
    """
    if trials == 1:
        return starts
    tried = starts
    for _ in range(_TRIAL_SWEEPS):
        tried = m_step(expected_counts(targets, tried, with_kl=False), tried)
    groups = expected_counts(targets, tried).kl.reshape(-1, trials)  # (chosen, trials)
    chosen = groups.argmin(1) + trials * torch.arange(len(groups), device=groups.device)
    return tried[chosen]


def expected_counts(
    targets: Targets | CountingTargets, mixtures: Mixtures, *, with_kl: bool = True
) -> Counts:
    """The E step of latent class analysis for every run, and the KL divergence it started from.

    With ``L[a] = w_a A_1[a] (x) ... (x) A_h[a]`` and ``R[a] = A_{h+1}[a] (x) ... (x) A_n[a]``
    (outer products over the two halves of the positions), the model is ``L^T R``, the quotients are
    ``T = P / (L^T R)``, and the counts of the two halves are ``L * (R T^T)`` and ``R * (L T)``:
    three matrix products with the joint, in blocks of rows, so nothing as large as the joint is
    allocated.

    Parameters
    ----------
    targets : Targets or CountingTargets
        The latter do it their own way.
    mixtures : Mixtures
        As many runs as the targets.
    with_kl : bool
        False leaves the divergences NaN: a logarithm per entry of the joint is a quarter of a
        sweep.

    References
    ----------
    hong2020generalized
    """
    if not isinstance(targets, Targets):
        return targets.expected_counts(mixtures)
    head = targets.horizon // 2
    left = outer_products(mixtures.factors[:, :head])  # (runs, rank, rows)
    left = left * mixtures.weights[..., None]  # (runs, rank, rows)
    right = outer_products(mixtures.factors[:, head:])  # (runs, rank, columns)

    left_pull, right_pull = torch.empty_like(left), torch.empty_like(right)
    log_likelihood = left.new_full((len(left),), 0.0 if with_kl else torch.nan)
    step = max(_block(left) // (left.shape[-1] * right.shape[-1]), 1)
    for start in range(0, len(left), step):
        runs = slice(start, start + step)
        pulls = (left_pull[runs], right_pull[runs])
        log_likelihood[runs] += _pull(targets[runs], (left[runs], right[runs]), pulls, with_kl)

    left_pull *= left
    right_pull *= right
    left_counts = _position_sums(left_pull, head, targets.vocab)
    right_counts = _position_sums(right_pull, targets.horizon - head, targets.vocab)
    return Counts(
        left_pull.sum(-1),  # (runs, rank)
        torch.cat([left_counts, right_counts], 1),  # (runs, horizon, rank, vocab)
        targets.negative_entropy[targets.owner] - log_likelihood,  # (runs,)
    )


def _pull(
    targets: Targets, halves: tuple[Tensor, Tensor], pulls: tuple[Tensor, Tensor], with_kl: bool
) -> Float[Tensor, " runs"]:
    """Fill ``R T^T`` and ``L T`` of a few runs; ``sum P log(L^T R)`` where it is asked for, else
    zero.
    """
    left, right = halves
    log_likelihood = left.new_zeros(len(left))
    probs = (
        targets.matrices[targets.owner]  # (runs, rows, columns)
        if len(left) > 1
        else targets.matrices[int(targets.owner[0])][None]  # (1, rows, columns), not copied
    )
    step = max(_block(left) // (len(left) * right.shape[-1]), 1)
    for start in range(0, left.shape[-1], step):
        rows = slice(start, start + step)
        shape = (len(left), left[..., rows].shape[-1], right.shape[-1])
        model, quotient = (buffer[: math.prod(shape)].view(shape) for buffer in targets.scratch)

        torch.bmm(left[..., rows].mT, right, out=model).clamp_min_(_TINY)  # (runs, step, columns)
        if with_kl:
            terms = torch.log(model, out=quotient).mul_(probs[:, rows])  # (runs, step, columns)
            log_likelihood += terms.sum((1, 2))  # (runs,)

        torch.div(probs[:, rows], model, out=quotient)  # (runs, step, columns)
        torch.bmm(right, quotient.mT, out=pulls[0][..., rows])  # (runs, rank, step)
        kept = 1.0 if start else 0.0
        torch.baddbmm(pulls[1], left[..., rows], quotient, beta=kept, out=pulls[1])  # (…, columns)
    return log_likelihood


def outer_products(
    factors: Float[Tensor, "runs positions rank vocab"],
) -> Float[Tensor, "runs rank sequences"]:
    """``A_1[a] (x) ... (x) A_m[a]`` for every component; the first position varies slowest."""
    product = factors.new_ones(len(factors), factors.shape[2], 1)  # (runs, rank, 1)
    for position in range(factors.shape[1]):
        grown = product.unsqueeze(-1) * factors[:, position].unsqueeze(-2)  # (…, sequences, vocab)
        product = grown.flatten(-2)  # (runs, rank, sequences * vocab)
    return product


def _block(like: Tensor) -> int:
    return _CUDA_BLOCK if like.is_cuda else _CPU_BLOCK


def _position_sums(
    half: Float[Tensor, "runs rank sequences"], positions: int, vocab: int
) -> Float[Tensor, "runs positions rank vocab"]:
    """Counts of each position from the counts of a half's sequences."""
    runs, rank, _ = half.shape
    sums = []
    for position in range(positions):
        shape = (runs, rank, vocab**position, vocab, -1)
        sums.append(half.view(shape).sum((2, 4)))  # (runs, rank, vocab)
    return torch.stack(sums, 1) if sums else half.new_empty(runs, 0, rank, vocab)


def m_step(counts: Counts, previous: Mixtures) -> Mixtures:
    """Counts normalised; a component without any keeps its factors."""
    total = counts.factors.sum(-1, keepdim=True)  # (runs, horizon, rank, 1)
    share = counts.factors / torch.where(total > 0, total, 1.0)  # (runs, horizon, rank, vocab)
    return Mixtures(
        counts.weights / counts.weights.sum(-1, keepdim=True),
        torch.where(total > 0, share, previous.factors),
    )


def _squarem_cycle(targets: Targets | CountingTargets, point: _Point) -> tuple[_Point, list[int]]:
    """Where the runs are next, and the passes over the joint this took each: 3 after a rejected
    extrapolation, otherwise 2.
    """
    once = m_step(point.counts, point.mixtures)
    counts_once = expected_counts(targets, once, with_kl=False)
    twice = m_step(counts_once, once)
    proposed, step = _extrapolated((point.mixtures, once, twice), point.step_limit)
    counts = expected_counts(targets, proposed)
    risen = ~(counts.kl <= point.counts.kl)  # (runs,)

    step_limit = limits_after(risen, step, point.step_limit)
    if bool(risen.any()):
        proposed = proposed.replaced(risen, twice[risen])
        counts = counts.replaced(risen, expected_counts(targets[risen], twice[risen]))
    spent = [3 if up else 2 for up in risen.tolist()]
    return _Point(proposed, counts, step_limit, point.rounds + 1), spent


def _extrapolated(
    path: tuple[Mixtures, Mixtures, Mixtures], step_limit: Float[Tensor, " runs"]
) -> tuple[Mixtures, Float[Tensor, " runs"]]:
    """SQUAREM's point beyond ``x0 -> x1 -> x2`` and its step ``s = |x1 - x0| / |x2 - 2 x1 + x0|``
    in 1 to the limit.

    Lengths are weighted by the probabilities themselves (Fisher's metric): entries on their way to
    zero move for ever in their logarithm and mean nothing.
    """
    (w0, f0), (w1, f1), (w2, f2) = (
        (m.weights.clamp_min(_LOWEST).log(), m.factors.clamp_min(_LOWEST).log()) for m in path
    )
    w_step, f_step = w1 - w0, f1 - f0
    w_bend, f_bend = w2 - 2 * w1 + w0, f2 - 2 * f1 + f0
    weights = path[1].weights  # (runs, rank)
    mass = weights[:, None, :, None] * path[1].factors  # (runs, horizon, rank, vocab)

    length = (weights * w_step.square()).sum(1) + (mass * f_step.square()).sum((1, 2, 3))  # (runs,)
    bend = (weights * w_bend.square()).sum(1) + (mass * f_bend.square()).sum((1, 2, 3))  # (runs,)
    step = (length / bend.clamp_min(1e-300)).sqrt().clamp_min(1.0).minimum(step_limit)  # (runs,)

    s = step[:, None]  # (runs, 1)
    new_weights = (w0 + 2 * s * w_step + s.square() * w_bend).softmax(-1)
    s = step[:, None, None, None]  # (runs, 1, 1, 1)
    new_factors = (f0 + 2 * s * f_step + s.square() * f_bend).softmax(-1)
    return Mixtures(new_weights, new_factors), step
