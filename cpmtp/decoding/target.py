"""The target inside the decoding loop: what follows a few more tokens, rejected ones forgotten.

There are several ways to follow a model, from the fastest to the one that takes nothing for
granted. `open_target` picks the first that gave what full forward passes give on this model.

========  =========================================================  ==========================
way       what is kept between calls                                 taken for granted
========  =========================================================  ==========================
batch     one cache of all rows, cropped; rejected tokens of rows    cache grows and crops;
          that keep fewer stay in it, masked                         positions and masks are heeded
rows      a cache of each row's own, cropped                         cache grows and crops
replayed  a cache of each row's own, copied before every call;       cache grows, several tokens
          what was accepted is fed to the copy again                 at a time
stepped   a cache of each row's own, copied after every token        cache grows token by token
full      the texts                                                  a pass says at every position
                                                                     what a pass per prefix does
prefixes  the texts                                                  nothing
========  =========================================================  ==========================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from cpmtp.language_model import LanguageModel
from cpmtp.pretrained import HuggingFaceLanguageModel


@runtime_checkable
class Target(Protocol):
    """A model that follows some texts.

    Scores are log-probabilities but for a constant; hidden states, what they are made of, or None.
    """

    device: torch.device

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, Tensor | None]:
        """Scores (batch, vocab) after each prompt, hidden states (batch, d)."""
        ...

    def extend(
        self, tokens: Int[Tensor, "batch count"], running: set[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (batch, count, vocab) after each of some more tokens, hidden states (…, d).

        Those of rows that are not running mean nothing.
        """
        ...

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Only the first `counts` tokens of the last extension stay."""
        ...


class _Reader:
    """Asks a Hugging Face model for scores and, where heads need them, hidden states."""

    def __init__(self, lm: HuggingFaceLanguageModel, hidden: bool):
        self._lm, self._hidden, self.device = lm, hidden, lm.device

    def _asked(self, tokens: Tensor, cache: Any, last: bool, **inputs) -> tuple[Tensor, Any, Any]:
        """Scores and hidden states after every token, or the last one, and the cache."""
        lm = self._lm
        named = {"input_ids": tokens.to(self.device), "use_cache": True} | inputs
        named[lm.cache_name] = cache
        if not self._hidden:
            out = lm.model(**named)
            return out.logits[:, -1:] if last else out.logits, None, out[lm.cache_name]
        out = lm.trunk(**named)
        hidden = out.last_hidden_state[:, -1:] if last else out.last_hidden_state
        return lm.unembed(hidden), hidden, out[lm.cache_name]


class BatchTarget(_Reader):
    """One cache for all rows.

    Rows of a batch keep different numbers of tokens. Rejected tokens of the longest-keeping row are
    cropped from the cache; the others' stay where they are, masked out.
    """

    def __init__(self, lm: HuggingFaceLanguageModel, hidden: bool):
        super().__init__(lm, hidden)
        self._cache: Any = DynamicCache()
        # A batch of one has no holes in its cache, and so no mask.
        self._mask: Tensor | None = None
        self._positions = torch.zeros(0)
        self._added = 0

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, Tensor | None]:
        """Read the prompts, padded on the left."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
        steps = torch.arange(longest)
        padding = (longest - lengths)[:, None]  # (batch, 1)
        self._mask = (steps >= padding).long() if len(prompts) > 1 else None
        self._positions, self._added = lengths, 0
        return _at_end(*self._forward(tokens, (steps - padding).clamp_min(0), last=True))

    def extend(
        self, tokens: Int[Tensor, "batch count"], running: set[int]
    ) -> tuple[Tensor, Tensor | None]:
        """One forward pass over all rows."""
        count = tokens.shape[1]
        if self._mask is not None:
            new = torch.ones(len(tokens), count, dtype=torch.long)
            self._mask = torch.cat([self._mask, new], 1)  # (batch, seen + count)
        positions = self._positions[:, None] + torch.arange(count)  # (batch, count)
        if self._lm.max_context is not None:  # a row that has ended may stand at the last one
            positions = positions.clamp_max(self._lm.max_context - 1)
        self._added = count
        return self._forward(tokens, positions, last=False)

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Crop what no row keeps, mask what only some keep."""
        drop = self._added - int(counts.max())
        if drop:
            self._cache.crop(-drop)
        if self._mask is not None:
            size = self._mask.shape[1]
            rejected = torch.arange(self._added) >= counts[:, None]  # (batch, added)
            self._mask[:, size - self._added :].masked_fill_(rejected, 0)
            self._mask = self._mask[:, : size - drop]
        self._positions = self._positions + counts

    def _forward(
        self, tokens: Tensor, positions: Tensor, *, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        # Without padding the model's own causal path is the fast one.
        whole = self._mask is None or bool(self._mask.all())
        mask = None if whole else self._mask.to(self.device)  # type: ignore[union-attr]
        inputs = {"position_ids": positions.to(self.device), "attention_mask": mask}
        scores, hidden, self._cache = self._asked(tokens, self._cache, last, **inputs)
        return scores, hidden


class RowsTarget(_Reader):
    """A cache of its own for every row: no padding, no holes, no positions but the model's own.

    Parameters
    ----------
    recording : bool
        Caches of the configuration's own kind that remember what cropping must restore.
    """

    def __init__(self, lm: HuggingFaceLanguageModel, hidden: bool, *, recording: bool):
        super().__init__(lm, hidden)
        self._recording = recording
        self._caches: list[Any] = []
        self._added: list[int] = []

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, Tensor | None]:
        """Read one prompt after another."""
        self._caches = [self._new_cache() for _ in prompts]
        # (1, 1, vocab) each
        found = [self._row(row, prompt[None], last=True) for row, prompt in enumerate(prompts)]
        self._added = [0] * len(prompts)
        self._settle(dict.fromkeys(range(len(prompts)), 0))
        return _at_end(*_joined(found, 0))

    def extend(
        self, tokens: Int[Tensor, "batch count"], running: set[int]
    ) -> tuple[Tensor, Tensor | None]:
        """A forward pass for each running row."""
        self._added = [tokens.shape[1] if row in running else 0 for row in range(len(tokens))]
        read = lambda row: self._row(row, tokens[row, None], last=False)  # noqa: E731
        return _of_running(read, running, len(tokens))

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Crop each row."""
        self._settle({row: n - int(counts[row]) for row, n in enumerate(self._added) if n})

    def _settle(self, drops: dict[int, int]) -> None:
        for row, drop in drops.items():
            if drop or self._recording:
                self._caches[row].crop(-drop)

    def _row(self, row: int, tokens: Tensor, *, last: bool) -> tuple[Tensor, Tensor | None]:
        scores, hidden, self._caches[row] = self._asked(tokens, self._caches[row], last)
        return scores, hidden

    def _new_cache(self) -> Any:
        if not self._recording:
            return DynamicCache()
        cache = DynamicCache(config=self._lm.model.config)
        cache.activate_past_recording()
        return cache


