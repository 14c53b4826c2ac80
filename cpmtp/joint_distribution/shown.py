"""What an answer shows of itself: one short line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

_MOST = 8  # numbers of a tensor that are written out


class Shown:
    """A dataclass (``repr=False``) that shows numbers to four digits and of larger tensors the
    shape alone.

    Examples
    --------
    >>> import torch
    >>> from dataclasses import dataclass
    >>> @dataclass(repr=False)
    ... class Found(Shown):
    ...     mean: float
    ...     rows: Tensor
    >>> Found(1 / 3, torch.tensor([1.0, 0.5])), Found(2.0, torch.ones(3, 9))
    (Found(mean=0.3333, rows=[1, 0.5]), Found(mean=2, rows=tensor of (3, 9)))
    """

    def __repr__(self) -> str:
        told = [f"{f.name}={_in_short(getattr(self, f.name))}" for f in fields(self) if f.repr]  # type: ignore[arg-type]  # a dataclass
        return f"{type(self).__name__}({', '.join(told)})"


def _in_short(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.ndim > 1 or value.numel() > _MOST:
            return f"tensor of {tuple(value.shape)}"
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_in_short, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return repr(value)
