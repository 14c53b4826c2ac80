"""An anchored draft over a vocabulary that is too large for one distribution per first token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.drafts.mixture import Mixture
from cpmtp.drafts.prefix_tables import PrefixTable
from cpmtp.joint_distribution.stored import Stored
from cpmtp.sampling_law import SamplingLaw


@dataclass(frozen=True, eq=False)
class FirstTokenDrafts(Stored):
    """An anchored draft that holds distributions for the first tokens that have mass, and one for
    all others.

    To whoever reads it it has a batch axis over all first tokens, as any anchored draft has.

    Attributes
    ----------
    entries : Mixture
        One batch axis; the last entry stands for all other first tokens.
    first_tokens : (entries - 1,) long tensor
        Which token each of the others is for.

    Examples
    --------
    >>> from cpmtp.drafts.cp_distribution import CPDistribution
    >>> half = torch.full((2, 1), 1.0, dtype=torch.float64)
    >>> entries = CPDistribution(half, [torch.eye(2, dtype=torch.float64)[..., None]])
    >>> draft = FirstTokenDrafts(entries, torch.tensor([1]))
    >>> draft.batch_shape, draft[1].following(torch.empty(1, 0, dtype=torch.long), told=False)
    (torch.Size([2]), tensor([[1., 0.]], dtype=torch.float64))
    """

    entries: Mixture
    first_tokens: Int[Tensor, " tokens"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.entries.vocab_size

    @property
    def horizon(self) -> int:
        """Tokens after the first."""
        return self.entries.horizon

    @property
    def transition_rank(self) -> int:
        """Rank of what a token's logits owe to the one before; 0: nothing."""
        return getattr(self.entries, "transition_rank", 0)

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.entries.rank

    @property
    def batch_shape(self) -> torch.Size:
        """That of the first token."""
        return torch.Size([self.vocab_size])

    @property
    def free_numbers(self) -> int:
        """Free parameters of one distribution."""
        return self.entries.free_numbers

    @property
    def shared_numbers(self) -> int:
        """Parameters that all first tokens share."""
        return self.entries.shared_numbers

    @property
    def parameter_count(self) -> int:
        """Free parameters of all distributions that are held."""
        count = len(self.first_tokens) + 1
        return count * self.entries.free_numbers + self.entries.shared_numbers

    def serial_steps(self, law: SamplingLaw | None = None) -> int:
        """Steps that must follow each other to draw from it under a law."""
        return self.entries.serial_steps(law)

    @property
    def places(self) -> Int[Tensor, " vocab"]:
        """Every first token's entry."""
        places = torch.full((self.vocab_size,), len(self.first_tokens))
        places[self.first_tokens] = torch.arange(len(self.first_tokens))
        return places

    def expanded(self) -> Any:
        """The same with an entry for every first token: for small vocabularies."""
        return self.entries[self.places]

    def __getitem__(self, index) -> Any:
        """What follows a first token, or some of them."""
        if isinstance(index, int):
            found = (self.first_tokens == index).nonzero()  # (0 or 1, 1)
            return self.entries[int(found[0, 0]) if len(found) else len(self.first_tokens)]
        return self.entries[self.places[index]]

    def following(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Float[Tensor, "count vocab"]:
        """Not without a first token: select one; see `Draft`."""
        raise _unselected()

    def child_probs(self, prefixes: Tensor, row: Tensor, tokens: Tensor, **how: Any) -> Tensor:
        """Not without a first token: select one; see `Draft`."""
        raise _unselected()

    def proposes(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Bool[Tensor, " count"]:
        """Always something; see `Draft`."""
        return torch.ones(len(prefixes), dtype=torch.bool)

    def prefix_tables(
        self, first: Float[Tensor, "*batch vocab"] | None, *, anchored: bool
    ) -> Iterator[PrefixTable]:
        """Of all first tokens; see `Draft`."""
        return self.expanded().prefix_tables(first, anchored=anchored)


def _unselected() -> ValueError:
    return ValueError("an anchored draft speaks of what follows a first token: select one first")
