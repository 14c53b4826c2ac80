"""`cpmtp generate`: text by lossless self-speculative decoding, and what it took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cpmtp.commands.options import Device, Dtype, TopK, TopP, load_head


def generate(
    head: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a trained head, or recommended or baseline (embedded models); "
            "without: plain decoding."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Its base model: code, prose, a folder, a GGUF file or a hub id.")
    ] = "code",
    prompt: Annotated[
        str, typer.Option(help="Text to go on from.")
    ] = "def add(a, b):\n    return ",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    rule: Annotated[str, typer.Option(help="block, token or greedy.")] = "block",
    temperature: Annotated[float, typer.Option(help="0 follows the most probable token.")] = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    monitor: Annotated[
        Path | None, typer.Option(help="File that gets a line of JSON per cycle.")
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(
            help="Table with forecast_low and forecast_high: say whether decoding keeps to it."
        ),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Hold what was drawn from against full forward passes.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
) -> None:
    """Generate text by lossless speculative decoding.

    And say what it took.

    Example: cpmtp generate recommended --model code --max-new-tokens 200 --monitor
    runs/generate.jsonl
    """
    from cpmtp.decoding.drift import drift_report, expected_interval
    from cpmtp.decoding.speculative import speculative_generate
    from cpmtp.pretrained import load_language_model
    from cpmtp.sampling_law import SamplingLaw

    lm = load_language_model(model, device=device, dtype=dtype)
    SamplingLaw(temperature, top_k, top_p).check_vocabulary(lm.vocab_size)
    draft = None if head is None else load_head(head, model, device)
    if expect and draft is None:
        raise ValueError("--expect without a head: plain decoding has nothing to drift")
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = None
    if expect and draft is not None:
        shape = {name: getattr(draft, name) for name in ("rank", "horizon", "anchored")}
        known = {"model": lm.name, "head": Path(head or "").name, "rule": rule}
        expected = expected_interval(expect, **known, **shape, **sampling)
    out = speculative_generate(
        lm,
        draft,
        lm.encode(prompt),
        max_new_tokens=max_new_tokens,
        rule=rule,
        **sampling,
        seed=seed,
        monitor=monitor,
        audit=audit,
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
    if (found := stats.audit_findings) is not None:
        print(
            f"audit              {found.largest:.1e} largest total variation to full passes over "
            f"{found.positions} tokens (rounding alone: {found.rounding:.1e}); {stats.way}",
            file=sys.stderr,
        )
        verdict = "exact up to rounding" if found.passed else "NOT the model's distribution"
        print(
            f"                   {found.distance:.1e} mean squared Hellinger distance, "
            f"{found.allowed:.1e} allowed: {verdict}",
            file=sys.stderr,
        )
    if expected:
        print(drift_report(stats, *expected), file=sys.stderr)
