"""What a head makes of positions before anything is multiplied with a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a head makes of some positions before anything is multiplied with a vocabulary.

    Attributes
    ----------
    log_weights : (*batch, rank) tensor
        Of the components.
    states : (*batch, width) or (*batch, drafted, width) tensor
        What the maps read: one for all drafted positions, or each its own.
    left : (*batch, later, transition_rank) tensor or None
        ``L[x_{i-1}] * g_i`` of each drafted position but the first.
    """

    log_weights: Tensor
    states: Tensor
    left: Tensor | None = None

    def __getitem__(self, index) -> Features:
        left = None if self.left is None else self.left[index]
        return Features(self.log_weights[index], self.states[index], left)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there are, in the order of the attributes."""
        own = (self.log_weights, self.states, self.left)
        return tuple(tensor for tensor in own if tensor is not None)
