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
            self._first = None if read is None else _Embedded(head, read)
            blocks: list[Any] = list(head.blocks)
            self._blocks = [
                (block.up.weight * block.norm.weight * scale, block.down.weight) for block in blocks
            ]
        if head.form == "recurrent":
            step: Any = head.step
            width = head.maps.shape[-1]
            self._up = step.up.weight[:, :width] * step.norm.weight * scale
            self._down, self._token = step.down.weight, _Embedded(head, step.up.weight[:, width:])
            self._over_support = head.support_size <= head.hidden_size
            self._readout = head.readout() * head.norm.weight * scale  # (maps, d or support, width)

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
            read = _plus_times(self._token(token), _unit(state), self._up)  # (batch, 2 width)
            return _plus_times(state, functional.silu(read), self._down)

        def logits(position: int, state: Tensor) -> Tensor:
            # (batch, support) or (batch, d)
            moved = _plus_times(base, _unit(state), self._readout[position + skipped])
            return moved if self._over_support else _times(moved, head.unembedding)

        state = advance(stream, first_token) if skipped else stream
        return RecurrentBlock(state, head.horizon - 1, logits, advance, head.drafted_ids)


class _Embedded:
    """Rows of normalised embeddings times a matrix: looked up where all of them are few."""

    def __init__(self, head: DraftHead, weight: Float[Tensor, "out d"]):
        self._head, self._weight, self._table = head, weight, None
        if len(head.embedding) * len(weight) <= _TABLES:
            every = torch.arange(len(head.embedding), device=weight.device)
            self._table = functional.linear(head.embedded(every), weight)  # (vocab, out)

    def __call__(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch out"]:
        """Of these tokens."""
        if self._table is not None:
            return self._table[tokens]
        return _times(self._head.embedded(tokens), self._weight)  # (batch, out)


def _unit(x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
    """Of length one: the root of the width, by which a norm is longer, is in the weights."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_TINY)


def _times(x: Float[Tensor, "batch width"], weight: Float[Tensor, "out width"]) -> Tensor:
    """``x W'``, (batch, out); of one row as a vector, which takes half the time in bfloat16."""
    if len(x) == 1:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return functional.linear(x, weight)


def _plus_times(
    before: Float[Tensor, "batch out"],
    x: Float[Tensor, "batch width"],
    weight: Float[Tensor, "out width"],
) -> Float[Tensor, "batch out"]:
    """``before + x W'``."""
    if len(x) == 1:
        return torch.addmv(before[0], weight, x[0]).unsqueeze(0)
    return torch.addmm(before, x, weight.T)


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
