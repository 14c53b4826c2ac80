"""`cpmtp generate`: text by lossless self-speculative decoding, and what it took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpmtp.commands.options import Device, Dtype, TopK, TopP, integers, load_head

if TYPE_CHECKING:
    from tqdm import tqdm

    from cpmtp.decoding.stats import GenerationStats, Progress


LOOKUP = "lookup"


def generate(
    head: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a trained head, recommended or baseline (embedded models), or lookup: "
            "what the text said before. Without: plain decoding."
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
    eos: Annotated[
        str | None,
        typer.Option(
            help="Token ids that end the text, separated by commas. Default: the model's own."
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="Text at which to stop; may be given several times."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode without the head as well: what it buys.")
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
    from cpmtp.decoding.endings import OWN, end_tokens
    from cpmtp.decoding.prompt_lookup import PromptLookup
    from cpmtp.decoding.speculative import speculative_generate
    from cpmtp.joint_distribution.progress import progress_bar
    from cpmtp.pretrained import load_language_model
    from cpmtp.sampling_law import SamplingLaw

    if eos is not None and ignore_eos:
        raise ValueError(
            "--eos says what ends the text and --ignore-eos that nothing does: give one of them"
        )
    if eos is not None and not integers("--eos", eos):
        raise ValueError("--eos is empty: name token ids, or give --ignore-eos")
    ends = integers("--eos", eos) if eos is not None else None if ignore_eos else OWN
    for option, given in (("--expect", expect), ("--compare", compare)):
        if given and head is None:
            raise ValueError(f"{option} without a head: plain decoding has nothing to differ from")
    lm = load_language_model(model, device=device, dtype=dtype)
    SamplingLaw(temperature, top_k, top_p).check_vocabulary(lm.vocab_size)
    looks_up = head == LOOKUP
    if expect and looks_up:
        raise ValueError("--expect with lookup: its table is of heads; leave one of them out")
    draft: Any = PromptLookup() if looks_up else None
    if head is not None and not looks_up:
        draft = load_head(head, model, device)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = None
    if expect and draft is not None:
        shape = {name: getattr(draft, name) for name in ("rank", "horizon", "anchored")}
        known = {"model": lm.name, "head": Path(head or "").name, "rule": rule}
        expected = expected_interval(expect, **known, **shape, **sampling)
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "rule": rule, "seed": seed}
    asked |= sampling | {"eos_token_id": ends, "stop_strings": tuple(stop or ())}
    ids = lm.encode(prompt)
    with progress_bar(max_new_tokens, "token", desc="decoding", leave=False) as bar:
        watching = {"monitor": monitor, "watch": lambda progress: _show(bar, progress)}
        out = speculative_generate(lm, draft, ids, **asked, **watching, audit=audit)
    # The end of the text is no part of it.
    ended = bool(len(out.token_ids)) and int(out.token_ids[-1]) in end_tokens(lm, ends)
    text = out.sequences[0]
    print(lm.decode(text[:-1] if ended else text))
    stats = out.stats
    print(f"tokens per call    {stats.tokens_per_call:.3f} in {stats.calls} calls", file=sys.stderr)
    print(f"tokens per second  {stats.tokens_per_second:.1f}", file=sys.stderr)
    print(
        f"latency per token  {1e3 * stats.latency(0.5):.1f} ms median, "
        f"{1e3 * stats.latency(0.95):.1f} ms p95",
        file=sys.stderr,
    )
    if len(out.token_ids) > 1:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in stats.stage_shares.items())
        print(f"time of a cycle    {shares}", file=sys.stderr)
    if compare:
        plain = speculative_generate(lm, None, ids, **asked).stats
        print(_comparison(stats, plain), file=sys.stderr)
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


def _show(bar: tqdm, progress: Progress) -> None:
    """What a cycle added, with tokens per call and where the time goes."""
    bar.set_postfix_str(str(progress), refresh=False)
    bar.update(progress.tokens + 1 - bar.n)  # the first token came with the prompt


def _comparison(stats: GenerationStats, plain: GenerationStats) -> str:
    """How fast both decode after the prompt is read and whatever is tried first is tried."""
    fast, slow = (
        (s.tokens - 1) / seconds if (seconds := sum(s.stage_seconds.values())) else 0.0
        for s in (stats, plain)
    )
    if not fast or not slow:
        return "plain decoding     not compared: no token came after the first"
    return (
        f"plain decoding     {slow:.1f} tokens per second, with the head {fast:.1f}: "
        f"{fast / slow:.2f} times as fast"
    )
