"""What no CP distribution of a given rank can beat, so that a reader sees how much a fit can still
gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.joint_distribution import JointDistribution

# An unfolding whose shorter side is longer than this is left out: its singular values would take
# minutes, and the floor holds without it.
_LONGEST_SIDE = 2048


@dataclass(frozen=True)
class RankFloors:
    """Lower bounds for every CP distribution of each rank, (*batch, ranks).

    Attributes
    ----------
    ranks : tuple of int
    relative_frobenius : (*batch, ranks) tensor
        Eckart and Young: the largest over the unfoldings of ``sqrt(sum_{i>r} s_i^2) / ||P||``.
    kl_nats : (*batch, ranks) tensor
        The largest of the three below, at least 0.
    kl_from_total_correlation : (*batch, ranks) tensor
        ``TC - (n-1) log r``, ``TC = sum_i H(x_i) - H(x)``; the least possible divergence itself at
        r = 1.
    kl_from_mutual_information : (*batch, ranks) tensor
        ``max over splits I(block; block) - log r``.
    kl_from_unfoldings : (*batch, ranks) tensor
        ``1/2 max over unfoldings sum_{i>r} s_i^2`` (Pinsker with Eckart and Young).
    """

    ranks: tuple[int, ...]
    relative_frobenius: Float[Tensor, "*batch ranks"]
    kl_nats: Float[Tensor, "*batch ranks"]
    kl_from_total_correlation: Float[Tensor, "*batch ranks"]
    kl_from_mutual_information: Float[Tensor, "*batch ranks"]
    kl_from_unfoldings: Float[Tensor, "*batch ranks"]


def rank_floors(joint: JointDistribution, ranks: Sequence[int]) -> RankFloors:
    """Floors of relative Frobenius error and KL divergence at each rank.

    Parameters
    ----------
    joint : JointDistribution
    ranks : sequence of int

    Raises
    ------
    ValueError
        If there are no ranks or one is below 1.

    References
    ----------
    eckart1936approximation

    Examples
    --------
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> joint = exact_joint(separated_hmm(3, 8), torch.tensor([], dtype=torch.long), 3)
    >>> floors = rank_floors(joint, [1, 3])
    >>> bool(floors.kl_nats[0] > 0.01), bool(floors.relative_frobenius[1] < 1e-12)
    (True, True)
    """
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks {list(ranks)}: expected at least one, none below 1")
    shape = (*joint.batch_shape, len(ranks))
    flat = joint.probs.reshape(-1, *(joint.vocab_size,) * joint.horizon).double()
    rows = [_entry_floors(probs, ranks) for probs in flat]
    error, correlation, information, unfolding = (
        torch.stack(column).reshape(shape) for column in zip(*rows, strict=True)
    )
    largest = torch.maximum(torch.maximum(correlation, information), unfolding).clamp_min(0.0)
    return RankFloors(tuple(ranks), error, largest, correlation, information, unfolding)


def _entry_floors(probs: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    horizon, entropy = probs.ndim, _entropy(probs)
    logs = torch.tensor([math.log(rank) for rank in ranks], dtype=torch.float64)
    singles = [_entropy(_marginal(probs, (i,))) for i in range(horizon)]
    information, tails = (
        [torch.zeros((), dtype=torch.float64)],
        [torch.zeros(len(ranks), dtype=torch.float64)],
    )
    for block in _splits(horizon):
        rest = tuple(i for i in range(horizon) if i not in block)
        information.append(
            _entropy(_marginal(probs, block)) + _entropy(_marginal(probs, rest)) - entropy
        )
        rows = probs.shape[0] ** len(block)
        if rows <= _LONGEST_SIDE:
            energy = torch.linalg.svdvals(probs.permute(*block, *rest).reshape(rows, -1)).square()
            tails.append(torch.stack([energy[rank:].sum() for rank in ranks]))
    tail = torch.stack(tails).amax(0)
    return (
        (tail / probs.square().sum()).sqrt(),
        torch.stack(singles).sum() - entropy - (horizon - 1) * logs,
        torch.stack(information).amax() - logs,
        0.5 * tail,
    )


def _splits(horizon: int) -> list[tuple[int, ...]]:
    """One block, the shorter, of every split of the positions into two."""
    blocks = [
        block for size in range(1, horizon // 2 + 1) for block in combinations(range(horizon), size)
    ]
    return [block for block in blocks if 2 * len(block) < horizon or 0 in block]


def _marginal(probs: Tensor, block: tuple[int, ...]) -> Tensor:
    others = [i for i in range(probs.ndim) if i not in block]
    return probs.sum(dim=others) if others else probs


def _entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum()
