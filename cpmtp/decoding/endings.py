"""Where a text ends before its longest length: end-of-text tokens, stop strings, a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

# What stands for the end-of-text tokens that a model's own files name.
OWN = "model"


@dataclass(frozen=True)
class Endings:
    """Where a row ends early.

    Attributes
    ----------
    lm : LanguageModel
        Decodes where there are stop strings.
    tokens : frozenset of int
        A row ends with one of them.
    stop_strings : tuple of str
        A row ends with the token that completes one of them.
    callback : callable, optional
        See `speculative_generate`.

    Examples
    --------
    >>> Endings(None, frozenset({7})).cut([], [3, 7, 5])
    ([3, 7], True)
    """

    lm: Any = None
    tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    callback: Callable[[int, Tensor], bool | None] | None = None

    @classmethod
    def of(
        cls,
        lm: Any,
        eos_token_id: Any,
        stop_strings: Any,
        callback: Callable[[int, Tensor], bool | None] | None,
    ) -> Endings:
        """From what a caller gives.

        Raises
        ------
        ValueError
            If a token is none of the model's, a stop string is empty or no string, or the model
            cannot decode.
        """
        return cls(lm, end_tokens(lm, eos_token_id), _stop_strings(lm, stop_strings), callback)

    def cut(self, before: list[int], block: list[int]) -> tuple[list[int], bool]:
        """The part of a block that is still wanted, and whether the row ends with it."""
        for k, token in enumerate(block):
            if token in self.tokens:
                return block[: k + 1], True
            if self.stop_strings:
                text = self.lm.decode(torch.tensor(before + block[: k + 1]))
                if any(stop in text for stop in self.stop_strings):
                    return block[: k + 1], True
        return block, False


def end_tokens(lm: Any, given: Any) -> frozenset[int]:
    """Ids that end a text: one, several, none, or ``"model"``: those that its files name.

    Raises
    ------
    ValueError
        If one is no token of the model's.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> sorted(end_tokens(separated_hmm(2, 6), [4, 2]))
    [2, 4]
    """
    if given is None:
        return frozenset()
    if isinstance(given, str):
        if given != OWN:
            raise ValueError(
                f"eos_token_id {given!r}: expected a token id, several, {OWN!r} or None"
            )
        return frozenset(getattr(lm, "eos_token_ids", ()))
    if isinstance(given, Tensor):
        given = given.reshape(-1).tolist()  # (tokens,)
    several = [given] if isinstance(given, Integral) else list(given)
    for token in several:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(f"eos_token_id {token!r}: expected a token id, several, or None")
        if not 0 <= int(token) < lm.vocab_size:
            raise ValueError(f"eos_token_id {token}: expected ids in [0, {lm.vocab_size})")
    return frozenset(int(token) for token in several)


def _stop_strings(lm: Any, given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop string {stop!r}: expected one string or several, none empty")
    if stops and not hasattr(lm, "decode"):
        raise ValueError(
            "stop strings for a model without decode(token_ids): leave them out, or end rows by "
            "eos_token_id or a callback"
        )
    return stops
