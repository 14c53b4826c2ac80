"""The base model's own distributions along texts, computed once for all heads that learn them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.heads.draft_head import DraftHead

_KEPT_AT_ONCE = 1 << 23  # entries
_POSITIONS_AT_ONCE = 128


class TargetLaws:
    """The target's next-token distributions after each position of texts, over a head's support.

    They are made of the hidden states: kept where they are few, made again where they are not.

    Parameters
    ----------
    hidden : (rows, time, hidden) tensor
        Last hidden states.
    unembed : callable
        Hidden states to the target's logits.
    """

    def __init__(self, hidden: Float[Tensor, "rows time d"], unembed: Callable[[Tensor], Tensor]):
        self.hidden, self._unembed = hidden, unembed
        self._kept: dict[tuple | None, tuple[Tensor, Tensor]] = {}

    def between(
        self, head: DraftHead, rows: slice, times: slice
    ) -> tuple[Float[Tensor, "some time support"], Float[Tensor, "some time"]]:
        """Probabilities over what the head may draft, and ``sum p log p`` over the same."""
        if self.hidden.shape[0] * self.hidden.shape[1] * head.support_size > _KEPT_AT_ONCE:
            return self._made(head, self.hidden[rows, times])
        key = None if head.vocabulary is None else tuple(head.vocabulary)
        if key not in self._kept:
            self._kept[key] = self._made(head, self.hidden)
        probs, entropies = self._kept[key]
        return probs[rows, times], entropies[rows, times]

    def _made(self, head: DraftHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """In pieces of positions: few logits over the whole vocabulary are there at once."""
        flat = hidden.flatten(0, 1)  # (positions, d)
        pieces = [self._of(head, some) for some in flat.split(_POSITIONS_AT_ONCE)]
        found = [
            torch.cat(parts).unflatten(0, hidden.shape[:2]) for parts in zip(*pieces, strict=True)
        ]
        return found[0], found[1]

    @torch.no_grad()
    def _of(self, head: DraftHead, hidden: Float[Tensor, "some d"]) -> tuple[Tensor, Tensor]:
        logits = self._unembed(hidden).to(head.maps.dtype)  # (some, vocab)
        if head.vocabulary is None:
            log_probs = logits.log_softmax(-1)
        else:
            total = logits.logsumexp(-1, keepdim=True)  # (some, 1)
            log_probs = logits.index_select(-1, head.kept) - total  # (some, support)
        probs = log_probs.exp()
        return probs, torch.linalg.vecdot(probs, log_probs.clamp_min(-1e4))
