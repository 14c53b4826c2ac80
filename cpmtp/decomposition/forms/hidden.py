"""Many hidden Markov distributions at once: their tables and expected counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.forms.chains import LOWEST_LOGIT
from cpmtp.decomposition.forms.likelihood import HalvedTargets
from cpmtp.decomposition.mixtures import Mixtures

# What of its weight a state of a fit's start gives to the other states: exact zeros would stay.
_LEAK = 0.05
_LEAST_CURVATURE = 1e-8


@dataclass(frozen=True)
class Hidden:
    """Parameters of many hidden Markov distributions as logarithms, up to constants.

    Attributes
    ----------
    weights : (runs, rank) tensor
    transitions : (runs, steps, rank, rank) tensor
        From the state of position i (rows) to that of position i + 1.
    factors : (runs, positions, rank, vocab) tensor
    """

    weights: Float[Tensor, "runs rank"]
    transitions: Float[Tensor, "runs steps rank rank2"]
    factors: Float[Tensor, "runs positions rank vocab"]

    def __getitem__(self, index) -> Hidden:
        return Hidden(self.weights[index], self.transitions[index], self.factors[index])

    @classmethod
    def of(cls, mixtures: Mixtures, *, leak: float = _LEAK) -> Hidden:
        """CP distributions whose components change with a little probability."""
        rank, steps = mixtures.rank, mixtures.factors.shape[1] - 1
        lowest = math.exp(LOWEST_LOGIT)
        stay = torch.eye(rank).to(mixtures.weights)  # (rank, rank)
        moves = (1 - leak) * stay + leak / rank
        return cls(
            mixtures.weights.clamp_min(lowest).log(),  # (runs, rank)
            moves.log().expand(len(mixtures), steps, rank, rank),
            mixtures.factors.clamp_min(lowest).log(),  # (runs, positions, rank, vocab)
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All parameters."""
        return self.weights, self.transitions, self.factors

    def packed(self) -> Float[Tensor, "runs size"]:
        """All parameters as one vector per run."""
        return torch.cat([part.flatten(1) for part in self.parts], 1)  # (runs, size)

    def unpacked(self, vectors: Float[Tensor, "runs size"]) -> Hidden:
        """Vectors as parameters of this one's shapes."""
        shapes = [part.shape[1:] for part in self.parts]
        parts = vectors.split([math.prod(shape) for shape in shapes], 1)
        shaped = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return Hidden(*shaped)

    def probs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, transitions and factors as probabilities, rows on the simplex."""
        weights, transitions, factors = (part.softmax(-1) for part in self.parts)
        return weights, transitions, factors

    def occupancy(self) -> Float[Tensor, "runs positions rank"]:
        """Probability of every state at every position."""
        weights, transitions, _ = self.probs()
        found = [weights.unsqueeze(1)]  # (runs, 1, rank)
        for step in range(transitions.shape[1]):
            found.append(found[-1] @ transitions[:, step])  # (runs, 1, rank)
        return torch.cat(found, 1)  # (runs, positions, rank)

    def spread(self) -> Float[Tensor, "runs size"]:
        """What a step in each parameter matters: the probability of what it is about."""
        weights, transitions, factors = self.probs()
        occupancy = self.occupancy().unsqueeze(-1)  # (runs, positions, rank, 1)
        moves, tokens = transitions * occupancy[:, :-1], factors * occupancy
        return Hidden(weights, moves, tokens).packed().clamp_min(_LEAST_CURVATURE)

    def dense(self) -> Float[Tensor, "runs 1 ..."]:
        """All probabilities, (runs, 1, vocab, …, vocab)."""
        weights, transitions, factors = self.probs()
        left, right = _halves(weights, transitions, factors)
        model = left.mT @ right  # (runs, 1, sequences before the cut, sequences after it)
        return model.reshape(len(weights), 1, *(factors.shape[-1],) * factors.shape[1])


@dataclass(frozen=True)
class HiddenCounts:
    """Expected counts under the target; those of every position sum to one.

    Attributes
    ----------
    weights : (runs, rank) tensor
    transitions : (runs, steps, rank, rank) tensor
        ``N_i(y, z)``.
    factors : (runs, positions, rank, vocab) tensor
        ``C_i(z, x)``.
    kl : (runs,) tensor
        Divergence in nats of what was counted.
    """

    weights: Float[Tensor, "runs rank"]
    transitions: Float[Tensor, "runs steps rank rank2"]
    factors: Float[Tensor, "runs positions rank vocab"]
    kl: Float[Tensor, " runs"]

    def __getitem__(self, index) -> HiddenCounts:
        parts = (self.weights, self.transitions, self.factors, self.kl)
        return HiddenCounts(*(part[index] for part in parts))


def hidden_counts(
    targets: HalvedTargets, owner: Int[Tensor, " runs"], hidden: Hidden, *, with_kl: bool = True
) -> HiddenCounts:
    """The E step of every run: counts are parameters times their gradients of the log-likelihood.

    Forward ``f_i[x_1:i, z] = A_i(x_i, z) sum_y f_{i-1}[x_<i, y] T_i(z | y)`` up to the middle, the
    same backward from the end; the two halves are all that is as long as half a sequence's number
    of values.
    """
    tables = hidden.probs()
    leaves = [table.detach().requires_grad_() for table in tables]
    with torch.enable_grad():
        kl = targets.divergence(*_halves(*leaves), owner, with_value=with_kl)
    gradients = torch.autograd.grad(kl.sum(), leaves)
    counts = [-table * slope for table, slope in zip(tables, gradients, strict=True)]
    return HiddenCounts(*counts, kl.detach())


def _halves(weights: Tensor, transitions: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Up to the middle and from there on, given the middle's state: (runs, 1, rank, sequences)."""
    positions = factors.shape[1]
    cut = positions // 2
    before = weights.unsqueeze(-1) * factors[:, 0]  # (runs, rank, vocab)
    for i in range(1, cut):
        moved = transitions[:, i - 1].mT @ before  # (runs, rank, sequences)
        before = (moved.unsqueeze(-1) * factors[:, i].unsqueeze(-2)).flatten(2)
    after = factors[:, -1]  # (runs, rank, vocab)
    for i in range(positions - 2, cut - 1, -1):
        moved = transitions[:, i] @ after  # (runs, rank, sequences)
        after = (factors[:, i].unsqueeze(-1) * moved.unsqueeze(-2)).flatten(2)
    after = transitions[:, cut - 1] @ after  # (runs, rank, sequences)
    return before.unsqueeze(1), after.unsqueeze(1)
