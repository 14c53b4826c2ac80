"""How far a draft's joint law is from the target's: four divergences in one pass over the joint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.drafts.protocol import as_draft, is_anchored
from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.shown import Shown

# Entries of the joint compared at once: the working set is a few blocks of this size, however large
# the joint.
_BLOCK = 1 << 18


@dataclass(frozen=True, repr=False)
class Divergences(Shown):
    """Divergences of a draft Q from the target P.

    Attributes
    ----------
    kl_nats : float or (*batch,) tensor
        ``KL(P || Q) = sum P log(P / Q)`` in nats; infinite where Q excludes what P allows.
    total_variation : float or (*batch,) tensor
        ``1/2 sum |P - Q|``, between 0 and 1.
    relative_frobenius : float or (*batch,) tensor
        ``||P - Q|| / ||P||``.
    hellinger : float or (*batch,) tensor
        ``sqrt(1/2 sum (sqrt P - sqrt Q)^2)``, between 0 and 1.
    """

    kl_nats: float | Float[Tensor, "*batch"]
    total_variation: float | Float[Tensor, "*batch"]
    relative_frobenius: float | Float[Tensor, "*batch"]
    hellinger: float | Float[Tensor, "*batch"]


@takes_what_is_given
def divergences(joint: JointDistribution, draft: Any) -> Divergences:
    """Kullback-Leibler divergence, total variation, relative Frobenius error and Hellinger distance
    of Q from P.

    Parameters
    ----------
    joint : JointDistribution
        The target P, with or without batch axes.
    draft : Draft, FitResult or JointDistribution
        The draft Q over the same tokens and batch axes; or an anchored one: one batch axis (vocab,)
        more and horizon n-1, whose joint law is ``P(x1) Q_{x1}(x_2:n)``.

    Returns
    -------
    Divergences
        Floats for an unbatched joint, (*batch,) tensors otherwise. Never NaN: a zero of P adds
        nothing to the KL divergence, a zero of Q where P is positive makes it infinite.

    Raises
    ------
    ValueError
        If the draft's vocabulary, horizon or batch axes do not fit the joint's.

    References
    ----------
    gibbs2002choosing

    Examples
    --------
    >>> from cpmtp.drafts.cp_distribution import CPDistribution
    >>> joint = JointDistribution(torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64))
    >>> half = torch.full((2, 1), 0.5, dtype=torch.float64)
    >>> draft = CPDistribution(torch.ones(1, dtype=torch.float64), [half, half])
    >>> result = divergences(joint, draft)
    >>> round(result.kl_nats, 4), result.total_variation, round(result.relative_frobenius, 4)
    (0.6931, 0.5, 0.7071)
    """
    anchored = is_anchored(draft, joint.vocab_size, joint.horizon, joint.batch_shape)
    batch = len(joint.batch_shape)
    first = joint.prefix_probs(1) if anchored else None
    *_, table = as_draft(draft).prefix_tables(first, anchored=anchored)

    lead = joint.probs.shape[: batch + anchored]
    p = joint.probs.reshape(*lead, -1, joint.vocab_size)  # (*batch[, vocab], prefixes, vocab)
    size = max(_BLOCK * p.shape[-2] // max(p.numel(), 1), 1)
    sums = torch.zeros(*joint.batch_shape, 5, dtype=torch.float64)
    for p_rows, q_rows in zip(p.split(size, -2), table.pieces(size), strict=True):
        # (*batch, 5)
        sums += _summed(p_rows.double().flatten(batch), q_rows.double().flatten(batch))

    kl, variation, squared_error, squared_norm, hellinger = sums.unbind(-1)
    found = (
        # Rounding can leave an exact fit a hair below zero.
        kl.clamp_min(0.0),
        0.5 * variation,
        (squared_error / squared_norm).sqrt(),
        (0.5 * hellinger).sqrt(),
    )
    return Divergences(*(value if batch else value.item() for value in found))


def _summed(
    p: Float[Tensor, "*batch entries"], q: Float[Tensor, "*batch entries"]
) -> Float[Tensor, "*batch 5"]:
    """Sums over some entries: of the divergence, of the gaps, their squares, P's and the roots'."""
    gap = p - q
    divergence = torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(p, q).sum(-1)
    roots = (p.sqrt() - q.sqrt()).square_().sum(-1)
    variation = gap.abs().sum(-1)
    return torch.stack(
        [divergence, variation, gap.square_().sum(-1), p.square().sum(-1), roots], -1
    )
