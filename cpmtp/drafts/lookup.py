"""Prompt lookup: what followed the last time the text ended as it does now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.sampling_law import SamplingLaw


def looked_up(
    text: Int[Tensor, " time"], length: int, *, max_ngram: int = 3, min_ngram: int = 1
) -> Int[Tensor, " drafted"]:
    """The tokens that followed an earlier occurrence of the text's end.

    The longest n-gram that ends the text and occurred before decides, and of its occurrences the
    latest. Where none did, nothing is drafted.

    Parameters
    ----------
    text : (time,) long tensor
    length : int
        Most tokens drafted; fewer where the text ends before.
    max_ngram, min_ngram : int
        Longest and shortest n-gram that is looked for.

    References
    ----------
    saxena2023prompt

    Examples
    --------
    >>> looked_up(torch.tensor([5, 1, 2, 3, 1, 2]), 3)
    tensor([3, 1, 2])
    """
    for ngram in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        windows = text[:-1].unfold(0, ngram, 1)  # (starts, ngram); each is followed by a token
        found = (windows == text[-ngram:]).all(-1).nonzero()[:, 0]
        if len(found):
            start = int(found[-1]) + ngram
            return text[start : start + length]
    return text[:0]


@dataclass(frozen=True, eq=False)
class LookupDraft:
    """Prompt lookup as a draft: one path, proposed for certain, or nothing.

    It costs nothing and learns nothing. Told the first token, it looks up the end of the text with
    that token. Where no token is proposed its probabilities are all zero, and nothing survives.

    Attributes
    ----------
    text : (time,) long tensor
        The text so far.
    vocab_size, horizon : int
        The horizon counts the first token.
    max_ngram, min_ngram : int
        As for `looked_up`.

    Raises
    ------
    ValueError
        If the horizon or an n-gram is below 1, or a token is not in the vocabulary.

    References
    ----------
    saxena2023prompt

    Examples
    --------
    >>> draft = LookupDraft(torch.tensor([1, 2, 3, 1]), vocab_size=4, horizon=3)
    >>> draft.following(torch.tensor([[2], [3]]), told=True)
    tensor([[0., 0., 0., 1.],
            [0., 1., 0., 0.]], dtype=torch.float64)
    """

    text: Int[Tensor, " time"]
    vocab_size: int
    horizon: int
    max_ngram: int = 3
    min_ngram: int = 1

    def __repr__(self) -> str:
        sizes = f"horizon={self.horizon}, vocab_size={self.vocab_size}"
        return f"LookupDraft(text of {len(self.text)} tokens, {sizes})"

    def __post_init__(self):
        if self.horizon < 1 or not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"horizon {self.horizon} and n-grams of {self.min_ngram} to {self.max_ngram} "
                "tokens: expected at least 1 and no fewer at the end"
            )
        if len(self.text) and not 0 <= int(self.text.min()) <= int(self.text.max()) < (
            self.vocab_size
        ):
            raise ValueError(
                f"tokens of the text must be in [0, {self.vocab_size}): got "
                f"{int(self.text.min())} to {int(self.text.max())}"
            )

    @property
    def batch_shape(self) -> torch.Size:
        """None: a text has one end."""
        return torch.Size()

    @property
    def free_numbers(self) -> int:
        """None is learned."""
        return 0

    @property
    def shared_numbers(self) -> int:
        """None is learned."""
        return 0

    def __getitem__(self, index) -> LookupDraft:
        raise IndexError("a prompt lookup has no batch axes")

    def serial_steps(self, law: SamplingLaw | None = None) -> int:
        """The path is copied at once."""
        return 1

    def path(self, known: Int[Tensor, " tokens"]) -> Int[Tensor, " drafted"]:
        """What is proposed after the text and some known tokens, up to the horizon."""
        # whole (text and known,)
        whole, length = torch.cat([self.text, known]), self.horizon - len(known)
        return looked_up(whole, length, max_ngram=self.max_ngram, min_ngram=self.min_ngram)

    def following(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Float[Tensor, "count vocab"]:
        """One-hot rows, or zeros where nothing is proposed; see `Draft`."""
        expected = self._expected(prefixes, told=told)  # (count,)
        rows = torch.zeros(len(prefixes), self.vocab_size + 1, dtype=torch.float64)
        rows.scatter_(1, torch.where(expected < 0, self.vocab_size, expected)[:, None], 1.0)
        return rows[:, : self.vocab_size]

    def child_probs(
        self,
        prefixes: Int[Tensor, "count length"],
        row: Int[Tensor, " children"],
        tokens: Int[Tensor, " children"],
        *,
        law: SamplingLaw,
        told: bool,
    ) -> Float[Tensor, " children"]:
        """One or zero, which no law changes; see `Draft`."""
        return (self._expected(prefixes, told=told)[row] == tokens).double()

    def proposes(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Bool[Tensor, " count"]:
        """Whether a prefix is the path's beginning, and the path goes on; see `Draft`."""
        return self._expected(prefixes, told=told) >= 0

    def prefix_tables(
        self, first: Float[Tensor, " vocab"] | None, *, anchored: bool
    ) -> Iterator[PathTable]:
        """A row of few numbers each; see `Draft`."""
        if first is None:
            masses, known = torch.ones(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.long)
        else:
            masses, known = first.double(), torch.arange(self.vocab_size)[:, None]
        paths = self._paths(known)  # (paths, horizon), -1 where it has ended
        for length in range(known.shape[1] + 1, self.horizon + 1):
            there = (paths[:, :length] >= 0).all(1)
            begun = paths[there, :length]  # (there, length)
            radix = self.vocab_size ** torch.arange(length - 2, -1, -1)  # (length - 1,)
            numbers = (begun[:, :-1] * radix).sum(-1)
            sizes = (self.vocab_size ** (length - 1), self.vocab_size)
            yield PathTable(sizes, numbers, begun[:, -1], masses[there])

    def _paths(self, known: Int[Tensor, "count tokens"]) -> Int[Tensor, "count horizon"]:
        """Known tokens and what is proposed after them, filled up with -1."""
        paths = torch.full((len(known), self.horizon), -1)
        for row, tokens in zip(paths, known, strict=True):
            path = torch.cat([tokens, self.path(tokens)])  # (known and proposed,)
            row[: len(path)] = path
        return paths

    def _expected(self, prefixes: Tensor, *, told: bool) -> Int[Tensor, " count"]:
        """The token proposed after each prefix, -1 for none."""
        length = prefixes.shape[1]
        if told and length:
            firsts, which = prefixes[:, 0].unique(return_inverse=True)
            paths = self._paths(firsts[:, None])[which]  # (count, horizon)
        else:
            paths = self._paths(prefixes.new_empty(1, 0)).expand(len(prefixes), -1)
        begins = (paths[:, :length] == prefixes).all(1)  # (count,)
        return torch.where(begins, paths[:, length], -1)


