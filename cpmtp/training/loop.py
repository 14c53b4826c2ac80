"""The training loop of base models and heads, resumable to the bit.

A training that was killed at any moment goes on from its last checkpoint to the weights of an
unbroken one: a batch depends on the seed and the step alone, the learning rate on how much is done,
and a checkpoint holds weights, optimisers and where they are, written whole or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from cpmtp.joint_distribution.progress import progress_bar
from cpmtp.whole_files import remove_partials, write_tensors

_LARGEST_NORM = 1.0  # gradients are clipped to it

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long a training is, and which share of its peak the learning rate has when.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    warmup : int
        Steps over which the rate rises linearly.
    decay : float
        Share of the training, its last, over which the rate falls linearly to zero; it is constant
        between.
    seconds : float, optional
        Train for this many seconds instead of `steps`.

    Examples
    --------
    >>> schedule = Schedule(steps=1000, warmup=10, decay=0.4)
    >>> [round(schedule.rate(step, step / 1000), 3) for step in (0, 9, 600, 800)]
    [0.1, 1.0, 1.0, 0.5]
    """

    steps: int
    warmup: int
    decay: float
    seconds: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """Share of the training that is done; 1 and more: all of it."""
        return step / self.steps if self.seconds is None else seconds / self.seconds

    def rate(self, step: int, done: float) -> float:
        """Learning rate of a step as a share of its peak."""
        rising = (step + 1) / self.warmup
        falling = (1 - done) / max(self.decay, 1 / self.steps)
        return max(min(1.0, rising, falling), 0.0)


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    Attributes
    ----------
    windows : list of int
        What the error message calls it, should its loss be no number.
    inputs : tuple
        Arguments of the objectives.
    """

    windows: list[int]
    inputs: tuple[Any, ...]


def drawn_windows(windows: int, rows: int, *, seed: int, step: int) -> Int[Tensor, " rows"]:
    """Numbers of the windows in the batch of a step, drawn with replacement; they depend on the
    seed and on the step alone, so that every process and a resumed training see the same.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(windows, (rows,), generator=generator)


class Run(Generic[Model]):
    """One model under training: how far it is, and where that is kept.

    Parameters
    ----------
    model : nn.Module
        Whose weights are learned.
    objective : nn.Module
        Its forward pass turns a batch's inputs into anything with a scalar ``loss``.
    optimisers : sequence of torch.optim.Optimizer
        With their peak learning rates.
    checkpoint : Path, optional
        The file that it is kept in, and gone on from where it is there.
    key : str
        What the training depends on: a checkpoint with another key is refused.
    accelerator : Accelerator, optional
        Under it the gradients are those of all processes; the first one writes.

    Raises
    ------
    ValueError
        If the checkpoint is damaged or has another key.
    """

    def __init__(
        self,
        model: Model,
        objective: nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
        *,
        checkpoint: Path | None,
        key: str,
        accelerator: Accelerator | None = None,
    ):
        self.model, self.objective, self.optimisers = model, objective, list(optimisers)
        self.checkpoint, self.accelerator, self._key = checkpoint, accelerator, key
        self.step, self.seconds = 0, 0.0
        self.metrics: list[str] = []  # rows of text that are kept with the weights
        for group in self._groups():
            group["peak"] = group["lr"]
        if checkpoint is not None:
            if self.writes:
                remove_partials(checkpoint.parent, checkpoint.name)
            if checkpoint.exists():
                self._load(checkpoint)
        if accelerator is not None:
            self.objective, *self.optimisers = accelerator.prepare(objective, *optimisers)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.accelerator is None or self.accelerator.is_main_process

    def advance(self, batch: Batch, rate: float) -> Any:
        """One step, with this share of the peak learning rates; returns what the objective gave.

        Raises
        ------
        ValueError
            If the loss is no finite number; the model is then as it was.
        """
        outcome = self.objective(*batch.inputs)
        loss = outcome.loss.item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}, windows {batch.windows}: look at their "
                "text, or lower the learning rate; the last checkpoint is kept"
            )

        parameters = self.objective.parameters()
        if self.accelerator is None:
            outcome.loss.backward()
            nn.utils.clip_grad_norm_(parameters, _LARGEST_NORM)
        else:
            self.accelerator.backward(outcome.loss)
            self.accelerator.clip_grad_norm_(parameters, _LARGEST_NORM)

        for group in self._groups():
            group["lr"] = group["peak"] * rate
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return outcome

    def save(self) -> None:
        """Keep weights, optimiser states, step, seconds and metrics."""
        if self.checkpoint is None or not self.writes:
            return
        # Of weights that are one tensor under two names, only the first is among them.
        tensors = {f"model.{name}": w.detach() for name, w in self.model.named_parameters()}
        for o, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimiser.{o}.{index}.{name}"] = torch.as_tensor(value)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(self.step), "seconds": str(self.seconds), "key": self._key}
        write_tensors(self.checkpoint, tensors, metadata | {"metrics": "\n".join(self.metrics)})

    def _load(self, checkpoint: Path) -> None:
        tensors, metadata = _checkpoint_contents(checkpoint, self._key)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"model.{name}"])
        for o, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name in (n for n in tensors if n.startswith(f"optimiser.{o}.")):
                _, _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = tensors[name]
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.metrics = metadata["metrics"].splitlines()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]


