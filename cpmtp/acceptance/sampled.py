"""Acceptance estimated from samples of the target: unbiased for any vocabulary and horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.children import ChildReader
from cpmtp.acceptance.options import proposal_law
from cpmtp.acceptance.verification import (
    VERIFIED,
    check_first_token,
    check_rule,
    survival_along,
)
from cpmtp.drafts.protocol import draft_horizon, is_anchored
from cpmtp.joint_distribution import check_context, conditional_probs, prefixes_at_once
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.language_model import LanguageModel
from cpmtp.resampling import normal_half_width
from cpmtp.sampling_law import SamplingLaw, draw

_ENTRIES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class AcceptanceEstimate:
    """A Monte Carlo estimate of an acceptance profile, with confidence intervals.

    Attributes
    ----------
    survival : (horizon,) float64 tensor
        Unbiased estimates of the probability that the first k tokens of a block are emitted
        unchanged.
    survival_error : (horizon,) float64 tensor
        Their standard errors.
    tokens_per_call : float
        Unbiased estimate of the expected tokens per call of the target.
    tokens_per_call_interval : (float, float)
        Confidence interval of it.
    samples : int
    rule : str
    first_token : str
        ``"target"`` or ``"draft"``.
    """

    survival: Float[Tensor, " horizon"]
    survival_error: Float[Tensor, " horizon"]
    tokens_per_call: float
    tokens_per_call_interval: tuple[float, float]
    samples: int
    rule: str
    first_token: str


@takes_what_is_given
def estimate_acceptance(
    lm: LanguageModel,
    draft: Any,
    context: Int[Tensor, " time"],
    *,
    samples: int = 1000,
    seed: int = 0,
    rule: str = "block",
    first_token: str = "target",
    proposal: str = "sampled",
    horizon: int | None = None,
    confidence: float = 0.95,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> AcceptanceEstimate:
    """Estimate the acceptance of a draft from sequences drawn from the target.

    ``S_k = E_P[prod_{i<=k} min(1, q_i / p_i)]`` for rule ``"token"`` and
    ``S_k = E_P[min_{0<=j<=k} Q(x_1:j) / P(x_1:j)]`` for ``"block"``: both are means, over x drawn
    from the target, of numbers between 0 and 1. The interval is the normal one of the mean number
    of tokens per sample, after adding ``z^2 / 2`` samples at each end of its range (Agresti and
    Coull's interval, for any bounded number): where acceptance rests on texts too rare to be among
    the samples, it stays honest.

    Parameters
    ----------
    lm : LanguageModel
        The target.
    draft : Draft, FitResult, JointDistribution or LanguageModel
        Anchored ones have one batch axis (vocab,) and horizon n - 1.
    context : (time,) long tensor
    samples : int
        At least 2.
    seed : int
    rule : {"block", "token"}
    first_token : {"target", "draft"}
        Whether the first token is known when the draft is judged, or drafted too.
    proposal : {"sampled", "argmax"}
        Whether the draft's tokens are drawn, or each is the most probable one.
    horizon : int, optional
        Number of tokens; by default the draft's own. A language model as draft has none.
    confidence : float
        Nominal coverage of the interval.
    temperature, top_k, top_p
        Of the target's law; the draft's next-token laws are put through the same.

    Raises
    ------
    ValueError
        If an argument is out of range, the draft does not fit, or context and horizon exceed the
        model's window.

    References
    ----------
    sun2024block, leviathan2023fast, agresti1998approximate

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> lm, context = separated_hmm(2, 8), torch.tensor([0])
    >>> estimate_acceptance(lm, lm, context, horizon=3, samples=10).tokens_per_call
    3.0
    """
    law = SamplingLaw(temperature, top_k, top_p)
    _check_choices(samples, rule, confidence)
    check_first_token(first_token)
    horizon = draft_horizon(draft) if horizon is None else horizon
    if horizon is None or horizon < 1:
        raise ValueError(
            f"horizon {horizon}: expected at least 1; a language model as draft has none of its "
            "own, so pass horizon="
        )
    told = first_token == "target"
    anchored = is_anchored(draft, lm.vocab_size, horizon, first_token=first_token)
    check_context(lm, context, horizon)
    children = ChildReader.of(
        draft, proposal_law(proposal, law), anchored=anchored, told=told, context=context
    )
    ratios = _sampled_ratios(lm, children, context, law, (samples, horizon), told=told, seed=seed)
    running = survival_along(ratios, rule)  # (samples, horizon)
    tokens = running.sum(1) + (first_token == "draft")
    return AcceptanceEstimate(
        survival=running.mean(0),
        survival_error=running.std(0) / math.sqrt(samples),
        tokens_per_call=float(tokens.mean()),
        tokens_per_call_interval=_bounded_mean_interval(
            tokens, 1.0, horizon + (first_token == "draft"), confidence
        ),
        samples=samples,
        rule=rule,
        first_token=first_token,
    )


def _bounded_mean_interval(
    values: Tensor, lowest: float, highest: float, confidence: float
) -> tuple[float, float]:
    """Interval of the mean of numbers known to lie in a range: also where their own spread misses
    what is rare.
    """
    z = normal_half_width(1.0, confidence)
    added, count = z * z / 2, len(values) + z * z
    mean = (float(values.sum()) + added * (lowest + highest)) / count
    squares = float((values - mean).square().sum()) + added * (
        (lowest - mean) ** 2 + (highest - mean) ** 2
    )
    half = z * math.sqrt(squares) / count
    return max(mean - half, lowest), min(mean + half, highest)


def _sampled_ratios(
    lm: LanguageModel,
    children: ChildReader,
    context: Tensor,
    law: SamplingLaw,
    size: tuple[int, int],
    *,
    told: bool,
    seed: int,
) -> Float[Tensor, "samples horizon"]:
    """``q / p`` of every token of sequences from the target; 1 for a first token of its own."""
    samples, horizon = size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(samples, 0, dtype=torch.long)
    ratios = torch.ones(samples, horizon, dtype=torch.float64)
    for depth in range(horizon):
        # Samples share prefixes: each is asked for once.
        prefixes, which = tokens[:1], torch.zeros(samples, dtype=torch.long)
        if depth:
            prefixes, which = torch.unique(tokens, dim=0, return_inverse=True)
        drawn = torch.empty(samples, dtype=torch.long)
        uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
        at_once = prefixes_at_once(lm.vocab_size)
        for start in range(0, len(prefixes), at_once):
            part = prefixes[start : start + at_once]  # (some, depth)
            rows = ((which >= start) & (which < start + at_once)).nonzero()[:, 0]
            row = which[rows] - start  # (rows,)
            probs = conditional_probs(lm, context, part, law)  # (some, vocab)
            drawn[rows] = _drawn(probs, row, uniform[rows])
            if depth or not told:
                q = children.probs(part, row, drawn[rows])  # (rows,)
                ratios[rows, depth] = q / probs[row, drawn[rows]]
        tokens = torch.cat([tokens, drawn[:, None]], 1)  # (samples, depth + 1)
    return ratios


def _drawn(
    probs: Float[Tensor, "some vocab"], row: Int[Tensor, " rows"], uniform: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """A token for every sample from its prefix's distribution."""
    size = max(_ENTRIES_AT_ONCE // probs.shape[1], 1)
    parts = zip(row.split(size), uniform.split(size), strict=True)
    return torch.cat([draw(probs[some], u) for some, u in parts])


def _check_choices(samples: int, rule: str, confidence: float) -> None:
    if samples < 2:
        raise ValueError(f"samples {samples}: expected at least 2")
    check_rule(rule, VERIFIED)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1")