@dataclass(frozen=True)
class PathTable:
    """A table of prefixes by next tokens that is zero but on some paths.

    Attributes
    ----------
    sizes : (int, int)
        Prefixes and tokens.
    prefixes, tokens : (paths,) long tensors
        Where each path passes.
    masses : (paths,) tensor
        What it has.
    """

    sizes: tuple[int, int]
    prefixes: Int[Tensor, " paths"]
    tokens: Int[Tensor, " paths"]
    masses: Float[Tensor, " paths"]

    def pieces(self, size: int) -> Iterator[Float[Tensor, "some vocab"]]:
        """Rows in turn; see `PrefixTable`."""
        return (
            self._rows(start, min(start + size, self.sizes[0]))
            for start in range(0, self.sizes[0], size)
        )

    def row(self, prefix: Int[Tensor, ""], batch: int) -> Float[Tensor, "1 vocab"]:
        """One row; see `PrefixTable`."""
        return self._rows(int(prefix), int(prefix) + 1)

    def _rows(self, start: int, stop: int) -> Tensor:
        here = (self.prefixes >= start) & (self.prefixes < stop)  # (paths,)
        rows = torch.zeros(stop - start, self.sizes[1], dtype=torch.float64)
        at = (self.prefixes[here] - start, self.tokens[here])
        return rows.index_put(at, self.masses[here], accumulate=True)
