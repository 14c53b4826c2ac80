"""Drafts that are looked up in the text so far: for any target, without a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from cpmtp.drafts.blocks import Drafted
from cpmtp.drafts.lookup import looked_up
from cpmtp.sampling_law import SamplingLaw


@dataclass(frozen=True)
class PromptLookup:
    """What followed an earlier occurrence of the text's end is proposed again, for certain.

    Attributes
    ----------
    horizon : int
        Counts the known token: one less is drafted at most.
    max_ngram, min_ngram : int
        Longest and shortest end of the text that is looked for.

    Raises
    ------
    ValueError
        If the horizon is below 2, or no n-gram is between the two.

    References
    ----------
    saxena2023prompt

    Examples
    --------
    >>> PromptLookup(horizon=4).block([torch.tensor([5, 1, 2, 3, 1, 2])]).tokens
    tensor([[3, 1, 2]])
    """

    horizon: int = 8
    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self):
        if self.horizon < 2 or not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"horizon {self.horizon} and n-grams of {self.min_ngram} to {self.max_ngram} "
                "tokens: expected a horizon of at least 2, and n-grams of at least 1 token"
            )

    def block(self, texts: Sequence[Int[Tensor, " _"]]) -> PathBlock:
        """A path after each text, as long as the longest that is found; where there is less, the
        last token is repeated, which is a guess like any other.
        """
        ngrams = {"max_ngram": self.max_ngram, "min_ngram": self.min_ngram}
        found = [looked_up(text, self.horizon - 1, **ngrams) for text in texts]
        longest = max(map(len, found))
        last = [(path if len(path) else text)[-1:] for path, text in zip(found, texts, strict=True)]
        filled = [
            torch.cat([path, end.expand(longest - len(path))])  # (longest,)
            for path, end in zip(found, last, strict=True)
        ]
        return PathBlock(pad_sequence(filled, batch_first=True))  # (batch, longest)


@dataclass(frozen=True)
class PathBlock:
    """One path per request, proposed for certain; see `cpmtp.drafts.blocks.Block`.

    Attributes
    ----------
    tokens : (batch, length) long tensor
    """

    tokens: Int[Tensor, "batch length"]

    @property
    def length(self) -> int:
        """Drafted tokens per request."""
        return self.tokens.shape[1]

    def first(self, length: int) -> PathBlock:
        """Only the first tokens."""
        return PathBlock(self.tokens[:, :length])

    def sample(self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]) -> Drafted:
        """The paths; nothing is drawn, and no law changes what is certain."""
        tokens = self.tokens.to(uniform.device)
        if law.temperature == 0 or not self.length:
            return Drafted(tokens, tokens, None)
        ids, places = tokens.unique(return_inverse=True)
        # (batch, length, ids)
        return Drafted(tokens, places, functional.one_hot(places, len(ids)).float(), ids)
