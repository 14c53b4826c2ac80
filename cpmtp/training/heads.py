"""Training of learned heads on a frozen base model: one pass of the base serves all heads of a
comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn

from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.losses import HeadLoss, head_loss
from cpmtp.heads.target_laws import TargetLaws
from cpmtp.joint_distribution.given import as_language_model, as_windows
from cpmtp.joint_distribution.habits import refuse_unknown
from cpmtp.joint_distribution.progress import progress_bar
from cpmtp.language_model import sample_sequences
from cpmtp.training.head_settings import SHAPE, HeadTrainingSettings
from cpmtp.training.kept_states import KeptStates
from cpmtp.training.loop import Batch, Run, Schedule, train
from cpmtp.training.muon import Muon
from cpmtp.training.new_models import locally_seeded
from cpmtp.whole_files import require_folder, write_tensors, write_text

_SAMPLED_AT_ONCE = 128
_TRUNK = ("enter", "blocks", "step")  # whose matrices Muon trains, with the maps
# Components begin with one map of a position and this share of each one's own: so they learn what
# all of them need faster (`data/studies/learning_rank`).
APART = 0.1
_METRICS = "step,seconds,loss,tokens_per_call"


def train_head(
    lm: HiddenStateLanguageModel,
    settings: HeadTrainingSettings = HeadTrainingSettings(),
    *,
    out: str | Path | None = None,
    tokens: Any = None,
    start: DraftHead | None = None,
    callback: Callable[[int, HeadLoss], None] | None = None,
    checkpoint_seconds: float = 60.0,
    **changes: Any,
) -> DraftHead:
    """Train a head for a base model, whose weights stay as they are.

    Under ``accelerate launch`` the windows of a batch are shared out over the processes.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
        The base model.
    settings : HeadTrainingSettings
    out : path, optional
        Folder for the head, `metrics.csv` and, while training, the checkpoint; a killed run started
        again with the same folder goes on from there, to the same weights.
    tokens : (count, length) long tensor or sequence of str, optional
        Windows of text, or texts to cut into them; default: drawn from the base model itself, which
        is what decoding meets.
    start : DraftHead, optional
        Begin with its weights.
    callback : callable, optional
        Called with (step, HeadLoss) after every step.
    changes
        Fields of the settings to replace, as in
        ``train_head(lm, form="markov", transition_rank=64, horizon=4, positions=2_000_000)``.

    Raises
    ------
    ValueError
        If a setting is out of range, a window exceeds the model's, a checkpoint is of other
        settings, or the loss is not finite (the last checkpoint is kept).
    """
    lm = as_language_model(lm)
    names = [field.name for field in fields(HeadTrainingSettings)]
    refuse_unknown("train_head", changes, names)
    settings = replace(settings, **changes)
    if tokens is not None:
        rows = [tokens] if isinstance(tokens, str) else tokens
        texts = isinstance(rows, Sequence) and all(isinstance(row, str) for row in rows)
        tokens = windows_of_text(lm, rows, settings.length) if texts else as_windows(rows, lm)
    folders = None if out is None else [Path(out)]
    return train_heads(
        lm,
        [settings],
        folders,
        tokens=tokens,
        starts=None if start is None else [start],
        callback=callback and (lambda _, step, loss: callback(step, loss)),
        checkpoint_seconds=checkpoint_seconds,
    )[0]


def train_heads(
    lm: HiddenStateLanguageModel,
    settings: Sequence[HeadTrainingSettings],
    folders: Sequence[Path] | None = None,
    *,
    tokens: Int[Tensor, "count length"] | None = None,
    starts: Sequence[DraftHead] | None = None,
    callback: Callable[[int, int, HeadLoss], None] | None = None,
    checkpoint_seconds: float = 60.0,
) -> list[DraftHead]:
    """Several heads side by side on the same windows in the same order; parameters as for
    `train_head`.

    The settings may differ in what describes a head and its loss, not in the data or the budget.
    `callback` gets the head's index first.
    """
    settings = [setting.on(lm.device.type) for setting in settings]
    plan = settings[0]
    shared = ("steps", "positions", "seconds", "rows", "length", "sequences", "seed")
    if any(getattr(s, name) != getattr(plan, name) for s in settings for name in shared):
        raise ValueError(
            f"heads trained side by side share {', '.join(shared)}: train the others apart"
        )
    _check_window(lm, plan)
    for setting in settings:
        if isinstance(setting.vocabulary, int) and setting.vocabulary > lm.vocab_size:
            raise ValueError(f"vocabulary {setting.vocabulary}: {lm.vocab_size} tokens are all")
    for folder in folders or ():
        _check_folder(folder)
    for setting, first in zip(settings, starts or (), strict=False):
        _check_start(lm, setting, first)
    accelerator = Accelerator(cpu=lm.device.type == "cpu")
    for folder in folders or ():
        folder.mkdir(parents=True, exist_ok=True)
    if tokens is None:
        tokens = _own_samples(lm, plan, folders[0] if folders else None)
    settings = [_with_ids(setting, tokens, lm.vocab_size) for setting in settings]
    nothing = [None] * len(settings)
    runs = [
        _run_of(lm, setting, folder, start=start, data=tokens, accelerator=accelerator)
        for setting, folder, start in zip(
            settings, folders or nothing, starts or nothing, strict=True
        )
    ]

    def recorded(index: int, run: Run, out: HeadLoss) -> dict[str, str]:
        loss, tokens_per_call = out.loss.item(), out.tokens_per_call
        run.metrics.append(f"{run.step},{run.seconds:.2f},{loss:.6f},{tokens_per_call:.5f}")
        if callback:
            callback(index, run.step, out)
        return {"loss": f"{loss:.3f}", "tokens_per_call": f"{tokens_per_call:.3f}"}

    states = KeptStates(
        lm,
        tokens,
        rows=plan.rows,
        seed=plan.seed,
        share=slice(accelerator.process_index, None, accelerator.num_processes),
        steps=plan.planned_steps if plan.seconds is None else None,
    )
    train(
        runs,
        partial(_batch, lm, states),
        Schedule(plan.planned_steps, warmup=plan.warmup, decay=0.5, seconds=plan.seconds),
        record=recorded,
        checkpoint_seconds=checkpoint_seconds,
    )
    return [_finished(run, setting) for run, setting in zip(runs, settings, strict=True)]


def windows_of_text(
    lm: TextLanguageModel, texts: Sequence[str], length: int
) -> Int[Tensor, "count length"]:
    """Texts cut into windows of `length` tokens; what is left at a text's end is dropped."""
    # each (windows, length)
    parts = [
        ids[: len(ids) // length * length].view(-1, length)
        for ids in map(lm.encode_document, texts)
    ]
    # (windows, length)
    windows = torch.cat(parts) if parts else torch.empty(0, length, dtype=torch.long)
    if not len(windows):
        raise ValueError(
            f"no text is {length} tokens long: give longer files or shorter windows (length, "
            "--length)"
        )
    return windows


def most_frequent(tokens: Int[Tensor, "*windows"], count: int, vocab_size: int) -> tuple[int, ...]:
    """The ids that come most often, ascending; of equally frequent ones the lowest.

    Examples
    --------
    >>> most_frequent(torch.tensor([[3, 1, 3], [0, 1, 3]]), 2, vocab_size=5)
    (1, 3)
    """
    counts = torch.bincount(tokens.flatten().long(), minlength=vocab_size)
    order = counts.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _with_ids(
    settings: HeadTrainingSettings, tokens: Tensor, vocab_size: int
) -> HeadTrainingSettings:
    """The settings with the ids that a number of them stands for."""
    count = settings.vocabulary
    if not isinstance(count, int):
        return settings
    return replace(settings, vocabulary=most_frequent(tokens, count, vocab_size))


class _Objective(nn.Module):
    """The loss as a module's forward pass, which is what data-parallel wrappers hook into."""

    def __init__(self, head: DraftHead, settings: HeadTrainingSettings):
        super().__init__()
        self.head, self._settings = head, settings

    def forward(self, hidden: Tensor, tokens: Tensor, laws: TargetLaws) -> HeadLoss:
        goal = self._settings
        low = goal.precision == "bfloat16"
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=low):
            return head_loss(
                self.head, hidden, tokens, laws, objective=goal.objective, balance=goal.balance
            )


