"""Drafted blocks as a decoder needs them: a row per request, unchecked, drawn and read fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.sampling_law import SamplingLaw, draw


@runtime_checkable
class Block(Protocol):
    """What is drafted after each request's known token."""

    @property
    def length(self) -> int:
        """Drafted tokens per request."""
        ...

    def first(self, length: int) -> Block:
        """Only the first tokens."""
        ...

    def sample(
        self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]
    ) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch length vocab"]]:
        """A path per request, and the processed next-token distributions along it.

        Needs one uniform number per token and one more.
        """
        ...

    def along(
        self, path: Int[Tensor, "batch length"], law: SamplingLaw
    ) -> Float[Tensor, "batch length"]:
        """The processed conditional of each token of given paths."""
        ...


@dataclass(frozen=True)
class CPBlock:
    """A mixture of products per request, float64.

    Attributes
    ----------
    weights : (batch, rank) tensor
    factors : (batch, length, rank, vocab) tensor
    """

    weights: Float[Tensor, "batch rank"]
    factors: Float[Tensor, "batch length rank vocab"]

    @classmethod
    def of(cls, weights: Tensor, factors: Tensor) -> CPBlock:
        """In double precision and normalised again there."""
        weights, factors = weights.double(), factors.double()
        return cls(weights / weights.sum(-1, keepdim=True), factors / factors.sum(-1, keepdim=True))

    @classmethod
    def of_distributions(cls, drafts: Sequence[CPDistribution]) -> CPBlock:
        """One request per distribution, which have no batch axes."""
        weights = torch.stack([draft.weights for draft in drafts])  # (batch, rank)
        rows = [torch.stack([factor.mT for factor in draft.factors]) for draft in drafts]
        return cls.of(weights, torch.stack(rows))  # (batch, length, rank, vocab)

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> CPBlock:
        """Nothing is drafted."""
        one = torch.ones(batch, 1, dtype=torch.float64, device=device)
        return cls(one, one.new_ones(batch, 0, 1, 1))

    @property
    def length(self) -> int:
        """Drafted tokens per request."""
        return self.factors.shape[1]

    def first(self, length: int) -> CPBlock:
        """Only the first tokens."""
        return CPBlock(self.weights, self.factors[:, :length])

    def sample(
        self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]
    ) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch length vocab"]]:
        """Paths and the mixture's distributions along them; at once where no law acts on it."""
        if not self.length:
            nothing = self.factors.new_zeros(len(self.weights), 0, 1)
            return nothing[..., 0].long(), nothing
        return self._at_once(uniform) if law.is_identity else self._in_turn(law, uniform)

    def along(
        self, path: Int[Tensor, "batch length"], law: SamplingLaw
    ) -> Float[Tensor, "batch length"]:
        """The processed conditional of each token of given paths."""
        weights, found = self.weights, []
        for k, token in enumerate(path.unbind(1)):
            mixed = (weights[:, None] @ self.factors[:, k]).squeeze(1)  # (batch, vocab)
            probs = law.process(mixed / mixed.sum(-1, keepdim=True))
            found.append(probs.gather(-1, token[:, None]))  # (batch, 1)
            weights = self._posterior(weights, k, token)
        return torch.cat(found, -1)  # (batch, length)

    def _at_once(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A component, then all its tokens; verified against the mixture, as if nobody knew it."""
        length, rows = self.length, torch.arange(len(self.weights), device=self.weights.device)
        component = draw(self.weights, uniform[:, length])  # (batch,)
        path = draw(self.factors[rows, :, component], uniform[:, :length])  # (batch, length)

        at = path[:, :, None, None].expand(-1, -1, self.weights.shape[1], 1)
        chosen = self.factors.gather(-1, at).squeeze(-1)  # (batch, length, rank)
        before = self.weights[:, None]  # (batch, 1, rank)
        posterior = torch.cat([before, before * chosen[:, :-1].cumprod(1)], 1)
        posterior = posterior / posterior.sum(-1, keepdim=True)  # (batch, length, rank)
        return path, (posterior.unsqueeze(-2) @ self.factors).squeeze(-2)

    def _in_turn(self, law: SamplingLaw, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One token after another: a processed mixture is no mixture of processed components."""
        weights, path, along = self.weights, [], []
        for k in range(self.length):
            mixed = (weights.unsqueeze(-2) @ self.factors[:, k]).squeeze(-2)  # (batch, vocab)
            probs = law.process(mixed)
            token = draw(probs, uniform[:, k])  # (batch,)
            weights = self._posterior(weights, k, token)
            path.append(token)
            along.append(probs)
        # (batch, length), (batch, length, vocab)
        return torch.stack(path, 1), torch.stack(along, 1)

    def _posterior(self, weights: Tensor, position: int, token: Tensor) -> Tensor:
        """Weights after one more token, (batch, rank)."""
        at = token[:, None, None].expand(-1, weights.shape[1], 1)  # (batch, rank, 1)
        weights = weights * self.factors[:, position].gather(-1, at).squeeze(-1)  # (batch, rank)
        return weights / weights.sum(-1, keepdim=True)
