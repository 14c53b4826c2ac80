"""Tokens per call as decoding will meet them: at the ends of its own cycles, forecast without
decoding.

Lossless decoding leaves the text's law as it is, so a text drawn from the target *is* what decoding
would have written; what is random beside it is only where its cycles end. Given the text, the first
k drafted tokens after a known one are kept with a probability that both rules give in closed form,
with ``R_k = Q(x_2:k+1 | x_1) / P(x_2:k+1 | x_1)`` along the text:

* ``token``: ``G_k = prod_{i<=k} min(1, q_i / p_i)``
* ``block``: ``G_k = min(1, R_1, …, R_k)``

and a cycle emits exactly j tokens, the last of them its correction, with probability
``G_{j-1} - G_j``. Running these jumps along the text gives the probability that a cycle starts at
each position: pairs of context and first token, weighted as decoding weighs them. The randomness of
cycles is integrated out; only that of texts is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.verification import VERIFIED, check_rule, survival_along
from cpmtp.heads.conditionals import path_conditionals
from cpmtp.heads.draft_head import DraftHead
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.shown import Shown
from cpmtp.resampling import normal_half_width
from cpmtp.sampling_law import SamplingLaw

_ENTRIES_AT_ONCE = 1 << 24
# Of the least probability that a law keeps: what rounding may leave of it in another pass (half-
# precision scores of 20 are off by up to 0.1).
_NEAR_EDGE = 0.5
_SMALLEST = 1e-12


@dataclass(frozen=True, repr=False)
class CycleForecast(Shown):
    """A forecast of decoding's pooled tokens per call.

    Attributes
    ----------
    tokens_per_call : float
        Weighted by the cycle's own law: what decoding texts like these comes to.
    interval : (float, float)
        Confidence interval over texts (ratio estimator).
    unweighted : float
        Every position counted alike: what a study over contexts forecasts.
    unweighted_interval : (float, float)
    texts : int
    rule : str
    calls : (texts,) tensor
        Expected calls in each text, of which every one has ``time - start - 1`` tokens from the
        first known one: for intervals over groups of texts, or of differences between heads.
    survived : (texts, horizon) tensor
        Expected calls in each text that emit at least 1 … n tokens; its sum over the texts is that
        of the calls times survival.
    """

    tokens_per_call: float
    interval: tuple[float, float]
    unweighted: float
    unweighted_interval: tuple[float, float]
    texts: int
    rule: str
    calls: Float[Tensor, " texts"] = field(repr=False, compare=False)
    survived: Float[Tensor, "texts horizon"] = field(repr=False, compare=False)

    @property
    def survival(self) -> Float[Tensor, " horizon"]:
        """``S_1 … S_n`` as cycles meet them; what a text's end cuts off counts as lost."""
        return self.survived.sum(0) / self.calls.sum()


