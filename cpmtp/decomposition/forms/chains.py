"""Many mixtures of Markov chains at once: tables, expected counts, softmax regressions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.decomposition.trees.neighbours import TreeGroups

# Logits of a start's zeros: probability e^-40, from where a gradient can still bring them back.
LOWEST_LOGIT = -40.0
# Logits of tokens that a position never has: their probability is zero in any precision, and stays.
IMPOSSIBLE = -1e4
# Rarer tokens are treated like those of this probability: their curvature says nothing about a
# whole step.
LEAST_CURVATURE = 1e-8
# A product's curvature in one factor vanishes with the other: it is taken for at least this.
LEAST_SPREAD = 1e-2

PER_MEMBER = ("weights", "logits")
TRANSITIONS = ("left", "right")


@dataclass(frozen=True)
class Chains:
    """Parameters of many mixtures of Markov chains; a run's members share left and right factors.

    Attributes
    ----------
    weights : (runs, members, rank) tensor
        Logarithms, up to a constant.
    logits : (runs, members, positions, rank, vocab) tensor
    gate : (runs, members, steps, width) tensor
    left : (runs, steps, vocab, width) tensor
    right : (runs, steps, width, vocab) tensor
        Step i goes from position i to position i + 1. Of trees they are over the tokens that occur,
        and logits over the places of each tree's own support.
    """

    weights: Float[Tensor, "runs members rank"]
    logits: Float[Tensor, "runs members positions rank vocab"]
    gate: Float[Tensor, "runs members steps width"]
    left: Float[Tensor, "runs steps tokens width"]
    right: Float[Tensor, "runs steps width tokens"]

    def __getitem__(self, index) -> Chains:
        return Chains(
            self.weights[index],
            self.logits[index],
            self.gate[index],
            self.left[index],
            self.right[index],
        )

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.weights.shape[-1]

    @classmethod
    def joined(cls, parts: list[Chains]) -> Chains:
        """All runs of several, one after another."""
        names = ("weights", "logits", "gate", "left", "right")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def packed(self, free: tuple[str, ...]) -> Float[Tensor, "runs size"]:
        """The named parts as one vector per run."""
        return torch.cat([getattr(self, name).flatten(1) for name in free], 1)  # (runs, size)

    def unpacked(self, vectors: Float[Tensor, "runs size"], free: tuple[str, ...]) -> Chains:
        """A copy with the named parts taken from vectors."""
        shapes = [getattr(self, name).shape[1:] for name in free]
        parts = vectors.split([math.prod(shape) for shape in shapes], 1)
        shaped = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return replace(self, **dict(zip(free, shaped, strict=True)))

    def corrections(self) -> Float[Tensor, "runs members steps vocab vocab"]:
        """``<L_i[u] * g_i, R_i[v]>``."""
        gated = self.left[:, None] * self.gate.unsqueeze(-2)  # (…, steps, vocab, width)
        return gated @ self.right[:, None]  # (runs, members, steps, vocab, vocab)

    def first_tables(self) -> Float[Tensor, "runs members rank vocab"]:
        """Log-probabilities of the first token in every component."""
        return self.logits[:, :, 0].log_softmax(-1)

    def later_tables(self) -> Float[Tensor, "runs members steps rank vocab vocab"]:
        """Log-probabilities of every later token given its neighbour, in every component."""
        logits = self.logits[:, :, 1:].unsqueeze(-2)  # (…, steps, rank, 1, vocab)
        return (logits + self.corrections().unsqueeze(-3)).log_softmax(-1)

    def dense(self) -> Float[Tensor, "runs members ..."]:
        """All probabilities, (runs, members, vocab, …, vocab)."""
        first, later = self.first_tables().exp(), self.later_tables().exp()
        left, right = _halves(self.weights.softmax(-1), first, later)
        model = left.mT @ right  # (runs, members * vocab, tokens before, tokens after)
        positions, vocab = self.logits.shape[2], self.logits.shape[-1]
        shape = (*self.weights.shape[:2], *(vocab,) * positions)
        return model.reshape(shape).movedim(2, 2 + (positions - 1) // 2)

    def of_members(self, members: slice) -> Chains:
        """Some members of every run."""
        weights, logits, gate = self.weights, self.logits, self.gate
        return replace(
            self, weights=weights[:, members], logits=logits[:, members], gate=gate[:, members]
        )


@dataclass(frozen=True)
class ChainCounts:
    """Expected counts under the target, those of a run's members by their masses.

    Attributes
    ----------
    weights : (runs, members, rank) tensor
        ``E_P[Q(a | x)]``.
    first : (runs, members, rank, vocab) tensor
        ``E_P[Q(a | x) 1(x_1 = v)]``.
    pairs : (runs, members, steps, rank, vocab, vocab) tensor
        ``E_P[Q(a | x) 1(x_i = u, x_{i+1} = v)]``.
    kl : (runs,) tensor
        Divergence in nats of the chains that were counted.
    """

    weights: Float[Tensor, "runs members rank"]
    first: Float[Tensor, "runs members rank vocab"]
    pairs: Float[Tensor, "runs members steps rank vocab vocab"]
    kl: Float[Tensor, " runs"]

    def of_members(self, members: slice) -> ChainCounts:
        """Some members of every run."""
        weights, first, pairs = self.weights, self.first, self.pairs
        return replace(
            self, weights=weights[:, members], first=first[:, members], pairs=pairs[:, members]
        )

    def __getitem__(self, index) -> ChainCounts:
        return ChainCounts(
            self.weights[index], self.first[index], self.pairs[index], self.kl[index]
        )


def chain_counts(
    groups: Groups, owner: Int[Tensor, " runs"], chains: Chains, *, with_kl: bool = True
) -> ChainCounts:
    """The E step of every run: counts are tables times their gradients of the log-likelihood.

    The joint is cut at a middle token b: of the tokens before it and those after it, given b and
    the component, each half is a small table, and for every b the model is a product of two
    matrices of the rank's width (see `HalvedTargets`).
    """
    tables = (
        chains.weights.softmax(-1),  # (runs, members, rank)
        chains.first_tables().exp(),  # (runs, members, rank, vocab)
        chains.later_tables().exp(),  # (runs, members, steps, rank, vocab, vocab)
    )
    if chains.rank == 1:
        return _counts_of_one(groups, owner, tables)
    leaves = [table.detach().requires_grad_() for table in tables]
    with torch.enable_grad():
        kl = groups.targets.divergence(*_halves(*leaves), owner, with_value=with_kl)
    gradients = torch.autograd.grad(kl.sum(), leaves, allow_unused=True, materialize_grads=True)
    found = (-table * slope for table, slope in zip(tables, gradients, strict=True))
    weights, first, pairs = found
    return ChainCounts(weights, first, pairs, kl.detach())


def _counts_of_one(groups: Groups, owner: Tensor, tables: tuple[Tensor, ...]) -> ChainCounts:
    """Of one component: the target's own distributions of neighbours, whatever the chain is."""
    mass, pairs = groups.mass[owner], groups.pairs[owner].unsqueeze(3)
    first = (mass[..., None] * groups.marginals[owner][:, :, 0]).unsqueeze(2)  # (…, 1, vocab)
    _, starts, steps = tables
    cross = -(first * starts.clamp_min(1e-290).log()).flatten(1).sum(1)  # (runs,)
    cross = cross - (pairs * steps.clamp_min(1e-290).log()).flatten(1).sum(1)
    # mass (runs, 1)
    return ChainCounts(mass.unsqueeze(-1), first, pairs, groups.negative_entropy[owner] + cross)


