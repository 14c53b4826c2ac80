"""Many continuations of one context as a single row of tokens: a tree laid flat, and the attention
that respects it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Attention scores held at once: few enough to stay in a processor's cache between the product and
# the softmax.
_SCORES_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class TokenTree:
    """Continuations with each shared beginning laid out once; their last tokens stand at the end,
    in the order given.

    Attributes
    ----------
    token_ids : (tokens,) long tensor
    depths : (tokens,) long tensor
        How many tokens of the same continuation come before.
    lineage : (tokens, length) long tensor
        Where each token's continuation stands, from its first token to the token itself; -1 beyond.
    """

    token_ids: Int[Tensor, " tokens"]
    depths: Int[Tensor, " tokens"]
    lineage: Int[Tensor, "tokens length"]


def lay_out_tree(continuations: Int[Tensor, "count length"]) -> TokenTree:
    """The tree of some continuations (at least one, of at least one token).

    Only neighbours that begin alike share tokens: sorted continuations make the smallest tree.

    Examples
    --------
    >>> tree = lay_out_tree(torch.tensor([[7, 1], [7, 2], [9, 1]]))
    >>> tree.token_ids, tree.depths
    (tensor([7, 9, 1, 2, 1]), tensor([0, 0, 1, 1, 1]))
    >>> tree.lineage[3]
    tensor([0, 3])
    """
    count, length = continuations.shape
    fresh = torch.ones(count, length - 1, dtype=torch.bool)
    fresh[1:] = (continuations[1:, :-1] != continuations[:-1, :-1]).cumsum(1) > 0
    number = fresh.flatten().cumsum(0).view(count, length - 1) - 1  # (count, length - 1)
    # A beginning that is not new is the one last laid out in its column; numbers only grow.
    position = torch.where(fresh, number, 0).cummax(0).values
    shared = int(fresh.sum())
    depths = torch.arange(length - 1).expand(count, -1)[fresh]  # (shared,)
    whole = torch.cat([position, shared + torch.arange(count)[:, None]], 1)  # (count, length)
    inner = whole[fresh.nonzero()[:, 0]]
    # (shared + count, length)
    lineage = torch.cat([torch.where(torch.arange(length) <= depths[:, None], inner, -1), whole])
    return TokenTree(
        torch.cat([continuations[:, :-1][fresh], continuations[:, -1]]),
        torch.cat([depths, torch.full((count,), length - 1)]),
        lineage,
    )


def attend_in_tree(
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 groups seen width"],
    value: Float[Tensor, "1 groups seen width"],
    lineage: Int[Tensor, "tokens length"],
    scaling: float,
) -> Float[Tensor, "1 tokens heads width"]:
    """Softmax attention of every token of a tree to the whole context and to its own lineage, and
    to nothing else.

    The context is what `key` and `value` have before the tree's own tokens. No score is computed
    that a mask would discard: the work per token is that of a sequence of the context's length,
    however wide the tree.

    Parameters
    ----------
    query : (1, heads, tokens, width) tensor
    key, value : (1, groups, context + tokens, width) tensors
        `groups` divides `heads`: neighbouring heads share a key (grouped-query attention).
    lineage : (tokens, length) long tensor
        See `TokenTree`.
    scaling : float
        Factor of the scores.
    """
    _, heads, tokens, width = query.shape
    groups, context = key.shape[1], key.shape[2] - tokens
    out = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    query, key, value = (part[0].to(_precision(part)) for part in (query, key, value))
    # Scaling the few keys is cheaper than scaling the scores of all tokens with them.
    # (groups, width, context) and (groups, context, width)
    given = (key[:, :context].mT * scaling, value[:, :context].mT.contiguous())
    own = (key[:, context:] * scaling, value[:, context:])
    size = max(_SCORES_AT_ONCE // (heads * context), 1)
    for start in range(0, tokens, size):
        some = slice(start, start + size)
        # (groups, heads per group, some, width)
        part = query[:, some].contiguous().view(groups, heads // groups, -1, width)
        out[some] = (  # (some, heads, width)
            _attend(part, given, own, lineage[some]).permute(2, 0, 1, 3).reshape(-1, heads, width)
        )
    return out[None]


def _precision(values: Tensor) -> torch.dtype:
    """In what the attention is computed: most processors do half precision by way of single, and
    turning the scores back and forth costs more than all else.
    """
    if values.device.type == "cpu":
        return torch.promote_types(values.dtype, torch.float32)
    return values.dtype


def _attend(
    query: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], lineage: Tensor
) -> Tensor:
    """(groups, heads per group, tokens, width): context and lineage are weighed apart and divided
    by their common sum.
    """
    groups, shared, tokens, width = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    # (groups, heads per group * tokens, context)
    scores = torch.bmm(query.view(groups, -1, width), context[0]).to(exact)
    places = lineage.clamp_min(0).unbind(1)
    own_scores = torch.stack(  # (length, groups, heads per group, tokens)
        [(query * own[0].index_select(1, at)[:, None]).sum(-1) for at in places]
    ).to(exact)
    own_scores.masked_fill_((lineage.T < 0)[:, None, None], -torch.inf)  # (length, 1, 1, tokens)
    # (groups, heads per group, tokens)
    top = torch.maximum(scores.amax(-1).view(groups, shared, tokens), own_scores.amax(0))
    # (groups, heads per group * tokens, context)
    weights = scores.sub_(top.view(groups, -1, 1)).exp_()
    own_weights = own_scores.sub_(top).exp_()
    # (groups, heads per group, tokens)
    total = weights.sum(-1).view(groups, shared, tokens) + own_weights.sum(0)
    # This way round the product is three times as fast where heads are narrow.
    # (groups, heads per group, tokens, width)
    mixed = torch.bmm(context[1], weights.to(query.dtype).mT).mT.reshape(query.shape)
    for weight, at in zip(own_weights.to(query.dtype), places, strict=True):
        # (groups, heads per group, tokens, width)
        mixed.addcmul_(weight[..., None], own[1].index_select(1, at)[:, None])
    return mixed.div_(total[..., None])
