"""The target inside the decoding loop: laws of the next tokens after a few more, and a cache that
forgets the rejected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from cpmtp.language_model import LanguageModel


class CachedTarget:
    """A Hugging Face model with its key/value cache; one forward pass per call of `extend`.

    Rows of a batch keep different numbers of tokens. Rejected tokens of the longest-keeping row are
    cropped from the cache; the others' stay where they are, masked out.
    """

    def __init__(self, lm: Any):
        self._lm, self._cache, self.device = lm, DynamicCache(), lm.device
        # A batch of one has no holes in its cache, and so no mask.
        self._mask: Tensor | None = None
        self._positions = torch.zeros(0)
        self._added = 0
        self._only_unembeds = False

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, Tensor]:
        """Read the prompts; scores (batch, vocab) after each and the hidden state (batch, hidden)
        they come from.
        """
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
        steps = torch.arange(longest)
        self._mask = (steps >= (longest - lengths)[:, None]).long() if len(prompts) > 1 else None
        positions = (steps - (longest - lengths)[:, None]).clamp_min(0)
        scores, hidden = self._forward(tokens, positions)
        # Some models cap or scale what they unembed; where this one does not, later calls need not
        # ask for hidden states.
        self._only_unembeds = torch.equal(self._lm.unembed(hidden), scores)
        self._positions, self._added = lengths, 0
        return scores[:, -1], hidden[:, -1]

    def extend(self, tokens: Int[Tensor, "batch count"]) -> tuple[Tensor, Tensor]:
        """Scores (batch, count, vocab), the log-probabilities but for a constant, after each token;
        hidden states.
        """
        count = tokens.shape[1]
        if self._mask is not None:
            self._mask = torch.cat(
                [self._mask, torch.ones(len(tokens), count, dtype=torch.long)], 1
            )
        positions = self._positions[:, None] + torch.arange(count)
        if self._lm.max_context is not None:  # a row that has ended may stand at the last one
            positions = positions.clamp_max(self._lm.max_context - 1)
        self._added = count
        return self._forward(tokens, positions)

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Only the first `counts` tokens of the last extension stay."""
        drop = self._added - int(counts.max())
        if drop:
            self._cache.crop(-drop)
        if self._mask is not None:
            size = self._mask.shape[1]
            rejected = torch.arange(self._added) >= counts[:, None]
            self._mask[:, size - self._added :].masked_fill_(rejected, 0)
            self._mask = self._mask[:, : size - drop]
        self._positions = self._positions + counts

    def _forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        lm, device = self._lm, self._lm.device
        # Without padding the model's own causal path is the fast one.
        mask = None if self._mask is None or bool(self._mask.all()) else self._mask.to(device)
        inputs: dict[str, Any] = {
            "input_ids": tokens.to(device),
            "position_ids": positions.to(device),
            "attention_mask": mask,
        }
        inputs |= {lm.cache_name: self._cache, "use_cache": True}
        if self._only_unembeds:
            hidden = lm.model.base_model(**inputs).last_hidden_state
            return lm.unembed(hidden), hidden
        out = lm.model(**inputs, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]


class PlainTarget:
    """Any language model: every law by a call of its own; no hidden states."""

    def __init__(self, lm: LanguageModel):
        self._lm, self._added, self.device = lm, 0, torch.device("cpu")
        self._texts: list[Tensor] = []

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, None]:
        """Scores (batch, vocab) after each prompt."""
        self._texts = list(prompts)
        return torch.stack([self._law(text) for text in self._texts]), None

    def extend(self, tokens: Int[Tensor, "batch count"]) -> tuple[Tensor, None]:
        """Scores (batch, count, vocab) after each of some more tokens."""
        laws = []
        for row, text in enumerate(self._texts):
            laws.append(
                torch.stack(
                    [
                        self._law(torch.cat([text, tokens[row, : k + 1]]))
                        for k in range(tokens.shape[1])
                    ]
                )
            )
        self._texts = [
            torch.cat([text, more]) for text, more in zip(self._texts, tokens, strict=True)
        ]
        self._added = tokens.shape[1]
        return torch.stack(laws), None

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Only the first `counts` tokens of the last extension stay."""
        self._texts = [
            text[: len(text) - self._added + int(c)]
            for text, c in zip(self._texts, counts, strict=True)
        ]

    def _law(self, text: Tensor) -> Float[Tensor, " vocab"]:
        return self._lm.next_token_log_probs(text[None])[0]
