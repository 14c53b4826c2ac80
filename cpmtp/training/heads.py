"""Training of learned heads on a frozen base model: one pass of the base serves all heads of a
comparison.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.losses import OBJECTIVES, HeadLoss, head_loss
from cpmtp.language_model import sample_sequences
from cpmtp.training.checkpoints import load_checkpoint, save_checkpoint
from cpmtp.training.muon import Muon
from cpmtp.whole_files import write_tensors, write_text

_SAMPLED_AT_ONCE = 128


@dataclass(frozen=True)
class HeadTrainingSettings:
    """What defines a head and its training; equal settings give equal weights on one machine (with
    `steps`).

    Attributes
    ----------
    horizon, rank, anchored, width, blocks
        The head, see `CPHead`; told the first token by default, as the drafts of a study are.
    objective : {"distillation", "likelihood", "acceptance"}
        See `head_loss`. ``acceptance`` has vanishing gradients far from the target: give
        `train_head` a head to start from.
    balance : float
        Weight of the load-balancing loss.
    steps : int
        Optimiser steps.
    seconds : float, optional
        Train for this long instead of for `steps`.
    rows, length : int
        Windows in a batch and tokens in a window.
    sequences : int
        How many windows are drawn from the base model when no data is given.
    learning_rate : float
        Peak rate of AdamW; Muon, which trains the trunk's matrices, takes twice as much. Linear
        warm-up, constant, and linear decay to zero over the second half.
    seed : int
        Of weights, samples and the order of windows.
    """

    horizon: int = 4
    rank: int = 8
    anchored: bool = True
    width: int | None = None
    blocks: int = 1
    objective: str = "distillation"
    balance: float = 0.0
    steps: int = 500
    seconds: float | None = None
    rows: int = 8
    length: int = 256
    sequences: int = 1024
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.objective!r}: choose one of {', '.join(OBJECTIVES)}"
            )
        for name in ("steps", "rows", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds {self.seconds}: expected a positive number")
        if not self.learning_rate > 0:
            raise ValueError(f"learning rate {self.learning_rate}: expected a positive number")
        if self.length <= self.horizon:
            raise ValueError(
                f"windows of {self.length} tokens for a horizon of {self.horizon}: lengthen them"
            )


def train_head(
    lm: Any,
    settings: HeadTrainingSettings = HeadTrainingSettings(),
    *,
    out: str | Path | None = None,
    tokens: Int[Tensor, "count length"] | None = None,
    start: CPHead | None = None,
    callback: Callable[[int, HeadLoss], None] | None = None,
    checkpoint_seconds: float = 60.0,
    **changes: Any,
) -> CPHead:
    """Train a head for a base model, whose weights stay as they are.

    Under ``accelerate launch`` the windows of a batch are shared out over the processes.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
        The base model.
    settings : HeadTrainingSettings
    out : path, optional
        Folder for the head, `metrics.csv` and, while training, the checkpoint; a killed run started
        again with the same folder goes on from there, to the same weights.
    tokens : (count, length) long tensor, optional
        Windows of text; default: drawn from the base model itself, which is what decoding meets.
    start : CPHead, optional
        Begin with its weights.
    callback : callable, optional
        Called with (step, HeadLoss) after every step.
    changes
        Fields of the settings to replace, as in
        ``train_head(lm, horizon=4, rank=8, steps=500, seed=0)``.

    Raises
    ------
    ValueError
        If a setting is out of range, a window exceeds the model's, a checkpoint is of other
        settings, or the loss is not finite (the last checkpoint is kept).
    """
    folders = None if out is None else [Path(out)]
    return train_heads(
        lm,
        [replace(settings, **changes)],
        folders,
        tokens=tokens,
        starts=None if start is None else [start],
        callback=callback and (lambda _, step, loss: callback(step, loss)),
        checkpoint_seconds=checkpoint_seconds,
    )[0]


def train_heads(
    lm: Any,
    settings: Sequence[HeadTrainingSettings],
    folders: Sequence[Path] | None = None,
    *,
    tokens: Int[Tensor, "count length"] | None = None,
    starts: Sequence[CPHead] | None = None,
    callback: Callable[[int, int, HeadLoss], None] | None = None,
    checkpoint_seconds: float = 60.0,
) -> list[CPHead]:
    """Several heads side by side on the same windows in the same order; parameters as for
    `train_head`.

    The settings may differ in what describes a head and its loss, not in the data or the budget.
    `callback` gets the head's index first.
    """
    settings = list(settings)
    plan = settings[0]
    shared = ("steps", "seconds", "rows", "length", "sequences", "seed")
    if any(getattr(s, name) != getattr(plan, name) for s in settings for name in shared):
        raise ValueError(
            f"heads trained side by side share {', '.join(shared)}: train the others apart"
        )
    _check_window(lm, plan)
    accelerator = Accelerator(cpu=lm.device.type == "cpu")
    for folder in folders or ():
        folder.mkdir(parents=True, exist_ok=True)
    if tokens is None:
        tokens = _own_samples(lm, plan, folders[0] if folders else None)
    runs = [
        _HeadRun(
            lm,
            s,
            folders[i] if folders else None,
            accelerator,
            start=starts[i] if starts else None,
            data=tokens,
        )
        for i, s in enumerate(settings)
    ]
    _train(lm, runs, tokens, plan, accelerator, callback, checkpoint_seconds)
    return [run.finish() for run in runs]


def windows_of_text(lm: Any, texts: Sequence[str], length: int) -> Int[Tensor, "count length"]:
    """Texts cut into windows of `length` tokens; what is left at a text's end is dropped."""
    parts = [
        ids[: len(ids) // length * length].view(-1, length)
        for ids in map(lm.encode_document, texts)
    ]
    windows = torch.cat(parts) if parts else torch.empty(0, length, dtype=torch.long)
    if not len(windows):
        raise ValueError(f"no text is {length} tokens long: give longer files or shorter windows")
    return windows


class _Objective(nn.Module):
    """The loss as a module's forward pass, which is what data-parallel wrappers hook into."""

    def __init__(self, head: CPHead, settings: HeadTrainingSettings):
        super().__init__()
        self.head, self._settings = head, settings

    def forward(
        self, hidden: Tensor, tokens: Tensor, unembed: Callable[[Tensor], Tensor]
    ) -> HeadLoss:
        goal = self._settings
        return head_loss(
            self.head, hidden, tokens, unembed, objective=goal.objective, balance=goal.balance
        )


class _HeadRun:
    """One head under training, and where it is on disk."""

    def __init__(
        self,
        lm,
        settings: HeadTrainingSettings,
        folder: Path | None,
        accelerator,
        *,
        start,
        data: Tensor,
    ):
        self.head = _new_head(lm, settings)
        if start is not None:
            self.head.load_state_dict(start.state_dict())
        self.settings, self.folder, self.accelerator = settings, folder, accelerator
        self.optimisers = _optimisers(self.head, settings.learning_rate)
        self.step, self.seconds, self.metrics = 0, 0.0, ["step,seconds,loss,tokens_per_call"]
        self._key = _resume_key(lm, settings, data)
        if self._checkpoint and self._checkpoint.exists():
            self._load(self._checkpoint)
        self.objective, *self.optimisers = accelerator.prepare(
            _Objective(self.head, settings), *self.optimisers
        )

    @property
    def _checkpoint(self) -> Path | None:
        return self.folder and self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        if self._checkpoint and self.accelerator.is_main_process:
            metadata = {"step": str(self.step), "seconds": str(self.seconds), "key": self._key}
            metadata["metrics"] = "\n".join(self.metrics)
            save_checkpoint(self._checkpoint, self.head.state_dict(), self.optimisers, metadata)

    def _load(self, checkpoint: Path) -> None:
        weights, metadata = load_checkpoint(checkpoint, self._key, self.optimisers)
        self.head.load_state_dict(weights)
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.metrics = metadata["metrics"].split("\n")

    def advance(self, batch: _Batch, progress: float) -> HeadLoss:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * _rate_factor(self.step, progress)
        out = self.objective(batch.hidden, batch.tokens, batch.unembed)
        if not math.isfinite(out.loss.item()):
            raise ValueError(
                f"the loss is {out.loss.item()} at step {self.step}, windows {batch.windows}: "
                "look at their text, or lower the "
                "learning rate; the last checkpoint is kept"
            )
        self.accelerator.backward(out.loss)
        self.accelerator.clip_grad_norm_(self.objective.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        self.metrics.append(
            f"{self.step},{self.seconds:.2f},{out.loss.item():.6f},{out.tokens_per_call:.5f}"
        )
        return out

    def finish(self) -> CPHead:
        self.save()
        self.head.eval().requires_grad_(False)
        if self.folder and self._checkpoint and self.accelerator.is_main_process:
            write_text(self.folder / "metrics.csv", "\n".join(self.metrics) + "\n")
            recipe = {
                "settings": asdict(self.settings),
                "steps": self.step,
                "seconds": round(self.seconds, 1),
            }
            write_text(
                self.folder / "recipe.json",
                json.dumps(recipe | {"torch": torch.__version__}, indent=2) + "\n",
            )
            self.head.save_pretrained(self.folder)
            self._checkpoint.unlink(missing_ok=True)
        return self.head


@dataclass(frozen=True)
class _Batch:
    windows: list[int]
    tokens: Tensor
    hidden: Tensor
    unembed: Callable[[Tensor], Tensor]


def _train(
    lm,
    runs: list[_HeadRun],
    tokens: Tensor,
    plan: HeadTrainingSettings,
    accelerator,
    callback,
    checkpoint_seconds,
):
    before, begun = runs[0].seconds, time.monotonic()
    saved = begun
    bar = _bar(plan, runs[0], accelerator)
    for batch in _batches(lm, tokens, plan, min(run.step for run in runs), accelerator):
        elapsed = before + time.monotonic() - begun
        step = min(run.step for run in runs)
        progress = step / plan.steps if plan.seconds is None else elapsed / plan.seconds
        if progress >= 1:
            break
        for index, run in enumerate(runs):
            if run.step > step:  # stopped after this one had been saved
                continue
            out = run.advance(batch, progress)
            run.seconds = before + time.monotonic() - begun
            if callback:
                callback(index, run.step, out)
        bar.set_postfix(loss=f"{out.loss.item():.3f}", tokens_per_call=f"{out.tokens_per_call:.3f}")
        bar.update(
            1 if plan.seconds is None else max(min(runs[0].seconds, plan.seconds) - bar.n, 0)
        )
        if time.monotonic() - saved > checkpoint_seconds:
            for run in runs:
                run.save()
            saved = time.monotonic()
    bar.close()


def _bar(plan: HeadTrainingSettings, run: _HeadRun, accelerator):
    timed = plan.seconds is not None
    return tqdm(
        total=plan.seconds if timed else plan.steps,
        initial=run.seconds if timed else run.step,
        unit="s" if timed else "step",
        disable=not (sys.stderr.isatty() and accelerator.is_main_process),
    )


def _batches(
    lm, tokens: Tensor, plan: HeadTrainingSettings, first: int, accelerator
) -> Iterator[_Batch]:
    """Batch k depends on the seed and on k alone, so that every rank and a resumed run see the
    same.
    """
    step = first
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    while True:
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        windows = torch.randint(len(tokens), (plan.rows,), generator=generator)[mine]
        batch = tokens[windows].long().to(lm.device)
        yield _Batch(windows.tolist(), batch, lm.hidden_states(batch).float(), lm.unembed)
        step += 1


def _own_samples(lm, plan: HeadTrainingSettings, folder: Path | None) -> Tensor:
    file = folder and folder / "samples.safetensors"
    key = _samples_key(lm, plan)
    if file and file.exists():
        stored = load_file(file)
        if key in stored:
            return stored[key].long()
    sizes = [
        min(_SAMPLED_AT_ONCE, plan.sequences - i)
        for i in range(0, plan.sequences, _SAMPLED_AT_ONCE)
    ]
    bar = tqdm(total=plan.sequences, unit="window", desc="samples", disable=not sys.stderr.isatty())
    parts = []
    for i, size in enumerate(sizes):
        parts.append(sample_sequences(lm, size, plan.length, seed=plan.seed * 1_000_003 + i))
        bar.update(size)
    bar.close()
    tokens = torch.cat(parts)
    if file:
        write_tensors(file, {key: tokens.to(torch.int32)})
    return tokens


def _samples_key(lm, plan: HeadTrainingSettings) -> str:
    return f"{lm.fingerprint[:16]}.{plan.seed}.{plan.sequences}.{plan.length}"


def _new_head(lm, settings: HeadTrainingSettings) -> CPHead:
    shape = {n: getattr(settings, n) for n in ("horizon", "rank", "anchored", "width", "blocks")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = CPHead(
            hidden_size=lm.unembedding.shape[1],
            vocab_size=lm.vocab_size,
            base=lm.name,
            base_sha256=lm.fingerprint,
            tokenizer_sha256=lm.tokenizer_fingerprint,
            **shape,
        )
    return head.to(lm.device).attach(lm)


def _optimisers(head: CPHead, rate: float) -> list[torch.optim.Optimizer]:
    trunk = [
        p
        for name, p in head.named_parameters()
        if p.ndim == 2 and not name.startswith("mixture") and "distance" not in name
    ]
    others = [p for p in head.parameters() if not any(p is t for t in trunk)]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if trunk:
        optimisers.append(Muon(trunk, 2 * rate))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def _rate_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / 30, 2 * max(1 - progress, 0.0))


def _resume_key(lm, settings: HeadTrainingSettings, data: Tensor) -> str:
    first = data[:: max(len(data) // 64, 1)].sum().item()
    return json.dumps(
        {"base": lm.fingerprint, "data": [*data.shape, first], **asdict(settings)}, sort_keys=True
    )


def _check_window(lm, plan: HeadTrainingSettings) -> None:
    if lm.max_context is not None and plan.length > lm.max_context:
        raise ValueError(
            f"windows of {plan.length} tokens exceed the model's {lm.max_context} positions: "
            "shorten them"
        )
