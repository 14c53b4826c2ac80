"""What decoding with heads earns and takes, beside what was forecast for it; as rows of a table."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.decoding.stats import GenerationStats
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.heads.draft_head import DraftHead
from cpmtp.language_model import HiddenStateLanguageModel
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.resampling import normal_half_width

SHAPE = ("horizon", "rank", "anchored", "head_parameters")


def head_shape(head: DraftHead) -> dict:
    """What kind of head it is: the columns of `SHAPE`."""
    values = (head.horizon, head.rank, head.anchored, sum(w.numel() for w in head.parameters()))
    return dict(zip(SHAPE, values, strict=True))


def peak_memory(device: torch.device) -> float:
    """Bytes allocated at most since the last call; not a number where a device does not count
    them.
    """
    if device.type != "cuda":
        return float("nan")
    peak = float(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def plain_texts(
    lm: HiddenStateLanguageModel,
    prompts: Sequence[Int[Tensor, " prompt"]],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Int[Tensor, "texts time"]:
    """What the model writes after prompts of one length without any head: texts to forecast on."""
    out = speculative_generate(
        lm, None, prompts, max_new_tokens=new_tokens, temperature=temperature, seed=seed
    )
    return torch.stack(out.sequences)  # (texts, prompt + new_tokens)


def decode_beside_forecast(
    lm: HiddenStateLanguageModel,
    heads: Iterable[tuple[str, DraftHead]],
    *,
    new_tokens: int,
    texts: Int[Tensor, "texts time"] | None = None,
    prompts: Sequence[Int[Tensor, " prompt"]] | None = None,
    rule: str = "block",
    temperature: float = 1.0,
    seed: int = 0,
) -> list[dict]:
    """Tokens per call of every head: forecast, decoded, or one beside the other; a row per head.

    Parameters
    ----------
    heads : pairs of a name and a head of this model
    new_tokens : int
        Tokens generated after every prompt; the last so many of every text are forecast on.
    texts : (texts, time) long tensor, optional
        Of `plain_texts`; without them there is no forecast.
    prompts : sequence of (prompt,) long tensors, optional
        Decoded in one batch; without them nothing is measured.
    seed : int
        Of decoding.

    Returns
    -------
    list of dict
        ``head``, its shape, and as far as asked for ``plain_forecast`` (every position counted
        alike), ``forecast`` (weighted as decoding's cycles weigh them) and ``measured``, each with
        ``_low`` and ``_high``: 95 % intervals over texts or prompts; and how often each position
        survived, ``measured_survival_2`` up to the horizon.

    Raises
    ------
    ValueError
        If there are fewer than two texts or prompts, or the heads are of another model.
    """
    if prompts is not None and len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts: expected at least 2, for an interval")
    rows = []
    for name, head in heads:
        row = {"head": name} | head_shape(head)
        if texts is not None:
            start = texts.shape[1] - new_tokens
            found = forecast_cycles(
                lm, head, texts, start=start, rule=rule, temperature=temperature
            )
            row |= _columns("plain_forecast", found.unweighted, found.unweighted_interval)
            row |= _columns("forecast", found.tokens_per_call, found.interval)
        if prompts is not None:
            out = speculative_generate(
                lm,
                head,
                prompts,
                max_new_tokens=new_tokens,
                rule=rule,
                temperature=temperature,
                seed=seed,
            )
            by_row = out.stats.tokens_per_call_by_row
            half = normal_half_width(float(np.std(by_row, ddof=1)) / len(by_row) ** 0.5)
            mean = out.stats.tokens_per_call
            row |= _columns("measured", mean, (mean - half, mean + half))
            row |= _survived(out.stats)
        rows.append(row)
    return rows


def decode_in_turns(
    lm: HuggingFaceLanguageModel,
    heads: Mapping[str, DraftHead],
    turns: Sequence[Sequence[Int[Tensor, " prompt"]]],
    *,
    new_tokens: int,
    rules: Sequence[str] = ("block",),
    temperature: float = 1.0,
) -> list[dict]:
    """Times of every way of decoding, taking turns; a row per head and rule.

    Transformers' own generation and this library's loop without drafts come first. The first turn
    warms up and is not counted.

    Parameters
    ----------
    heads : heads of this model by name
    turns : sequence of sequences of (prompt,) long tensors
        The prompts of each turn, decoded in one batch by every way.

    Returns
    -------
    list of dict
        ``head``, ``rule`` (none for the first two), ``rounds`` (turns that count), the head's
        shape, medians over turns of ``tokens_per_second``, ``peak_bytes`` and, for all but
        Transformers, ``tokens_per_call``, ``running_share``, ``full_tokens_per_second`` (see
        `GenerationStats`), seconds per token (``latency_p50``, ``latency_p95``) and
        per cycle (``target_seconds``, …); ``speedup`` over the loop without drafts.

    Raises
    ------
    ValueError
        If there are fewer than two turns.
    """
    if len(turns) < 2:
        raise ValueError(f"{len(turns)} turns: expected at least 2, the first warms up")
    ways = [("transformers", None), ("plain", None), *itertools.product(heads, rules)]
    runs: dict[tuple, list[dict[str, float]]] = {way: [] for way in ways}
    for turn, prompts in enumerate(turns):
        for (name, rule), found in runs.items():
            peak_memory(lm.device)
            if name == "transformers":
                run = _by_transformers(lm, prompts, new_tokens, temperature)
            else:
                options = {"rule": rule or rules[0], "temperature": temperature, "seed": turn}
                run = _by_cycles(lm, heads.get(name), prompts, new_tokens, options)
            if turn:
                found.append(run | {"peak_bytes": peak_memory(lm.device)})
    rows = []
    for (name, rule), found in runs.items():
        row = {"head": name, "rule": rule, "rounds": len(found)}
        row |= head_shape(heads[name]) if name in heads else {}
        rows.append(row | {key: statistics.median(run[key] for run in found) for key in found[0]})
    plain = rows[1]["tokens_per_second"]
    return [row | {"speedup": row["tokens_per_second"] / plain} for row in rows]


def _columns(name: str, mean: float, interval: tuple[float, float]) -> dict[str, float]:
    return {name: mean, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _survived(stats: GenerationStats) -> dict[str, float]:
    """How often the first k tokens of a cycle were emitted unchanged, k = 2 to the horizon."""
    cycles = max(sum(stats.accepted_counts), 1)
    counts = enumerate(stats.accepted_per_position, 2)
    return {f"measured_survival_{k}": count / cycles for k, count in counts}


def _by_transformers(
    lm: HuggingFaceLanguageModel, prompts: Sequence[Tensor], count: int, temperature: float
) -> dict[str, float]:
    tokens = torch.stack(list(prompts)).to(lm.device)  # (batch, prompt)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    options |= {"eos_token_id": None, "do_sample": bool(temperature)}
    options |= {"temperature": temperature, "top_k": 0} if temperature else {}
    begun = time.perf_counter()
    out = lm.model.generate(tokens, max_new_tokens=count, **options)
    out = out.cpu()  # what is on a device is done when it is here
    new = (out.shape[1] - tokens.shape[1]) * len(prompts)
    return {"tokens_per_second": new / (time.perf_counter() - begun)}


def _by_cycles(
    lm: HiddenStateLanguageModel,
    head: DraftHead | None,
    prompts: Sequence[Tensor],
    count: int,
    options: dict,
) -> dict[str, float]:
    stats = speculative_generate(lm, head, list(prompts), max_new_tokens=count, **options).stats
    return {
        "tokens_per_second": stats.tokens_per_second,
        "tokens_per_call": stats.tokens_per_call,
        "running_share": stats.running_share,
        "full_tokens_per_second": stats.full_tokens_per_second,
        "latency_p50": stats.latency(0.5),
        "latency_p95": stats.latency(0.95),
    } | stats.cycle_seconds
