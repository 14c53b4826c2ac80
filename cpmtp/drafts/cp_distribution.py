"""The canonical polyadic (CP) distribution, a mixture of product distributions, and its algebra."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.drafts.prefix_tables import LowRankTable, grown_rows
from cpmtp.language_model import draw_tokens
from cpmtp.sampling_law import SamplingLaw, ratio

_SIMPLEX_TOLERANCE = 1e-5


@dataclass(frozen=True)
class CPDistribution:
    """``Q(x) = sum_a w_a prod_i A_i[x_i, a]`` with the weights and every factor column on the
    simplex.

    Attributes
    ----------
    weights : (*batch, rank) tensor
    factors : sequence of horizon tensors (*batch, vocab, rank)
        TensorLy's orientation: column a of factor i is the distribution of token i in component a.

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
    """

    weights: Float[Tensor, "*batch rank"]
    factors: Sequence[Float[Tensor, "*batch vocab rank"]]

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        if not self.factors:
            raise ValueError("a CP distribution needs at least one factor, got none")
        if self.weights.ndim == 0 or self.weights.shape[-1] == 0:
            raise ValueError("a CP distribution needs a rank of at least 1, got none")
        expected = (*self.weights.shape[:-1], self.factors[0].shape[-2], self.weights.shape[-1])
        for position, factor in enumerate(self.factors):
            if tuple(factor.shape) != expected:
                raise ValueError(
                    f"factor {position} has shape {tuple(factor.shape)}: expected {expected}"
                )
            _check_simplex(factor.detach(), -2, f"the columns of factor {position}")
        _check_simplex(self.weights.detach(), -1, "the weights")

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.weights.shape[-1]

    @property
    def horizon(self) -> int:
        """Number of tokens."""
        return len(self.factors)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.factors[0].shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Axes before the distribution's own."""
        return self.weights.shape[:-1]

    @property
    def free_numbers(self) -> int:
        """Free parameters of one distribution: what a head would have to give for it."""
        return self.rank - 1 + self.horizon * self.rank * (self.vocab_size - 1)

    @property
    def shared_numbers(self) -> int:
        """Parameters that all contexts share: a CP distribution has none."""
        return 0

    def serial_steps(self, law: SamplingLaw | None = None) -> int:
        """Steps that must follow each other to draw from it under a law: one if it is as it is."""
        return 1 if law is None or law.is_identity else self.horizon

    @property
    def parameter_count(self) -> int:
        """Free parameters, simplex constraints taken off, summed over the batch."""
        return math.prod(self.batch_shape) * self.free_numbers

    def __getitem__(self, index) -> CPDistribution:
        """Select along the first batch axes."""
        if not self.batch_shape:
            raise IndexError("this CP distribution has no batch axes")
        return CPDistribution(self.weights[index], tuple(factor[index] for factor in self.factors))

    def to_tensor(self) -> Float[Tensor, "..."]:
        """All probabilities, (*batch, vocab, …, vocab)."""
        return self.prefix_probs(self.horizon)

    def prefix_probs(self, length: int) -> Float[Tensor, "..."]:
        """Joint of the first `length` tokens, (*batch, vocab, …, vocab); later ones sum to one."""
        if length == 0:
            return self.weights.sum(-1)
        if length == 1:
            return (self.factors[0] @ self.weights.unsqueeze(-1)).squeeze(-1)
        rows = self.weights.unsqueeze(-2) * self.factors[0]  # (*batch, vocab, rank)
        rows = khatri_rao([rows, *self.factors[1 : length - 1]])  # (*batch, prefixes, rank)
        table = rows @ self.factors[length - 1].mT  # (*batch, prefixes, vocab)
        return table.reshape(*self.batch_shape, *(self.vocab_size,) * length)

    def marginal(self, length: int) -> CPDistribution:
        """The CP distribution of the first `length` tokens."""
        if not 1 <= length <= self.horizon:
            raise ValueError(f"length {length}: expected 1 to the horizon, {self.horizon}")
        return CPDistribution(self.weights, self.factors[:length])

    def log_prob(self, tokens: Int[Tensor, "... length"]) -> Float[Tensor, "..."]:
        """Log-probability (nats) that the next tokens begin with `tokens`, of any length up to the
        horizon.

        The leading axes of `tokens` are the batch axes followed by any others.
        """
        self._check_tokens(tokens)
        # (*tokens, rank)
        total = self._lead(self.weights.log(), tokens).expand(*tokens.shape[:-1], self.rank)
        for position in range(tokens.shape[-1]):
            total = total + self._rows(position, tokens[..., position]).log()
        return torch.logsumexp(total, -1)

    def condition(self, prefix: Int[Tensor, "*batch length"]) -> CPDistribution:
        """The distribution of the remaining tokens given the first ones.

        A prefix of zero mass leaves the weights as they are: its posterior is 0/0.

        Raises
        ------
        ValueError
            If no token remains, or a token is not in the vocabulary.
        """
        self._check_tokens(prefix)
        if prefix.shape[-1] >= self.horizon:
            raise ValueError(
                f"a prefix of {prefix.shape[-1]} tokens leaves nothing of a horizon of "
                f"{self.horizon}"
            )
        return CPDistribution(self._posterior(prefix), self.factors[prefix.shape[-1] :])

    def next_token_probs(
        self, prefix: Int[Tensor, "*batch length"]
    ) -> Float[Tensor, "*batch vocab"]:
        """The next token after `prefix` (may be empty): factors mixed by the posterior
        weights.
        """
        self._check_tokens(prefix)
        if prefix.shape[-1] >= self.horizon:
            raise ValueError(
                f"a prefix of {prefix.shape[-1]} tokens leaves nothing of a horizon of "
                f"{self.horizon}"
            )
        posterior = self._posterior(prefix)
        return (self.factors[prefix.shape[-1]] @ posterior.unsqueeze(-1)).squeeze(-1)

    def following(
        self, prefixes: Int[Tensor, "count length"], *, told: bool
    ) -> Float[Tensor, "count vocab"]:
        """The token after each prefix, float64, without batch axes; see `Draft`."""
        posterior = self._posterior(prefixes, told=told)  # (count, rank)
        factor = self.factors[prefixes.shape[1]]  # (vocab, rank)
        return (factor @ posterior.unsqueeze(-1)).squeeze(-1).double()

    def prefix_tables(
        self, first: Float[Tensor, "*batch vocab"] | None, *, anchored: bool
    ) -> Iterator[LowRankTable]:
        """Rows carry the components, columns are the next position's factor; see `Draft`."""
        factors = self.factors
        if first is None:
            rows = self.weights.unsqueeze(-2)  # (*batch, 1, rank)
        elif anchored:
            rows = (self.weights * first.unsqueeze(-1)).unsqueeze(-2)  # (*batch, vocab, 1, rank)
        else:
            rows = posterior_after_first(self) * first.unsqueeze(-1)  # (*batch, vocab, rank)
            factors = factors[1:]
        for k, factor in enumerate(factors):
            yield LowRankTable(rows, factor)
            if k + 1 < len(factors):
                rows = grown_rows(rows, factor)

    def sample(
        self, count: int, *, generator: torch.Generator | None = None, seed: int = 0
    ) -> Int[Tensor, "..."]:
        """Draw `count` sequences, (*batch, count, horizon).

        Draws from `generator`, or from a new one made of `seed`.
        """
        generator = generator or torch.Generator(self.weights.device).manual_seed(seed)
        component = _draw(  # (*batch, count)
            self.weights.unsqueeze(-2).expand(*self.batch_shape, count, self.rank), generator
        )
        tokens = []
        for factor in self.factors:
            # (*batch, count, vocab)
            index = component.unsqueeze(-1).expand(*component.shape, self.vocab_size)
            tokens.append(_draw(factor.mT.gather(-2, index), generator))  # (*batch, count)
        return torch.stack(tokens, -1)

    def to_tensorly(self):
        """TensorLy's ``CPTensor`` (NumPy), for a distribution without batch axes."""
        from tensorly.cp_tensor import CPTensor

        if self.batch_shape:
            raise ValueError(
                f"TensorLy has no batch axes: select one of {tuple(self.batch_shape)} first"
            )
        return CPTensor(
            (self.weights.detach().cpu().numpy(), [f.detach().cpu().numpy() for f in self.factors])
        )

    def _posterior(self, prefix: Tensor, *, told: bool = False) -> Tensor:
        """Weights given a prefix, (*prefix axes, rank); the prior weights after an impossible one.

        With `told` an impossible first token leaves the weights as they are, and later ones count.
        """
        scores = self.weights.log().expand(*prefix.shape[:-1], self.rank)  # (*prefix, rank)
        for position in range(prefix.shape[-1]):
            grown = scores + self._rows(position, prefix[..., position]).log()
            if told and position == 0:
                excluded = grown.amax(-1, keepdim=True) == -math.inf
                grown = torch.where(excluded, scores, grown)
            scores = grown
        best = scores.amax(-1, keepdim=True)
        impossible = best == -math.inf
        posterior = (scores - torch.where(impossible, 0.0, best)).exp()
        posterior = torch.where(impossible, self.weights.expand_as(posterior), posterior)
        return posterior / posterior.sum(-1, keepdim=True)

    def _rows(self, position: int, tokens: Tensor) -> Tensor:
        """``A_i[x_i, :]`` for tokens with leading batch axes: (*tokens.shape, rank)."""
        factor = self.factors[position]
        if not self.batch_shape:
            return factor[tokens]
        batch = len(self.batch_shape)
        flat = (  # (*batch, others)
            tokens.reshape(*self.batch_shape, -1) if tokens.ndim > batch else tokens.unsqueeze(-1)
        )
        # (*batch, others, rank)
        rows = factor.gather(-2, flat.unsqueeze(-1).expand(*flat.shape, self.rank))
        return rows.reshape(*tokens.shape, self.rank)  # (*tokens, rank)

    def _lead(self, values: Tensor, tokens: Tensor) -> Tensor:
        extra = tokens.ndim - 1 - len(self.batch_shape)
        return (
            # (*batch, 1, …, rank)
            values.reshape(*self.batch_shape, *(1,) * max(extra, 0), self.rank)
            if self.batch_shape
            else values
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


def posterior_after_first(draft: CPDistribution) -> Float[Tensor, "*batch vocab rank"]:
    """Weights after each first token; the prior weights after one of zero mass."""
    scores = draft.weights.unsqueeze(-2) * draft.factors[0]  # (*batch, vocab, rank)
    total = scores.sum(-1, keepdim=True)
    given = ratio(scores, total, otherwise=0.0)
    return torch.where(total > 0, given, draft.weights.unsqueeze(-2))


def khatri_rao(
    factors: Sequence[Float[Tensor, "*batch _ rank"]],
) -> Float[Tensor, "*batch rows rank"]:
    """Columnwise Kronecker product, first factor slowest: (…, product of rows, rank)."""
    product = factors[0]
    for factor in factors[1:]:
        product = grown_rows(product, factor)
    return product


def _draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    flat = probs.reshape(-1, probs.shape[-1])  # (draws, vocab)
    return draw_tokens(flat, generator).reshape(probs.shape[:-1])


def _check_simplex(values: Tensor, dim: int, what: str) -> None:
    total = values.sum(dim)
    if not bool((values >= 0).all()):
        raise ValueError(f"{what} must be non-negative and finite: found a negative entry or NaN")
    if not bool(((total - 1).abs() <= _SIMPLEX_TOLERANCE).all()):
        raise ValueError(
            f"{what} must sum to 1: a sum is off by {(total - 1).abs().max().item():.3g}; "
            "normalise them first"
        )
