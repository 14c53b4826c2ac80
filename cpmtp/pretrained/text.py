"""What a tokenizer makes of a text: a prompt that goes on, a document that is cut into windows."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.pretrained.identity import vocabulary_fingerprint


class TextReader:
    """Text in and out of a model; `tokenizer` may be None where nobody asks for it.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    name : str
    """

    model: Any
    tokenizer: Any
    name: str

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the generation configuration's, or else the tokenizer's."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        if named is None:
            named = getattr(self.tokenizer, "eos_token_id", None)
        several = named if isinstance(named, list | tuple) else [named]
        return tuple(int(token) for token in several if token is not None)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the tokenizer's vocabulary; empty without a tokenizer."""
        return "" if self.tokenizer is None else vocabulary_fingerprint(self.tokenizer)

    def encode(self, text: str) -> Int[Tensor, " time"]:
        """Token ids of a text to go on from, with the special tokens the tokenizer puts before it.

        An end-of-text token that the tokenizer puts after it is left out: the text goes on.
        """
        tokenizer = self._tokenizer()
        ids = tokenizer.encode(text)
        bare = tokenizer.encode(text, add_special_tokens=False)
        while bare and ids[-1] in self.eos_token_ids and ids[-len(bare) :] != bare:
            ids = ids[:-1]
        return torch.tensor(ids, dtype=torch.long)

    def encode_document(self, text: str) -> Int[Tensor, " time"]:
        """Token ids of a text without special tokens: what windows are cut from.

        One that is spelled out in the text is text.
        """
        ids = self._tokenizer().encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, token_ids: Int[Tensor, " time"]) -> str:
        """The text of token ids."""
        return self._tokenizer().decode(token_ids.tolist())

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} came without a tokenizer: give token ids instead of text, or the "
                "model and its tokenizer as a pair"
            )
        return self.tokenizer
