"""A head's draft after a known token, as a decoder draws it: a block of the head's form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cpmtp.drafts.blocks import Block, CPBlock, MarkovBlock, RecurrentBlock
from cpmtp.heads.draft_head import DraftHead
from cpmtp.sampling_law import exact_dtype


def drafted_block(
    head: DraftHead, hidden: Float[Tensor, "batch d"], first_token: Int[Tensor, " batch"]
) -> Block:
    """What a decoder draws from: the draft of x_2 … x_n in each row, unchecked.

    Parameters
    ----------
    head : DraftHead
    hidden : (batch, hidden) tensor
        The hidden states that predicted x_1.
    first_token : (batch,) long tensor
        x_1.

    Raises
    ------
    ValueError
        If the head's step is a layer over the text.
    """
    hidden = hidden.to(head.maps)
    stream = head.stream(hidden, first_token)
    if head.form == "recurrent":
        return _recurrent_block(head, hidden, first_token, stream)
    z = stream if head.plain else head.norm(stream)
    logits = head.state_logits(hidden, z, head.readout())  # (batch, drafted, rank, support)
    scores, logits = _told(head, first_token, head.log_weights(z), logits)
    dtype, ids = exact_dtype(logits), head.drafted_ids
    weights = scores.softmax(-1, dtype)  # (batch, rank)
    if not head.has_transitions:
        return CPBlock(weights, logits.softmax(-1, dtype), ids)
    block = MarkovBlock(weights, logits, head.left, head.right, head.gates(z), ids)
    return block if head.anchored else block.after(first_token)


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


def _recurrent_block(
    head: DraftHead, hidden: Tensor, first_token: Tensor, stream: Tensor
) -> RecurrentBlock:
    if head.over_text:
        raise ValueError(
            "a head with a layer over the text is trained and forecast, not decoded with: train "
            "one with over_text=False"
        )
    skipped = head.drafted - head.horizon + 1  # the first position, if the head models it

    def advance(state: Tensor, token: Tensor) -> Tensor:
        return head.step(state, head.embedded(token))

    def logits(position: int, state: Tensor) -> Tensor:
        moved = functional.linear(head.norm(state), head.maps[position + skipped])  # (batch, d)
        return functional.linear(hidden + moved, head.unembedding)  # (batch, support)

    state = advance(stream, first_token) if skipped else stream
    return RecurrentBlock(state, head.horizon - 1, logits, advance, head.drafted_ids)
