"""How far a draft's joint law is from the target's: four divergences in one pass over the joint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution, khatri_rao
from cpmtp.joint_distribution import JointDistribution

# Entries of the joint compared at once: the working set is a few blocks of this size, however large
# the joint.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Divergences:
    """Divergences of a draft law Q from the target law P.

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


def divergences(joint: JointDistribution, draft: CPDistribution | JointDistribution) -> Divergences:
    """Kullback-Leibler divergence, total variation, relative Frobenius error and Hellinger distance
    of Q from P.

    Parameters
    ----------
    joint : JointDistribution
        The target P, with or without batch axes.
    draft : CPDistribution or JointDistribution
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
    >>> round(result.kl_nats, 4), result.total_variation, result.relative_frobenius
    (0.6931, 0.5, 0.7071067811865476)
    """
    anchored = is_anchored(joint, draft)
    rows = [_entry_divergences(p, q) for p, q in _entries(joint, draft, anchored)]
    if not joint.batch_shape:
        return Divergences(*rows[0])
    table = torch.tensor(rows, dtype=torch.float64).reshape(*joint.batch_shape, 4)
    return Divergences(*table.unbind(-1))


def is_anchored(joint: JointDistribution, draft: CPDistribution | JointDistribution) -> bool:
    """Whether the draft holds one law of the remaining n-1 tokens for each first token.

    Raises
    ------
    ValueError
        If the draft fits the joint neither so nor plainly.
    """
    if draft.vocab_size != joint.vocab_size:
        raise ValueError(
            f"the draft is over {draft.vocab_size} tokens and the joint over {joint.vocab_size}: "
            "use one vocabulary for both"
        )
    if draft.horizon == joint.horizon and draft.batch_shape == joint.batch_shape:
        return False
    if draft.horizon == joint.horizon - 1 and draft.batch_shape == (
        *joint.batch_shape,
        joint.vocab_size,
    ):
        return True
    raise ValueError(
        f"a draft of horizon {draft.horizon} and batch axes {tuple(draft.batch_shape)} does not "
        "fit a joint of horizon "
        f"{joint.horizon} and batch axes {tuple(joint.batch_shape)}: expected the same, or an "
        "anchored draft (horizon n-1, "
        "one more batch axis of the vocabulary's length)"
    )


def _entries(
    joint: JointDistribution, draft, anchored: bool
) -> Iterator[tuple[Tensor, Callable[[slice], Tensor]]]:
    """Pairs of one batch entry's probabilities as a matrix (vocab, rest) and a reader of the
    draft's rows.
    """
    vocab = joint.vocab_size
    for item, probs in enumerate(joint.probs.reshape(-1, vocab, vocab ** (joint.horizon - 1))):
        if isinstance(draft, JointDistribution):
            dense = draft.probs.reshape(-1, vocab, vocab ** (joint.horizon - 1))[item]
            scale = probs.sum(1, keepdim=True) if anchored else torch.ones_like(probs[:, :1])
            yield probs, _dense_reader(scale, dense)
        elif anchored:
            yield (
                probs,
                _anchored_reader(
                    probs.sum(1), _flat(draft, 1 + len(joint.batch_shape), item * vocab, vocab)
                ),
            )
        else:
            yield probs, _plain_reader(*_flat(draft, len(joint.batch_shape), item, 1))


def _dense_reader(scale: Tensor, dense: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: scale[rows] * dense[rows]


def _flat(draft: CPDistribution, axes: int, start: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """Weights and factors of `count` entries of the flattened first `axes` axes."""
    weights = draft.weights.reshape(-1, draft.rank)[start : start + count]
    factors = [
        f.reshape(-1, draft.vocab_size, draft.rank)[start : start + count] for f in draft.factors
    ]
    return weights, factors


def _plain_reader(weights: Tensor, factors: list[Tensor]):
    lead = weights * factors[0][0]
    rest = khatri_rao([factor[0] for factor in factors[1:]]) if len(factors) > 1 else None
    return lambda rows: lead[rows].sum(1, keepdim=True) if rest is None else lead[rows] @ rest.mT


def _anchored_reader(first: Tensor, parameters: tuple[Tensor, list[Tensor]]):
    def read(rows: slice) -> Tensor:
        weights, factors = parameters[0][rows], [factor[rows] for factor in parameters[1]]
        return first[rows, None] * CPDistribution(weights, tuple(factors)).to_tensor().flatten(1)

    return read


def _entry_divergences(probs: Tensor, read) -> tuple[float, float, float, float]:
    step = max(_BLOCK // probs.shape[1], 1)
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(probs), step):
        rows = slice(start, start + step)
        p, q = probs[rows].double(), read(rows).double()
        gap = p - q
        sums[0] += torch.special.xlogy(p, p).sum() - torch.special.xlogy(p, q).sum()
        sums[1] += gap.abs().sum()
        sums[2] += gap.square_().sum()
        sums[3] += p.square().sum()
        sums[4] += (p.sqrt() - q.sqrt()).square_().sum()
    kl, variation, squared_error, squared_norm, hellinger = sums.tolist()
    # Rounding can leave an exact fit a hair below zero.
    return (
        max(kl, 0.0),
        0.5 * variation,
        math.sqrt(squared_error / squared_norm),
        math.sqrt(0.5 * hellinger),
    )
