"""What a written text is put through: the distributions that were used against full passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.sampling_law import SamplingLaw

EVERY = 64  # new tokens of a row between two audits


@dataclass(frozen=True)
class AuditFindings:
    """What an audit found.

    Attributes
    ----------
    largest : float
        Largest total variation between a distribution that a token was drawn from and that of one
        full forward pass over the text, as it was written.
    rounding : float
        The same between two full passes of different batch shape: what the precision makes.
    positions : int
        Tokens that were held against full passes.
    seconds : float
    """

    largest: float
    rounding: float
    positions: int
    seconds: float


class Audit:
    """Keeps what was used until enough of it is there, holds it against full passes, forgets it.

    At temperature 0, where the processed distribution is an argmax, that of the model is held
    against the full pass's.

    Parameters
    ----------
    by_prefix : bool
        A full pass for every token: for models of which one pass says something else, and for those
        that can do no other.
    """

    def __init__(self, lm: Any, law: SamplingLaw, rows: int, *, by_prefix: bool):
        self._lm, self._by_prefix = lm, by_prefix
        self._law = law if law.temperature else SamplingLaw()
        self._used: list[list[Tensor]] = [[] for _ in range(rows)]
        self._largest, self._rounding, self._positions, self._seconds = 0.0, 0.0, 0, 0.0

    def note(self, row: int, scores: Float[Tensor, "count vocab"]) -> None:
        """Scores that some more tokens of a row were drawn from."""
        self._used[row].append(scores.float())

    def hold(self, row: int, text: Tensor, *, at_end: bool) -> None:
        """Compare what is waiting of a row, whose text is given up to its last token."""
        waiting = sum(map(len, self._used[row]))
        if not waiting or (waiting < EVERY and not at_end):
            return
        begun = time.perf_counter()
        used = self._processed(torch.cat(self._used[row]))  # (waiting, vocab)
        alone, beside = self._full(text, waiting)
        self._largest = max(self._largest, _gap(used, alone))
        self._rounding = max(self._rounding, _gap(beside, alone))
        self._positions += waiting
        self._used[row] = []
        self._seconds += time.perf_counter() - begun

    def findings(self) -> AuditFindings:
        """What was found so far."""
        return AuditFindings(self._largest, self._rounding, self._positions, self._seconds)

    def _full(self, text: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Processed distributions (count, vocab) of the last tokens, by passes of two shapes."""
        ends = range(len(text) - count, len(text))
        if self._by_prefix:
            rows = [self._lm.next_token_log_probs(text[None, :end])[0] for end in ends]
            alone = self._processed(torch.stack(rows))  # (count, vocab)
            return alone, alone
        alone = self._processed(self._lm.full_logits(text[None, :-1])[0, -count:])  # (count, vocab)
        # The same without the last tokens, which no position may see.
        left = max(count - 5, 1)
        shorter = self._lm.full_logits(text[None, : len(text) - 1 - (count - left)])
        beside = self._processed(shorter[0, -left:])  # (left, vocab)
        return alone, torch.cat([beside, alone[left:]])  # (count, vocab)

    def _processed(self, scores: Float[Tensor, "count vocab"]) -> Float[Tensor, "count vocab"]:
        return self._law.process(scores.double().softmax(-1)).cpu()


def finished(audit: Audit | None, texts: Sequence[Tensor]) -> AuditFindings | None:
    """Findings of a run that is over, whose whole texts are given."""
    if audit is None:
        return None
    for row, text in enumerate(texts):
        audit.hold(row, text, at_end=True)
    return audit.findings()


def _gap(a: Tensor, b: Tensor) -> float:
    return float(0.5 * (a - b).abs().sum(-1).max())
