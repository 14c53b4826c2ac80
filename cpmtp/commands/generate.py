"""`cpmtp generate`: text by lossless self-speculative decoding, and what it took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    head: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a trained head, or recommended or baseline (embedded models); "
            "without: plain decoding."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Its base model: code, prose, a folder or a hub id.")
    ] = "code",
    prompt: Annotated[
        str, typer.Option(help="Text to go on from.")
    ] = "def add(a, b):\n    return ",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    rule: Annotated[str, typer.Option(help="block, token or greedy.")] = "block",
    temperature: Annotated[float, typer.Option(help="0 follows the most probable token.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Only the so many most probable tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the most probable tokens of this mass.")
    ] = None,
    monitor: Annotated[
        Path | None, typer.Option(help="File that gets a line of JSON per cycle.")
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(help="Table with forecast_low and forecast_high: warn of drift from it."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
) -> None:
    """Generate text by lossless speculative decoding.

    And say what it took.

    Example: cpmtp generate recommended --model code --max-new-tokens 200 --monitor
    runs/generate.jsonl
    """
    from cpmtp.decoding.drift import drift_warning, expected_interval
    from cpmtp.decoding.speculative import speculative_generate
    from cpmtp.pretrained import load_language_model

    lm = load_language_model(model, device=device)
    draft = None if head is None else _load_head(head, model, device)
    if expect and draft is None:
        raise ValueError("--expect without a head: plain decoding has nothing to drift")
    keys = {
        "model": lm.name,
        "rank": getattr(draft, "rank", 0),
        "anchored": getattr(draft, "anchored", False),
        "rule": rule,
    }
    keys["head"] = Path(head or "").name
    expected = expected_interval(expect, **keys) if expect else None
    out = speculative_generate(
        lm,
        draft,
        lm.encode(prompt),
        max_new_tokens=max_new_tokens,
        rule=rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        monitor=monitor,
    )
    print(lm.decode(out.sequences[0]))
    stats = out.stats
    print(f"tokens per call    {stats.tokens_per_call:.3f} in {stats.calls} calls", file=sys.stderr)
    print(f"tokens per second  {stats.tokens_per_second:.1f}", file=sys.stderr)
    print(
        f"latency per token  {1e3 * stats.latency(0.5):.1f} ms median, "
        f"{1e3 * stats.latency(0.95):.1f} ms p95",
        file=sys.stderr,
    )
    if expected and (warning := drift_warning(stats, *expected)):
        print(f"drift: {warning}", file=sys.stderr)


def _load_head(name: str, model: str, device: str):
    from cpmtp.heads.cp_head import CPHead
    from cpmtp.pretrained import embedded_heads

    folder = embedded_heads(model).get(name, Path(name))
    if not (folder / "config.json").is_file():
        known = (
            f"; {model} comes with {', '.join(embedded_heads(model))}"
            if embedded_heads(model)
            else ""
        )
        raise ValueError(
            f"the folder {name!r} holds no head: expected config.json and model.safetensors in "
            f"it{known}"
        )
    return CPHead.from_pretrained(folder).to(device)
