"""What a written text is put through: the distributions that were used against full passes.

Two numbers say how far they are apart. The largest total variation finds a fault of a single
token, but in half precision rounding alone makes some percent of it. The mean of the squared
Hellinger distance over all tokens is steady: it is a quarter of the nats by which a reader who
knows the model can tell the text from its own, token by token, and so adds up over a text.
"""

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
# How often the squared distance that rounding makes may be exceeded: twice as far.
_TIMES = 4
# Units in the last place of a logit that rounding amounts to where it cannot be measured.
_UNITS = {torch.float32: 256, torch.float16: 2, torch.bfloat16: 2}
# Tokens at which a model in half precision is held against itself in single precision.
_MEASURED = 4 * EVERY


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
    distance : float
        Mean of ``1/2 sum (sqrt p - sqrt q)^2`` over all tokens, p and q being the model's own
        distributions, before temperature and truncation: the one used and the full pass's.
    precision : float
        What rounding makes of `distance`. In half precision: that of full passes from full passes
        in single precision over some of the tokens, where the model fits into memory beside itself;
        else what an error of 2 units in the last place of every logit would make, in single
        precision 256.
    """

    largest: float
    rounding: float
    positions: int
    seconds: float
    distance: float
    precision: float

    @property
    def allowed(self) -> float:
        """Up to where `distance` is rounding: four times `precision`, which is twice as far."""
        return _TIMES * self.precision

    @property
    def passed(self) -> bool:
        """Whether the text was drawn from what full passes say, up to rounding."""
        return self.distance <= self.allowed


@dataclass
class _Sums:
    """What is left of the positions that were compared."""

    largest: float = 0.0
    rounding: float = 0.0
    distance: float = 0.0
    positions: int = 0
    precision: float = 0.0
    measured: int = 0
    by_twin: bool = False
    seconds: float = 0.0

    def found(self) -> AuditFindings:
        return AuditFindings(
            self.largest,
            self.rounding,
            self.positions,
            self.seconds,
            self.distance / max(self.positions, 1),
            self.precision / max(self.measured, 1),
        )


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
        self._sums = _Sums()
        # The model in single precision, until enough was held against it.
        self._twin: Any = None

    def note(self, row: int, scores: Float[Tensor, "count vocab"]) -> None:
        """Scores that some more tokens of a row were drawn from."""
        self._used[row].append(scores.float())

    def hold(self, row: int, text: Tensor, *, at_end: bool) -> None:
        """Compare what is waiting of a row, whose text is given up to its last token."""
        waiting = sum(map(len, self._used[row]))
        if not waiting or (waiting < EVERY and not at_end):
            return
        begun, sums = time.perf_counter(), self._sums
        scores = torch.cat(self._used[row])
        used, (alone, beside) = _probs(scores), self._full(text, waiting)  # (waiting, vocab) each
        sums.largest = max(sums.largest, self._gap(used, alone))
        sums.rounding = max(sums.rounding, self._gap(beside, alone))
        sums.distance += float(_squared_hellinger(used, alone).sum())
        sums.positions += waiting
        self._measure(text, scores, alone)
        self._used[row] = []
        sums.seconds += time.perf_counter() - begun

    def findings(self) -> AuditFindings:
        """What was found so far."""
        return self._sums.found()

    def _full(self, text: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Distributions (count, vocab) of the last tokens, by passes of two shapes."""
        ends = range(len(text) - count, len(text))
        if self._by_prefix:
            rows = [self._lm.next_token_log_probs(text[None, :end])[0] for end in ends]
            alone = _probs(torch.stack(rows))  # (count, vocab)
            return alone, alone
        alone = _probs(self._lm.full_logits(text[None, :-1])[0, -count:])  # (count, vocab)
        # The same without the last tokens, which no position may see.
        left = max(count - 5, 1)
        shorter = self._lm.full_logits(text[None, : len(text) - 1 - (count - left)])
        beside = _probs(shorter[0, -left:])  # (left, vocab)
        return alone, torch.cat([beside, alone[left:]])  # (count, vocab)

    def _measure(self, text: Tensor, scores: Tensor, alone: Tensor) -> None:
        """What rounding makes of the squared distance at some more tokens."""
        sums = self._sums
        if not sums.measured and not self._by_prefix:
            twin = self._lm.twin
            self._twin = None if twin is self._lm else twin
        if self._twin is not None:
            single = _probs(self._twin.full_logits(text[None, :-1])[0, -len(alone) :])
            gaps = _squared_hellinger(alone, single)  # (count,)
            sums.by_twin = True
        elif sums.by_twin:
            return
        else:
            gaps = _last_places(scores, getattr(getattr(self._lm, "model", None), "dtype", None))
        sums.precision += float(gaps.sum())
        sums.measured += len(gaps)
        if sums.measured >= _MEASURED:
            self._twin = None

    def _gap(self, a: Tensor, b: Tensor) -> float:
        """Largest total variation of processed distributions."""
        return float(0.5 * (self._law.process(a) - self._law.process(b)).abs().sum(-1).max())


def finished(audit: Audit | None, texts: Sequence[Tensor]) -> AuditFindings | None:
    """Findings of a run that is over, whose whole texts are given."""
    if audit is None:
        return None
    for row, text in enumerate(texts):
        audit.hold(row, text, at_end=True)
    return audit.findings()


def _probs(scores: Float[Tensor, "count vocab"]) -> Float[Tensor, "count vocab"]:
    return scores.double().softmax(-1).cpu()


def _squared_hellinger(
    p: Float[Tensor, "count vocab"], q: Float[Tensor, "count vocab"]
) -> Float[Tensor, " count"]:
    return 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)


def _last_places(
    scores: Float[Tensor, "count vocab"], dtype: torch.dtype | None
) -> Float[Tensor, " count"]:
    """The squared distance that errors of some units in the last place of every logit z make.

    A small error δ of the logits makes ``1/8 Var_p(δ)``; errors spread evenly over one unit
    ``u (1 + |z|)`` to either side of nothing have a variance of a twelfth of its square.
    """
    dtype = dtype if dtype in _UNITS else torch.float32
    p = _probs(scores)
    unit = _UNITS[dtype] * torch.finfo(dtype).eps * (1 + scores.double().abs().cpu())
    return (p * (1 - p) * unit.square()).sum(-1) / 96  # (count,)