class ReplayingTarget(_Reader):
    """A cache of its own for every row, kept as it was before the last call.

    Parameters
    ----------
    stepped : bool
        Token by token, with a copy of the cache after each; else several tokens at a time, and what
        was accepted is fed once more to the cache from before.
    """

    def __init__(self, lm: HuggingFaceLanguageModel, hidden: bool, *, stepped: bool):
        super().__init__(lm, hidden)
        self._stepped = stepped
        # Per row: the cache after 0, 1, … tokens of the last extension; if not stepped, after none.
        self._caches: list[list[Any]] = []
        self._tokens = torch.zeros(0, 0, dtype=torch.long)
        self._running: set[int] = set()

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, Tensor | None]:
        """Read one prompt after another into caches that the model makes."""
        found = [self._asked(prompt[None], None, True) for prompt in prompts]  # (1, 1, vocab) each
        self._caches = [[cache] for _, _, cache in found]
        return _at_end(*_joined([(s, h) for s, h, _ in found], 0))

    def extend(
        self, tokens: Int[Tensor, "batch count"], running: set[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Forward passes for each running row, on copies."""
        self._tokens, self._running = tokens, set(running)
        read = self._stepped_row if self._stepped else self._whole_row
        return _of_running(read, running, len(tokens))

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Go on from the cache after so many tokens."""
        for row in self._running:
            count, caches = int(counts[row]), self._caches[row]
            if self._stepped or not count:
                self._caches[row] = [caches[count]]
                continue
            accepted = self._tokens[row, None, :count]  # (1, count)
            self._caches[row] = [self._asked(accepted, caches[0], True)[2]]

    def _whole_row(self, row: int) -> tuple[Tensor, Tensor | None]:
        cache = copy.deepcopy(self._caches[row][0])
        scores, hidden, _ = self._asked(self._tokens[row, None], cache, False)  # (1, count, vocab)
        return scores, hidden

    def _stepped_row(self, row: int) -> tuple[Tensor, Tensor | None]:
        found, caches = [], self._caches[row]
        for token in self._tokens[row].split(1):
            cache = copy.deepcopy(caches[-1])
            scores, hidden, cache = self._asked(token[None], cache, False)  # (1, 1, vocab)
            caches.append(cache)
            found.append((scores, hidden))
        return _joined(found, 1)  # (1, count, …)


class _TextsTarget:
    """Texts without a cache: what follows them is asked for again in every call."""

    def __init__(self, device: torch.device):
        self.device = device
        self._texts: list[Tensor] = []
        self._added, self._running = 0, set[int]()

    def begin(self, prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Tensor, Tensor | None]:
        """Read one prompt after another."""
        self._texts = list(prompts)
        return _at_end(*_joined([self._asked(text, 1) for text in self._texts], 0))

    def extend(
        self, tokens: Int[Tensor, "batch count"], running: set[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Read each running row's longer text."""
        self._added, self._running = tokens.shape[1], set(running)
        for row in running:
            self._texts[row] = torch.cat([self._texts[row], tokens[row].cpu()])  # (time + count,)
        read = lambda row: self._asked(self._texts[row], self._added)  # noqa: E731
        return _of_running(read, running, len(tokens))

    def keep(self, counts: Int[Tensor, " batch"]) -> None:
        """Cut the texts."""
        for row in self._running:
            text = self._texts[row]
            self._texts[row] = text[: len(text) - self._added + int(counts[row])]

    def _asked(self, text: Tensor, last: int) -> tuple[Tensor, Tensor | None]:
        """Scores (1, last, vocab) after the last tokens, and hidden states."""
        raise NotImplementedError


class FullPassTarget(_TextsTarget):
    """One forward pass over the whole text of each row per call."""

    def __init__(self, lm: HuggingFaceLanguageModel, hidden: bool):
        super().__init__(lm.device)
        self._lm, self._hidden = lm, hidden

    def _asked(self, text: Tensor, last: int) -> tuple[Tensor, Tensor | None]:
        if not self._hidden:
            return self._lm.full_logits(text[None])[:, -last:], None
        hidden = self._lm.hidden_states(text[None])[:, -last:]  # (1, last, d)
        return self._lm.unembed(hidden), hidden


class PrefixTarget(FullPassTarget):
    """A full forward pass for every prefix of a drafted block.

    For models whose distributions at a position depend on how long the whole text is.
    """

    def _asked(self, text: Tensor, last: int) -> tuple[Tensor, Tensor | None]:
        ends = range(len(text) - last + 1, len(text) + 1)
        found = [FullPassTarget._asked(self, text[:end], 1) for end in ends]
        return _joined(found, 1)  # (1, last, vocab)


class PlainTarget(_TextsTarget):
    """Any language model: every distribution by a call of its own; no hidden states."""

    def __init__(self, lm: LanguageModel):
        super().__init__(torch.device("cpu"))
        self._lm = lm

    def _asked(self, text: Tensor, last: int) -> tuple[Tensor, None]:
        ends = range(len(text) - last + 1, len(text) + 1)
        rows = [self._lm.next_token_log_probs(text[None, :end]) for end in ends]  # (1, vocab) each
        return torch.stack(rows, 1), None  # (1, last, vocab)


def _at_end(scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of the last token of every row alone: (batch, vocab) and (batch, d)."""
    return scores[:, -1], None if hidden is None else hidden[:, -1]


def _joined(found: list[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    """Scores and hidden states one after another along an axis."""
    hidden = [h for _, h in found if h is not None]
    return torch.cat([s for s, _ in found], dim), torch.cat(hidden, dim) if hidden else None


def _of_running(
    read: Callable[[int], tuple[Tensor, Tensor | None]], running: set[int], batch: int
) -> tuple[Tensor, Tensor | None]:
    """One batch out of the running rows (1, count, …); zeros for the others."""
    rows = sorted(running)
    some_scores, some_hidden = _joined([read(row) for row in rows], 0)
    scores = some_scores.new_zeros(batch, *some_scores.shape[1:])  # (batch, count, vocab)
    scores[rows] = some_scores
    if some_hidden is None:
        return scores, None
    hidden = some_hidden.new_zeros(batch, *some_hidden.shape[1:])  # (batch, count, d)
    hidden[rows] = some_hidden
    return scores, hidden
