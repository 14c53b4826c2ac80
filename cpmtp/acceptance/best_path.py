"""The most that a draft can earn that is not sampled: the best path after every first token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.acceptance.truncated import is_complete
from cpmtp.acceptance.verification import check_first_token
from cpmtp.drafts.prefix_tables import joints_of_prefixes
from cpmtp.joint_distribution import JointDistribution
from cpmtp.prefix_tree import PrefixTree, TreeLevel


@dataclass(frozen=True)
class TokensPerCallBounds:
    """Bounds of a number of tokens per call, from what a tree keeps.

    Attributes
    ----------
    lower, upper : float
        Equal on a complete tree.
    """

    lower: float
    upper: float


def best_path_tokens_per_call(
    joint: JointDistribution | PrefixTree, *, first_token: str = "target"
) -> float | Float[Tensor, "*batch"] | TokensPerCallBounds:
    """Tokens per call of the best draft that proposes one path instead of sampling.

    ``sum_{x1} max_y sum_k P(x1, y_2:k)`` where the target gives the first token, ``1 + max_y sum_k
    P(y_1:k)`` where it is drafted. Of a path that is proposed for certain, lossless rules accept
    what the target has of it, so they all earn the same. An anchored draft of any form and rank can
    propose any paths: where drafts are not sampled this one number is the ceiling of them all.

    Parameters
    ----------
    joint : JointDistribution or PrefixTree
    first_token : {"target", "draft"}

    Returns
    -------
    float, (*batch,) tensor or TokensPerCallBounds
        Bounds for a tree, equal where it is complete.

    Raises
    ------
    ValueError
        If `first_token` is unknown.

    Examples
    --------
    >>> joint = JointDistribution(torch.tensor([[0.1, 0.3], [0.4, 0.2]], dtype=torch.float64))
    >>> round(best_path_tokens_per_call(joint), 9)
    1.7
    """
    check_first_token(first_token)
    if isinstance(joint, PrefixTree):
        return _bounds(joint, first_token)
    joints = joints_of_prefixes(joint.probs, joint.horizon)
    value = joints[-1]
    for before in reversed(joints[1:-1]):
        value = before + value.amax(-1)  # (*batch, vocab, …), one axis less
    total = value.sum(-1) if first_token == "target" else 1 + value.amax(-1)  # (*batch,)
    return total if joint.batch_shape else total.item()


def _bounds(tree: PrefixTree, first_token: str) -> TokensPerCallBounds:
    """From the last level to the first: what is kept, and the most of what is not."""
    lower = upper = tree.levels[-1].probs
    for length in range(tree.horizon - 1, 0, -1):
        level, probs = tree.levels[length], tree.levels[length - 1].probs
        remaining = tree.horizon - length
        lower = probs + _best_child(level, lower, torch.zeros_like(probs))
        upper = probs + _best_child(level, upper, remaining * _likeliest_dropped(level, probs))
    first = tree.levels[0].probs
    one = torch.ones(1, dtype=torch.float64)
    dropped = max(1 - float(first.sum()), 0.0)
    if first_token == "target":
        low, high = float(lower.sum()) + dropped, float(upper.sum()) + tree.horizon * dropped
    else:
        unseen = tree.horizon * float(_likeliest_dropped(tree.levels[0], one))
        low, high = 1 + float(lower.max()), 1 + max(float(upper.max()), unseen)
    return TokensPerCallBounds(low, low if is_complete(tree) else high)


def _best_child(level: TreeLevel, values: Tensor, otherwise: Tensor) -> Float[Tensor, " parents"]:
    return otherwise.scatter_reduce(0, level.parents, values, "amax")


def _likeliest_dropped(level: TreeLevel, probs: Tensor) -> Float[Tensor, " parents"]:
    """The most that one child that is not kept can have: all of an unexpanded node; no more than
    the least of the kept ones, nor than is left.
    """
    kept = torch.zeros_like(probs).index_add_(0, level.parents, level.probs)
    left = (probs - kept).clamp_min(0)  # (parents,)
    return left.scatter_reduce(0, level.parents, level.probs, "amin")