def _run_of(
    lm,
    settings: HeadTrainingSettings,
    folder: Path | None,
    *,
    start: DraftHead | None,
    data: Tensor,
    accelerator: Accelerator,
) -> Run[DraftHead]:
    """A new head under training, or one that goes on from the folder's checkpoint."""
    head = _new_head(lm, settings)
    if start is not None:
        try:
            head.load_state_dict(start.state_dict())
        except RuntimeError:
            raise ValueError(
                f"the head to begin with, of {start.base!r}, does not go with {lm.name!r}: leave "
                "it out"
            ) from None
    return Run(
        head,
        _Objective(head, settings),
        _optimisers(head, settings),
        checkpoint=folder and folder / "checkpoint.safetensors",
        key=_resume_key(lm, settings, data),
        accelerator=accelerator,
    )


def _batch(lm, states: KeptStates, step: int) -> Batch:
    """One process's share of a step's windows, and the base model's states and laws for all
    heads.
    """
    windows, hidden, tokens = states.batch(step)
    return Batch(windows, (hidden, tokens, TargetLaws(hidden, lm.unembed)))


def _finished(run: Run[DraftHead], settings: HeadTrainingSettings) -> DraftHead:
    """The trained head, written with what is known of its training where there is a folder."""
    head = run.model
    head.eval().requires_grad_(False)
    if run.checkpoint and run.writes:
        folder = run.checkpoint.parent
        write_text(folder / "metrics.csv", "\n".join([_METRICS, *run.metrics]) + "\n")
        recipe = {
            "settings": asdict(settings),
            "steps": run.step,
            "seconds": round(run.seconds, 1),
            "torch": torch.__version__,
        }
        write_text(folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")
        head.save_pretrained(folder)
        run.checkpoint.unlink(missing_ok=True)
    return head


def _own_samples(lm, plan: HeadTrainingSettings, folder: Path | None) -> Tensor:
    file = folder and folder / "samples.safetensors"
    key = _samples_key(lm, plan)
    if file and file.exists():
        stored = load_file(file)
        if key in stored:
            return stored[key].long()
    sizes = [
        min(_SAMPLED_AT_ONCE, plan.sequences - i)
        for i in range(0, plan.sequences, _SAMPLED_AT_ONCE)
    ]
    bar = progress_bar(plan.sequences, "window", desc="samples")
    parts = []
    for i, size in enumerate(sizes):
        parts.append(sample_sequences(lm, size, plan.length, seed=plan.seed * 1_000_003 + i))
        bar.update(size)
    bar.close()
    tokens = torch.cat(parts)
    if file:
        write_tensors(file, {key: tokens.to(torch.int32)})
    return tokens


def _samples_key(lm, plan: HeadTrainingSettings) -> str:
    return f"{lm.fingerprint[:16]}.{plan.seed}.{plan.sequences}.{plan.length}"


def _new_head(lm, settings: HeadTrainingSettings, apart: float | None = APART) -> DraftHead:
    """A head to be trained; None: its components' maps are drawn one by one."""
    shape = {name: getattr(settings, name) for name in SHAPE}
    with locally_seeded(settings.seed):
        head = DraftHead(
            hidden_size=lm.unembedding.shape[1],
            vocab_size=lm.vocab_size,
            base=lm.name,
            base_sha256=lm.fingerprint,
            tokenizer_sha256=lm.tokenizer_fingerprint,
            **shape,
        )
    if head.rank > 1 and apart is not None:
        with torch.no_grad():
            maps = head.maps.unflatten(0, (head.drafted, head.rank))  # (drafted, rank, d, width)
            head.maps.copy_((maps[:, :1] + apart * maps).flatten(0, 1))
    return head.to(lm.device).attach(lm)


def _optimisers(head: DraftHead, settings: HeadTrainingSettings) -> list[torch.optim.Optimizer]:
    rate, dtype = settings.learning_rate, getattr(torch, settings.precision)
    named = dict(head.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and name.split(".")[0] in _TRUNK]
    others = [p for p in named.values() if not any(p is m for m in (*matrices, head.maps))]
    maps = {"params": [head.maps], "members": head.rank}
    groups = [maps, {"params": matrices}] if matrices else [maps]
    muon = Muon(groups, 2 * rate, dtype=dtype)
    others = [p for p in others if p.requires_grad]
    if not others:
        return [muon]
    return [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0), muon]


