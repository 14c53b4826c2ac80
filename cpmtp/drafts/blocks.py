"""Drafted blocks as a decoder needs them: a row per request, unchecked, drawn and read fast.

A block of every form draws the same way: the next position's rows, one distribution per component,
are mixed by the weights so far, put through the law, and drawn from; the drawn token moves the
weights. What differs is where the rows come from. Probabilities have the precision of what they are
made of, at least single: what is drawn from and what is said of it are the same numbers. Sums that
are drawn from are made in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.sampling_law import SamplingLaw, draw, exact_dtype

# Position and the token before it (None at first) to what is there, (batch, support) or (batch,
# rank, support); asked in turn.
Rows = Callable[[int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Drafted:
    """A path per request, and the distributions that it was drawn from.

    Attributes
    ----------
    tokens : (batch, length) long tensor
    places : (batch, length) long tensor
        Where the tokens stand among the ids that may be drafted.
    probs : (batch, length, support) tensor or None
        Processed next-token distributions along the path; None at temperature 0: all on the path.
    ids : (support,) long tensor or None
        The ids that may be drafted; None: all.
    """

    tokens: Int[Tensor, "batch length"]
    places: Int[Tensor, "batch length"]
    probs: Tensor | None
    ids: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Drafted:
        """Nothing is drafted."""
        nothing = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls(nothing, nothing, None)

    @property
    def length(self) -> int:
        """Drafted tokens per request."""
        return self.tokens.shape[1]

    def over_all(self, vocab_size: int) -> Float[Tensor, "batch length vocab"]:
        """The distributions over the whole vocabulary."""
        if self.probs is None:
            return functional.one_hot(self.tokens, vocab_size).double()  # (batch, length, vocab)
        if self.ids is None:
            return self.probs
        wide = self.probs.new_zeros(*self.tokens.shape, vocab_size)
        return wide.index_copy_(-1, self.ids, self.probs)  # (batch, length, vocab)


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

    def sample(self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]) -> Drafted:
        """A path per request, and the processed next-token distributions along it.

        Needs one uniform number per token and one more.
        """
        ...


@dataclass(frozen=True)
class CPBlock:
    """A mixture of products per request.

    Attributes
    ----------
    weights : (batch, rank) tensor
    factors : (batch, length, rank, support) tensor
    ids : (support,) long tensor, optional
        The ids that may be drafted; default: all.
    """

    weights: Float[Tensor, "batch rank"]
    factors: Float[Tensor, "batch length rank support"]
    ids: Tensor | None = None

    @classmethod
    def of_distributions(cls, drafts: Sequence[CPDistribution]) -> CPBlock:
        """One request per distribution, which have no batch axes; normalised again in double
        precision.
        """
        weights = torch.stack([draft.weights for draft in drafts]).double()  # (batch, rank)
        rows = [torch.stack([factor.mT for factor in draft.factors]) for draft in drafts]
        factors = torch.stack(rows).double()  # (batch, length, rank, vocab)
        weights = weights / weights.sum(-1, keepdim=True)
        return cls(weights, factors / factors.sum(-1, keepdim=True))

    @property
    def length(self) -> int:
        """Drafted tokens per request."""
        return self.factors.shape[1]

    def first(self, length: int) -> CPBlock:
        """Only the first tokens."""
        return replace(self, factors=self.factors[:, :length])

    def sample(self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]) -> Drafted:
        """Paths and the mixture's distributions along them; at once where no law acts on it."""
        if law.is_identity:
            path, probs = self._at_once(uniform)
            return Drafted(_ids(self.ids, path), path, probs, self.ids)
        rows = lambda k, token: self.factors[:, k]  # noqa: E731
        return _mixture_in_turn(self.weights, self.length, rows, self.ids, law, uniform)

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
    logits : (batch, length, rank, support) tensor
        The first position's are complete; a later one's lack what the token before it adds.
    left, right : (vocab, transition_rank) and (transition_rank, support) tensors
    gates : (batch, length - 1, transition_rank) tensor, optional
        Default: ones.
    ids : (support,) long tensor, optional
        The ids that may be drafted; default: all.
    """

    weights: Float[Tensor, "batch rank"]
    logits: Float[Tensor, "batch length rank support"]
    left: Float[Tensor, "vocab transition_rank"]
    right: Float[Tensor, "transition_rank support"]
    gates: Tensor | None = None
    ids: Tensor | None = None

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

    def sample(self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]) -> Drafted:
        """One token after another; see `Block`."""
        if self.logits.shape[2] == 1:
            chain = lambda k, token: self._rows(k, token)[:, 0]  # noqa: E731
            return _chain_in_turn(self.length, chain, self.ids, law, uniform)
        dtype = exact_dtype(self.logits)
        rows = lambda k, token: self._rows(k, token).softmax(-1, dtype)  # noqa: E731
        return _mixture_in_turn(self.weights, self.length, rows, self.ids, law, uniform)

    def _rows(self, position: int, token: Tensor | None) -> Tensor:
        logits = self.logits[:, position]  # (batch, rank, support)
        if token is None:
            return logits
        # (batch, rank, support)
        return logits + self._moved(position - 1, token).unsqueeze(1)

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
    ids : (support,) long tensor, optional
        The ids that may be drafted; default: all.
    """

    state: Float[Tensor, "batch width"]
    length: int
    logits: Callable[[int, Tensor], Tensor]
    advance: Callable[[Tensor, Tensor], Tensor]
    ids: Tensor | None = None

    def first(self, length: int) -> RecurrentBlock:
        """Only the first tokens."""
        return replace(self, length=min(length, self.length))

    def sample(self, law: SamplingLaw, uniform: Float[Tensor, "batch numbers"]) -> Drafted:
        """One token after another; see `Block`."""
        state = self.state

        def rows(position: int, token: Tensor | None) -> Tensor:
            nonlocal state
            state = state if token is None else self.advance(state, token)
            return self.logits(position, state)

        return _chain_in_turn(self.length, rows, self.ids, law, uniform)


