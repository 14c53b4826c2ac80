"""What a validation runs, at two sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    bases : tuple of BasePlan
        The first is decoded with; the last has a vocabulary small enough for dense joints. They may
        be the same.
    horizons, ranks : tuple of int
        Of the heads, each unanchored and anchored.
    head_width, head_blocks : int
        Their trunk.
    head_seconds : float, optional
        Time for distillation, and half of it again for acceptance, all heads of a base side by
        side; None: `head_steps`.
    windows, window : int
        Windows of text for the heads, as many again drawn from the base model; tokens in each.
    prompts, prompt, new_tokens : int
        Held-out prompts for the forecast, and as many others for decoding; their tokens; tokens
        generated after each.
    batches : tuple of int
    temperatures : tuple of float
    rounds : int
        How often every way of decoding takes its turn.
    widths : tuple of int
        Hidden sizes (multiples of 96) at which the head's share of a cycle is timed, with random
        weights.
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


_TINY = Preset(
    name="tiny",
    device="cpu",
    dtype="float32",
    bases=(BasePlan("code"),),
    horizons=(3, 4),
    ranks=(1, 4),
    head_width=96,
    head_blocks=1,
    head_steps=12,
    head_seconds=None,
    windows=16,
    window=64,
    rows=4,
    prompts=6,
    prompt=24,
    new_tokens=24,
    batches=(1, 4),
    temperatures=(0.0, 1.0),
    rounds=1,
    widths=(96, 288),
    width_layers=2,
    law_rows=300,
    law_seeds=1,
)

_GPU = Preset(
    name="gpu",
    device="cuda",
    dtype="bfloat16",
    bases=(
        BasePlan(
            "code-bpe",
            vocab_size=4096,
            training=BaseTrainingSettings(
                windows_per_step=64,
                width=768,
                layers=8,
                learning_rate=2e-3,
                seconds=300.0,
                bfloat16=True,
                compiled=True,
            ),
            corpus_bytes=150_000_000,
            held_out_bytes=1_000_000,
        ),
        BasePlan(
            "code-bytes",
            vocab_size=257,
            training=BaseTrainingSettings(
                windows_per_step=64,
                width=768,
                layers=8,
                learning_rate=2e-3,
                seconds=80.0,
                bfloat16=True,
                compiled=True,
            ),
            corpus_bytes=60_000_000,
            held_out_bytes=500_000,
        ),
    ),
    horizons=(4, 8),
    ranks=(1, 4, 16),
    head_width=256,
    head_blocks=2,
    head_steps=0,
    head_seconds=120.0,
    windows=4096,
    window=256,
    rows=16,
    prompts=64,
    prompt=64,
    new_tokens=128,
    batches=(1, 8),
    temperatures=(0.0, 0.7, 1.0),
    rounds=3,
    widths=(576, 1152, 2304, 4032),
    width_layers=8,
    law_rows=4000,
    law_seeds=20,
)

PRESETS = {preset.name: preset for preset in (_TINY, _GPU)}