def _resume_key(lm, settings: HeadTrainingSettings, data: Tensor) -> str:
    first = data[:: max(len(data) // 64, 1)].sum().item()
    return json.dumps(
        {"base": lm.fingerprint, "data": [*data.shape, first], **asdict(settings)}, sort_keys=True
    )


def _check_folder(folder: Path) -> None:
    """A head does not overwrite a model."""
    config = require_folder(folder) / "config.json"
    if config.is_file() and "model_type" in json.loads(config.read_text("utf-8")):
        raise ValueError(f"the folder {str(folder)!r} holds a model: choose another for the head")


def _check_start(lm, settings: HeadTrainingSettings, start: DraftHead) -> None:
    """A head to begin with has the sizes of the one that is asked for."""
    asked = asdict(settings.sizes) | {"anchored": settings.anchored, "vocab_size": lm.vocab_size}
    there = {name: getattr(start, name) for name in asked}
    asked |= {"blocks": settings.blocks, "width": settings.width or start.hidden_size}
    there |= {"blocks": len(getattr(start, "blocks", ())), "width": start.maps.shape[-1]}
    for name, value in asked.items():
        if there[name] != value:
            raise ValueError(
                f"the head to begin with has {name} {there[name]} where {value} is asked for: give "
                "the sizes it has, or leave it out"
            )


def _check_window(lm, plan: HeadTrainingSettings) -> None:
    if lm.max_context is not None and plan.length > lm.max_context:
        raise ValueError(
            f"windows of {plan.length} tokens exceed the model's {lm.max_context} positions: "
            "shorten them (length, --length)"
        )
