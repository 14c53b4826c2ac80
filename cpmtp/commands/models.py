"""`cpmtp models`: what comes with the package, and what a model is followed by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cpmtp.commands.options import Device, Dtype


def models(
    check: Annotated[
        str | None,
        typer.Option(
            help="A model to put to its trials: embedded name, folder, GGUF file or hub id."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the longest text that is tried.")] = 512,
    convert: Annotated[
        str | None,
        typer.Option(help="A model to write as a folder, such as a GGUF file: it loads faster."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder that --convert writes.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """List, check or convert models.

    Example: cpmtp models --convert model.gguf --dtype bfloat16 --out ./my-model
    """
    if check is not None and convert is not None:
        raise ValueError("--check and --convert: give one of them")
    if length < 1:
        raise ValueError(f"--length {length}: expected at least 1")
    if check is not None:
        _check(check, length, device, dtype)
        return
    if convert is not None or out is not None:
        _convert(convert, out, dtype)
        return
    from cpmtp.pretrained import embedded_models

    for name, folder in embedded_models().items():
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        print(
            f"{name:8} {recipe['parameters']:>10,} parameters  "
            f"{recipe['held_out_bits_per_byte']:.3f} bits per byte  {folder}"
        )


def _convert(name: str | None, out: Path | None, dtype: str) -> None:
    """The model as a folder that says what its weights are."""
    from cpmtp.pretrained import load_language_model
    from cpmtp.pretrained.converting import check_new_folder, save_language_model

    if name is None or out is None:
        raise ValueError("--convert MODEL and --out FOLDER: each needs the other")
    check_new_folder(out)
    lm = load_language_model(name, dtype=dtype)
    print(f"model   {save_language_model(lm, out)}")
    print(f"sha256  {lm.fingerprint}")


def _check(name: str, length: int, device: str, dtype: str) -> None:
    """Every way that is used of a model, and how far it is from full passes."""
    from cpmtp.decoding.trials import way_of
    from cpmtp.pretrained import load_language_model

    lm = load_language_model(name, device=device, dtype=dtype)
    print(f"{name}: {type(lm.model).__name__}, {lm.vocab_size:,} tokens, {lm.model.dtype}")
    lm.require_causal()
    uses = {
        "joints": lambda: (
            "branches share a context" if lm.shares_prefixes_up_to(length) else "full passes"
        ),
        "own samples": lambda: "its own cache" if lm.grows_up_to(length) else "full passes",
        "decoding alone": lambda: way_of(lm, rows=1, longest=length, hidden=False),
        "decoding a batch": lambda: way_of(lm, rows=3, longest=length, hidden=False),
        "decoding with a head": lambda: way_of(lm, rows=3, longest=length, hidden=True),
    }
    for use, found in uses.items():
        try:
            print(f"{use:22} {found()}")
        except ValueError as error:
            print(f"{use:22} refused: {error}")
    print("tried, with the largest total variation to full passes and what rounding may make:")
    for (way, boundary), outcome in lm.trials.outcomes.items():
        at = "" if boundary is None else f" across {boundary} tokens"
        verdict = "exact" if outcome.passed else "not used"
        gap = outcome.failure or f"{outcome.gap:.1e} of {outcome.allowed:.1e}"
        print(f"  {verdict:8} {way}{at}: {gap}")
