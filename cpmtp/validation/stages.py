"""From a base model to decoded text: what each stage computes, as rows of its table."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from cpmtp.corpora import (
    Document,
    installed_code_documents,
    split_held_out,
    split_packages,
    standard_library_documents,
)
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.losses import head_loss
from cpmtp.latency import LatencyModel
from cpmtp.pretrained import HuggingFaceLanguageModel, load_language_model
from cpmtp.training.base_models import train_base_on
from cpmtp.training.heads import HeadTrainingSettings, train_heads
from cpmtp.training.new_models import train_byte_tokenizer
from cpmtp.validation.measurements import (
    decode_beside_forecast,
    decode_in_turns,
    head_shape,
    peak_memory,
    plain_texts,
)
from cpmtp.validation.presets import BasePlan, Preset
from cpmtp.whole_files import write_tensors

_TOKENIZER_BYTES = 20_000_000
_TIMED_TOKENS = 64


@dataclass(frozen=True)
class Workplace:
    """A preset and the folder its state is in."""

    preset: Preset
    folder: Path

    def base_folder(self, plan: BasePlan) -> Path:
        """Where a base model is."""
        return self.folder / "bases" / plan.name

    def load(self, plan: BasePlan) -> HuggingFaceLanguageModel:
        """The base model on the preset's device and in its precision."""
        source = str(self.base_folder(plan)) if plan.vocab_size else plan.name
        return load_language_model(
            source, device=self.preset.device, dtype=getattr(torch, self.preset.dtype)
        )

    def text(self, plan: BasePlan, side: str) -> Tensor:
        """Windows of ``training`` text, or of ``held_out`` prompts."""
        return load_file(self.base_folder(plan) / "text.safetensors")[side].long()

    def head_folder(self, plan: BasePlan, settings: HeadTrainingSettings) -> Path:
        """Where a head is."""
        kind = "anchored" if settings.anchored else "unanchored"
        return self.folder / "heads" / plan.name / f"n{settings.horizon}-r{settings.rank}-{kind}"

    def heads(
        self, plan: BasePlan, lm: HuggingFaceLanguageModel
    ) -> Iterator[tuple[str, DraftHead]]:
        """Every trained head of a base model, by name."""
        for settings in head_settings(self.preset):
            folder = self.head_folder(plan, settings)
            yield (
                folder.name,
                DraftHead.from_pretrained(folder).to(lm.device).attach(lm).requires_grad_(False),
            )


def train_base_model(place: Workplace, plan: BasePlan) -> list[dict]:
    """Train a base model where it is not an embedded one; keep windows of its text for the later
    stages.
    """
    preset, folder = place.preset, place.base_folder(plan)
    folder.mkdir(parents=True, exist_ok=True)
    row: dict = {"base": plan.name}
    if plan.vocab_size:
        training, held_out = split_packages(installed_code_documents(plan.corpus_bytes))
        held_out = _at_most(held_out, plan.held_out_bytes)
        tokenizer = train_byte_tokenizer(
            [d.text for d in _at_most(training, _TOKENIZER_BYTES)], plan.vocab_size
        )
        result = train_base_on(
            training,
            held_out,
            tokenizer,
            folder,
            plan.training,
            name=plan.name,
            device=preset.device,
        )
        row |= {"bits_per_byte": result.bits_per_byte, "tokens_seen": result.tokens_seen}
        row["held_out_packages"] = ", ".join(sorted({d.name.partition("/")[0] for d in held_out}))
    else:
        training, held_out = split_held_out(standard_library_documents(plan.name))
    lm = place.load(plan)
    wanted = {
        "training": (training, preset.windows, preset.window),
        "held_out": (held_out, 2 * preset.prompts, preset.prompt),
    }
    windows = {side: _windows(lm, *cut) for side, cut in wanted.items()}
    write_tensors(folder / "text.safetensors", windows)
    parameters = sum(weight.numel() for weight in lm.model.parameters())
    return [
        row
        | {
            "parameters": parameters,
            "vocab_size": lm.vocab_size,
            "peak_bytes": peak_memory(lm.device),
        }
    ]


def train_all_heads(place: Workplace, plan: BasePlan) -> list[dict]:
    """Distillation, then acceptance from there, every head on the same windows in the same order;
    what a step of each costs.
    """
    preset, lm = place.preset, place.load(plan)
    settings = head_settings(preset)
    folders = [place.head_folder(plan, s) for s in settings]
    # The same number of own samples as of windows of text: the law decoding meets, and its variety.
    tokens = torch.cat([_own_samples(place, plan, lm), place.text(plan, "training")])
    first = train_heads(lm, settings, [f / "distilled" for f in folders], tokens=tokens)
    seconds = preset.head_seconds and preset.head_seconds / 2
    second = [
        replace(s, objective="acceptance", seconds=seconds, learning_rate=s.learning_rate / 2)
        for s in settings
    ]
    heads = train_heads(lm, second, folders, tokens=tokens, starts=first)
    return [
        {"base": plan.name, "head": folder.name}
        | head_shape(head)
        | _step_cost(place, lm, head, tokens)
        for folder, head in zip(folders, heads, strict=True)
    ]


def head_settings(preset: Preset) -> list[HeadTrainingSettings]:
    """One per horizon, rank and kind, equal in everything else."""
    shared = HeadTrainingSettings(
        width=preset.head_width,
        blocks=preset.head_blocks,
        steps=max(preset.head_steps, 1),
        seconds=preset.head_seconds,
        rows=preset.rows,
        length=preset.window,
        precision="float32",
    )
    shapes = itertools.product(preset.horizons, preset.ranks, (False, True))
    return [replace(shared, horizon=n, rank=r, anchored=anchored) for n, r, anchored in shapes]