def _chain_in_turn(
    length: int, rows: Rows, ids: Tensor | None, law: SamplingLaw, uniform: Tensor
) -> Drafted:
    """One token after another of a single component, whose rows are logits."""
    places, tokens, along = [], [], []
    token = None
    for k in range(length):
        logits = rows(k, token)  # (batch, support)
        if law.temperature:
            probs = law.of_logits(logits)
            place = draw(probs, uniform[:, k])  # (batch,)
            along.append(probs)
        else:
            place = logits.max(-1).indices  # (batch,); in half precision argmax is slow
        token = _ids(ids, place)
        places.append(place)
        tokens.append(token)
    return _stacked(tokens, places, along, ids)


def _mixture_in_turn(
    weights: Float[Tensor, "batch rank"],
    length: int,
    rows: Rows,
    ids: Tensor | None,
    law: SamplingLaw,
    uniform: Float[Tensor, "batch numbers"],
) -> Drafted:
    """One token after another, rows being probabilities: a processed mixture is no mixture of
    processed components.
    """
    places, tokens, along = [], [], []
    token = None
    for k in range(length):
        factors = rows(k, token)  # (batch, rank, support)
        mixed = (weights.unsqueeze(-2) @ factors).squeeze(-2)  # (batch, support)
        if law.temperature:
            mixed = law.process(mixed)
            place = draw(mixed, uniform[:, k])  # (batch,)
            along.append(mixed)
        else:
            place = mixed.max(-1).indices  # (batch,)
        if k + 1 < length:
            at = place[:, None, None].expand(-1, weights.shape[1], 1)  # (batch, rank, 1)
            weights = weights * factors.gather(-1, at).squeeze(-1)  # (batch, rank)
            weights = weights / weights.sum(-1, keepdim=True)
        token = _ids(ids, place)
        places.append(place)
        tokens.append(token)
    return _stacked(tokens, places, along, ids)


def _ids(ids: Tensor | None, places: Tensor) -> Tensor:
    """What stands at places."""
    return places if ids is None else ids[places]


def _stacked(
    tokens: list[Tensor], places: list[Tensor], along: list[Tensor], ids: Tensor | None
) -> Drafted:
    path = torch.stack(tokens, 1)  # (batch, length)
    at = path if ids is None else torch.stack(places, 1)  # (batch, length)
    return Drafted(path, at, torch.stack(along, 1) if along else None, ids)
