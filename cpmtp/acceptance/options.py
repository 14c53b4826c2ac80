"""How a draft is used and judged, beside the rule: said once for all that computes acceptance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.acceptance.verification import check_first_token, check_rule
from cpmtp.sampling_law import SamplingLaw

PROPOSALS = ("sampled", "argmax")


@dataclass(frozen=True)
class Thresholds:
    """Of the typical rule: a token passes whose probability exceeds ``min(ε, δ exp(-H))``.

    Attributes
    ----------
    epsilon, delta : float
    """

    epsilon: float = 0.3
    delta: float = 0.09

    def of(self, entropies: Tensor) -> Tensor:
        """The highest probability that is still rejected, at these entropies in nats."""
        return (self.delta * torch.exp(-entropies)).clamp_max(self.epsilon)


@dataclass(frozen=True, eq=False)
class AcceptanceOptions:
    """What `implied_acceptance` and its kin take by keyword; see there.

    Attributes
    ----------
    first_token : {"target", "draft"}
    proposal : {"sampled", "argmax"}
    temperature, top_k, top_p : numbers, optional
    context : (time,) long tensor, optional
    epsilon, delta : float

    Raises
    ------
    ValueError
        If a name is unknown or a number out of range.

    Examples
    --------
    >>> AcceptanceOptions(proposal="argmax").law.temperature
    0.0
    """

    first_token: str = "target"
    proposal: str = "sampled"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    context: Int[Tensor, " time"] | None = None
    epsilon: float = 0.3
    delta: float = 0.09

    def __post_init__(self):
        check_first_token(self.first_token)
        _ = self.law

    @property
    def law(self) -> SamplingLaw:
        """What the draft's next-token distributions are put through."""
        # Greedy matching judges argmaxes, which no temperature above zero moves.
        temperature = 1.0 if self.temperature is None else self.temperature
        return proposal_law(self.proposal, SamplingLaw(temperature, self.top_k, self.top_p))

    @property
    def told(self) -> bool:
        """Whether the first token is the target's."""
        return self.first_token == "target"

    @property
    def thresholds(self) -> Thresholds:
        """Of the typical rule."""
        return Thresholds(self.epsilon, self.delta)

    def check_rule(self, rule: str) -> None:
        """Refuse an unknown rule, and greedy matching above temperature 0."""
        check_rule(rule, temperature=self.temperature)


def proposal_law(proposal: str, law: SamplingLaw) -> SamplingLaw:
    """The law of what is proposed: argmaxes are what temperature 0 draws, whatever the law was.

    Raises
    ------
    ValueError
        If the proposal is unknown.
    """
    if proposal not in PROPOSALS:
        raise ValueError(f"unknown proposal {proposal!r}: expected one of {', '.join(PROPOSALS)}")
    return law if proposal == "sampled" else SamplingLaw(temperature=0.0)
