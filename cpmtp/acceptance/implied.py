"""The one definition of implied acceptance: what a draft earns against the exact joint.

Survival ``S_k`` is the probability that the first k tokens of a block are emitted unchanged.
Everything is a sum over sequences of at most two prefix laws, the target's and the draft's: only
tensors of the joint's own size are held.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.dense import survivals
from cpmtp.acceptance.options import AcceptanceOptions
from cpmtp.acceptance.truncated import AcceptanceInterval, certified_acceptance
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.protocol import as_draft, is_anchored
from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.shown import Shown
from cpmtp.prefix_tree import PrefixTree
from cpmtp.sampling_law import ratio


@dataclass(frozen=True, repr=False)
class AcceptanceProfile(Shown):
    """What a draft earns under one rule.

    Attributes
    ----------
    survival : (*batch, horizon) tensor
        ``S_1 … S_n``, float64, non-increasing.
    rule, first_token : str
        How it was verified and where the first token came from.
    """

    survival: Float[Tensor, "*batch horizon"]
    rule: str
    first_token: str

    @property
    def tokens_per_call(self) -> float | Float[Tensor, "*batch"]:
        """Expected tokens per forward pass of the target: ``sum S_k``, one more where the draft
        gives the first token.
        """
        total = self.survival.sum(-1) + (self.first_token == "draft")
        return total if total.ndim else total.item()

    @property
    def conditional(self) -> Float[Tensor, "*batch horizon"]:
        """``S_k / S_{k-1}``: acceptance of position k given that the ones before it survived; 0
        where none did.
        """
        first = torch.ones_like(self.survival[..., :1])  # (*batch, 1)
        before = torch.cat([first, self.survival[..., :-1]], -1)  # (*batch, horizon)
        return ratio(self.survival, before, otherwise=0.0)

    @property
    def iid_tokens_per_call(self) -> float | Float[Tensor, "*batch"]:
        """The textbook approximation, which takes every position to be accepted with the first
        drafted one's probability.
        """
        told = self.first_token == "target"
        if self.survival.shape[-1] == 1 and told:
            return self.tokens_per_call  # nothing is drafted
        alpha = self.survival[..., int(told)]  # (*batch,)
        total = sum((alpha**k for k in range(1, self.survival.shape[-1] - told + 1)), 1 + 0 * alpha)
        return total if total.ndim else total.item()

    def to_vllm_synthetic(self) -> str:
        """JSON for vLLM's synthetic rejection sampling: one unconditional rate per drafted token
        (no batch axes).
        """
        if self.survival.ndim != 1:
            raise ValueError(
                f"rates of a batch of {tuple(self.survival.shape[:-1])}: average the survival or "
                "select one first"
            )
        rates = self.survival[1:] if self.first_token == "target" else self.survival
        # Sums of many products: rounding may leave them above one or rising.
        rates = rates.clamp(0.0, 1.0).cummin(0).values if len(rates) else rates  # (drafted,)
        return json.dumps(
            {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates.tolist()}
        )


@takes_what_is_given
def implied_acceptance(
    joint: JointDistribution | PrefixTree,
    draft: Any,
    *,
    rule: str = "block",
    first_token: str = "target",
    proposal: str = "sampled",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    context: Int[Tensor, " time"] | None = None,
    epsilon: float = 0.3,
    delta: float = 0.09,
) -> AcceptanceProfile | AcceptanceInterval:
    """Survival and tokens per call that a draft earns against the exact joint.

    With ``P`` the joint, ``Q`` the draft's joint (``P(x1) Q(x_2:k | x1)`` where the target gives
    the first token), and ``p``, ``q`` their conditionals:

    * ``token``: ``S_k = sum_x prod_{i<=k} min(p_i, q_i)``
    * ``block``: ``m_0 = 1, m_k = min(Q(x_1:k), m_{k-1} p_k), S_k = sum_x m_k``
    * ``coupling``: ``S_k = sum_x min(P(x_1:k), Q(x_1:k))``, the bound of every scheme
    * ``greedy``: ``Q(y_1:k)`` on the path y of the target's argmaxes; with ``temperature=0`` the
      draft takes argmaxes, too
    * ``typical`` (not lossless): ``Q[all p_i > min(epsilon, delta exp(-H_i))]``, H the entropy of
      the target's conditional

    Under ``first_token="target"`` the rules judge positions 2 … n, given the first, and
    ``S_1 = 1``.

    Parameters
    ----------
    joint : JointDistribution or PrefixTree
        The target's law; temperature, top-k and top-p are part of it (see `exact_joint` and
        `truncated_joint`).
    draft : Draft, FitResult, JointDistribution or LanguageModel
        Over the joint's horizon; or anchored: with a further batch axis over the first token and
        horizon n-1.
    rule : {"token", "block", "coupling", "greedy", "typical"}
    first_token : {"target", "draft"}
    proposal : {"sampled", "argmax"}
        Whether the draft's tokens are drawn, or each is the most probable one after those before
        it. Then ``S_k = sum_{x1} P(x1, y_2:k(x1))`` on that path y, by token, block and coupling
        alike; a temperature, top-k or top-p of the draft changes nothing.
    temperature, top_k, top_p
        The law that the draft's conditionals are put through before sampling; default: none.
    context : (time,) long tensor, optional
        What a draft that is a language model continues.
    epsilon, delta : float
        Of the typical rule.

    Returns
    -------
    AcceptanceProfile or AcceptanceInterval
        With the joint's batch axes; for a truncated joint, bounds that contain the exact values,
        equal where the tree is complete (see `certified_acceptance`).

    Raises
    ------
    ValueError
        If a name is unknown, shapes do not match, an anchored draft is to give the first token,
        ``greedy`` comes with a temperature above 0, or a language model comes without its context.

    References
    ----------
    leviathan2023fast, chen2023accelerating, sun2024block, cai2024medusa

    Examples
    --------
    >>> third = torch.tensor([1.0, 2.0], dtype=torch.float64) / 3
    >>> target = JointDistribution(torch.outer(third, third))
    >>> draft = CPDistribution(torch.ones(1, dtype=torch.float64), [third.flip(0)[:, None]] * 2)
    >>> def ninths(rule):
    ...     profile = implied_acceptance(target, draft, rule=rule, first_token="draft")
    ...     return round(9 * profile.survival.sum().item())
    >>> [ninths(rule) for rule in ("token", "block", "coupling")]
    [10, 11, 12]
    """
    options: dict[str, Any] = {
        "first_token": first_token,
        "proposal": proposal,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "context": context,
        "epsilon": epsilon,
        "delta": delta,
    }
    if isinstance(joint, PrefixTree):
        return certified_acceptance(joint, draft, rule=rule, **options)
    return acceptance_profiles(joint, draft, (rule,), **options)[rule]


def acceptance_profiles(
    joint: JointDistribution, draft: Any, rules: Iterable[str], **options: Any
) -> dict[str, AcceptanceProfile]:
    """The profiles of several rules with their common part computed once; parameters, options and
    errors as for `implied_acceptance`.
    """
    rules, chosen = tuple(rules), AcceptanceOptions(**options)
    for rule in rules:
        chosen.check_rule(rule)
    shape = (joint.vocab_size, joint.horizon, tuple(joint.batch_shape))
    anchored = is_anchored(draft, *shape, first_token=chosen.first_token)
    found = survivals(
        joint,
        as_draft(draft, context=chosen.context, horizon=joint.horizon),
        rules,
        chosen.law,
        told=chosen.told,
        anchored=anchored,
        thresholds=chosen.thresholds,
    )
    return {
        rule: AcceptanceProfile(survival, rule, chosen.first_token)
        for rule, survival in found.items()
    }


def revealed_component_survival(
    joint: JointDistribution,
    draft: CPDistribution,
    *,
    rule: str = "block",
    first_token: str = "target",
) -> Float[Tensor, " horizon"]:
    """Survival when a path is verified against the component it was sampled from instead of the
    mixture.

    A counter-example, not a recommendation: it is lossless, since each component is a draft of its
    own, but earns less than the mixture does under ``block``, and less the higher the rank.
    """
    draft, total = draft.without_support(), torch.zeros(joint.horizon, dtype=torch.float64)
    certain = torch.ones(1, dtype=draft.weights.dtype)
    if first_token == "draft":
        for a in range(draft.rank):
            component = CPDistribution(certain, [f[:, a : a + 1] for f in draft.factors])
            total += (
                draft.weights[a]
                * acceptance_profiles(joint, component, (rule,), first_token=first_token)[
                    rule
                ].survival
            )
        return total
    given, first = joint.given_first_token(), joint.prefix_probs(1)
    posterior = draft.posterior_after_first()
    for a in range(draft.rank):
        # (vocab, vocab, 1) each
        factors = [f[:, a : a + 1].expand(joint.vocab_size, -1, -1) for f in draft.factors[1:]]
        # weights (vocab, 1)
        component = CPDistribution(certain.expand(joint.vocab_size, 1), factors)
        profile = acceptance_profiles(given, component, (rule,), first_token="draft")[rule]
        total[1:] += torch.einsum("v,v,vk->k", first, posterior[:, a], profile.survival)  # (later,)
    total[0] = 1.0
    return total