@takes_what_is_given
def forecast_cycles(
    lm: Any,
    head: DraftHead,
    tokens: Int[Tensor, "texts time"],
    *,
    start: int = 1,
    rule: str = "block",
    confidence: float = 0.95,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> CycleForecast:
    """Forecast the tokens per call of `speculative_generate` on texts drawn from the target.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
        The head's base model.
    tokens : (texts, time) long tensor
        From `start` on drawn from the target's law under the same temperature, top-k and top-p.
    start : int
        The length of the prompts: the token at `start` is the first known one, and ``time - start``
        are generated.
    rule : {"block", "token"}
    confidence : float
        Nominal coverage of the intervals.

    Raises
    ------
    ValueError
        If the rule is unknown, there are fewer than two texts, nothing comes after the first known
        token, or the target's law cannot have written a text.
    """
    law = SamplingLaw(temperature, top_k, top_p)
    if not 1 <= start < tokens.shape[1] - 1:
        raise ValueError(
            f"start {start} of texts of {tokens.shape[1]} tokens: expected a prompt, a known "
            "token and more after it"
        )
    ratios = head_ratios(head, (ReadText.of(lm, row, law) for row in tokens.split(1)), start)
    return forecast_from_ratios(ratios, rule=rule, confidence=confidence)


@dataclass(frozen=True)
class ReadText:
    """What the base model says of one text, whatever the head.

    Attributes
    ----------
    tokens : (1, time) long tensor
    hidden : (1, time - 1, hidden) tensor
        After each token but the last.
    probs : (time - 1,) tensor
        Of each token but the first, under the sampling law.
    law : SamplingLaw
    """

    tokens: Int[Tensor, "1 time"]
    hidden: Float[Tensor, "1 _ d"]
    probs: Float[Tensor, " _"]
    law: SamplingLaw

    @classmethod
    @torch.no_grad()
    def of(cls, lm: Any, row: Int[Tensor, "1 time"], law: SamplingLaw) -> ReadText:
        """One pass of the base model."""
        row = row.to(lm.device)
        hidden = lm.hidden_states(row)[:, :-1]  # (1, time - 1, d)
        plain = lm.unembed(hidden[0]).double().softmax(-1)  # (time - 1, vocab)
        return cls(row, hidden, _text_probs(plain, row[0, 1:], law), law)


def _text_probs(
    plain: Float[Tensor, "steps vocab"], tokens: Int[Tensor, " steps"], law: SamplingLaw
) -> Float[Tensor, " steps"]:
    """The law's probability of each token of a text that was drawn from it.

    Another pass of the same model rounds differently: a token at the law's edge when it was drawn
    (the best of two at temperature 0) may be just outside now. It counts as the edge.
    """
    target = law.process(plain)  # (steps, vocab)
    own, before = (of.gather(-1, tokens[:, None]).squeeze(-1) for of in (target, plain))  # (steps,)
    edge, edge_before = (
        of.masked_fill(target == 0, torch.inf).amin(-1) for of in (target, plain)
    )  # (steps,)
    return torch.where((own == 0) & (before >= _NEAR_EDGE * edge_before), edge, own)


def head_ratios(
    head: DraftHead, texts: Iterable[ReadText], start: int
) -> Float[Tensor, "texts starts drafted"]:
    """``q / p`` along texts for a head, see `forecast_from_ratios`."""
    return torch.cat([_text_ratios(head, text, start) for text in texts])


def forecast_from_ratios(
    ratios: Float[Tensor, "texts starts drafted"], *, rule: str = "block", confidence: float = 0.95
) -> CycleForecast:
    """The same from ``q / p`` along texts, for drafts of any kind.

    Parameters
    ----------
    ratios : (texts, starts, drafted) tensor
        ``ratios[m, t, i]``: the draft's over the target's probability of the text's token t + 1 + i
        given all before it, the draft made when token t was the last known one. The text's last
        token is the one after the last start; what would lie beyond it is not read.

    Examples
    --------
    One drafted token, kept with probability one half: one token and a half per call.

    >>> half = torch.full((2, 5, 1), 0.5)
    >>> round(forecast_from_ratios(half).unweighted, 3)
    1.5
    """
    if len(ratios) < 2:
        raise ValueError(f"{len(ratios)} texts: expected at least 2, for an interval")
    kept = kept_along_text(ratios, rule)
    whole = kept[:, : max(kept.shape[1] - ratios.shape[2], 1)].sum(-1)
    starts = start_probs(kept)
    weighted = _ratio(torch.full_like(starts[:, 0], starts.shape[1]), starts.sum(1), confidence)
    plain = _ratio(whole.sum(1), torch.full_like(starts[:, 0], whole.shape[1]), confidence)
    calls = starts.sum(1)  # (texts,)
    survived = (starts.unsqueeze(-1) * kept).sum(1)  # (texts, horizon)
    return CycleForecast(*weighted, *plain, len(ratios), rule, calls, survived)


def divergences_along(
    ratios: Float[Tensor, "texts starts drafted"],
) -> Float[Tensor, "texts drafted"]:
    """Mean of ``log p / q`` along each text by drafted position, over starts with a whole block:
    the draft's divergence from the target at each position.

    Tokens that a draft vocabulary leaves out are passed over.

    Examples
    --------
    >>> half = torch.full((1, 5, 1), 0.5)
    >>> round(float(divergences_along(half)), 3)
    0.693
    """
    whole = ratios[:, : max(ratios.shape[1] - ratios.shape[2] + 1, 1)].double()
    inside = whole > 0
    logs = torch.where(inside, -whole.clamp_min(_SMALLEST).log(), 0.0)
    return logs.sum(1) / inside.sum(1).clamp_min(1)  # (texts, drafted)


def kept_along_text(
    ratios: Float[Tensor, "texts starts drafted"], rule: str
) -> Float[Tensor, "texts starts horizon"]:
    """``G_0 … G_drafted`` of every start, zero beyond the text's end; ``G_0 = 1`` is the known
    token itself.
    """
    check_rule(rule, VERIFIED)
    kept = survival_along(ratios, rule)  # (texts, starts, drafted)
    kept = torch.cat([torch.ones_like(kept[..., :1]), kept], -1).double()
    left = torch.arange(kept.shape[1], 0, -1)
    return kept * (torch.arange(kept.shape[2]) < left[:, None])


def start_probs(kept: Float[Tensor, "texts starts horizon"]) -> Float[Tensor, "texts starts"]:
    """The probability that a cycle starts at each position, one starting at the first: a renewal
    process with these jumps.
    """
    # (texts, starts, horizon)
    jumps = torch.cat([kept[..., :-1] - kept[..., 1:], kept[..., -1:]], -1)
    texts, starts, horizon = kept.shape
    found = torch.zeros(texts, starts + horizon, dtype=kept.dtype)
    found[:, 0] = 1
    for t in range(starts):
        found[:, t + 1 : t + 1 + horizon] += found[:, t, None] * jumps[:, t]  # (texts, horizon)
    return found[:, :starts]


@torch.no_grad()
def _text_ratios(head: DraftHead, text: ReadText, start: int) -> Tensor:
    """``q / p`` (1, starts, drafted) of one text; what lies beyond its end is 0."""
    row, hidden, law = text.tokens, text.hidden, text.law
    time, drafted = row.shape[1], head.horizon - 1
    outside = (text.probs[start:] == 0).nonzero()
    if len(outside):
        at = start + 1 + int(outside[0])
        raise ValueError(
            f"token {int(row[0, at])} at position {at} of a text has no probability under {law}: "
            "expected texts drawn from the target under the same temperature, top-k and top-p"
        )
    # Beyond the end stand copies of the last token: read by nobody, but the shapes stay.
    padded = torch.cat([row, row[:, -1:].expand(-1, drafted)], 1)  # (1, time + drafted)
    of_text = torch.cat([text.probs, text.probs.new_ones(drafted)])  # (time - 1 + drafted,)

    hidden = hidden.to(head.maps)
    features, weights = head.features(hidden, padded), head.weights()
    paths = padded[:, 1:].unfold(1, head.horizon, 1)  # (1, time - 1, horizon)
    size = max(_ENTRIES_AT_ONCE // (head.drafted * head.rank * head.support_size), 1)
    parts = []
    for at in torch.arange(start, time - 1, device=row.device).split(size):
        some = (0, at - 1)
        found = features[some]
        logits = head.logits(hidden[some], found, *weights)  # (some, drafted, rank, support)
        along = path_conditionals(head, found.log_weights.double(), logits.double(), paths[some])
        q = replace(along, drafted=law.process(along.drafted)).of_path()  # (some, drafted)
        following = at[:, None] + torch.arange(1, drafted + 1, device=row.device)  # (some, drafted)
        parts.append(torch.where(following < time, q / of_text[following - 1], 0.0))
    return torch.cat(parts).cpu()[None]  # (1, starts, drafted)


def _ratio(above: Tensor, below: Tensor, confidence: float) -> tuple[float, tuple[float, float]]:
    """Sum over sum, with the normal interval of the ratio estimator."""
    ratio = float(above.sum() / below.sum())
    error = float((above - ratio * below).std() / below.mean() / len(below) ** 0.5)
    half = normal_half_width(error, confidence)
    return ratio, (ratio - half, ratio + half)
