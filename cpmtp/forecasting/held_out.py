"""What heads are judged on: texts that the base model writes after held-out beginnings, and what a
draft that is looked up in the text so far earns on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.drafts.lookup import looked_up
from cpmtp.forecasting.cycles import (
    ReadText,
    divergences_along,
    forecast_from_ratios,
    head_ratios,
)
from cpmtp.heads.draft_head import DraftHead
from cpmtp.language_model import sample_sequences
from cpmtp.sampling_law import SamplingLaw

HELD_OUT_SHARE = 0.2
_FEWEST_DOCUMENTS = 4


@dataclass(frozen=True)
class HeldOut:
    """Texts in which the tokens after a beginning are the base model's own.

    Attributes
    ----------
    tokens : (texts, time) long tensor
    start : int
        Length of the beginnings.
    documents : (texts,) int array
        The document each text begins as: what is resampled.
    law : SamplingLaw
        What the texts were drawn by.
    read : tuple of ReadText
        What the base model says of them.
    """

    tokens: Int[Tensor, "texts time"]
    start: int
    documents: Int[ndarray, " texts"]
    law: SamplingLaw
    read: tuple[ReadText, ...]

    @property
    def drawn(self) -> int:
        """Tokens of each text that cycles emit."""
        return self.tokens.shape[1] - self.start - 1

    def cycles_of_head(
        self, head: DraftHead, horizons: Sequence[int], rule: str
    ) -> Float[ndarray, "horizons texts"]:
        """Expected cycles along each text at horizons up to the head's own."""
        return self.scores_of_head(head, horizons, rule)[0]

    def scores_of_head(
        self, head: DraftHead, horizons: Sequence[int], rule: str
    ) -> tuple[Float[ndarray, "horizons texts"], Float[ndarray, "drafted texts"]]:
        """The same, and the head's divergence from the target at each drafted position."""
        ratios = head_ratios(head, self.read, self.start)
        # (horizons, texts), (drafted, texts)
        return self._cycles(ratios, horizons, rule), divergences_along(ratios).T.numpy()

    def cycles_of_exact(
        self, head: DraftHead, horizons: Sequence[int], rule: str
    ) -> Float[ndarray, "horizons texts"]:
        """The same for drafts that are exact over the tokens that a head can draft."""
        drafted = max(horizons) - 1
        known = torch.isin(self.tokens, head.kept.to(self.tokens))  # (texts, time)
        # What lies beyond a text's end is read by nobody.
        padded = torch.cat([known, known.new_zeros(len(known), drafted)], 1)
        following = padded[:, self.start + 1 :].unfold(1, drafted, 1)[:, : self.drawn]
        return self._cycles(following.double(), horizons, rule)  # (texts, starts, drafted)

    def cycles_of_lookup(
        self, horizons: Sequence[int], rule: str
    ) -> Float[ndarray, "horizons texts"]:
        """The same for drafts that are looked up."""
        rows = [lookup_matches(row, self.start, max(horizons)) for row in self.tokens]
        return self._cycles(torch.stack(rows), horizons, rule)  # (texts, starts, drafted)

    @staticmethod
    def _cycles(ratios: Tensor, horizons: Sequence[int], rule: str) -> ndarray:
        found = [forecast_from_ratios(ratios[..., : n - 1], rule=rule).calls for n in horizons]
        return torch.stack(found).numpy()  # (horizons, texts)


def lookup_matches(
    text: Int[Tensor, " time"], start: int, horizon: int
) -> Float[Tensor, "starts drafted"]:
    """One where a looked-up draft says what the text says, 0 elsewhere: ``min(1, q / p)`` of it,
    since it proposes one path for certain.

    Examples
    --------
    >>> lookup_matches(torch.tensor([5, 6, 7, 5, 6, 7]), 3, 3)
    tensor([[1., 1.],
            [1., 0.]])
    """
    found = torch.zeros(len(text) - 1 - start, horizon - 1)  # (starts, drafted)
    for row, known in enumerate(range(start, len(text) - 1)):
        proposed = looked_up(text[: known + 1], horizon - 1)
        wanted = text[known + 1 : known + 1 + len(proposed)]
        found[row, : len(wanted)] = (proposed[: len(wanted)] == wanted).float()
    return found


def split_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts to train on and texts to judge by: every fifth is held out.

    Few long documents are cut into pieces first, which then count as documents.

    Raises
    ------
    ValueError
        If there is no text.
    """
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise ValueError("no text: give documents, or none at all for the model's own samples")
    if len(documents) < 5 * _FEWEST_DOCUMENTS:
        pieces = 5 * _FEWEST_DOCUMENTS
        size = max(max(map(len, documents)) // pieces, 1)
        documents = [d[i : i + size] for d in documents for i in range(0, len(d), size)]
    every = round(1 / HELD_OUT_SHARE)
    held_out = documents[every - 1 :: every]
    return [d for i, d in enumerate(documents) if i % every != every - 1], held_out


def held_out_texts(
    lm: Any,
    texts: Sequence[str] | None,
    *,
    count: int,
    start: int,
    drawn: int,
    law: SamplingLaw,
    seed: int,
) -> HeldOut:
    """Texts that the base model writes: after beginnings of held-out documents, or by itself.

    Parameters
    ----------
    texts : sequence of str or None
        Held-out documents.
    count, start, drawn : int
        Texts, tokens of a beginning, tokens written after it.

    Raises
    ------
    ValueError
        If no document is long enough.
    """
    if texts is None:
        prompts = list(sample_sequences(lm, count, start, seed=seed))
        documents = np.arange(count)
    else:
        prompts, documents = _beginnings(lm, texts, count, start)
    sampling = {"temperature": law.temperature, "top_k": law.top_k, "top_p": law.top_p}
    out = speculative_generate(
        lm,
        None,
        prompts,
        max_new_tokens=drawn + 1,
        seed=seed + 1,
        **sampling,  # type: ignore[arg-type]
    )
    tokens = torch.stack(out.sequences)  # (texts, start + drawn + 1)
    read = tuple(ReadText.of(lm, row, law) for row in tokens.split(1))
    return HeldOut(tokens, start, documents, law, read)


def _beginnings(
    lm: Any, texts: Sequence[str], count: int, start: int
) -> tuple[list[Tensor], ndarray]:
    """Windows of held-out documents, spread over them, and each one's document."""
    cut = [lm.encode_document(text) for text in texts]
    # each (windows, start)
    windows = [ids[: len(ids) // start * start].view(-1, start) for ids in cut]
    whole = [(document, row) for document, rows in enumerate(windows) for row in range(len(rows))]
    if len({document for document, _ in whole}) < 2:
        raise ValueError(
            f"less than two held-out documents have {start} tokens: give more text, or shorter "
            "beginnings"
        )
    # A window of every document first, then second ones: documents count, not their lengths.
    turns = sorted(whole, key=lambda place: (place[1], place[0]))[:count]
    prompts = [windows[document][row] for document, row in turns]
    return prompts, np.array([document for document, _ in turns])
