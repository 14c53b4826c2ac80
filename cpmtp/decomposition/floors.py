"""What no CP distribution of a given rank can beat, so that a reader sees how much a fit can still
gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.shown import Shown

# An unfolding whose shorter side is longer than this is left out: its singular values would take
# minutes, and the floor holds without it.
_LONGEST_SIDE = 2048


@dataclass(frozen=True, repr=False)
class RankFloors(Shown):
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


@takes_what_is_given
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
    probs = joint.probs.double().reshape(-1, *(joint.vocab_size,) * joint.horizon)  # (items, …)
    flat = JointDistribution(probs, joint.horizon)
    logs = torch.tensor(list(ranks), dtype=torch.float64).log()  # (ranks,)
    entropy = flat.entropy()[:, None]  # (items, 1)
    singles = sum(_entropies(marginal) for marginal in flat.marginals())  # (items, 1)

    information = torch.zeros_like(entropy)  # (items, 1)
    tail = entropy.new_zeros(len(probs), len(ranks))  # (items, ranks)
    for unfolding in _unfoldings(flat):
        blocks = _entropies(unfolding.sum(2)) + _entropies(unfolding.sum(1))  # (items, 1)
        information = torch.maximum(information, blocks - entropy)
        if unfolding.shape[1] <= _LONGEST_SIDE:
            tail = torch.maximum(tail, _tails(unfolding, ranks))

    norm = probs.square().flatten(1).sum(1, keepdim=True)  # (items, 1)
    floors = (
        singles - entropy - (joint.horizon - 1) * logs,  # (items, ranks)
        information - logs,  # (items, ranks)
        0.5 * tail,  # (items, ranks)
    )
    largest = torch.stack(floors).amax(0).clamp_min(0.0)  # (items, ranks)
    shape = (*joint.batch_shape, len(ranks))
    tables = ((tail / norm).sqrt(), largest, *floors)
    return RankFloors(tuple(ranks), *(table.reshape(shape) for table in tables))  # (*batch, ranks)


def _unfoldings(flat: JointDistribution) -> Iterator[Float[Tensor, "items rows columns"]]:
    """The joint as matrices, (items, shorter block, rest), one for every split of the positions."""
    positions, items = range(flat.horizon), len(flat.probs)
    for size in range(1, flat.horizon // 2 + 1):
        for block in combinations(positions, size):
            # Of two blocks of one length, the one with the first position stands for both.
            if 2 * size < flat.horizon or 0 in block:
                rest = [i for i in positions if i not in block]
                axes = (0, *(1 + i for i in (*block, *rest)))
                turned = flat.probs.permute(axes)  # (items, *block, *rest)
                yield turned.reshape(items, flat.vocab_size**size, -1)  # (items, rows, columns)


def _entropies(probs: Float[Tensor, "items sequences"]) -> Float[Tensor, "items 1"]:
    return JointDistribution(probs, 1).entropy()[:, None]


def _tails(
    unfolding: Float[Tensor, "items rows columns"], ranks: Sequence[int]
) -> Float[Tensor, "items ranks"]:
    """``sum_{i>r} s_i^2`` at each rank."""
    energy = torch.linalg.svdvals(unfolding).square()  # (items, min(rows, columns))
    return torch.stack([energy[:, rank:].sum(1) for rank in ranks], 1)  # (items, ranks)
