"""Drafted blocks as a decoder needs them: a row per request, unchecked, drawn and read fast.

A block of every form draws the same way: the next position's rows, one distribution per component,
are mixed by the weights so far, put through the law, and drawn from; the drawn token moves the
weights. What differs is where the rows come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.support import Support
from cpmtp.sampling_law import SamplingLaw, draw

# Position and the token before it (None at first) to the components' distributions there, float64
# (batch, rank, support); asked in turn.
Rows = Callable[[int, Tensor | None], Tensor]


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


@dataclass(frozen=True)
class CPBlock:
    """A mixture of products per request, float64.

    Attributes
    ----------
    weights : (batch, rank) tensor
    factors : (batch, length, rank, support) tensor
    support : Support, optional
        The ids that may be drafted, the same at all positions; default: all.
    """

    weights: Float[Tensor, "batch rank"]
    factors: Float[Tensor, "batch length rank support"]
    support: Support | None = None

    @classmethod
    def of(cls, weights: Tensor, factors: Tensor, support: Support | None = None) -> CPBlock:
        """In double precision and normalised again there."""
        weights, factors = weights.double(), factors.double()
        weights = weights / weights.sum(-1, keepdim=True)
        return cls(weights, factors / factors.sum(-1, keepdim=True), support)

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
        return replace(self, factors=self.factors[:, :length])

    def sample(
        self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]
    ) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch length vocab"]]:
        """Paths and the mixture's distributions along them; at once where no law acts on it."""
        if not self.length:
            nothing = self.factors.new_zeros(len(self.weights), 0, 1)
            return nothing[..., 0].long(), nothing
        if law.is_identity:
            return _tokens(self.support, *self._at_once(uniform))
        return _in_turn(
            self.weights,
            self.length,
            lambda k, token: self.factors[:, k],
            self.support,
            law,
            uniform,
        )

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


@dataclass(frozen=True)
class MarkovBlock:
    """A mixture of Markov chains per request, whose transitions all requests share.

    Attributes
    ----------
    weights : (batch, rank) tensor
        float64.
    logits : (batch, length, rank, support) tensor
        The first position's are complete; a later one's lack what the token before it adds.
    left, right : (vocab, transition_rank) and (transition_rank, support) tensors
    gates : (batch, length - 1, transition_rank) tensor, optional
        Default: ones.
    support : Support, optional
        The ids that may be drafted, the same at all positions; default: all.
    """

    weights: Float[Tensor, "batch rank"]
    logits: Float[Tensor, "batch length rank support"]
    left: Float[Tensor, "vocab transition_rank"]
    right: Float[Tensor, "transition_rank support"]
    gates: Tensor | None = None
    support: Support | None = None

    @property
    def length(self) -> int:
        """Drafted tokens per request."""
        return self.logits.shape[1]

    def first(self, length: int) -> MarkovBlock:
        """Only the first tokens."""
        return replace(self, logits=self.logits[:, :length])

    def after(self, token: Int[Tensor, " batch"]) -> MarkovBlock:
        """The block whose first position comes after a token of another transition: the first
        gates are that transition's.
        """
        moved = self._moved(0, token)  # (batch, support)
        first = self.logits[:, :1] + moved[:, None, None]  # (batch, 1, rank, support)
        gates = None if self.gates is None else self.gates[:, 1:]
        # logits (batch, length, rank, support)
        return replace(self, logits=torch.cat([first, self.logits[:, 1:]], 1), gates=gates)

    def sample(
        self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]
    ) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch length vocab"]]:
        """One token after another; see `Block`."""
        return _in_turn(self.weights, self.length, self._rows, self.support, law, uniform)

    def _rows(self, position: int, token: Tensor | None) -> Tensor:
        logits = self.logits[:, position]  # (batch, rank, support)
        if token is not None:
            # (batch, rank, support)
            logits = logits + self._moved(position - 1, token).unsqueeze(1)
        return logits.double().softmax(-1)

    def _moved(self, transition: int, token: Tensor) -> Tensor:
        left = self.left[token]  # (batch, transition_rank)
        return (left if self.gates is None else left * self.gates[:, transition]) @ self.right


@dataclass(frozen=True)
class RecurrentBlock:
    """A state per request that reads every drafted token.

    Attributes
    ----------
    state : (batch, width) tensor
        Before the first drafted token.
    length : int
    logits : callable
        Of (position, states), (batch, support).
    advance : callable
        States and the token drafted after them to the states after it.
    support : Support, optional
        The ids that may be drafted, the same at all positions; default: all.
    """

    state: Float[Tensor, "batch width"]
    length: int
    logits: Callable[[int, Tensor], Tensor]
    advance: Callable[[Tensor, Tensor], Tensor]
    support: Support | None = None

    def first(self, length: int) -> RecurrentBlock:
        """Only the first tokens."""
        return replace(self, length=min(length, self.length))

    def sample(
        self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]
    ) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch length vocab"]]:
        """One token after another; see `Block`."""
        state = self.state

        def rows(position: int, token: Tensor | None) -> Tensor:
            nonlocal state
            state = state if token is None else self.advance(state, token)
            # (batch, 1, support)
            return self.logits(position, state).double().softmax(-1).unsqueeze(1)

        weights = torch.ones(len(state), 1, dtype=torch.float64, device=state.device)
        return _in_turn(weights, self.length, rows, self.support, law, uniform)


def _in_turn(
    weights: Float[Tensor, "batch rank"],
    length: int,
    rows: Rows,
    support: Support | None,
    law: SamplingLaw,
    uniform: Float[Tensor, "batch numbers"],
) -> tuple[Tensor, Tensor]:
    """One token after another: a processed mixture is no mixture of processed components."""
    path, along = [], []
    token = None
    for k in range(length):
        factors = rows(k, token)  # (batch, rank, support)
        probs = law.process((weights.unsqueeze(-2) @ factors).squeeze(-2))  # (batch, support)
        place = draw(probs, uniform[:, k])  # (batch,)

        at = place[:, None, None].expand(-1, weights.shape[1], 1)  # (batch, rank, 1)
        weights = weights * factors.gather(-1, at).squeeze(-1)  # (batch, rank)
        weights = weights / weights.sum(-1, keepdim=True)
        path.append(place)
        along.append(probs)
        token = place if support is None else support.tokens(k, place)
    # (batch, length), (batch, length, support)
    return _tokens(support, torch.stack(path, 1), torch.stack(along, 1))


def _tokens(support: Support | None, places: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and probabilities over all of them, from places in the support."""
    if support is None:
        return places, probs
    ids = [support.tokens(k, place) for k, place in enumerate(places.unbind(1))]
    spread = [support.scatter(k, row) for k, row in enumerate(probs.unbind(1))]
    return torch.stack(ids, 1), torch.stack(spread, 1)  # (batch, length), (batch, length, vocab)
