"""Acceptance estimated from samples of the target: unbiased for any vocabulary and horizon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.children import ChildReader
from cpmtp.acceptance.options import proposal_law
from cpmtp.acceptance.paths import SampledPaths
from cpmtp.acceptance.truncated import AcceptanceInterval
from cpmtp.acceptance.verification import (
    VERIFIED,
    check_first_token,
    check_rule,
    survival_along,
)
from cpmtp.drafts.protocol import draft_horizon, is_anchored
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.shown import Shown
from cpmtp.language_model import LanguageModel
from cpmtp.resampling import normal_half_width
from cpmtp.sampling_law import SamplingLaw


@dataclass(frozen=True, repr=False)
class AcceptanceEstimate(Shown):
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
    draft_law: SamplingLaw | None = None,
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
        Of the target's law.
    draft_law : SamplingLaw, optional
        What the draft's next-token laws are put through; default: the same as the target's, as
        becomes a model or a head. A fit to a joint of that law is read as it is with
        ``SamplingLaw()``: temperature and top-p are not idempotent.

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
    check_rule(rule, VERIFIED)
    _check_confidence(confidence)
    check_first_token(first_token)
    horizon = draft_horizon(draft) if horizon is None else horizon
    if horizon is None or horizon < 1:
        raise ValueError(
            f"horizon {horizon}: expected at least 1; a language model as draft has none of its "
            "own, so pass horizon="
        )
    is_anchored(draft, lm.vocab_size, horizon, first_token=first_token)  # before anything is drawn
    proposal_law(proposal, law)
    paths = SampledPaths.drawn(lm, context, horizon, samples=samples, seed=seed, law=law)
    options: dict[str, Any] = {"first_token": first_token, "proposal": proposal, "context": context}
    options |= {"confidence": confidence, "draft_law": law if draft_law is None else draft_law}
    return sampled_acceptance(paths, draft, (rule,), **options)[rule]


def sampled_acceptance(
    paths: SampledPaths,
    draft: Any,
    rules: Iterable[str] = VERIFIED,
    *,
    first_token: str = "target",
    proposal: str = "sampled",
    draft_law: SamplingLaw | None = None,
    context: Int[Tensor, " time"] | None = None,
    confidence: float = 0.95,
    bounds: Mapping[str, AcceptanceInterval] | None = None,
) -> dict[str, AcceptanceEstimate]:
    """Estimates of several rules on texts that are there already, whoever else is judged on them.

    With `bounds` only what is lost where a tree holds nothing is estimated. With ``m_k`` the rule's
    term of a prefix and K its kept prefixes, ``S_k = L_k + (1 - P(K)) - E_P[1 - m_k / P; not in
    K]``, where ``L_k``, the sum of the kept prefixes' terms, and ``P(K)`` are exact.

    Parameters
    ----------
    paths : SampledPaths
        Of the draft's horizon.
    bounds : mapping of rule to AcceptanceInterval, optional
        What `implied_acceptance` says of the same draft on the tree that `paths` is marked by.
    draft_law : SamplingLaw, optional
        What the draft's next-token laws are put through; default: they are read as they are.
    rules, first_token, proposal, context, confidence
        As for `estimate_acceptance`; a context is needed by a language model as draft.

    Raises
    ------
    ValueError
        As of `estimate_acceptance`, or if there are bounds and the paths are not marked.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> lm, context = separated_hmm(2, 8), torch.tensor([0])
    >>> paths = SampledPaths.drawn(lm, context, 3, samples=10)
    >>> found = sampled_acceptance(paths, lm, context=context)
    >>> {rule: estimate.tokens_per_call for rule, estimate in found.items()}
    {'token': 3.0, 'block': 3.0}
    """
    rules = tuple(rules)
    for rule in rules:
        check_rule(rule, VERIFIED)
    check_first_token(first_token)
    _check_confidence(confidence)
    if bounds is not None and paths.outside is None:
        raise ValueError("bounds without a tree: mark the paths first, paths.outside_of(tree)")
    horizon, told = paths.tokens.shape[1], first_token == "target"
    anchored = is_anchored(draft, paths.vocab_size, horizon, first_token=first_token)
    law = proposal_law(proposal, draft_law or SamplingLaw())
    ratios = paths.ratios(
        ChildReader.of(draft, law, anchored=anchored, told=told, context=context)
    )  # (samples, horizon)
    found = {}
    for rule in rules:
        lost = 1 - survival_along(ratios, rule)  # (samples, horizon)
        most = torch.ones(horizon, dtype=torch.float64)
        if bounds is not None:
            assert paths.outside is not None and paths.outside_mass is not None  # checked above
            lost = lost * paths.outside  # (samples, horizon)
            most = bounds[rule].survival_lower + paths.outside_mass  # (horizon,)
        if told:  # the target's own first token survives
            most[0] = 1.0
        found[rule] = _estimate(most, lost, rule, first_token, confidence)
    return found


def _estimate(
    most: Float[Tensor, " horizon"],
    lost: Float[Tensor, "samples horizon"],
    rule: str,
    first_token: str,
    confidence: float,
) -> AcceptanceEstimate:
    """From what survives at most, and what of it is lost along each text."""
    samples, horizon = lost.shape
    told = first_token == "target"
    tokens = lost.sum(1)  # (samples,)
    low, high = _bounded_mean_interval(tokens, 0.0, horizon - told, confidence)
    sure = float(most.sum()) + (not told)
    return AcceptanceEstimate(
        survival=most - lost.mean(0),
        survival_error=lost.std(0) / math.sqrt(samples),
        tokens_per_call=sure - float(tokens.mean()),
        tokens_per_call_interval=(sure - high, sure - low),
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


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a number between 0 and 1")