def train(
    runs: Sequence[Run],
    batches: Callable[[int], Batch],
    schedule: Schedule,
    *,
    record: Callable[[int, Run, Any], Mapping[str, str]],
    checkpoint_seconds: float,
) -> None:
    """Train models side by side, each step of all on one batch, and keep them in the end.

    Parameters
    ----------
    runs : sequence of Run
    batches : callable
        The batch of a step; the same one each time it is asked.
    schedule : Schedule
    record : callable
        Called with (index of the run, run, what its objective gave) after each of its steps;
        returns what the progress bar shows.
    checkpoint_seconds : float
        How often checkpoints are written.

    Raises
    ------
    ValueError
        If a loss is no finite number; the last checkpoints are kept.
    """
    before, begun = runs[0].seconds, time.monotonic()
    saved = begun
    shown: Mapping[str, str] = {}
    with _progress_bar(schedule, runs[0]) as bar:
        while True:
            step = min(run.step for run in runs)
            done = schedule.done(step, _common(before + time.monotonic() - begun, runs[0]))
            if done >= 1:
                break
            batch = batches(step)
            for index, run in enumerate(runs):
                if run.step > step:  # saved when the others were not yet
                    continue
                outcome = run.advance(batch, schedule.rate(step, done))
                run.seconds = before + time.monotonic() - begun
                shown = record(index, run, outcome)
            bar.set_postfix(shown)
            far = runs[0].step if schedule.seconds is None else min(runs[0].seconds, bar.total)
            bar.update(max(far - bar.n, 0))
            if time.monotonic() - saved > checkpoint_seconds:
                for run in runs:
                    run.save()
                saved = time.monotonic()
    for run in runs:
        run.save()


def _common(seconds: float, run: Run) -> float:
    """The first process's seconds: all must end at the same step."""
    if run.accelerator is None or run.accelerator.num_processes == 1:
        return seconds
    told = torch.tensor([seconds], dtype=torch.float64, device=run.accelerator.device)
    return float(broadcast(told))


def _progress_bar(schedule: Schedule, run: Run) -> tqdm:
    timed = schedule.seconds is not None
    return progress_bar(
        schedule.seconds or schedule.steps,
        "s" if timed else "step",
        shown=None if run.writes else False,
        initial=run.seconds if timed else run.step,
    )


def _checkpoint_contents(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint that has this key."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"the checkpoint {path} is damaged ({error}): delete it to begin again"
        ) from error
    if metadata["key"] != key:
        raise ValueError(
            f"{path} was made with other settings, another model or corpus; choose another folder "
            "or delete it"
        )
    return tensors, metadata
