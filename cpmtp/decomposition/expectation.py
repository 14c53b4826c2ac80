"""The step that every Kullback-Leibler fit shares: expected component counts, from three matrix products at any horizon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.cp_distribution import khatri_rao
from cpmtp.joint_distribution import JointDistribution

# Entries of the joint in flight: quotients of a block this large stay in a core's cache between the three products.
_CPU_BLOCK = 1 << 17
_CUDA_BLOCK = 1 << 28
# Below any probability a float64 joint can hold to some digits; keeps 0 / 0 at 0.
_TINY = 1e-290


@dataclass(frozen=True)
class Mixtures:
    """Parameters of many CP distributions at once: one run is one restart on one joint.

    Attributes
    ----------
    weights : (runs, rank) tensor
    factors : (runs, horizon, vocab, rank) tensor
    """

    weights: Float[Tensor, "runs rank"]
    factors: Float[Tensor, "runs horizon vocab rank"]

    def __getitem__(self, index) -> Mixtures:
        return Mixtures(self.weights[index], self.factors[index])

    def __len__(self) -> int:
        return len(self.weights)

    def replaced(self, index: Tensor, other: Mixtures) -> Mixtures:
        """A copy with the runs at `index` (long or bool) taken from `other`."""
        weights, factors = self.weights.clone(), self.factors.clone()
        weights[index], factors[index] = other.weights, other.factors
        return Mixtures(weights, factors)


@dataclass(frozen=True)
class Counts:
    """Expected component counts under the target, per unit of its mass.

    Attributes
    ----------
    weights : (runs, rank) tensor
        ``n_a = E_P[Q(a | x)]``.
    factors : (runs, horizon, vocab, rank) tensor
        ``N_i[v, a] = E_P[Q(a | x) 1(x_i = v)]``; sums to n_a over v.
    kl : (runs,) tensor
        ``KL(P || Q)`` in nats of the mixtures that were counted.
    """

    weights: Float[Tensor, "runs rank"]
    factors: Float[Tensor, "runs horizon vocab rank"]
    kl: Float[Tensor, " runs"]


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
    horizon, vocab : int
    """

    matrices: Float[Tensor, "items rows columns"]
    negative_entropy: Float[Tensor, " items"]
    owner: Int[Tensor, " runs"]
    horizon: int
    vocab: int

    @classmethod
    def of(cls, joint: JointDistribution, runs_per_item: int = 1) -> Targets:
        """Targets of a joint (batch axes flattened), each repeated for `runs_per_item` consecutive runs."""
        vocab, horizon = joint.vocab_size, joint.horizon
        head = horizon // 2
        matrices = joint.probs.double().reshape(-1, vocab**head, vocab ** (horizon - head))
        owner = torch.arange(len(matrices), device=matrices.device).repeat_interleave(runs_per_item)
        negative_entropy = -JointDistribution(matrices.flatten(1), 1).entropy()
        return cls(matrices, negative_entropy, owner, horizon, vocab)

    def __getitem__(self, runs) -> Targets:
        return Targets(self.matrices, self.negative_entropy, self.owner[runs], self.horizon, self.vocab)

    def __len__(self) -> int:
        return len(self.owner)


def expected_counts(targets: Targets, mixtures: Mixtures) -> Counts:
    """The E step of latent class analysis for every run, and the KL divergence it started from.

    With ``L = w * (A_1 (*) ... (*) A_h)`` and ``R = A_{h+1} (*) ... (*) A_n`` (Khatri-Rao products of the two halves of the
    positions), the model is ``L R^T``, the quotients are ``T = P / (L R^T)``, and the counts of the two halves are
    ``L * (T R)`` and ``R * (T^T L)``: three matrix products with the joint, in blocks of rows, so nothing as large as the
    joint is allocated.

    References
    ----------
    hong2020generalized
    """
    head = targets.horizon // 2
    left = khatri_rao(list(mixtures.factors[:, :head].unbind(1))) * mixtures.weights[:, None]
    right = khatri_rao(list(mixtures.factors[:, head:].unbind(1)))
    left_pull, right_pull = torch.empty_like(left), torch.empty_like(right)
    log_likelihood = left.new_empty(len(left))
    rows, columns = left.shape[1], right.shape[1]
    block = _CUDA_BLOCK if left.is_cuda else _CPU_BLOCK
    step = max(block // (rows * columns), 1)
    for start in range(0, len(left), step):
        runs = slice(start, start + step)
        log_likelihood[runs] = _pull(
            targets[runs], (left[runs], right[runs]), (left_pull[runs], right_pull[runs]), max(block // columns, 1)
        )
    left_pull *= left
    right_pull *= right
    factors = torch.stack(_position_sums(left_pull, targets.vocab) + _position_sums(right_pull, targets.vocab), 1)
    kl = targets.negative_entropy[targets.owner] - log_likelihood
    return Counts(left_pull.sum(1), factors, kl)


def _pull(targets: Targets, halves: tuple[Tensor, Tensor], pulls: tuple[Tensor, Tensor], row_step: int) -> Tensor:
    """Fill ``T R`` and ``T^T L`` for a few runs and return ``sum P log(L R^T)``."""
    left, right = halves
    probs = targets.matrices[targets.owner] if len(left) > 1 else targets.matrices[int(targets.owner[0])][None]
    log_likelihood = left.new_zeros(len(left))
    for start in range(0, left.shape[1], row_step):
        rows = slice(start, start + row_step)
        model = torch.bmm(left[:, rows], right.mT).clamp_min_(_TINY)
        log_likelihood += (probs[:, rows] * model.log()).sum((1, 2))
        quotient = torch.div(probs[:, rows], model, out=model)
        torch.bmm(quotient, right, out=pulls[0][:, rows])
        torch.baddbmm(pulls[1], quotient.mT, left[:, rows], beta=1.0 if start else 0.0, out=pulls[1])
    return log_likelihood


def _position_sums(half: Tensor, vocab: int) -> list[Tensor]:
    """Counts of each position from the counts of a half's sequences: (runs, vocab**m, rank) to m of (runs, vocab, rank)."""
    runs, size, rank = half.shape
    sums, before = [], 1
    while before < size:
        sums.append(half.view(runs, before, vocab, -1, rank).sum((1, 3)))
        before *= vocab
    return sums
