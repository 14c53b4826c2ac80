"""Windows of text in an order, with the base model's hidden states, which are computed once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_IN_MEMORY = 1 << 31  # bytes of hidden states; more are kept in a file


class KeptStates:
    """Batches of windows, each the same windows whenever it comes again, and their hidden states.

    All windows are shared out over batches by the seed, and every pass over them takes the batches
    in another order. A batch's hidden states are computed together when it comes first, so that a
    training that goes on from a checkpoint sees the same numbers; where batches come again they are
    kept, in memory or, if they are large, in a file that is gone with the process.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
    tokens : (count, length) long tensor
    rows : int
        Windows in a batch.
    seed : int
    share : slice
        Which of a batch's windows are this process's.
    steps : int or None
        Batches that will be asked for; None: nobody knows. Nothing is kept that is asked for once.

    Examples
    --------
    >>> from cpmtp.pretrained import load_language_model
    >>> lm = load_language_model("code")
    >>> states = KeptStates(lm, torch.arange(40).view(4, 10), rows=2, seed=0)
    >>> numbers, hidden, windows = states.batch(0)
    >>> len(numbers), hidden.shape[:2] == windows.shape == (2, 10)
    (2, True)
    """

    def __init__(
        self,
        lm: Any,
        tokens: Int[Tensor, "count length"],
        *,
        rows: int,
        seed: int,
        share: slice = slice(None),
        steps: int | None = None,
    ):
        self._lm, self._tokens, self._seed, self._share = lm, tokens, seed, share
        order = torch.randperm(len(tokens), generator=self._generator(-1))
        # What is left when all windows are shared out is no batch, unless nothing else is.
        self.batches = max(len(tokens) // rows, 1)
        whole = torch.arange(self.batches * rows) % len(tokens)
        self._windows = order[whole].view(self.batches, rows)  # (batches, rows)
        self._keeps = steps is None or steps > self.batches
        self._kept: Tensor | None = None
        self._has = [False] * self.batches

    def batch(
        self, step: int
    ) -> tuple[list[int], Float[Tensor, "rows length d"], Int[Tensor, "rows length"]]:
        """Numbers of the step's windows, their hidden states and their tokens."""
        pass_over, at = divmod(step, self.batches)
        order = torch.randperm(self.batches, generator=self._generator(pass_over))
        index = int(order[at])
        windows = self._windows[index][self._share]
        tokens = self._tokens[windows].long().to(self._lm.device)  # (rows, length)
        if self._kept is not None and self._has[index]:
            hidden = self._kept[index].to(self._lm.device)
        else:
            hidden = self._lm.hidden_states(tokens)  # (rows, length, d)
            self._keep(index, hidden)
        return windows.tolist(), hidden.float(), tokens

    def _keep(self, index: int, hidden: Tensor) -> None:
        if not self._keeps:
            return
        if self._kept is None:
            self._kept = _room((self.batches, *hidden.shape), hidden)
        self._kept[index].copy_(hidden)
        self._has[index] = True

    def _generator(self, pass_over: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed * 1_000_003 + pass_over + 1)


def _room(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for so much, or a file that nobody else sees."""
    size = torch.Size(shape).numel()
    if size * like.element_size() <= _IN_MEMORY:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.TemporaryDirectory() as folder:
        # The mapping outlives the file's name.
        file = str(Path(folder) / "hidden")
        return torch.from_file(file, shared=True, size=size, dtype=like.dtype).view(shape)
