"""What rounding may add to a law: derived from the precision and the number of operations, so that
no processor, instruction set or order of summation can break it.
"""

from __future__ import annotations

import math

import torch


def rounding(dtype: torch.dtype, size: int) -> float:
    """Largest relative error of `size` rounded operations in a row: ``n u / (1 - n u)``.

    u is half the distance from 1 to the next number. Of a sum or inner product of n terms it bounds
    the error relative to the sum of the terms' absolute values, in whatever order they are added
    and with or without fused operations (Higham, Accuracy and Stability of Numerical Algorithms,
    2002, section 3.1).

    Examples
    --------
    >>> rounding(torch.float64, 1)
    1.1102230246251568e-16
    """
    unit = size * torch.finfo(dtype).eps / 2
    if not 0 <= unit < 1:
        raise ValueError(f"{size} operations in {dtype}: nothing is left of such a sum")
    return unit / (1 - unit)


# Log-probabilities of a forward pass in double precision: no number of the models in these tests
# is the end of more than a hundred thousand operations in a row.
FORWARD = rounding(torch.float64, 100_000)

# The same fit in other company: a batch adds up in another order, and what that changes in the last
# digit grows over the passes of a fit, forty times over the first ones and ever less near its end;
# a hundred thousand times is more than any fit to a joint of some thousand entries does.
FITTED = 100_000 * rounding(torch.float64, 64)


def kl_rounding(entries: int, kl: float = 1.0) -> float:
    """Largest error of a divergence (nats) summed over `entries` pairs of float64 probabilities.

    ``sum p |log p| + p |log q|`` is twice the entropy and the divergence, so at most
    ``2 log(entries) + kl``; an error in p or q itself, here a product of some sums of up to 64
    operations in all, moves its logarithm by as much, and the p sum to one.
    """
    return (2 * math.log(entries) + kl + 1) * rounding(torch.float64, entries + 64)
