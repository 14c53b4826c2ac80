"""What a validation runs, at two sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cpmtp.pretrained.loading import usable_dtype
from cpmtp.training.base_models import BaseTrainingSettings


@dataclass(frozen=True)
class BasePlan:
    """A base model: an embedded one by its name, or one to be trained on the Python sources of this
    machine.

    Attributes
    ----------
    name : str
    vocab_size : int
        Of the byte-level tokenizer to train; 257 is bytes alone. 0: the embedded model of this
        name.
    training : BaseTrainingSettings
    corpus_bytes, held_out_bytes : int
        Text to train on, and text of packages never trained on to measure it by.
    """

    name: str
    vocab_size: int = 0
    training: BaseTrainingSettings = field(default_factory=BaseTrainingSettings)
    corpus_bytes: int = 0
    held_out_bytes: int = 0


@dataclass(frozen=True)
class Preset:
    """Sizes and budgets of a validation.

    Attributes
    ----------
    name : str
    device, dtype : str
        Where base models and heads run, and the base models' precision; heads are trained in
        float32.
    bases : tuple of BasePlan
        The first is decoded with; the last has a vocabulary small enough for dense joints. They may
        be the same.
    horizons, ranks : tuple of int
        Of the heads, each unanchored and anchored.
    head_width, head_blocks : int
        Their trunk.
    head_steps : int
        Optimiser steps of distillation, and as many again for acceptance; not read where
        `head_seconds` is given.
    head_seconds : float, optional
        Time for distillation, and half of it again for acceptance, all heads of a base side by
        side; None: `head_steps`.
    windows, window : int
        Windows of text for the heads, as many again drawn from the base model; tokens in each.
    rows : int
        Windows in a batch of the heads' training.
    prompts, prompt, new_tokens : int
        Held-out prompts for the forecast, and as many others for decoding; their tokens; tokens
        generated after each.
    batches : tuple of int
        Prompts decoded together.
    temperatures : tuple of float
        Of the forecasts and of decoding.
    rounds : int
        How often every way of decoding takes its turn.
    widths : tuple of int
        Hidden sizes (multiples of 96) at which the head's share of a cycle is timed, with random
        weights.
    width_layers : int
        Transformer blocks of these models.
    law_rows, law_seeds : int
        Texts per test of the output's law, and tests.
    """

    name: str
    device: str
    dtype: str
    bases: tuple[BasePlan, ...]
    horizons: tuple[int, ...]
    ranks: tuple[int, ...]
    head_width: int
    head_blocks: int
    head_steps: int
    head_seconds: float | None
    windows: int
    window: int
    rows: int
    prompts: int
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    rounds: int
    widths: tuple[int, ...]
    width_layers: int
    law_rows: int
    law_seeds: int

    def on(self, device: str | None, dtype: str | None) -> Preset:
        """The same elsewhere or in another precision; None: as it is.

        Raises
        ------
        ValueError
            If a forward pass cannot run in this precision.
        """
        chosen = self.dtype if dtype is None else str(usable_dtype(dtype)).removeprefix("torch.")
        return replace(self, device=device or self.device, dtype=chosen)


_LARGE = BaseTrainingSettings(
    windows_per_step=64,
    width=768,
    layers=8,
    learning_rate=2e-3,
    seconds=300.0,
    bfloat16=True,
    compiled=True,
)
_SUBWORDS = BasePlan("code-bpe", 4096, _LARGE, corpus_bytes=150_000_000, held_out_bytes=1_000_000)
_BYTES = BasePlan(
    "code-bytes",
    257,
    replace(_LARGE, seconds=80.0),
    corpus_bytes=60_000_000,
    held_out_bytes=500_000,
)

# Every field at both sizes.
_SIZES: dict[str, tuple[Any, Any]] = {
    "name": ("tiny", "gpu"),
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "bases": ((BasePlan("code"),), (_SUBWORDS, _BYTES)),
    "horizons": ((3, 4), (4, 8)),
    "ranks": ((1, 4), (1, 4, 16)),
    "head_width": (96, 256),
    "head_blocks": (1, 2),
    "head_steps": (12, 0),
    "head_seconds": (None, 120.0),
    "windows": (16, 4096),
    "window": (64, 256),
    "rows": (4, 16),
    "prompts": (6, 64),
    "prompt": (24, 64),
    "new_tokens": (24, 128),
    "batches": ((1, 4), (1, 8)),
    "temperatures": ((0.0, 1.0), (0.0, 0.7, 1.0)),
    "rounds": (1, 3),
    "widths": ((96, 288), (576, 1152, 2304, 4032)),
    "width_layers": (2, 8),
    "law_rows": (300, 4000),
    "law_seeds": (1, 20),
}

PRESETS = {
    preset.name: preset
    for preset in (Preset(**{name: sizes[k] for name, sizes in _SIZES.items()}) for k in (0, 1))
}
