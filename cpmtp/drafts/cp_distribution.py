"""The canonical polyadic (CP) distribution, a mixture of product distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.drafts.mixture import Mixture, check_simplex
from cpmtp.drafts.prefix_tables import LowRankTable
from cpmtp.drafts.support import Support
from cpmtp.sampling_law import SamplingLaw, ratio


class Factored(Mixture):
    """What a component emits is a column of a factor per position, whatever came before.

    Attributes
    ----------
    factors : tuple of horizon tensors (*batch, size, rank)
    """

    factors: Sequence[Float[Tensor, "*batch _ rank"]]

    @property
    def horizon(self) -> int:
        """Number of tokens."""
        return len(self.factors)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.factors[0].shape[-2] if self.support is None else self.support.vocab_size

    @property
    def free_numbers(self) -> int:
        """Free parameters of one distribution: what a head would have to give for it."""
        return self.rank - 1 + sum(self.rank * (size - 1) for size in self._sizes)

    @property
    def shared_numbers(self) -> int:
        """Parameters that all contexts share: none."""
        return 0

    def serial_steps(self, law: SamplingLaw | None = None) -> int:
        """Steps that must follow each other to draw from it under a law: one if it is as it is."""
        return 1 if law is None or law.is_identity else self.horizon

    def _log_emission(self, position: int, before: Tensor | None, tokens: Tensor) -> Tensor:
        place, there = self._place(position, tokens)
        return emitted(self.factors[position], place, there).log()

    def _mixed(self, position: int, weights: Tensor, before: Tensor | None) -> Tensor:
        return weights @ self.factors[position].mT  # (*batch, rows, size)

    def _of_components(self, position: int, component: Tensor, before: Tensor | None) -> Tensor:
        return columns_of(self.factors[position], component)

    def _table(self, position: int, rows: Tensor) -> LowRankTable:
        return LowRankTable(rows, self.factors[position])


@dataclass(frozen=True, repr=False)
class CPDistribution(Factored):
    """``Q(x) = sum_a w_a prod_i A_i[x_i, a]`` with the weights and every factor column on the
    simplex.

    Attributes
    ----------
    weights : (*batch, rank) tensor
    factors : sequence of horizon tensors (*batch, vocab, rank)
        TensorLy's orientation: column a of factor i is the distribution of token i in component a.
        With a support its size takes the place of vocab, which may differ by position.
    support : Support, optional
        The tokens that the rows of the factors stand for; default: all.

    Raises
    ------
    ValueError
        If shapes do not match, or an entry is negative, not finite, or a column does not sum to one
        (within 1e-5).

    Examples
    --------
    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    >>> dist = CPDistribution(half, [torch.eye(2, dtype=torch.float64)] * 2)
    >>> dist.to_tensor()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    >>> dist.next_token_probs(torch.tensor([1]))
    tensor([0., 1.], dtype=torch.float64)
    >>> some = Support.of(torch.tensor([1, 3]), vocab_size=4, positions=2)
    >>> CPDistribution(half, dist.factors, some).next_token_probs(torch.tensor([1]))
    tensor([0., 1., 0., 0.], dtype=torch.float64)
    """

    weights: Float[Tensor, "*batch rank"]
    factors: Sequence[Float[Tensor, "*batch _ rank"]]
    support: Support | None = None

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        check_factors(self.weights, self.factors, self.support)

    @property
    def parameter_count(self) -> int:
        """Free parameters, simplex constraints taken off, summed over the batch."""
        return math.prod(self.batch_shape) * self.free_numbers

    def __getitem__(self, index) -> CPDistribution:
        """Select along the first batch axes."""
        self._check_batched()
        support = None if self.support is None else self.support[index]
        factors = tuple(factor[index] for factor in self.factors)
        return CPDistribution(self.weights[index], factors, support)

    def marginal(self, length: int) -> CPDistribution:
        """The CP distribution of the first `length` tokens."""
        self._check_length(length)
        support = None if self.support is None else self.support.part(0, length)
        return CPDistribution(self.weights, self.factors[:length], support)

    def without_support(self) -> CPDistribution:
        """The same over all tokens, with zeros outside the support."""
        return CPDistribution(self.weights, spread_factors(self.factors, self.support))

    def to_tensorly(self):
        """TensorLy's ``CPTensor`` (NumPy), for a distribution without batch axes."""
        from tensorly.cp_tensor import CPTensor

        if self.batch_shape:
            raise ValueError(
                f"TensorLy has no batch axes: select one of {tuple(self.batch_shape)} first"
            )
        factors = spread_factors(self.factors, self.support)
        return CPTensor(
            (self.weights.detach().cpu().numpy(), [f.detach().cpu().numpy() for f in factors])
        )

    def _rest(self, length: int, weights: Tensor, last: Tensor | None) -> CPDistribution:
        support = None if self.support is None else self.support.part(length)
        return CPDistribution(weights, self.factors[length:], support)


