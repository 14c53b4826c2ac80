"""Which way a model is followed while it decodes: the fastest that gives what full passes give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpmtp.decoding.target import (
    BatchTarget,
    FullPassTarget,
    PlainTarget,
    PrefixTarget,
    ReplayingTarget,
    RowsTarget,
    Target,
)
from cpmtp.pretrained.trials import one_pass_gap, total_variation, trial_ids


class RecordedRowsTarget(RowsTarget):
    """Rows whose caches remember what cropping must restore, as far as they can."""

    def __init__(self, lm: Any, hidden: bool):
        super().__init__(lm, hidden, recording=True)

    def begin(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Read the prompts.

        Raises
        ------
        ValueError
            If there are recurrent states: recording restores convolutions alone, and what a state
            keeps of rejected tokens may be too little to be seen on random texts.
        """
        found = super().begin(prompts)
        for layer in (layer for cache in self._caches for layer in cache.layers):
            states = getattr(layer, "recurrent_states", None)
            kept = states.values() if isinstance(states, dict) else [states]
            if any(state is not None for state in kept):
                raise ValueError("a recurrent state cannot be cropped")
        return found


Opener = Callable[[Any, bool], Target]
# From the fastest to the one that takes nothing for granted.
WAYS: dict[str, Opener] = {
    "batch": BatchTarget,
    "rows": lambda lm, hidden: RowsTarget(lm, hidden, recording=False),
    "recorded rows": RecordedRowsTarget,
    "replayed": lambda lm, hidden: ReplayingTarget(lm, hidden, stepped=False),
    "stepped": lambda lm, hidden: ReplayingTarget(lm, hidden, stepped=True),
    "full passes": FullPassTarget,
    # For models for which one pass does not say what a pass per prefix says.
    "passes of prefixes": PrefixTarget,
}
PREFIXES = "passes of prefixes"
# A language model of one's own, which is asked for every distribution by itself.
CALLS = "calls"
# How many tokens each row keeps of three, extension by extension.
_KEPT = ((2, 3, 1), (3, 0, 2), (1, 3, 3))
_EXTENSION = 3


@dataclass(frozen=True)
class FollowedTarget:
    """A target and the way it is followed.

    Attributes
    ----------
    target : Target
    way : str
        Of `WAYS`, or `CALLS`.
    """

    target: Target
    way: str


def open_target(lm: Any, *, rows: int, longest: int, hidden: bool) -> FollowedTarget:
    """The target by the fastest way that passes its trial.

    Parameters
    ----------
    lm : LanguageModel
    rows : int
        Texts decoded together.
    longest : int
        Tokens of the longest text that may come of it.
    hidden : bool
        Whether hidden states are wanted.

    Raises
    ------
    ValueError
        If the model looks at later tokens, or hidden states are wanted of a model
        that has none its logits could be computed from.
    """
    if hasattr(lm, "full_logits"):
        way = way_of(lm, rows=rows, longest=longest, hidden=hidden)
        return FollowedTarget(WAYS[way](lm, hidden), way)
    if hidden:
        raise ValueError(
            "a head needs hidden states, which this language model has not: give a function of the "
            "text instead"
        )
    return FollowedTarget(PlainTarget(lm), CALLS)


def way_of(lm: Any, *, rows: int, longest: int, hidden: bool) -> str:
    """The fastest way that passes its trial, for a Hugging Face model; see `open_target`."""
    lm.require_causal()
    if hidden:
        lm.require_hidden_states()
    if not lm.trials.passes("one pass", longest, one_pass_gap):
        return PREFIXES
    ways = [way for way in WAYS if rows > 1 or way != "batch"]
    passing = (
        way
        for way in ways
        if lm.trials.passes(_named(way, hidden), longest, gap_of(WAYS[way], hidden))
    )
    return next(passing, PREFIXES)


def _named(way: str, hidden: bool) -> str:
    return f"{way}, with hidden states" if hidden else way


def gap_of(opener: Opener, hidden: bool) -> Callable[[Any, tuple[int, ...]], float]:
    """The largest total variation of a way to full passes, over a ragged batch that is decoded.

    Three rows begin with prompts of the given lengths and keep different numbers of tokens.
    """

    def gap(lm: Any, lengths: tuple[int, ...]) -> float:
        texts = [trial_ids(lm.vocab_size, length, row) for row, length in enumerate(lengths)]
        target, running = opener(lm, hidden), set(range(len(texts)))
        scores, states = target.begin(texts)
        worst = max(
            # (1, vocab)
            _gap(lm, text, scores[row, None], None if states is None else states[row, None])
            for row, text in enumerate(texts)
        )
        for call, kept in enumerate(_KEPT):
            more = trial_ids(lm.vocab_size, _EXTENSION * len(texts), 17 + call)
            tokens = more.reshape(len(texts), _EXTENSION)  # (rows, extension)
            scores, states = target.extend(tokens, running)
            for row, text in enumerate(texts):
                whole = torch.cat([text, tokens[row]])  # (time + extension,)
                own = None if states is None else states[row]
                worst = max(worst, _gap(lm, whole, scores[row], own))
                texts[row] = whole[: len(text) + kept[row]]
            target.keep(torch.tensor(kept))
        return worst

    return gap


def _gap(lm: Any, text: Tensor, scores: Tensor, hidden: Tensor | None) -> float:
    """The total variation of scores (count, vocab) after a text's last tokens to a full pass."""
    expected = lm.full_logits(text[None])[0, -len(scores) :]  # (count, vocab)
    found = [scores] if hidden is None else [scores, lm.unembed(hidden)]
    return max(float(total_variation(one, expected).max()) for one in found)
