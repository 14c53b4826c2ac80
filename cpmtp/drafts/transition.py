"""How the components of a Markov draft emit after a token, without a table per component.

A bias b that depends on the token before, but not on the component, splits off:
``softmax_v(U_a(v) + b(v)) = exp U_a(v) exp b(v) / sum_v exp U_a(v) exp b(v)``. A mixture of all
components then needs one exponential per pair of tokens, and matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.drafts.prefix_tables import row_of, rows_at

# Entries of a table of biases made at once where only its sums are wanted.
_ENTRIES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Transition:
    """Into one position: ``softmax_v(U_a(v) + <L[x] * g, R[v]>)`` after a token x in component a.

    Attributes
    ----------
    logits : (*batch, rank, size) tensor
    left : (vocab, width) or (*batch, vocab, width) tensor
    right : (width, size) or (*batch, width, size) tensor
    gate : (*batch, width) tensor
    """

    logits: Float[Tensor, "*batch rank size"]
    left: Float[Tensor, "*left_batch vocab width"]
    right: Float[Tensor, "*right_batch width size"]
    gate: Float[Tensor, "*batch width"]

    @cached_property
    def tilts(self) -> Float[Tensor, "*batch rank size"]:
        """``exp U_a(v)``, the largest one."""
        return (self.logits - self.logits.detach().amax(-1, keepdim=True)).exp()

    def gated(self, before: Int[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows width"]:
        """``L[x] * g`` of tokens before, some per entry of the batch."""
        return rows_at(self.left, before) * self.gate.unsqueeze(-2)  # (*batch, rows, width)

    def after(self, before: Int[Tensor, "*batch rows"]) -> After:
        """What is emitted after tokens, some per entry of the batch."""
        return After.of(self, self.gated(before))

    def after_each(self, tokens: Int[Tensor, " rows"]) -> After:
        """What is emitted after the same tokens in all entries of the batch."""
        # (*batch, rows, width)
        return After.of(self, self.left[..., tokens, :] * self.gate.unsqueeze(-2))

    def bias(self, before: Int[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows size"]:
        """``<L[x] * g, R[v]>`` of tokens before."""
        return self.gated(before) @ self.right

    def log_emission(
        self, before: Int[Tensor, "*batch rows"], place: Int[Tensor, "*batch rows"]
    ) -> Float[Tensor, "*batch rows rank"]:
        """Log-probability of the token at each place in every component."""
        which = None
        if before.ndim == 1:  # what comes after one token is summed up once
            before, which = before.unique(return_inverse=True)
        gated = self.gated(before)  # (*batch, distinct, width)
        normaliser = self._log_normaliser(gated)  # (*batch, distinct, rank)
        if which is not None:
            gated, normaliser = gated[which], normaliser[which]
        bias = (gated * rows_at(self.right.mT, place)).sum(-1, keepdim=True)  # (*batch, rows, 1)
        return rows_at(self.logits.mT, place) + bias - normaliser

    def entry(self, index: Int[Tensor, "*some"], axis: int) -> Transition:
        """The transition of one place per entry along a batch axis, which is the last one."""

        def taken(values: Tensor, own: int) -> Tensor:
            if values.ndim == own:
                return values
            at = index.reshape(*index.shape, *(1,) * (own + 1))  # (*some, 1, …)
            return values.take_along_dim(at, axis).squeeze(axis)

        return Transition(
            taken(self.logits, 2), taken(self.left, 2), taken(self.right, 2), taken(self.gate, 1)
        )

    def _log_normaliser(self, gated: Tensor) -> Tensor:
        """``log sum_v exp(U_a(v) + b(v))``, (*batch, rows, rank), some rows at a time."""
        per_row = self.logits.shape[:-2].numel() * self.logits.shape[-1]
        size = max(_ENTRIES_AT_ONCE // max(per_row, 1), 1)
        parts = [After.of(self, part).log_normaliser for part in gated.split(size, -2)]
        return torch.cat(parts, -2)  # (*batch, rows, rank)


@dataclass(frozen=True)
class After:
    """What the components emit after some tokens.

    Attributes
    ----------
    transition : Transition
    highest : (*batch, rows, 1) tensor
        The largest bias after each token.
    bias : (*batch, rows, size) tensor
        The biases less that.
    tilt : (*batch, rows, size) tensor
        Their exponentials.
    total : (*batch, rows, rank) tensor
        ``sum_v exp(U_a(v) + b(v))`` in these units.
    """

    transition: Transition
    highest: Float[Tensor, "*batch rows 1"]
    bias: Float[Tensor, "*batch rows size"]
    tilt: Float[Tensor, "*batch rows size"]
    total: Float[Tensor, "*batch rows rank"]

    @classmethod
    def of(cls, transition: Transition, gated: Float[Tensor, "*batch rows width"]) -> After:
        """From ``L[x] * g``."""
        bias = gated @ transition.right  # (*batch, rows, size)
        highest = bias.detach().amax(-1, keepdim=True)
        bias = bias - highest
        tilt = bias.exp()
        # products (*batch, rows, rank)
        return cls(transition, highest, bias, tilt, tilt @ transition.tilts.mT)

    def __getitem__(self, rows: Int[Tensor, " some"]) -> After:
        fields = (self.highest, self.bias, self.tilt, self.total)
        return After(self.transition, *(field[..., rows, :] for field in fields))

    @property
    def splits(self) -> bool:
        """Whether the products lost nothing: where the bias favours what no component does, they
        may be too small for a floating-point number.
        """
        return not bool((self.total < torch.finfo(self.total.dtype).tiny ** 0.5).any())

    @property
    def log_normaliser(self) -> Float[Tensor, "*batch rows rank"]:
        """``log sum_v exp(U_a(v) + b(v))``."""
        if not self.splits:
            return self.highest + self._logits.logsumexp(-1)
        highest = self.transition.logits.detach().amax(-1).unsqueeze(-2)  # (*batch, 1, rank)
        return self.total.log() + self.highest + highest

    def mixed(self, masses: Float[Tensor, "*batch rows rank"]) -> Float[Tensor, "*batch rows size"]:
        """Masses of the components times what each emits, summed."""
        if self.splits:
            return ((masses / self.total) @ self.transition.tilts) * self.tilt
        # (*batch, rows, 1, rank) @ (*batch, rows, rank, size)
        return (masses.unsqueeze(-2) @ self._logits.softmax(-1)).squeeze(-2)

    def grown(
        self, masses: Float[Tensor, "*batch rows rank"]
    ) -> Float[Tensor, "*batch rows size rank"]:
        """The same, not summed."""
        if self.splits:
            share = (masses / self.total).unsqueeze(-2)  # (*batch, rows, 1, rank)
            tilts = self.transition.tilts.mT.unsqueeze(-3)  # (*batch, 1, size, rank)
            return share * tilts * self.tilt.unsqueeze(-1)
        return masses.unsqueeze(-2) * self._logits.softmax(-1).mT

    @property
    def _logits(self) -> Tensor:
        """A table per component, (*batch, rows, rank, size)."""
        # (*batch, rows, rank, size)
        return self.transition.logits.unsqueeze(-3) + self.bias.unsqueeze(-2)


@dataclass(frozen=True)
class MarkovTable:
    """The joint of a Markov draft's first k tokens: rows of prefixes, which end with every token in
    turn.

    Attributes
    ----------
    rows : (*lead, prefixes, rank) tensor
        The components' masses after each prefix.
    transition : Transition
        Its batch axes are the leading ones.
    """

    rows: Float[Tensor, "*lead prefixes rank"]
    transition: Transition

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Rows in turn, each made when it is asked for."""
        # (*lead, some, vocab)
        return (after.mixed(masses) for masses, after in self._parts(size))

    def row(self, prefix: Int[Tensor, "*batch"], batch: int) -> Float[Tensor, "*batch 1 vocab"]:
        """One row per batch entry."""
        transition = self.transition
        if self.rows.ndim - 2 > batch:
            transition = transition.entry(prefix // self.rows.shape[-2], batch)
        last = (prefix % transition.left.shape[-2]).unsqueeze(-1)  # (*batch, 1)
        return transition.after(last).mixed(row_of(self.rows, prefix, batch))

    def grown(self) -> Float[Tensor, "*lead longer rank"]:
        """Masses of the components after one token more."""
        vocab = self.transition.left.shape[-2]
        # (*lead, some, vocab, rank) each
        parts = [after.grown(masses) for masses, after in self._parts(vocab)]
        return torch.cat(parts, -3).flatten(-3, -2)

    def _parts(self, size: int) -> Iterator[tuple[Tensor, After]]:
        """Some rows with what follows their last tokens."""
        vocab, prefixes = self.transition.left.shape[-2], self.rows.shape[-2]
        numbers = torch.arange(prefixes, device=self.rows.device)
        # What follows a token is the same after all prefixes that end with it.
        of_all = self.transition.after_each(numbers[:vocab]) if prefixes > vocab else None
        for masses, number in zip(self.rows.split(size, -2), numbers.split(size), strict=True):
            last = number % vocab
            yield masses, self.transition.after_each(last) if of_all is None else of_all[last]