def _halves(weights: Tensor, first: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens up to the middle one and those after it: (runs, members * vocab, rank, sequences)."""
    steps, vocab = later.shape[2], first.shape[-1]
    middle = steps // 2
    before = (weights.unsqueeze(-1) * first).unsqueeze(-2)  # (runs, members, rank, 1, vocab)
    for step in range(middle):
        table = later[:, :, step].unsqueeze(3)  # (runs, members, rank, 1, vocab, vocab)
        before = (before.unsqueeze(-1) * table).flatten(3, 4)  # (…, sequences, vocab)
    after = first.new_ones(*first.shape[:3], vocab, 1, 1)  # (…, middle token, sequences, last)
    if steps:
        after = later[:, :, middle].unsqueeze(4)  # (runs, members, rank, middle token, 1, last)
    for step in range(middle + 1, steps):
        table = later[:, :, step].unsqueeze(3).unsqueeze(4)  # (…, rank, 1, 1, vocab, vocab)
        after = (after.unsqueeze(-1) * table).flatten(4, 5)  # (…, middle token, sequences, last)
    left = before.movedim(-1, 2)  # (runs, members, middle token, rank, sequences)
    right = after.flatten(4).movedim(3, 2)  # (runs, members, middle token, rank, sequences)
    return left.flatten(1, 2), right.flatten(1, 2)


def surprise(counts: ChainCounts, chains: Chains) -> tuple[Float[Tensor, " runs"], Chains]:
    """``-sum counts log table``, what an M step lowers, and its gradient in all parameters.

    Where the counts are those of the chains themselves, the gradient is the divergence's.
    """
    weights, first = chains.weights.log_softmax(-1), chains.first_tables()
    value = -(counts.weights * weights).flatten(1).sum(1)  # (runs,)
    value = value - (counts.first * first).flatten(1).sum(1)
    by_weights = _excess(counts.weights, weights)
    by_first = _excess(counts.first, first)  # (runs, members, rank, vocab)
    of_later, by_later, by_corrections = _later_surprise(counts.pairs, chains)
    by_logits = torch.cat([by_first.unsqueeze(2), by_later], 2)  # (…, positions, rank, vocab)
    by_gate, by_left, by_right = _by_factors(by_corrections, chains)
    return value + of_later, Chains(by_weights, by_logits, by_gate, by_left, by_right)


def _later_surprise(pairs: Tensor, chains: Chains) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tokens but the first, with its gradients in their logits and in the corrections.

    Components share the corrections: one exponential for each pair of tokens and products of
    matrices stand in for a table per component.
    """
    before, after = pairs.sum(-1), pairs.sum(-2)  # (runs, members, steps, rank, vocab) each
    pooled = pairs.sum(3) if chains.rank > 1 else pairs[:, :, :, 0]  # (…, steps, vocab, vocab)
    logits = chains.logits[:, :, 1:]  # (runs, members, steps, rank, vocab)
    corrections = chains.corrections()  # (runs, members, steps, vocab, vocab)
    corrections -= corrections.amax(-1, keepdim=True)
    top = logits.amax(-1, keepdim=True)  # (…, rank, 1)

    odds, factors = (logits - top).exp(), corrections.exp()
    total = (odds @ factors.mT).clamp_min(1e-300)  # (…, rank, vocab): by the token before
    gained = (after * logits).flatten(1).sum(1)  # (runs,)
    gained = gained + (pooled.flatten(1)[:, None] @ corrections.flatten(1)[..., None]).flatten()
    value = (before * (total.log() + top)).flatten(1).sum(1) - gained

    share = before / total  # (…, rank, vocab)
    by_later = odds * (share @ factors) - after  # (…, rank, vocab)
    by_corrections = (share.mT @ odds).mul_(factors).sub_(pooled)  # (…, vocab, vocab)
    return value, by_later, by_corrections


def _excess(counts: Tensor, log_probs: Tensor) -> Tensor:
    """Gradient of ``-sum counts log softmax`` in the logits."""
    return counts.sum(-1, keepdim=True) * log_probs.exp() - counts


def _by_factors(by_correction: Tensor, chains: Chains) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in gates, left and right factors from those in their products."""
    left, right = chains.left[:, None], chains.right[:, None]  # (runs, 1, steps, …)
    pulled = by_correction @ right.mT  # (runs, members, steps, vocab, width)
    by_gate = (pulled * left).sum(-2)  # (runs, members, steps, width)
    gate = chains.gate.unsqueeze(-2)  # (runs, members, steps, 1, width)
    by_left = (pulled * gate).sum(1)  # (runs, steps, vocab, width)
    by_right = ((left * gate).mT @ by_correction).sum(1)  # (runs, steps, width, vocab)
    return by_gate, by_left, by_right


def chain_curvature(groups: Groups, owner: Tensor, chains: Chains) -> Chains:
    """A positive guess at the diagonal of the surprise's Hessian, one number per parameter."""
    mass = groups.mass[owner]  # (runs, members)
    weights = mass.unsqueeze(-1) * chains.weights.softmax(-1)  # (runs, members, rank)
    marginals = groups.marginals[owner]  # (runs, members, positions, vocab)
    tokens = (chains.logits.softmax(-1) + marginals.unsqueeze(3)) / 2
    logits = weights[:, :, None, :, None] * tokens  # (runs, members, positions, rank, vocab)

    weighted = mass[..., None, None] * marginals  # (runs, members, positions, vocab)
    before, after = weighted[:, :, :-1], marginals[:, :, 1:]  # (runs, members, steps, vocab)
    gates, left, right = chains.gate.square(), chains.left.square(), chains.right.square()
    to = (right[:, None] * after.unsqueeze(-2)).sum(-1)  # (runs, members, steps, width)
    of = (left[:, None] * before.unsqueeze(-1)).sum(-2)  # (runs, members, steps, width)
    by_left = (gates * to + LEAST_SPREAD).unsqueeze(-2) * before.unsqueeze(-1)
    by_right = gates * of + LEAST_SPREAD * mass[..., None, None]  # (…, steps, width)
    by_right = by_right.unsqueeze(-1) * after.unsqueeze(-2)  # (runs, members, steps, width, vocab)
    parts = (weights, logits, of * to, by_left.sum(1), by_right.sum(1))
    return Chains(*(part.clamp_min(LEAST_CURVATURE) for part in parts))


def chains_of(mixtures: Mixtures, groups: Groups | TreeGroups, owner: Tensor, width: int) -> Chains:
    """CP distributions, one per member and run, as chains whose left factors are zero.

    Their right factors are zero too: what they should be is the caller's to say.
    """
    members = groups.mass.shape[1]
    possible = groups.marginals[owner].unsqueeze(3) > 0  # (runs, members, positions, 1, vocab)
    factors = mixtures.factors.unflatten(0, (-1, members))  # (…, positions, rank, vocab)
    logits = factors.clamp_min(math.exp(LOWEST_LOGIT)).log()
    logits = torch.where(possible, logits, IMPOSSIBLE)  # (runs, members, positions, rank, vocab)
    weights = mixtures.weights.unflatten(0, (-1, members))  # (runs, members, rank)
    weights = weights.clamp_min(math.exp(LOWEST_LOGIT)).log()

    steps, vocab = groups.positions - 1, groups.vocab
    gate = logits.new_ones(len(weights), members, steps, width)
    left = logits.new_zeros(len(weights), steps, vocab, width)
    return Chains(weights, logits, gate, left, left.mT.contiguous())
