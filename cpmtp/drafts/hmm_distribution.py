"""Hidden-Markov drafts: mixtures whose component changes from token to token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.drafts.cp_distribution import Factored, check_factors, spread_factors
from cpmtp.drafts.mixture import check_simplex, drawn
from cpmtp.drafts.support import Support


@dataclass(frozen=True, repr=False)
class HMMDistribution(Factored):
    """``Q(x) = sum_z w_{z_1} A_1[x_1, z_1] prod_{i>=2} T_i[z_{i-1}, z_i] A_i[x_i, z_i]``.

    Up to three tokens it is a CP distribution of the same rank, whose component is the state in the
    middle; from four on it is more.

    Attributes
    ----------
    weights : (*batch, rank) tensor
        Of the first token's states.
    transitions : (*batch, horizon - 1, rank, rank) tensor
        ``T_i[z_{i-1}, z_i]``, rows on the simplex.
    factors : sequence of horizon tensors (*batch, vocab, rank)
        As of a `CPDistribution`.
    support : Support, optional
        The tokens that the rows of the factors stand for; default: all.

    Raises
    ------
    ValueError
        If shapes do not match, or an entry is negative, not finite, or a column of a factor or a
        row of a transition does not sum to one (within 1e-5).

    Examples
    --------
    >>> first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    >>> HMMDistribution(first, swap, [torch.eye(2, dtype=torch.float64)] * 2).to_tensor()
    tensor([[0., 1.],
            [0., 0.]], dtype=torch.float64)
    """

    weights: Float[Tensor, "*batch rank"]
    transitions: Float[Tensor, "*batch steps rank rank"]
    factors: Sequence[Float[Tensor, "*batch _ rank"]]
    support: Support | None = None

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        check_factors(self.weights, self.factors, self.support)
        expected = (*self.batch_shape, self.horizon - 1, self.rank, self.rank)
        if tuple(self.transitions.shape) != expected:
            raise ValueError(
                f"transitions have shape {tuple(self.transitions.shape)}: expected {expected}"
            )
        check_simplex(self.transitions.detach(), -1, "the rows of the transitions")

    @property
    def free_numbers(self) -> int:
        """Free parameters of one distribution."""
        return super().free_numbers + (self.horizon - 1) * self.rank * (self.rank - 1)

    def __getitem__(self, index) -> HMMDistribution:
        """Select along the first batch axes."""
        self._check_batched()
        support = None if self.support is None else self.support[index]
        factors = tuple(factor[index] for factor in self.factors)
        return HMMDistribution(self.weights[index], self.transitions[index], factors, support)

    def marginal(self, length: int) -> HMMDistribution:
        """The distribution of the first `length` tokens."""
        self._check_length(length)
        support = None if self.support is None else self.support.part(0, length)
        transitions = self.transitions[..., : length - 1, :, :]
        return HMMDistribution(self.weights, transitions, self.factors[:length], support)

    def without_support(self) -> HMMDistribution:
        """The same over all tokens, with zeros outside the support."""
        factors = spread_factors(self.factors, self.support)
        return HMMDistribution(self.weights, self.transitions, factors)

    def _rest(self, length: int, weights: Tensor, last: Tensor | None) -> HMMDistribution:
        support = None if self.support is None else self.support.part(length)
        transitions = self.transitions[..., length:, :, :]
        return HMMDistribution(weights, transitions, self.factors[length:], support)

    def _carried(self, position: int, masses: Tensor) -> Tensor:
        # (*batch, rows, rank) @ (*batch, rank, rank)
        return masses @ self.transitions[..., position - 1, :, :]

    def _moved(self, position: int, scores: Tensor) -> Tensor:
        highest = scores.amax(-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)  # (*batch, rows, 1)
        return self._carried(position, (scores - highest).exp()).log() + highest

    def _changed(self, position: int, component: Tensor, generator: torch.Generator) -> Tensor:
        transition = self.transitions[..., position - 1, :, :]  # (*batch, rank, rank)
        rows = transition.take_along_dim(component.unsqueeze(-1), -2)  # (*batch, count, rank)
        return drawn(rows, generator)
