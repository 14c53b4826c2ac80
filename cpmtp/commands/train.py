"""`cpmtp train-base` and `cpmtp train-head`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpmtp.commands.options import Device, Dtype, load_head

if TYPE_CHECKING:
    from torch import Tensor

    from cpmtp.corpora import Document


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
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: expected at least 1")
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
    precision: Annotated[
        str,
        typer.Option(
            help="Of the head's products: float32, bfloat16, or auto: bfloat16 where there are "
            "units for it."
        ),
    ] = "auto",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>", help="Files, folders or globs; default: the model's own samples."
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of a line of JSON (.jsonl) that holds its text.")
    ] = "text",
    rows: Annotated[int, typer.Option(help="Windows in a step.")] = 8,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens in a window; default: 256, or as many as the model has."),
    ] = None,
    sequences: Annotated[
        int, typer.Option(help="Windows drawn from the model where no --corpus is given.")
    ] = 1024,
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

    asked: dict[str, Any] = {"form": form, "horizon": horizon, "rank": rank, "anchored": anchored}
    asked |= {"transition_rank": transition_rank, "gated": gated, "over_text": over_text}
    asked |= {"width": width, "blocks": blocks, "vocabulary": vocabulary, "precision": precision}
    asked |= {"steps": steps, "positions": positions, "seconds": seconds, "seed": seed}
    asked |= {"objective": objective, "rows": rows, "sequences": sequences}
    asked |= {} if length is None else {"length": length}
    settings = HeadTrainingSettings(**asked)
    texts = read_documents(list(corpus), field=text_field) if corpus else []
    lm = load_language_model(model, device=device, dtype=dtype)
    if length is None and lm.max_context is not None and lm.max_context < settings.length:
        settings = replace(settings, length=lm.max_context)
    if seconds is None:
        # No more windows than are read.
        needed = min(settings.sequences, settings.planned_steps * settings.rows)
        settings = replace(settings, sequences=needed)
    first = None if start is None else load_head(start, model, device)
    tokens = windows_of_text(lm, [d.text for d in texts], settings.length) if corpus else None
    if tokens is not None:
        print(f"windows          {_kept(lm, texts, tokens)}")
    folder = out or Path(f"runs/head-{lm.name}-{settings.sizes.name}")
    head = train_head(lm, settings, out=folder, tokens=tokens, start=first)
    last = (folder / "metrics.csv").read_text("utf-8").splitlines()[-1].split(",")
    print(f"steps            {last[0]} in {float(last[1]):.0f} s")
    print(f"tokens per call  {float(last[3]):.3f} (block, on the last batch)")
    print(
        f"ceiling          {head.horizon}, its horizon; cpmtp study says what rank {rank} can reach"
    )
    print(f"break-even       {_break_even(lm, head)}")
    print(f"head             {folder}")
    print(f"next             cpmtp generate {folder} --model {model} --compare")


def _kept(lm: Any, texts: Sequence[Document], tokens: Tensor) -> str:
    """How much of the texts the windows hold."""
    whole = sum(len(lm.encode_document(document.text)) for document in texts)
    return (
        f"{len(tokens):,} of {tokens.shape[1]} tokens, {tokens.numel() / whole:.1%} of the texts; "
        "what is left at their ends is dropped (--length)"
    )


def _break_even(lm: Any, head: Any) -> str:
    """Tokens per call from which the head pays here, by decoding a little with and without it."""
    import torch

    from cpmtp.decoding.speculative import speculative_generate
    from cpmtp.language_model import sample_sequences

    room = 64 if lm.max_context is None else min(64, lm.max_context - 1)
    prompt = sample_sequences(lm, 1, 1, seed=1)[0] if _begins(lm) else torch.zeros(1).long()
    calls = []
    for draft in (None, head):
        for _ in range(2):  # the first is for what is tried and made ready
            stats = speculative_generate(lm, draft, prompt, max_new_tokens=room).stats
        calls.append(sum(stats.stage_seconds.values()) / max(stats.calls - 1, 1))
    if not calls[0]:
        return "not measured: the model's window has no room"
    return (
        f"{calls[1] / calls[0]:.2f} tokens per call here: a call with the head takes so many plain "
        "steps, one text at a time"
    )


def _begins(lm: Any) -> bool:
    """Whether the model can begin a text of its own."""
    return getattr(lm.text_config, "bos_token_id", None) is not None
