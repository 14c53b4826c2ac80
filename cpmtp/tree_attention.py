"""Many continuations of one context as a single row of tokens: a tree laid flat, and the attention
that respects it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

# Neighbouring tokens that share their keys: at least so many, and a part of the context's length.
# What a block's tokens do not see of each other costs less, then, than the context's keys once per
# block.
_LEAST_BLOCK, _BLOCK_SHARE = 32, 4
# Entries of the keys of all heads that are gathered at once.
_KEYS_AT_ONCE = 1 << 21


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

    def attention_mask(self, context: int) -> Int[Tensor, "1 blocks rows keys"]:
        """What blocks of neighbouring tokens see of a context and of the tree that follows it.

        Of every block the first row says where its keys stand: the whole context, then all that is
        in the lineage of one of its tokens. A row for each token follows: 1 where it sees the key.
        All layers of a model share it. It is whole numbers, which no model turns into its own
        precision.

        Examples
        --------
        >>> lay_out_tree(torch.tensor([[7, 1], [7, 2]])).attention_mask(1)[0, 0, :4]
        tensor([[0, 1, 2, 3],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 0, 1]], dtype=torch.int32)
        """
        tokens, length = self.lineage.shape
        size = max(_LEAST_BLOCK, context // _BLOCK_SHARE)
        blocks = -(-tokens // size)
        lineage = functional.pad(self.lineage, (0, 0, 0, blocks * size - tokens), value=-1)
        standing, order = lineage.view(blocks, -1).sort(1)  # (blocks, size * length)
        fresh = standing >= 0
        fresh[:, 1:] &= standing[:, 1:] != standing[:, :-1]
        number = fresh.cumsum(1) - 1  # (blocks, size * length): -1 beyond lineages
        most = int(number.max()) + 1

        # What is in no lineage is written into a last column, which is left out.
        mask = torch.zeros(blocks, 1 + size, context + most + 1, dtype=torch.int32)
        mask[:, 0, :context] = torch.arange(context)
        mask[:, 1:, :context] = 1
        column = context + torch.where(fresh, number, most)
        mask[:, 0].scatter_(1, column, (context + standing).int())
        slots = torch.empty_like(number).scatter_(1, order, number)  # (blocks, size * length)
        slots = torch.where(slots < 0, most, slots).view(blocks, size, length)
        mask[:, 1:].scatter_(2, context + slots, 1)
        return mask[None, ..., :-1].contiguous()  # (1, blocks, 1 + size, keys)


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
    mask: Int[Tensor, "1 blocks rows keys"],
    scaling: float,
) -> Float[Tensor, "1 tokens heads width"]:
    """Softmax attention of every token of a tree to the whole context and to its own lineage, and
    to nothing else.

    Blocks of neighbouring tokens are attended to as rows of a batch, each with the context's keys
    and those of its own lineages: a block's tokens discard little but each other, however wide the
    tree, and the attention is torch's own.

    Parameters
    ----------
    query : (1, heads, tokens, width) tensor
    key, value : (1, groups, context + tokens, width) tensors
        `groups` divides `heads`: neighbouring heads share a key (grouped-query attention). The
        context is what they have before the tree's own tokens.
    mask : (1, blocks, 1 + size, keys) int tensor
        `TokenTree.attention_mask` of that context.
    scaling : float
        Factor of the scores.
    """
    _, heads, tokens, width = query.shape
    blocks, size, keys = mask.shape[1], mask.shape[2] - 1, mask.shape[3]
    places, seen = mask[0, :, 0], mask[0, :, None, 1:].bool()  # (blocks, keys), (…, 1, size, keys)
    # (blocks * size, heads, width), then (blocks, heads, size, width)
    query = functional.pad(query[0].transpose(0, 1), (0, 0, 0, 0, 0, blocks * size - tokens))
    query = query.unflatten(0, (blocks, size)).transpose(1, 2)
    out = query.new_empty(blocks, size, heads, width)
    some = max(_KEYS_AT_ONCE // (keys * heads * width), 1)
    for start in range(0, blocks, some):
        part = slice(start, start + some)
        out[part] = functional.scaled_dot_product_attention(  # (some, heads, size, width)
            query[part],
            _gathered(key, places[part]),
            _gathered(value, places[part]),
            attn_mask=seen[part],
            scale=scaling,
            enable_gqa=True,
        ).transpose(1, 2)
    return out.view(1, blocks * size, heads, width)[:, :tokens]


def _gathered(
    states: Float[Tensor, "1 groups seen width"], places: Int[Tensor, "blocks keys"]
) -> Float[Tensor, "blocks groups keys width"]:
    found = states[0].index_select(1, places.flatten())  # (groups, blocks * keys, width)
    return found.unflatten(1, places.shape).transpose(0, 1)
