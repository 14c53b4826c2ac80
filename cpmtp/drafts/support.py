"""Which token ids a draft can emit at each position: its factors run over these alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from cpmtp.joint_distribution.stored import Stored


@dataclass(frozen=True, eq=False)
class Support(Stored):
    """The token ids of every position, ascending; outside them a draft gives no mass.

    Attributes
    ----------
    ids : sequence of horizon tensors (*batch, size)
        Sizes may differ by position. Where an entry of the batch has fewer ids than others its row
        ends with `vocab_size`, and rows of factors at these places are zero.
    vocab_size : int
        Number of token ids there are.

    Raises
    ------
    ValueError
        If ids do not ascend, lie outside the vocabulary, or an entry has none. Unsorted ids are
        refused rather than sorted: what runs over them would have to be sorted with them.

    Examples
    --------
    >>> support = Support((torch.tensor([1, 3]),), vocab_size=5)
    >>> support.find(0, torch.tensor([3, 4]))
    (tensor([1, 1]), tensor([ True, False]))
    >>> support.scatter(0, torch.tensor([0.25, 0.75]))
    tensor([0.0000, 0.2500, 0.0000, 0.7500, 0.0000])
    """

    ids: Sequence[Int[Tensor, "*batch _"]]
    vocab_size: int

    def __repr__(self) -> str:
        sizes = ", ".join(str(ids.shape[-1]) for ids in self.ids)
        return f"Support(sizes by position [{sizes}], vocab_size={self.vocab_size})"

    def __post_init__(self):
        object.__setattr__(self, "ids", tuple(self.ids))
        if not self.ids:
            raise ValueError("a support needs the ids of at least one position, got none")
        for position, ids in enumerate(self.ids):
            _check_ids(_once(ids), position, self.vocab_size)

    @classmethod
    def of(
        cls,
        ids: Int[Tensor, "..."] | Sequence[Int[Tensor, " _"]],
        *,
        vocab_size: int,
        positions: int,
        batch_shape: Sequence[int] = (),
    ) -> Support:
        """The same ids for all positions or some for each, shared by the batch or an entry's own.

        Parameters
        ----------
        ids : (size,), (positions, size) or (*batch, positions, size) tensor, or a sequence
            A sequence has a one-dimensional tensor per position, of any size each.
        vocab_size, positions : int
        batch_shape : sequence of int
            What is shared is not copied along these.

        Raises
        ------
        ValueError
            If the shape is none of these.
        """
        batch = tuple(batch_shape)
        if isinstance(ids, Tensor):
            shapes = [(), (positions,), (*batch, positions)]
            if tuple(ids.shape[:-1]) not in shapes:
                raise ValueError(
                    f"ids of shape {tuple(ids.shape)}: expected (size,), ({positions}, size) or "
                    f"{(*batch, positions, 'size')}"
                )
            ids = (ids,) * positions if ids.ndim == 1 else ids.unbind(-2)
        if len(ids) != positions:
            raise ValueError(f"ids of {len(ids)} positions: expected {positions}")
        return cls(tuple(part.expand(*batch, part.shape[-1]) for part in ids), vocab_size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Places per position, those that only fill up included."""
        return tuple(ids.shape[-1] for ids in self.ids)

    @property
    def batch_shape(self) -> torch.Size:
        """Axes before that of the ids."""
        return self.ids[0].shape[:-1]

    @property
    def is_shared(self) -> bool:
        """Whether all entries of the batch have the same ids by construction."""
        return all(_once(ids).ndim == 1 for ids in self.ids)

    def __getitem__(self, index) -> Support:
        """Select along the first batch axes."""
        return Support(tuple(ids[index] for ids in self.ids), self.vocab_size)

    def part(self, start: int, stop: int | None = None) -> Support:
        """The ids of some neighbouring positions."""
        return Support(self.ids[start:stop], self.vocab_size)

    def filled(self, position: int) -> Bool[Tensor, "*batch size"]:
        """Which places hold an id."""
        return self.ids[position] < self.vocab_size

    def find(
        self, position: int, tokens: Int[Tensor, "..."]
    ) -> tuple[Int[Tensor, "..."], Bool[Tensor, "..."]]:
        """Each token's place, and whether it is there; where it is not the place is any.

        Parameters
        ----------
        tokens : (*batch, …) long tensor
        """
        ids = _once(self.ids[position])
        if ids.ndim == 1:
            place = torch.searchsorted(ids, tokens.contiguous()).clamp_max(len(ids) - 1)
            return place, ids[place] == tokens
        flat = tokens.reshape(*ids.shape[:-1], -1).contiguous()  # (*batch, others)
        place = torch.searchsorted(ids.contiguous(), flat).clamp_max(ids.shape[-1] - 1)
        there = ids.gather(-1, place) == flat  # (*batch, others)
        return place.reshape(tokens.shape), there.reshape(tokens.shape)

    def tokens(self, position: int, place: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The ids at places (*batch, …)."""
        ids = _once(self.ids[position])
        if ids.ndim == 1:
            return ids[place]
        flat = place.reshape(*ids.shape[:-1], -1)  # (*batch, others)
        return ids.gather(-1, flat).reshape(place.shape)

    def scatter(
        self, position: int, values: Shaped[Tensor, "... size"], *, fill: float = 0.0
    ) -> Shaped[Tensor, "... vocab"]:
        """Values (*batch, …, size) spread over all tokens, `fill` elsewhere."""
        ids = _once(self.ids[position])
        others = values.ndim - ids.ndim if ids.ndim > 1 else 0
        index = ids.reshape(*ids.shape[:-1], *(1,) * others, ids.shape[-1])  # (*batch, 1, …, size)
        wide = values.new_full((*values.shape[:-1], self.vocab_size + 1), fill)
        # What only fills up goes to a column of its own, which is cut off.
        return wide.scatter(-1, index.expand(values.shape), values)[..., : self.vocab_size]


def _once(ids: Tensor) -> Tensor:
    """One row where the batch's axes only repeat it."""
    repeats = all(ids.stride(k) == 0 or ids.shape[k] == 1 for k in range(ids.ndim - 1))
    return ids[(0,) * (ids.ndim - 1)] if repeats and ids.numel() else ids


def _check_ids(ids: Tensor, position: int, vocab_size: int) -> None:
    if ids.is_floating_point() or ids.ndim == 0:
        raise ValueError(
            f"ids of position {position} have {ids.dtype} and shape {tuple(ids.shape)}: expected "
            "integer ids, (*batch, size)"
        )
    if not ids.shape[-1] or (ids.numel() and bool((ids[..., 0] >= vocab_size).any())):
        raise ValueError(f"position {position} has no ids: a draft must be able to emit something")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= vocab_size:
        raise ValueError(
            f"ids of position {position} run from {int(ids.min())} to {int(ids.max())}: expected "
            f"[0, {vocab_size}), and {vocab_size} where a row is filled up"
        )
    rises = ids.diff(dim=-1) > 0
    if not bool((rises | (ids[..., 1:] == vocab_size)).all()):
        raise ValueError(
            f"ids of position {position} do not ascend: sort them and the rows of what runs over "
            "them"
        )