def time_calls(place: Workplace, plan: BasePlan) -> list[dict]:
    """Seconds per cycle of every head and of plain decoding, before any acceptance is known: the
    latency model's data.
    """
    lm = place.load(plan)
    prompt = place.text(plan, "held_out")[0]
    rows = []
    for name, head in [("plain", None), *place.heads(plan, lm)]:
        speculative_generate(lm, head, prompt, max_new_tokens=8)
        stats = speculative_generate(
            lm, head, prompt, max_new_tokens=min(_TIMED_TOKENS, place.preset.new_tokens)
        ).stats
        seconds = sum(stats.cycle_seconds.values())
        rows.append(
            {"base": plan.name, "head": name, "call_seconds": seconds}
            | (head_shape(head) if head else {})
        )
    return rows


def fit_latency(calls: pd.DataFrame) -> LatencyModel:
    """Least squares with times of at least 0 over the measured calls."""
    heads = calls[calls["head"] != "plain"]
    plain = float(calls.loc[calls["head"] == "plain", "call_seconds"].iloc[0])
    columns = (heads[name].tolist() for name in ("horizon", "rank", "call_seconds"))
    return LatencyModel.fitted(plain, *columns)


def forecast_tokens(place: Workplace, plan: BasePlan, temperature: float) -> list[dict]:
    """Tokens per call of every head at one temperature, from texts that the base model writes after
    held-out prompts.
    """
    preset, lm = place.preset, place.load(plan)
    prompts = list(place.text(plan, "held_out")[: preset.prompts])
    how: dict[str, Any] = {"new_tokens": preset.new_tokens, "temperature": temperature}
    texts = plain_texts(lm, prompts, seed=1, **how)
    rows = decode_beside_forecast(lm, place.heads(plan, lm), texts=texts, **how)
    return [{"base": plan.name, "temperature": temperature} | row for row in rows]


def measure_acceptance(place: Workplace, plan: BasePlan, temperature: float) -> list[dict]:
    """Tokens per call of every head over all prompts the forecast has not seen, in one batch."""
    preset, lm = place.preset, place.load(plan)
    prompts = list(place.text(plan, "held_out")[preset.prompts :])
    how: dict[str, Any] = {"new_tokens": preset.new_tokens, "temperature": temperature}
    rows = decode_beside_forecast(lm, place.heads(plan, lm), prompts=prompts, seed=2, **how)
    return [{"base": plan.name, "temperature": temperature} | row for row in rows]


def decode(place: Workplace, plan: BasePlan, temperature: float, batch: int) -> list[dict]:
    """Transformers' own generation, the loop without drafts and every head in turn, on other
    held-out prompts.
    """
    preset, lm = place.preset, place.load(plan)
    prompts = itertools.cycle(place.text(plan, "held_out")[preset.prompts :])
    turns = [list(itertools.islice(prompts, batch)) for _ in range(preset.rounds + 1)]
    how: dict[str, Any] = {"new_tokens": preset.new_tokens, "temperature": temperature}
    rows = decode_in_turns(lm, dict(place.heads(plan, lm)), turns, **how)
    key = {"base": plan.name, "temperature": temperature, "batch": batch}
    return [key | row for row in rows]


def _step_cost(
    place: Workplace, lm, head: DraftHead, tokens: Tensor, repeats: int = 3
) -> dict[str, float]:
    """Median seconds of forward and backward pass of one head on one batch, and the memory they
    take.
    """
    batch = tokens[: place.preset.rows].to(lm.device)
    hidden, times = lm.hidden_states(batch).float(), []
    head.requires_grad_(True)
    for _ in range(repeats):
        peak_memory(lm.device)
        begun = time.perf_counter()
        head_loss(head, hidden, batch, lm.unembed).loss.backward()
        peak = peak_memory(lm.device)
        head.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    head.requires_grad_(False)
    return {"step_seconds": statistics.median(times), "step_peak_bytes": peak}


def _own_samples(place: Workplace, plan: BasePlan, lm: HuggingFaceLanguageModel) -> Tensor:
    file = place.base_folder(plan) / "own.safetensors"
    if not file.exists():
        count, length = place.preset.windows, place.preset.window
        parts = [
            lm.sample_tokens(min(512, count - i), length, seed=i) for i in range(0, count, 512)
        ]
        write_tensors(file, {"tokens": torch.cat(parts)})
    return load_file(file)["tokens"]


def _windows(
    lm: HuggingFaceLanguageModel, documents: list[Document], count: int, length: int
) -> Tensor:
    """So many windows, spread over the documents."""
    found: list[Tensor] = []
    per_document = max(2 * count // max(len(documents), 1), 1)
    for document in documents:
        ids = lm.encode_document(document.text)
        cuts = ids[: len(ids) // length * length].view(-1, length)
        found += list(cuts[:: max(len(cuts) // per_document, 1)][:per_document])
    if len(found) < count:
        raise ValueError(
            f"the text holds {len(found)} windows of {length} tokens: {count} are needed"
        )
    return torch.stack([found[i] for i in torch.linspace(0, len(found) - 1, count).long().tolist()])


def _at_most(documents: list[Document], most_bytes: int) -> list[Document]:
    """A beginning of the documents, spread by every k-th."""
    step = max(sum(len(d.text) for d in documents) // max(most_bytes, 1), 1)
    return documents[::step]
