"""`cpmtp models`: what comes with the package, and what a model is followed by."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models(
    check: Annotated[
        str | None,
        typer.Option(help="A model to put to its trials: an embedded name, a folder or a hub id."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the longest text that is tried.")] = 512,
) -> None:
    """List the embedded models, or check that one is followed exactly.

    Example: cpmtp models --check ./my-model
    """
    if check is not None:
        _check(check, length)
        return
    from cpmtp.pretrained import embedded_models

    for name, folder in embedded_models().items():
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        print(
            f"{name:8} {recipe['parameters']:>10,} parameters  "
            f"{recipe['held_out_bits_per_byte']:.3f} bits per byte  {folder}"
        )


def _check(name: str, length: int) -> None:
    """Every way that is used of a model, and how far it is from full passes."""
    from cpmtp.decoding.trials import way_of
    from cpmtp.pretrained import load_language_model

    lm = load_language_model(name)
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
