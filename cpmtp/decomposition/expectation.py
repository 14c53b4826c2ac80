"""The step that every Kullback-Leibler fit shares: expected component counts, from three matrix
products at any horizon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.joint_distribution import JointDistribution

# Entries of the joint in flight: quotients of a block this large stay in a core's cache between the
# three products.
_CPU_BLOCK = 1 << 18
_CUDA_BLOCK = 1 << 28
# Below any probability a float64 joint can hold to some digits; keeps 0 / 0 at 0.
_TINY = 1e-290


@dataclass(frozen=True)
class Mixtures:
    """Parameters of many CP distributions at once: one run is one restart on one joint.

    Attributes
    ----------
    weights : (runs, rank) tensor
    factors : (runs, horizon, rank, vocab) tensor
        Rows on the simplex: the layout in which the matrix products run fastest.
    """

    weights: Float[Tensor, "runs rank"]
    factors: Float[Tensor, "runs horizon rank vocab"]

    def __getitem__(self, index) -> Mixtures:
        return Mixtures(self.weights[index], self.factors[index])

    def __len__(self) -> int:
        return len(self.weights)

    def replaced(self, index: Tensor, other: Mixtures) -> Mixtures:
        """A copy with the runs at `index` (long or bool) taken from `other`."""
        return Mixtures(
            self.weights.index_put((index,), other.weights),
            self.factors.index_put((index,), other.factors),
        )


def joined(parts: list[Mixtures]) -> Mixtures:
    """All runs of several mixtures, one after another."""
    return Mixtures(
        torch.cat([part.weights for part in parts]), torch.cat([part.factors for part in parts])
    )


@dataclass(frozen=True)
class Counts:
    """Expected component counts under the target, per unit of its mass.

    Attributes
    ----------
    weights : (runs, rank) tensor
        ``n_a = E_P[Q(a | x)]``.
    factors : (runs, horizon, rank, vocab) tensor
        ``N_i[a, v] = E_P[Q(a | x) 1(x_i = v)]``; sums to n_a over v.
    kl : (runs,) tensor
        ``KL(P || Q)`` in nats of the mixtures that were counted.
    """

    weights: Float[Tensor, "runs rank"]
    factors: Float[Tensor, "runs horizon rank vocab"]
    kl: Float[Tensor, " runs"]

    def __getitem__(self, index) -> Counts:
        return Counts(self.weights[index], self.factors[index], self.kl[index])

    def replaced(self, index: Tensor, other: Counts) -> Counts:
        """A copy with the runs at `index` (long or bool) taken from `other`."""
        fields = [(self.weights, other.weights), (self.factors, other.factors), (self.kl, other.kl)]
        return Counts(*(mine.index_put((index,), theirs) for mine, theirs in fields))


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
        """Targets of a joint (batch axes flattened), each repeated for `runs_per_item` consecutive
        runs.
        """
        vocab, horizon = joint.vocab_size, joint.horizon
        head = horizon // 2
        matrices = joint.probs.double().reshape(-1, vocab**head, vocab ** (horizon - head))
        owner = torch.arange(len(matrices), device=matrices.device).repeat_interleave(runs_per_item)
        negative_entropy = -JointDistribution(matrices.flatten(1), 1).entropy()
        block = min(max(_block(matrices), matrices.shape[-1]), len(owner) * matrices[0].numel())
        return cls(matrices, negative_entropy, owner, matrices.new_empty(2, block), horizon, vocab)

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

    def __getitem__(self, runs) -> CountingTargets: ...


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
    left = outer_products(mixtures.factors[:, :head]) * mixtures.weights[..., None]
    right = outer_products(mixtures.factors[:, head:])
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
    factors = torch.cat([left_counts, right_counts], 1)
    return Counts(
        left_pull.sum(-1), factors, targets.negative_entropy[targets.owner] - log_likelihood
    )


def _pull(
    targets: Targets, halves: tuple[Tensor, Tensor], pulls: tuple[Tensor, Tensor], with_kl: bool
) -> Tensor:
    """Fill ``R T^T`` and ``L T`` of a few runs; ``sum P log(L^T R)`` where it is asked for, else
    zero.
    """
    left, right = halves
    log_likelihood = left.new_zeros(len(left))
    probs = (
        targets.matrices[targets.owner]
        if len(left) > 1
        else targets.matrices[int(targets.owner[0])][None]
    )
    row_step = max(_block(left) // (len(left) * right.shape[-1]), 1)
    for start in range(0, left.shape[-1], row_step):
        rows = slice(start, start + row_step)
        shape = (len(left), left[..., rows].shape[-1], right.shape[-1])
        model, quotient = (buffer[: math.prod(shape)].view(shape) for buffer in targets.scratch)
        torch.bmm(left[..., rows].mT, right, out=model).clamp_min_(_TINY)
        if with_kl:
            log_likelihood += torch.log(model, out=quotient).mul_(probs[:, rows]).sum((1, 2))
        torch.div(probs[:, rows], model, out=quotient)
        torch.bmm(right, quotient.mT, out=pulls[0][..., rows])
        torch.baddbmm(pulls[1], left[..., rows], quotient, beta=1.0 if start else 0.0, out=pulls[1])
    return log_likelihood


def outer_products(
    factors: Float[Tensor, "runs positions rank vocab"],
) -> Float[Tensor, "runs rank sequences"]:
    """``A_1[a] (x) ... (x) A_m[a]`` for every component; the first position varies slowest."""
    product = factors.new_ones(len(factors), factors.shape[2], 1)
    for position in range(factors.shape[1]):
        product = (product.unsqueeze(-1) * factors[:, position].unsqueeze(-2)).flatten(-2)
    return product


def _block(like: Tensor) -> int:
    return _CUDA_BLOCK if like.is_cuda else _CPU_BLOCK


def _position_sums(
    half: Float[Tensor, "runs rank sequences"], positions: int, vocab: int
) -> Float[Tensor, "runs positions rank vocab"]:
    """Counts of each position from the counts of a half's sequences."""
    runs, rank, _ = half.shape
    befores = [vocab**position for position in range(positions)]
    sums = [half.view(runs, rank, before, vocab, -1).sum((2, 4)) for before in befores]
    return torch.stack(sums, 1) if sums else half.new_empty(runs, 0, rank, vocab)
