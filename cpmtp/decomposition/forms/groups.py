"""What is fitted together: joints that share the factors of their transitions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.forms.likelihood import HalvedTargets
from cpmtp.decomposition.restarts import Items, noticeable_tokens
from cpmtp.decomposition.starts import stacked_marginals
from cpmtp.joint_distribution import JointDistribution
from cpmtp.sampling_law import entropy


@dataclass(frozen=True)
class Groups:
    """Groups of joints: one joint each, or the continuations of one joint's first tokens.

    Attributes
    ----------
    probs : (groups, members, vocab, …, vocab) tensor
        Every member sums to one.
    mass : (groups, members) tensor
        What each member counts for; sums to one over a group.
    """

    probs: Float[Tensor, "groups members ..."]
    mass: Float[Tensor, "groups members"]

    @property
    def positions(self) -> int:
        """Number of modelled tokens."""
        return self.probs.ndim - 2

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.probs.shape[-1]

    @cached_property
    def joint(self) -> JointDistribution:
        """All members along one batch axis."""
        # (groups * members, vocab, …)
        return JointDistribution(self.probs.flatten(0, 1), self.positions)

    @cached_property
    def items(self) -> Items:
        """The members by themselves."""
        return Items(self.joint)

    @cached_property
    def marginals(self) -> Float[Tensor, "groups members positions vocab"]:
        """The distribution of every position."""
        return stacked_marginals(self.joint).unflatten(0, self.mass.shape)

    @cached_property
    def pairs(self) -> Float[Tensor, "groups members steps vocab vocab"]:
        """The distribution of every pair of neighbours, times the member's mass."""
        axes, found = range(2, self.probs.ndim), []
        for i in range(self.positions - 1):
            others = [axis for axis in axes if axis not in (i + 2, i + 3)]
            found.append(self.probs.sum(others) if others else self.probs)  # (…, vocab, vocab)
        shape = (*self.mass.shape, 0, self.vocab, self.vocab)
        stacked = torch.stack(found, 2) if found else self.probs.new_empty(shape)
        return stacked * self.mass[:, :, None, None, None]  # (groups, members, steps, vocab, vocab)

    def neighbour_laws(self) -> tuple[Tensor, Tensor]:
        """The distribution of neighbours, all members together, and what it would be if those of
        each member were independent: (groups, steps, vocab, vocab) each.
        """
        weighted = self.mass[..., None, None] * self.marginals  # (groups, members, positions, …)
        apart = torch.einsum("gmiu,gmiv->giuv", weighted[:, :, :-1], self.marginals[:, :, 1:])
        return self.pairs.sum(1), apart

    @cached_property
    def negative_entropy(self) -> Float[Tensor, " groups"]:
        """Mean of the members' ``sum P log P``."""
        return -(self.mass * self.joint.entropy().reshape(self.mass.shape)).sum(1)  # (groups,)

    @cached_property
    def chain_floor(self) -> Float[Tensor, " groups"]:
        """What no chain of one component is below, in nats: of a single member the divergence of
        its conditionals ``sum_i I(x_{i+1}; x_{<i} | x_i)``, of several zero.
        """
        if self.mass.shape[1] > 1:
            return torch.zeros_like(self.mass[:, 0])
        singles = entropy(self.marginals[:, 0])  # (groups, positions)
        pairs = entropy(self.pairs[:, 0].flatten(-2))  # (groups, steps)
        chain = pairs.sum(1) - singles[:, 1:-1].sum(1)  # (groups,)
        chain = singles[:, 0] if self.positions == 1 else chain
        return (self.negative_entropy + chain).clamp_min(0.0)

    @cached_property
    def targets(self) -> HalvedTargets:
        """The joints cut at a middle token: one matrix for each of its values."""
        middle = (self.positions - 1) // 2
        weighted = self.probs * self.mass.view(*self.mass.shape, *(1,) * self.positions)
        moved = weighted.movedim(2 + middle, 2)  # (groups, members, middle token, …)
        shape = (
            len(self.mass),
            -1,
            self.vocab**middle,
            self.vocab ** (self.positions - 1 - middle),
        )
        return HalvedTargets(moved.reshape(shape), self.negative_entropy)  # (…, rows, columns)

    def __getitem__(self, index) -> Groups:
        return Groups(self.probs[index], self.mass[index])

    @cached_property
    def noticeable(self) -> Int[Tensor, " kept"]:
        """The tokens that a fit of a single group is begun on."""
        marginals = (self.mass[0, :, None, None] * self.marginals[0]).sum(0)  # (positions, vocab)
        return noticeable_tokens(marginals, -self.negative_entropy[0])

    def narrowed(self, tokens: Int[Tensor, " kept"]) -> Groups:
        """The same over some of the tokens only; a member without mass on them counts nothing."""
        kept = self.probs
        for axis in range(2, self.probs.ndim):
            kept = kept.index_select(axis, tokens)  # (groups, members, kept, …, vocab, …)
        axes = tuple(range(2, kept.ndim))
        total = kept.sum(axes, keepdim=True)  # (groups, members, 1, …)
        empty = total <= 0
        law = torch.where(empty, 1 / kept[0, 0].numel(), kept / torch.where(empty, 1.0, total))
        mass = self.mass * total.reshape(self.mass.shape)  # (groups, members)
        return Groups(law, mass / mass.sum(1, keepdim=True))
