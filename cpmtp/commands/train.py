"""`cpmtp train-base` and `cpmtp train-head`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpmtp.commands.options import load_head


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
        str, typer.Option(help="Base model: code, prose, a folder or a hub id.")
    ] = "code",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for head and checkpoint; default: runs/head-MODEL-rRANK."),
    ] = None,
    form: Annotated[str, typer.Option(help="cp, markov, markov_mixture or recurrent.")] = "cp",
    horizon: Annotated[int, typer.Option(help="Tokens per call at most.")] = 4,
    rank: Annotated[
        int | None,
        typer.Option(help="Components; default: cp 8, markov_mixture 4, others have one."),
    ] = None,
    transition_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the token-to-token correction; default: markov 64, markov_mixture 32."
        ),
    ] = None,
    gated: Annotated[bool, typer.Option(help="Whether the context gates that correction.")] = True,
    over_text: Annotated[
        bool,
        typer.Option(
            "--over-text", help="Recurrent: a transformer layer over the text; not for decoding."
        ),
    ] = False,
    width: Annotated[
        int | None, typer.Option(help="Of the trunk; default: the base model's.")
    ] = None,
    blocks: Annotated[int, typer.Option(help="Residual blocks of the trunk.")] = 1,
    vocabulary: Annotated[
        int | None, typer.Option(help="Draft only so many of the most frequent tokens.")
    ] = None,
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
    positions: Annotated[
        int | None, typer.Option(help="Train on so many positions instead of --steps.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    precision: Annotated[
        str, typer.Option(help="Of the head's products: float32 or bfloat16.")
    ] = "float32",
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Files, folders or globs; default: the model's own samples."),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a head to begin with.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
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
        form=form,
        horizon=horizon,
        rank=rank,
        transition_rank=transition_rank,
        gated=gated,
        over_text=over_text,
        anchored=anchored,
        width=width,
        blocks=blocks,
        vocabulary=vocabulary,
        objective=objective,
        steps=steps,
        positions=positions,
        seconds=seconds,
        length=length,
        precision=precision,
        seed=seed,
    )
    lm = load_language_model(model, device=device)
    tokens = (
        windows_of_text(lm, [d.text for d in read_documents(list(corpus))], settings.length)
        if corpus
        else None
    )
    folder = out or Path(f"runs/head-{lm.name}-{settings.sizes.name}")
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
