"""A head's draft after a known token, as a decoder draws it: a block of the head's form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cpmtp.drafts.blocks import Block, CPBlock, MarkovBlock, RecurrentBlock
from cpmtp.heads.draft_head import DraftHead
from cpmtp.sampling_law import exact_dtype

_TABLES = 1 << 20  # entries of a product of all embeddings that is kept
# Of one that every drafted token reads: it saves a product at each of them.
_READ_OFTEN = 1 << 23
_TINY = 1e-12


class Drafter:
    """A head made ready to draft for a model: in the model's precision, and in few operations.

    What depends on weights alone is multiplied beforehand: the weights of norms, and, of small
    vocabularies, all tokens' embeddings with what reads them.

    Parameters
    ----------
    head : DraftHead
        Attached to its model.
    dtype : torch.dtype
        Of the model. Drafts are computed in it where it is narrower than the head's own: verifying
        asks for the probabilities that were drawn from, not for those of another precision.

    Raises
    ------
    ValueError
        If the head's step is a layer over the text.
    """

    def __init__(self, head: DraftHead, dtype: torch.dtype):
        if head.over_text:
            raise ValueError(
                "a head with a layer over the text is trained and forecast, not decoded with: "
                "train one with over_text=False"
            )
        own = head.maps.dtype
        if torch.promote_types(own, dtype) == own != dtype:
            # Without what it was attached to: the model is not copied.
            without = {id(part): None for part in (head.attached, head.ready)}
            head = copy.deepcopy(head, without).to(dtype)
        self.head = head
        self._plain = head.plain
        if not head.plain:
            scale = head.enter.out_features**0.5
            d = head.hidden_size
            self._enter = head.enter.weight[:, :d]
            read = head.enter.weight[:, d:] if head.anchored else None
            self._first = None if read is None else _Embedded(head, read, _TABLES)
            blocks: list[Any] = list(head.blocks)
            self._blocks = [
                (block.up.weight * block.norm.weight * scale, block.down.weight) for block in blocks
            ]
        if head.form == "recurrent":
            step: Any = head.step
            width = head.maps.shape[-1]
            self._up = step.up.weight[:, :width] * step.norm.weight * scale
            self._down = step.down.weight
            self._token = _Embedded(head, step.up.weight[:, width:], _READ_OFTEN)
            self._over_support = _reads_less_over_support(head)
            maps = head.unembedding @ head.maps if self._over_support else head.maps
            self._readout = maps * head.norm.weight * scale  # (maps, d or support, width)

    @torch.no_grad()
    def block(self, hidden: Float[Tensor, "batch d"], first_token: Int[Tensor, " batch"]) -> Block:
        """What a decoder draws from: the draft of x_2 … x_n in each row, unchecked.

        Parameters
        ----------
        hidden : (batch, hidden) tensor
            The hidden states that predicted x_1.
        first_token : (batch,) long tensor
            x_1.
        """
        head, hidden = self.head, hidden.to(self.head.maps)
        stream = self._stream(hidden, first_token)
        if head.form == "recurrent":
            return self._recurrent_block(hidden, first_token, stream)
        z = stream if head.plain else head.norm(stream)
        logits = head.state_logits(hidden, z, head.readout())  # (batch, drafted, rank, support)
        scores, logits = _told(head, first_token, head.log_weights(z), logits)
        dtype, ids = exact_dtype(logits), head.drafted_ids
        weights = scores.softmax(-1, dtype)  # (batch, rank)
        if not head.has_transitions:
            return CPBlock(weights, logits.softmax(-1, dtype), ids)
        block = MarkovBlock(weights, logits, head.left, head.right, head.gates(z), ids)
        return block if head.anchored else block.after(first_token)

    def _stream(self, hidden: Tensor, first_token: Tensor) -> Tensor:
        """The trunk's residual stream, (batch, width)."""
        if self._plain:
            return hidden
        if self._first is None:
            stream = _times(hidden, self._enter)  # (batch, width)
        else:
            stream = _plus_times(self._first(first_token), hidden, self._enter)  # (batch, width)
        for up, down in self._blocks:
            stream = _plus_times(stream, functional.silu(_times(_unit(stream), up)), down)
        return stream

    def _recurrent_block(
        self, hidden: Tensor, first_token: Tensor, stream: Tensor
    ) -> RecurrentBlock:
        head = self.head
        skipped = head.drafted - head.horizon + 1  # the first position, if the head models it
        # (batch, support) or (batch, d)
        base = _times(hidden, head.unembedding) if self._over_support else hidden

        def advance(state: Tensor, token: Tensor) -> Tensor:
            return self._after(state, self._token.of_drafted(token))

        def logits(position: int, state: Tensor) -> Tensor:
            # (batch, support) or (batch, d)
            moved = _plus_times(base, _unit(state), self._readout[position + skipped])
            return moved if self._over_support else _times(moved, head.unembedding)

        state = self._after(stream, self._token(first_token)) if skipped else stream
        return RecurrentBlock(state, head.horizon - 1, logits, advance, head.drafted_ids)

    def _after(self, state: Tensor, embedded: Tensor) -> Tensor:
        """The state (batch, width) after a token more, of which (batch, 2 width) is known."""
        read = _plus_times(embedded, _unit(state), self._up)  # (batch, 2 width)
        return _plus_times(state, functional.silu(read), self._down)


