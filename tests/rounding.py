"""What rounding may add to a law: derived from the precision and the number of operations, so that
no processor, instruction set or order of summation can break it.
"""

from __future__ import annotations

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