def check_factors(weights: Tensor, factors: Sequence[Tensor], support: Support | None) -> None:
    """Refuse weights or factors (*batch, size, rank) that do not fit each other, a support or the
    simplex.

    Raises
    ------
    ValueError
        With the first factor that does not.
    """
    if not factors:
        raise ValueError("a distribution needs at least one factor, got none")
    if weights.ndim == 0 or weights.shape[-1] == 0:
        raise ValueError("a distribution needs a rank of at least 1, got none")
    check_simplex(weights.detach(), -1, "the weights")
    batch, sizes = weights.shape[:-1], (factors[0].shape[-2],) * len(factors)
    if support is not None:
        sizes = support.sizes
        if len(sizes) != len(factors) or support.batch_shape != batch:
            raise ValueError(
                f"a support of {len(sizes)} positions and batch axes {tuple(support.batch_shape)} "
                f"for {len(factors)} factors and batch axes {tuple(batch)}: expected the same"
            )
    for position, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
        expected = (*batch, size, weights.shape[-1])
        if tuple(factor.shape) != expected:
            raise ValueError(
                f"factor {position} has shape {tuple(factor.shape)}: expected {expected}"
            )
        check_simplex(factor.detach(), -2, f"the columns of factor {position}")
        if support is not None and bool(
            (factor.detach().sum(-1) > 0)[~support.filled(position)].any()
        ):
            raise ValueError(
                f"factor {position} has mass where the support only fills up: expected zeros there"
            )


def spread_factors(factors: Sequence[Tensor], support: Support | None) -> tuple[Tensor, ...]:
    """Factors (*batch, size, rank) over a support as factors (*batch, vocab, rank) with zeros."""
    if support is None:
        return tuple(factors)
    # (*batch, vocab, rank) each
    return tuple(support.scatter(i, factor.mT).mT for i, factor in enumerate(factors))


def emitted(factor: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """Rows of a factor (*batch, size, rank) at places (*batch, rows); zeros where nothing is."""
    found = factor.take_along_dim(place.unsqueeze(-1), -2)  # (*batch, rows, rank)
    return found * there.unsqueeze(-1)


def columns_of(factor: Tensor, component: Tensor) -> Tensor:
    """Columns of a factor (*batch, size, rank) at components (*batch, rows), each a row."""
    return factor.mT.take_along_dim(component.unsqueeze(-1), -2)  # (*batch, rows, size)


def normalised_cp(weights: Tensor, factors: list[Tensor]) -> CPDistribution:
    """A CP distribution from non-negative weights and factors: column sums move into the weights.

    Dead columns (sum zero) get weight zero and a uniform column. Everything dead is a ValueError.
    """
    columns = []
    for factor in factors:
        sums = factor.sum(-2, keepdim=True)  # (*batch, 1, rank)
        normalised = ratio(factor, sums, otherwise=1.0 / factor.shape[-2])
        columns.append(normalised)
        weights = weights * sums.squeeze(-2)  # (*batch, rank)
    total = weights.sum(-1, keepdim=True)
    if not bool((total > 0).all()) or not bool(torch.isfinite(total).all()):
        raise ValueError("no mass is left: every component has a zero weight or factor")
    return CPDistribution(weights / total, tuple(columns))
