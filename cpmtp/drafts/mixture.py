"""What all mixtures of simple drafts share: the forward recursion and all that is read off it.

A component is drawn, then token after token from it; a form says how a component emits, whether it
changes on the way, and how it is written down. Weights of the components given the tokens so far
come from the forward recursion, and the next token follows the mixture by these weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.drafts.prefix_tables import GrowingTable, picked
from cpmtp.drafts.support import Support
from cpmtp.joint_distribution.stored import Stored
from cpmtp.language_model import draw_tokens
from cpmtp.sampling_law import SamplingLaw, ratio

_SIMPLEX_TOLERANCE = 1e-5


class Mixture(Stored, ABC):
    """A mixture of drafts; see `CPDistribution` for the names' meaning.

    Inside, tokens have shape (*batch, rows) and weights (*batch, rows, rank): what does not depend
    on the row has an axis of one there.
    """

    weights: Float[Tensor, "*batch rank"]
    support: Support | None
    _named: ClassVar[tuple[str, ...]] = ()  # sizes beside those that all forms have

    # What a form says of itself.

    @property
    @abstractmethod
    def horizon(self) -> int:
        """Number of tokens."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    @abstractmethod
    def free_numbers(self) -> int:
        """Free parameters of one distribution: what a head would have to give for it."""

    @property
    @abstractmethod
    def shared_numbers(self) -> int:
        """Parameters that all contexts share."""

    @abstractmethod
    def serial_steps(self, law: SamplingLaw | None = None) -> int:
        """Steps that must follow each other to draw from it under a law."""

    @abstractmethod
    def __getitem__(self, index) -> Any:
        """Select along the first batch axes."""

    @abstractmethod
    def marginal(self, length: int) -> Any:
        """The distribution of the first `length` tokens, of the same form."""

    @abstractmethod
    def without_support(self) -> Any:
        """The same over all tokens, with zeros outside the support."""

    @abstractmethod
    def _rest(self, length: int, weights: Tensor, last: Tensor | None) -> Any:
        """The form of what follows `length` tokens, given the weights there."""

    @abstractmethod
    def _log_emission(self, position: int, before: Tensor | None, tokens: Tensor) -> Tensor:
        """Log-probability of a token in every component, (*batch, rows, rank)."""

    @abstractmethod
    def _mixed(self, position: int, weights: Tensor, before: Tensor | None) -> Tensor:
        """The mixture's next-token probabilities over the support, (*batch, rows, size)."""

    @abstractmethod
    def _of_components(self, position: int, component: Tensor, before: Tensor | None) -> Tensor:
        """Next-token probabilities of one component per row, (*batch, rows, size)."""

    @abstractmethod
    def _table(self, position: int, rows: Tensor) -> GrowingTable:
        """The joint of the tokens up to a position, from the components' masses before it."""

    def _moved(self, position: int, scores: Tensor) -> Tensor:
        """Log-masses of the components before a position, from those after the one before."""
        return scores

    def _carried(self, position: int, masses: Tensor) -> Tensor:
        """`_moved` for masses."""
        return masses

    def _changed(self, position: int, component: Tensor, generator: torch.Generator) -> Tensor:
        """`_moved` for drawn components."""
        return component

    # What follows from it.

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.weights.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Axes before the distribution's own."""
        return self.weights.shape[:-1]

    def __repr__(self) -> str:
        names = ("rank", *self._named, "horizon", "vocab_size")
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{type(self).__name__}({sizes}, batch_shape={tuple(self.batch_shape)})"

    def component_probs(self) -> Iterator[Float[Tensor, "*batch rank vocab"]]:
        """Next-token probabilities of every component by itself, position after position; where
        they depend on the token before, that is its own most probable one.
        """
        rows = torch.arange(self.rank, device=self.weights.device)
        component = rows.expand(*self.batch_shape, -1)  # (*batch, rank)
        before = None
        for position in range(self.horizon):
            probs = self._of_components(position, component, before)  # (*batch, rank, size)
            probs = self._spread(position, probs)  # (*batch, rank, vocab)
            before = probs.argmax(-1)  # (*batch, rank)
            yield probs

    def to_tensor(self) -> Float[Tensor, "..."]:
        """All probabilities, (*batch, vocab, …, vocab)."""
        return self.prefix_probs(self.horizon)

    def prefix_probs(self, length: int) -> Float[Tensor, "..."]:
        """Joint of the first `length` tokens, (*batch, vocab, …, vocab); later ones sum to one."""
        if length == 0:
            return self.weights.sum(-1)
        self._check_length(length)
        table = next(islice(self.prefix_tables(None, anchored=False), length - 1, None))
        (whole,) = table.pieces(self.vocab_size ** (length - 1))  # (*batch, prefixes, vocab)
        return whole.reshape(*self.batch_shape, *(self.vocab_size,) * length)

    def log_prob(self, tokens: Int[Tensor, "... length"]) -> Float[Tensor, "..."]:
        """Log-probability (nats) that the next tokens begin with `tokens`, of any length up to the
        horizon.

        The leading axes of `tokens` are the batch axes followed by any others.
        """
        self._check_tokens(tokens)
        scores = self._scores(self._as_rows(tokens))  # (*batch, rows, rank)
        return torch.logsumexp(scores, -1).reshape(tokens.shape[:-1])

    def condition(self, prefix: Int[Tensor, "*batch length"]) -> Any:
        """The distribution of the remaining tokens given the first ones, of the same form.

        A prefix of zero mass leaves the weights as they are: its posterior is 0/0.

        Raises
        ------
        ValueError
            If no token remains, or a token is not in the vocabulary.
        """
        self._check_prefix(prefix)
        weights = self._posterior(self._as_rows(prefix)).squeeze(-2)  # (*batch, rank)
        last = prefix[..., -1] if prefix.shape[-1] else None
        return self._rest(prefix.shape[-1], weights, last)

    def next_token_probs(
        self, prefix: Int[Tensor, "*batch length"]
    ) -> Float[Tensor, "*batch vocab"]:
        """The next token after `prefix` (may be empty): components mixed by the posterior
        weights.
        """
        self._check_prefix(prefix)
        probs = self._spread(prefix.shape[-1], self._next(self._as_rows(prefix), told=False))
        return probs.reshape(*prefix.shape[:-1], self.vocab_size)

    def following(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Float[Tensor, "count vocab"]:
        """The token after each prefix, float64, without batch axes; see `Draft`."""
        return self._spread(prefixes.shape[1], self._next(prefixes, told=told)).double()

    def child_probs(
        self,
        prefixes: Int[Tensor, "count length"],
        row: Int[Tensor, " children"],
        tokens: Int[Tensor, " children"],
        *,
        law: SamplingLaw,
        told: bool,
    ) -> Float[Tensor, " children"]:
        """Conditionals of children of prefixes, without a table over the vocabulary; see
        `Draft`.
        """
        position = prefixes.shape[1]
        if law.is_identity:
            weights = self._posterior(prefixes, told=told)[row]  # (children, rank)
            before = prefixes[row, -1] if position else None
            emitted = self._log_emission(position, before, tokens).exp()  # (children, rank)
            return (weights * emitted).sum(-1).double()

        place, there = self._place(position, tokens)
        width = self._sizes[position]
        found = picked(
            lambda some: law.process(self._next(some, told=told).double()),
            prefixes,
            row,
            place,
            width,
        )
        return found * there

    def proposes(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Bool[Tensor, " count"]:
        """Always something; see `Draft`."""
        return torch.ones(len(prefixes), dtype=torch.bool, device=prefixes.device)

    def prefix_tables(
        self, first: Float[Tensor, "*batch vocab"] | None, *, anchored: bool
    ) -> Iterator[GrowingTable]:
        """Rows carry the components, columns are the next position's tokens; see `Draft`."""
        if self.support is not None:
            yield from self.without_support().prefix_tables(first, anchored=anchored)
            return
        start = 0
        if first is None:
            rows = self.weights.unsqueeze(-2)  # (*batch, 1, rank)
        elif anchored:
            rows = (self.weights * first.unsqueeze(-1)).unsqueeze(-2)  # (*batch, vocab, 1, rank)
        else:
            rows = self.posterior_after_first() * first.unsqueeze(-1)  # (*batch, vocab, rank)
            start = 1
        for position in range(start, self.horizon):
            table = self._table(position, self._carried(position, rows) if position else rows)
            yield table
            if position + 1 < self.horizon:
                rows = table.grown()

    def posterior_after_first(self) -> Float[Tensor, "*batch vocab rank"]:
        """Weights after each first token; the prior weights after one of zero mass."""
        if self.support is not None:
            return self.without_support().posterior_after_first()
        scores = self._table(0, self.weights.unsqueeze(-2)).grown()  # (*batch, vocab, rank)
        total = scores.sum(-1, keepdim=True)
        given = ratio(scores, total, otherwise=0.0)
        return torch.where(total > 0, given, self.weights.unsqueeze(-2))

    def sample(
        self, count: int, *, generator: torch.Generator | None = None, seed: int = 0
    ) -> Int[Tensor, "..."]:
        """Draw `count` sequences, (*batch, count, horizon).

        Draws from `generator`, or from a new one made of `seed`.
        """
        generator = generator or torch.Generator(self.weights.device).manual_seed(seed)
        component = drawn(  # (*batch, count)
            self.weights.unsqueeze(-2).expand(*self.batch_shape, count, self.rank), generator
        )
        tokens: list[Tensor] = []
        for position in range(self.horizon):
            if position:
                component = self._changed(position, component, generator)
            before = tokens[-1] if tokens else None
            place = drawn(self._of_components(position, component, before), generator)
            tokens.append(place if self.support is None else self.support.tokens(position, place))
        return torch.stack(tokens, -1)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Places per position."""
        if self.support is None:
            return (self.vocab_size,) * self.horizon
        return self.support.sizes

    def _as_rows(self, tokens: Tensor) -> Tensor:
        """Tokens (*batch, …, length) as (*batch, rows, length)."""
        rows = math.prod(tokens.shape[len(self.batch_shape) : -1])
        return tokens.reshape(*self.batch_shape, rows, tokens.shape[-1])  # (*batch, rows, length)

    def _place(self, position: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Places of tokens in what runs over the support, and whether they are there."""
        if self.support is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        return self.support.find(position, tokens)

    def _spread(self, position: int, values: Tensor) -> Tensor:
        """Values over the support as values over all tokens."""
        return values if self.support is None else self.support.scatter(position, values)

    def _next(self, prefixes: Tensor, *, told: bool) -> Tensor:
        """Next-token probabilities over the support, (*batch, rows, size)."""
        before = prefixes[..., -1] if prefixes.shape[-1] else None
        return self._mixed(prefixes.shape[-1], self._posterior(prefixes, told=told), before)

    def _scores(self, prefixes: Tensor, *, told: bool = False) -> Tensor:
        """Log-masses of the components after prefixes, (*batch, rows, rank).

        With `told` an impossible first token leaves the weights as they are, and later ones count.
        """
        # (*batch, rows, rank)
        scores = self.weights.log().unsqueeze(-2).expand(*prefixes.shape[:-1], self.rank)
        before = None
        for position, token in enumerate(prefixes.unbind(-1)):
            if position:
                scores = self._moved(position, scores)
            grown = scores + self._log_emission(position, before, token)
            if told and position == 0:
                excluded = grown.amax(-1, keepdim=True) == -math.inf
                grown = torch.where(excluded, scores, grown)
            scores, before = grown, token
        return scores

    def _posterior(self, prefixes: Tensor, *, told: bool = False) -> Tensor:
        """Weights at the next position, (*batch, rows, rank); unconditional ones after an
        impossible prefix.
        """
        prior = self.weights.unsqueeze(-2)  # (*batch, 1, rank)
        length = prefixes.shape[-1]
        if not length:
            return prior.expand(*prefixes.shape[:-1], self.rank)  # (*batch, rows, rank)
        scores = self._moved(length, self._scores(prefixes, told=told))
        impossible = scores.amax(-1, keepdim=True) == -math.inf
        if not bool(impossible.any()):
            return scores.softmax(-1)
        for position in range(1, length + 1):
            prior = self._carried(position, prior)
        return torch.where(impossible, prior, torch.where(impossible, 0.0, scores).softmax(-1))

    def _check_length(self, length: int) -> None:
        if not 1 <= length <= self.horizon:
            raise ValueError(f"length {length}: expected 1 to the horizon, {self.horizon}")

    def _check_batched(self) -> None:
        if not self.batch_shape:
            raise IndexError(f"this {type(self).__name__} has no batch axes")

    def _check_prefix(self, prefix: Tensor) -> None:
        self._check_tokens(prefix)
        if prefix.shape[-1] >= self.horizon:
            raise ValueError(
                f"a prefix of {prefix.shape[-1]} tokens leaves nothing of a horizon of "
                f"{self.horizon}"
            )

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.is_floating_point() or tokens.ndim == 0:
            raise ValueError(
                f"tokens of {tokens.dtype} and shape {tuple(tokens.shape)}: expected integer ids, "
                "(…, length)"
            )
        if tokens.shape[-1] > self.horizon:
            raise ValueError(
                f"{tokens.shape[-1]} tokens for a horizon of {self.horizon}: give at most that many"
            )
        if tuple(tokens.shape[: len(self.batch_shape)]) != tuple(self.batch_shape):
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)}: their leading axes must be "
                f"{tuple(self.batch_shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"tokens must be in [0, {self.vocab_size}): got {int(tokens.min())} to "
                f"{int(tokens.max())}"
            )


def drawn(probs: Float[Tensor, "*draws vocab"], generator: torch.Generator) -> Tensor:
    """A place per row, (*draws,)."""
    flat = probs.reshape(-1, probs.shape[-1])  # (all draws, vocab)
    return draw_tokens(flat, generator).reshape(probs.shape[:-1])


def check_simplex(values: Tensor, dim: int, what: str) -> None:
    """Refuse what is negative, not finite or does not sum to one (within 1e-5) along an axis.

    Raises
    ------
    ValueError
        With `what` it is and how far off.
    """
    total = values.sum(dim)
    if not bool((values >= 0).all()):
        raise ValueError(f"{what} must be non-negative and finite: found a negative entry or NaN")
    if not bool(((total - 1).abs() <= _SIMPLEX_TOLERANCE).all()):
        raise ValueError(
            f"{what} must sum to 1: a sum is off by {(total - 1).abs().max().item():.3g}; "
            "normalise them first"
        )
