"""What defines a head and its training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from cpmtp.heads.losses import OBJECTIVES
from cpmtp.heads.shape import HeadSizes
from cpmtp.joint_distribution.habits import knows_habits

AUTO = "auto"
# After 32 steps of 2,048 positions of small models 1.6e-2 is better for every form
# (`data/studies/rates`), of a real one it was worse; 2e-3 is far behind.
LEARNING_RATE = 8e-3
PRECISIONS = (AUTO, "float32", "bfloat16")
SHAPE = (
    "form",
    "horizon",
    "rank",
    "transition_rank",
    "gated",
    "over_text",
    "anchored",
    "width",
    "blocks",
    "vocabulary",
)


def quick_precision(device: str) -> str:
    """The precision of the fastest matrix products of a kind of device.

    Examples
    --------
    >>> quick_precision("cpu") in ("bfloat16", "float32")
    True
    """
    return "bfloat16" if has_bfloat16_units(device) else "float32"


def has_bfloat16_units(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device == "cpu" and known()


@knows_habits
@dataclass(frozen=True)
class HeadTrainingSettings:
    """What defines a head and its training; equal settings give equal weights on one machine
    (unless they end by `seconds`).

    Attributes
    ----------
    form, horizon, rank, transition_rank, gated, over_text, anchored, width, blocks, vocabulary
        The head, see `DraftHead`; told the first token by default, as the drafts of a study are. A
        vocabulary that is a number: so many of the most frequent ids of the windows.
    objective : {"distillation", "likelihood", "acceptance"}
        See `head_loss`. ``acceptance`` has vanishing gradients far from the target: give
        `train_head` a head to start from.
    balance : float
        Weight of the load-balancing loss.
    steps : int
        Optimiser steps.
    positions : int, optional
        Train on this many positions (windows times tokens) instead of `steps`.
    seconds : float, optional
        Train for this long instead.
    rows, length : int
        Windows in a batch and tokens in a window.
    sequences : int
        How many windows are drawn from the base model when no data is given.
    learning_rate : float
        Peak rate of AdamW; Muon, which trains the matrices of trunk and maps, takes twice as much.
        Linear warm-up over 30 steps or a tenth of them, constant, and linear decay to zero
        over the second half.
    precision : {"auto", "float32", "bfloat16"}
        Of the head's matrix products; weights, losses and probabilities stay in float32. ``auto``:
        bfloat16 where the device has units for it, see `quick_precision`; the recipe says which.
    seed : int
        Of weights, samples and the order of windows.
    """

    form: str = "cp"
    horizon: int = 4
    rank: int | None = None
    transition_rank: int | None = None
    gated: bool = True
    over_text: bool = False
    anchored: bool = True
    width: int | None = None
    blocks: int = 1
    vocabulary: tuple[int, ...] | int | None = None
    objective: str = "distillation"
    balance: float = 0.0
    steps: int = 500
    positions: int | None = None
    seconds: float | None = None
    rows: int = 8
    length: int = 256
    sequences: int = 1024
    learning_rate: float = LEARNING_RATE
    precision: str = AUTO
    seed: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.objective!r}: choose one of {', '.join(OBJECTIVES)}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}"
            )
        _ = self.sizes  # refuses what is out of range
        for name in ("steps", "positions", "rows", "sequences", "vocabulary", "width"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds {self.seconds}: expected a positive number")
        if not self.learning_rate > 0:
            raise ValueError(f"learning rate {self.learning_rate}: expected a positive number")
        if self.length <= self.horizon:
            raise ValueError(
                f"windows of {self.length} tokens for a horizon of {self.horizon}: lengthen them"
            )

    def on(self, device: str) -> HeadTrainingSettings:
        """The same with the precision that is trained in on a kind of device.

        Examples
        --------
        >>> HeadTrainingSettings(precision="float32").on("cpu").precision
        'float32'
        """
        if self.precision != AUTO:
            return self
        return replace(self, precision=quick_precision(device))

    @property
    def sizes(self) -> HeadSizes:
        """The head's, with the form's own defaults."""
        own = (self.form, self.horizon, self.rank, self.transition_rank)
        return HeadSizes.of(*own, blocks=self.blocks)

    @property
    def planned_steps(self) -> int:
        """Optimiser steps, of `positions` or as they are.

        Examples
        --------
        >>> HeadTrainingSettings(positions=2_000_000, rows=8, length=250).planned_steps
        1000
        """
        if self.positions is None:
            return self.steps
        return math.ceil(self.positions / (self.rows * self.length))

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        steps = 300 if self.seconds is not None else self.planned_steps
        return max(min(30, steps // 10), 1)
