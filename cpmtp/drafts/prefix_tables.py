"""A draft's joint as tables of prefixes by next tokens, made some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Probabilities made at once where only some of each row are wanted.
_ENTRIES_AT_ONCE = 1 << 21


@runtime_checkable
class PrefixTable(Protocol):
    """``Q(x_1:k)`` as rows of prefixes of k-1 tokens by the k-th, never held as a whole.

    Leading axes are the batch's; those of a draft per first token have that token's axis, too.
    """

    def pieces(self, size: int) -> Iterator[Float[Tensor, "*lead some vocab"]]:
        """All rows in turn, `size` prefixes of every leading entry at a time."""
        ...

    def row(self, prefix: Int[Tensor, "*batch"], batch: int) -> Float[Tensor, "*batch 1 vocab"]:
        """The row of one prefix per batch entry, numbered over all axes after the batch's."""
        ...


class GrowingTable(PrefixTable, Protocol):
    """A mixture's table, which says how much of each longer prefix every component has."""

    def grown(self) -> Float[Tensor, "*lead longer rank"]:
        """Masses of the components after one token more, the new token varying fastest."""
        ...


@dataclass(frozen=True)
class FullTable:
    """A table that is there anyway.

    Attributes
    ----------
    values : (*lead, prefixes, vocab) tensor
    """

    values: Float[Tensor, "*lead prefixes vocab"]

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Rows in turn; `split` rather than slices: its gradient is one concatenation."""
        return iter(self.values.split(size, -2))

    def row(self, prefix: Int[Tensor, "*batch"], batch: int) -> Tensor:
        """One row per batch entry."""
        return row_of(self.values, prefix, batch)


@dataclass(frozen=True)
class LowRankTable:
    """A table that is a product: rows carry a mixture's components.

    Attributes
    ----------
    rows : (*lead, prefixes, rank) tensor
    columns : (*lead, vocab, rank) tensor
        May lack leading axes: it is then shared along them.
    """

    rows: Float[Tensor, "*lead prefixes rank"]
    columns: Float[Tensor, "*lead2 vocab rank"]

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Rows in turn, each made when it is asked for."""
        # (*lead, some, vocab)
        return (part @ self.columns.mT for part in self.rows.split(size, -2))

    def row(self, prefix: Int[Tensor, "*batch"], batch: int) -> Tensor:
        """One row per batch entry."""
        columns = self.columns
        if columns.ndim - 2 > batch:
            # The columns are those of the prefix's first token.
            first = (prefix // self.rows.shape[-2])[..., None, None, None]
            columns = columns.take_along_dim(first, batch).squeeze(batch)  # (*batch, vocab, rank)
        return row_of(self.rows, prefix, batch) @ columns.mT

    def grown(self) -> Float[Tensor, "*lead longer rank"]:
        """Masses of the components after one token more."""
        return (self.rows.unsqueeze(-2) * self.columns.unsqueeze(-3)).flatten(-3, -2)


def row_of(table: Tensor, prefix: Int[Tensor, "*batch"], batch: int) -> Tensor:
    """The row (*batch, 1, width) of one prefix per batch entry of a table (*batch, …, width)."""
    rows = table.flatten(batch, -2)  # (*batch, all prefixes, width)
    return rows.take_along_dim(prefix[..., None, None], -2)


def tables_of(
    joints: list[Tensor], lead: int, start: int
) -> Iterator[Float[Tensor, "*lead prefixes vocab"]]:
    """Joints of 0, 1, … tokens, from that of `start` tokens on, as prefixes by next tokens."""
    return (joint.reshape(*joint.shape[:lead], -1, joint.shape[-1]) for joint in joints[start:])


def joints_of_prefixes(probs: Tensor, horizon: int) -> list[Tensor]:
    """The joint of the first 0, 1, … `horizon` tokens, (*batch, vocab, …, vocab) each."""
    found = [probs]
    for _ in range(horizon):
        found.append(found[-1].sum(-1))
    return found[::-1]


def broadcast_first(first: Tensor, rest: Tensor) -> Tensor:
    """`first` with an axis of one for each of the later axes of `rest`."""
    return first.reshape(*first.shape, *(1,) * (rest.ndim - first.ndim))  # (*first, 1, …, 1)


def picked(
    read: Callable[[Tensor], Tensor],
    prefixes: Int[Tensor, "count length"],
    row: Int[Tensor, " children"],
    place: Int[Tensor, " children"],
    width: int,
) -> Float[Tensor, " children"]:
    """Entries (row, place) of what is read of prefixes, (count, width), some prefixes at a time."""
    found = torch.zeros(len(row), dtype=torch.float64)
    size = max(_ENTRIES_AT_ONCE // width, 1)
    for start in range(0, len(prefixes), size):
        here = (row >= start) & (row < start + size)  # (children,)
        found[here] = read(prefixes[start : start + size])[row[here] - start, place[here]].double()
    return found
