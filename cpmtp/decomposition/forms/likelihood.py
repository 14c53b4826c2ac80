"""Likelihoods of models that are products of two halves: value and gradient in one walk over the
joint, with nothing of the joint's size kept for the way back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of the joint in flight: a block this large stays in a core's cache between its products.
_BLOCK = 1 << 17
# Below any probability that a float64 joint can hold to some digits; keeps 0 / 0 at 0.
_TINY = 1e-290


@dataclass(frozen=True)
class HalvedTargets:
    """Joints as stacks of matrices, rows by the tokens before a cut and columns by those after it.

    Attributes
    ----------
    matrices : (groups, stack, rows, columns) tensor
        Masses; those of one group sum to one.
    negative_entropy : (groups,) tensor
        Mean over what a group holds of ``sum P log P``.
    """

    matrices: Float[Tensor, "groups stack rows columns"]
    negative_entropy: Float[Tensor, " groups"]

    @property
    def entries(self) -> int:
        """Entries of one group: what a pass over it costs."""
        return self.matrices[0].numel()

    def divergence(
        self, left: Tensor, right: Tensor, owner: Int[Tensor, " runs"], *, with_value: bool = True
    ) -> Float[Tensor, " runs"]:
        """``KL(P || left^T right)`` of every run against its owner's joints, in nats.

        Parameters
        ----------
        left : (runs, stack, rank, rows) tensor
        right : (runs, stack, rank, columns) tensor
        owner : (runs,) long tensor
            Which group each run is compared with.
        with_value : bool
            False leaves the value NaN and the gradient as it is: a logarithm per entry of the joint
            is a quarter of the work.
        """
        likelihood = _Likelihood.apply(left, right, self.matrices, owner, with_value)
        return self.negative_entropy[owner] - likelihood  # (runs,)


class _Likelihood(torch.autograd.Function):
    """``sum P log(left^T right)``; the gradients ``right T^T`` and ``left T``, ``T = P / (left^T
    right)``, are made in the same walk and kept.
    """

    @staticmethod
    def forward(ctx, left, right, matrices, owner, with_value):
        """Fill value and gradients, run after run, in blocks."""
        left, right = left.contiguous(), right.contiguous()  # blocks of their pulls are views
        runs, stack, _, rows = left.shape
        columns = right.shape[-1]
        pulls = torch.empty_like(left), torch.zeros_like(right)
        value = left.new_full((runs, stack), 0.0 if with_value else torch.nan)

        together = max(_BLOCK // (stack * rows * columns), 1)
        for start in range(0, runs, together):
            some = slice(start, start + together)
            one = together == 1  # a view, not a copy
            probs = matrices[int(owner[start])][None] if one else matrices[owner[some]]
            parts = (left[some], right[some], probs, value[some], pulls[0][some], pulls[1][some])
            _walk(*(part.flatten(0, 1) for part in parts))  # (some * stack, …): views
        ctx.save_for_backward(*pulls)
        return value.sum(1)  # (runs,)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_value):
        """Scale what the walk kept."""
        scale = by_value[:, None, None, None]  # (runs, 1, 1, 1)
        return *(scale * pull for pull in ctx.saved_tensors), None, None, None


def _walk(
    left: Float[Tensor, "stack rank rows"],
    right: Float[Tensor, "stack rank columns"],
    probs: Float[Tensor, "stack rows columns"],
    value: Float[Tensor, " stack"],
    left_pull: Float[Tensor, "stack rank rows"],
    right_pull: Float[Tensor, "stack rank columns"],
) -> None:
    """Fill value and gradients of a stack of matrices."""
    stack, rows, columns = probs.shape
    depth = max(_BLOCK // (rows * columns), 1)
    height = max(_BLOCK // columns, 1)
    scratch = probs.new_empty(2, min(depth, stack) * min(height, rows) * columns)
    for first in range(0, stack, depth):
        for top in range(0, rows, height):
            here, some = slice(first, first + depth), slice(top, top + height)
            mass, factor = probs[here, some], left[here, :, some]
            model, quotient = (part[: mass.numel()].view(mass.shape) for part in scratch)

            torch.bmm(factor.mT, right[here], out=model).clamp_min_(_TINY)  # (depth, height, …)
            if not bool(value[here].isnan().any()):
                logs = torch.log(model, out=quotient).mul_(mass)  # (depth, height, columns)
                value[here] += logs.sum((1, 2))

            torch.div(mass, model, out=quotient)  # (depth, height, columns)
            left_pull[here, :, some] = torch.bmm(right[here], quotient.mT)  # (depth, rank, height)
            right_pull[here] += torch.bmm(factor, quotient)  # (depth, rank, columns)