def _reads_less_over_support(head: DraftHead) -> bool:
    """Whether a draft reads fewer numbers of maps that are multiplied with the unembedding."""
    d, width, size = head.hidden_size, head.maps.shape[-1], head.support_size
    together = len(head.maps) * size * width
    apart = len(head.maps) * d * (width + size)
    return size <= d or (together <= _READ_OFTEN and d * size + together < apart)


class _Embedded:
    """Rows of normalised embeddings times a matrix: looked up where they are few.

    Of all tokens where these make a table of at most `most` entries, else of those that may be
    drafted; any others are multiplied.
    """

    def __init__(self, head: DraftHead, weight: Float[Tensor, "out d"], most: int):
        self._head, self._weight = head, weight
        self._every = self._table(torch.arange(len(head.embedding)).to(head.kept), most)
        fewer = self._every is None and head.vocabulary is not None
        self._drafted = self._table(head.kept, most) if fewer else None

    def __call__(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch out"]:
        """Of these tokens."""
        if self._every is not None:
            return self._every[tokens]
        return _times(self._head.embedded(tokens), self._weight)  # (batch, out)

    def of_drafted(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch out"]:
        """Of tokens that may be drafted."""
        if self._drafted is None:
            return self(tokens)
        return self._drafted[self._head.places[tokens]]

    def _table(self, tokens: Int[Tensor, " some"], most: int) -> Tensor | None:
        if len(tokens) * len(self._weight) > most:
            return None
        return functional.linear(self._head.embedded(tokens), self._weight)  # (some, out)


def _unit(x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
    """Of length one: the root of the width, by which a norm is longer, is in the weights."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_TINY)


def _times(x: Float[Tensor, "batch width"], weight: Float[Tensor, "out width"]) -> Tensor:
    """``x W'``, (batch, out); of one row as a vector, which takes half the time in bfloat16; of
    several from the left, as the weight lies in memory.
    """
    if len(x) == 1:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.mm(weight, x.T).T.contiguous()


def _plus_times(
    before: Float[Tensor, "batch out"],
    x: Float[Tensor, "batch width"],
    weight: Float[Tensor, "out width"],
) -> Float[Tensor, "batch out"]:
    """``before + x W'``."""
    if len(x) == 1:
        return torch.addmv(before[0], weight, x[0]).unsqueeze(0)
    return torch.addmm(before.T, weight, x.T).T.contiguous()


def drafter(head: DraftHead, dtype: torch.dtype) -> Drafter:
    """The head made ready; once, for as long as its weights stay the same."""
    tensors = (*head.parameters(), head.unembedding, head.embedding)
    state = (dtype, *((t.data_ptr(), t._version, t.dtype) for t in tensors))
    if head.ready is None or head.ready[0] != state:
        # Of no use to a later call if they could be used in inference mode alone.
        with torch.inference_mode(False), torch.no_grad():
            head.ready = (state, Drafter(head, dtype))
    return head.ready[1]


def drafted_block(
    head: DraftHead, hidden: Float[Tensor, "batch d"], first_token: Int[Tensor, " batch"]
) -> Block:
    """What a decoder draws from, in the head's own precision; see `Drafter.block`."""
    return drafter(head, head.maps.dtype).block(hidden, first_token)


def _told(
    head: DraftHead, first_token: Tensor, scores: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-weights, unnormalised, and logits of x_2 … x_n once x_1 is known."""
    if head.anchored:
        return scores, logits
    place = head.places[first_token]
    known = logits[:, 0]  # (batch, rank, support)
    at = place.clamp_min(0)[:, None, None].expand(*known.shape[:-1], 1)  # (batch, rank, 1)
    chosen = (known.gather(-1, at) - known.logsumexp(-1, keepdim=True)).squeeze(-1)  # (batch, rank)
    # A token that is never drafted says nothing of the components.
    return scores + torch.where(place[:, None] >= 0, chosen, 0.0), logits[:, 1:]
