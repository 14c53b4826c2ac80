"""`cpmtp train-base` and `cpmtp train-head`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpmtp.commands.options import Device, Dtype, load_head


def train_base_model(
    domain: Annotated[str, typer.Argument(help="code or prose.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for model and checkpoint; default: runs/base-DOMAIN."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Train a small base model on what this Python carries.

    Goes on from its checkpoint if there is one.

    Example: cpmtp train-base code --steps 3000 --out runs/base-code
    """
    import torch

    from cpmtp.training.base_models import BaseTrainingSettings, train_base

    if steps < 1:
        raise ValueError(f"--steps {steps}: expected at least 1")
    if threads:
        torch.set_num_threads(threads)
    result = train_base(
        domain, out or Path(f"runs/base-{domain}"), BaseTrainingSettings(steps=steps, seed=seed)
    )
    print(f"held-out bits per byte  {result.bits_per_byte:.3f}")
    print(f"tokens seen             {result.tokens_seen:,}")
    print(f"model                   {result.folder}")


def train_one_head(
    model: Annotated[
        str, typer.Option(help="Base model: code, prose, a folder, a GGUF file or a hub id.")
    ] = "code",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for head and checkpoint; default: runs/head-MODEL-rRANK."),
    ] = None,
    horizon: Annotated[int, typer.Option(help="Tokens per call at most.")] = 4,
    rank: Annotated[int, typer.Option(help="Components of the CP distribution.")] = 8,
    anchored: Annotated[
        bool, typer.Option(help="Whether the head is told the first token, as study's drafts are.")
    ] = True,
    objective: Annotated[
        str, typer.Option(help="distillation, likelihood or acceptance.")
    ] = "distillation",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    seconds: Annotated[
        float | None, typer.Option(help="Train for this many seconds instead of --steps.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Files, folders or globs; default: the model's own samples."),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a head to begin with.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and batches.")] = 0,
) -> None:
    """Train a head for a base model that stays as it is.

    Goes on from its checkpoint if there is one.

    Example: cpmtp train-head --model code --rank 8 --steps 2000 --out runs/head-code
    """
    from cpmtp.corpora import read_documents
    from cpmtp.pretrained import load_language_model
    from cpmtp.training.heads import HeadTrainingSettings, train_head, windows_of_text

    settings = HeadTrainingSettings(
        horizon=horizon,
        rank=rank,
        anchored=anchored,
        objective=objective,
        steps=steps,
        seconds=seconds,
        seed=seed,
    )
    lm = load_language_model(model, device=device, dtype=dtype)
    tokens = (
        windows_of_text(lm, [d.text for d in read_documents(list(corpus))], settings.length)
        if corpus
        else None
    )
    folder = out or Path(f"runs/head-{lm.name}-r{rank}")
    train_head(
        lm,
        settings,
        out=folder,
        tokens=tokens,
        start=None if start is None else load_head(start, model, device),
    )
    last = (folder / "metrics.csv").read_text("utf-8").splitlines()[-1].split(",")
    print(f"steps            {last[0]} in {float(last[1]):.0f} s")
    print(f"tokens per call  {float(last[3]):.3f} (block, on the last batch)")
    print(f"head             {folder}")
