"""Training: base models, from the text every CPython carries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from cpmtp.corpora import Document, corpus_hash, split_held_out, standard_library_documents
from cpmtp.joint_distribution.habits import knows_habits
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.base_evaluation import accepted_line_share, bits_per_byte, xz_bits_per_byte
from cpmtp.training.loop import Batch, Run, Schedule, drawn_windows, train
from cpmtp.training.muon import Muon
from cpmtp.training.new_models import new_llama, train_character_tokenizer
from cpmtp.whole_files import require_folder, write_text


@knows_habits
@dataclass(frozen=True)
class BaseTrainingSettings:
    """What defines a base model's training; two equal settings give the same weights on one
    machine.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    windows_per_step, window : int
        Windows in a batch and tokens in a window; `window` is the model's maximal context, too.
    width, layers : int
        Hidden size (a multiple of 96) and number of transformer blocks.
    merges : int
        Byte-pair merges on top of the 97 characters.
    learning_rate : float
        Peak rate of both optimisers (Muon for the blocks' matrices with its update scaled to
        AdamW's size, AdamW for the rest); linear warm-up, constant, then linear decay to zero over
        the last `decay` of the steps.
    seconds : float, optional
        Train for this many seconds instead of `steps`.
    bfloat16, compiled : bool
        Forward and backward pass in mixed precision, through `torch.compile`: what a GPU wants.
    """

    steps: int = 3000
    windows_per_step: int = 8
    window: int = 512
    width: int = 192
    layers: int = 4
    merges: int = 5
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup: int = 50
    decay: float = 0.4
    held_out: float = 0.05
    seed: int = 0
    seconds: float | None = None
    bfloat16: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class BaseTrainingResult:
    """What a base training arrived at.

    Attributes
    ----------
    folder : Path
        Where model, tokenizer and `recipe.json` are.
    bits_per_byte : float
        On the held-out documents.
    tokens_seen : int
        Tokens the optimiser was shown.
    """

    folder: Path
    bits_per_byte: float
    tokens_seen: int


@knows_habits
def train_base(
    domain: str,
    out: str | Path,
    settings: BaseTrainingSettings = BaseTrainingSettings(),
    *,
    checkpoint_seconds: float = 120.0,
    callback: Callable[[int, float], None] | None = None,
) -> BaseTrainingResult:
    """Train a small Llama-architecture model on the standard library's code or prose.

    A run killed at any moment goes on from its last checkpoint when it is started again with the
    same folder. The number of steps may differ then, as long as the decay of the learning rate has
    not begun.

    Parameters
    ----------
    domain : {"code", "prose"}
    out : path
        Folder for model, tokenizer, `recipe.json` and, while training, the checkpoint.
    callback : callable, optional
        Called with (step, loss in nats per token) after every step.

    Raises
    ------
    ValueError
        If `domain` is unknown, or the checkpoint in `out` belongs to other settings or another
        corpus.
    """
    require_folder(out)
    documents = standard_library_documents(domain)
    training, held_out = split_held_out(documents, settings.held_out)
    tokenizer = train_character_tokenizer([d.text for d in training], settings.merges)
    return train_base_on(
        training,
        held_out,
        tokenizer,
        out,
        settings,
        name=domain,
        checkpoint_seconds=checkpoint_seconds,
        callback=callback,
    )


def train_base_on(
    training: list[Document],
    held_out: list[Document],
    tokenizer: PreTrainedTokenizerFast,
    out: str | Path,
    settings: BaseTrainingSettings = BaseTrainingSettings(),
    *,
    name: str,
    device: str = "cpu",
    checkpoint_seconds: float = 120.0,
    callback: Callable[[int, float], None] | None = None,
) -> BaseTrainingResult:
    """The same on documents and with a tokenizer of one's own; `name` goes into the recipe."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    ids = encode_documents(tokenizer, training)
    model = new_llama(
        len(tokenizer),
        width=settings.width,
        layers=settings.layers,
        window=settings.window,
        seed=settings.seed,
    )
    model = model.to(device)
    key = _resume_key(name, settings, training)
    checkpoint = folder / "checkpoint.safetensors"
    objective, optimisers = _NextTokens(model, settings), _optimisers(model, settings)
    run = Run(model.train(), objective, optimisers, checkpoint=checkpoint, key=key)

    def recorded(_: int, run: Run, out: _Loss) -> dict[str, str]:
        if callback:
            callback(run.step, out.loss.item())
        return {"nats_per_token": f"{out.loss.item():.3f}"}

    train(
        [run],
        partial(_batch, ids, settings),
        _schedule(settings),
        record=recorded,
        checkpoint_seconds=checkpoint_seconds,
    )
    _save(model, tokenizer, folder)
    # Half precision is what is shipped, so that is what is measured.
    model = model.float()
    bits = bits_per_byte(model, tokenizer, held_out)
    seen = run.step * settings.windows_per_step * settings.window
    recipe = _recipe(name, settings, [*training, *held_out], held_out) | {
        "parameters": model.num_parameters(),
        "tokens_seen": seen,
        "training_seconds": round(run.seconds, 1),
        "held_out_bits_per_byte": round(bits, 4),
        "held_out_xz_bits_per_byte": round(xz_bits_per_byte(held_out), 4),
    }
    recipe |= _sampled(model, tokenizer, held_out, settings) if name == "code" else {}
    write_text(folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return BaseTrainingResult(folder, bits, seen)


def encode_documents(tokenizer, documents: list[Document]) -> Tensor:
    """All documents as one sequence of ids, each followed by the end-of-text token."""
    pieces = tokenizer([d.text for d in documents], add_special_tokens=False).input_ids
    return torch.tensor(
        [i for piece in pieces for i in (*piece, tokenizer.eos_token_id)], dtype=torch.int32
    )


@dataclass(frozen=True)
class _Loss:
    """Mean cross-entropy of the next tokens, nats."""

    loss: Tensor


class _NextTokens(nn.Module):
    """The loss as a module's forward pass."""

    def __init__(self, model, settings: BaseTrainingSettings):
        super().__init__()
        self._forward = torch.compile(model) if settings.compiled else model
        self._device, self._bfloat16 = model.device, settings.bfloat16

    def forward(self, tokens: Int[Tensor, "rows time"]) -> _Loss:
        tokens = tokens.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            logits = self._forward(input_ids=tokens, use_cache=False).logits
            # (rows, time - 1, vocab) and (rows, time - 1), as one row each
            predicted, following = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            return _Loss(functional.cross_entropy(predicted.float(), following))


def _optimisers(model, settings: BaseTrainingSettings) -> list[torch.optim.Optimizer]:
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    rate, decay = settings.learning_rate, settings.weight_decay
    return [
        Muon(matrices, rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def _batch(ids: Tensor, settings: BaseTrainingSettings, step: int) -> Batch:
    """Windows at random offsets."""
    starts = drawn_windows(
        len(ids) - settings.window, settings.windows_per_step, seed=settings.seed, step=step
    )
    tokens = ids[starts[:, None] + torch.arange(settings.window)].long()  # (rows, window)
    return Batch(starts.tolist(), (tokens,))


def _schedule(settings: BaseTrainingSettings) -> Schedule:
    return Schedule(settings.steps, settings.warmup, settings.decay, settings.seconds)


def _save(model, tokenizer, folder: Path) -> None:
    model.eval()
    # Half precision halves the file; what is loaded from it is the model, in every dtype it is run
    # in.
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sampled(model, tokenizer, held_out: list[Document], settings: BaseTrainingSettings) -> dict:
    """Share of lines that are Python to `tokenize`: of what the model writes, and of the held-out
    files.
    """
    lm = HuggingFaceLanguageModel(model, tokenizer)
    tokens = lm.sample_tokens(16, settings.window, seed=settings.seed)
    # A sample ends where its window does, seldom at the end of a line.
    texts = [lm.decode(row[row != tokenizer.eos_token_id]).rpartition("\n")[0] for row in tokens]
    return {
        "sampled_lines_accepted": round(accepted_line_share("\n".join(texts)), 4),
        "held_out_lines_accepted": round(
            accepted_line_share("\n".join(d.text for d in held_out)), 4
        ),
    }


def _resume_key(domain: str, settings: BaseTrainingSettings, training: list[Document]) -> str:
    fixed = {k: v for k, v in asdict(settings).items() if k not in ("steps", "decay")}
    return json.dumps({"domain": domain, "corpus": corpus_hash(training), **fixed}, sort_keys=True)


def _recipe(
    domain: str, settings: BaseTrainingSettings, documents: list[Document], held_out: list[Document]
) -> dict:
    return {
        "domain": domain,
        "settings": asdict(settings),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "corpus_sha256": corpus_hash(documents),
        "documents": len(documents),
        "bytes": sum(len(d.text.encode()) for d in documents),
        "held_out_documents": [d.name for d in held_out],
        "held_out_bytes": sum(len(d.text.encode()) for d in held_out),
    }
