"""The order of a validation, what of it is done already, and when to stop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from cpmtp.joint_distribution.progress import progress_bar
from cpmtp.pretrained.loading import usable_device
from cpmtp.validation import checks, stages
from cpmtp.validation.presets import Preset
from cpmtp.validation.stages import Workplace
from cpmtp.whole_files import require_folder, write_parquet, write_text

STAGES = ("base", "heads", "forecast", "decode", "report")


@dataclass(frozen=True)
class Validation:
    """How far a validation is.

    Attributes
    ----------
    folder : Path
        Its ``results`` folder holds the tables and the report: everything worth carrying away.
    finished : bool
        Whether the stages asked for are done; if not, the time was over, and the same call goes on.
    missing : tuple of str
        What is still to be done.
    """

    folder: Path
    finished: bool
    missing: tuple[str, ...]

    @property
    def results(self) -> Path:
        """Where the summary, the tables and the report are."""
        return self.folder / "results"


@dataclass(frozen=True)
class _Task:
    """A part of a table, computed in one go."""

    stage: str
    table: str
    name: str
    rows: Callable[[], list[dict]]


def validate(
    preset: Preset,
    folder: str | Path,
    *,
    stage: str | None = None,
    budget_seconds: float | None = None,
) -> Validation:
    """Train a base model and heads, forecast what they earn, decode, measure, and report.

    Every part lies on disk when it is done and is not computed again; trainings go on from their
    checkpoints.

    Parameters
    ----------
    preset : Preset
        Of `PRESETS`, or one of your own.
    folder : path
        The validation's state; one folder per preset.
    stage : {"base", "heads", "forecast", "decode", "report"}, optional
        Only this one, those before it being done; default: all.
    budget_seconds : float, optional
        No part is begun after so many seconds.

    Raises
    ------
    ValueError
        If the stage is unknown, the one before it is not done, the folder holds another preset's
        state, or the preset's device is not there.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: choose one of {', '.join(STAGES)}")
    on_cuda = preset.device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(
            f"the preset {preset.name!r} runs on a CUDA device, and there is none: see "
            "docs/results_gpu.md, or give --device cpu"
        )
    usable_device(preset.device)
    if budget_seconds is not None and not budget_seconds >= 0:
        raise ValueError(f"budget_seconds {budget_seconds}: expected a number of at least 0")
    begun = time.monotonic()
    require_folder(folder)
    place = Workplace(preset, Path(folder))
    _claim(place)
    wanted = [task for task in _tasks(place) if stage in (None, task.stage)]
    _require_earlier(place, stage)
    torch.set_float32_matmul_precision("high" if on_cuda else "highest")
    bar = progress_bar(len(wanted), "part")
    for task in wanted:
        bar.set_postfix_str(f"{task.stage}: {task.table} {task.name}")
        if not _part(place, task).exists():
            if budget_seconds is not None and time.monotonic() - begun > budget_seconds:
                break
            _run(place, task)
        bar.update()
    bar.close()
    missing = tuple(
        f"{task.table} {task.name}" for task in wanted if not _part(place, task).exists()
    )
    if not missing and stage in (None, "report"):
        _report(place)
    return Validation(place.folder, not missing, missing)


def _tasks(place: Workplace) -> Iterator[_Task]:
    preset = place.preset
    main, small = preset.bases[0], preset.bases[-1]
    for plan in preset.bases:
        yield _Task("base", "bases", plan.name, partial(stages.train_base_model, place, plan))
    for plan in preset.bases:
        yield _Task("heads", "heads", plan.name, partial(stages.train_all_heads, place, plan))
    yield _Task("forecast", "calls", main.name, partial(stages.time_calls, place, main))
    for temperature in preset.temperatures:
        made = partial(stages.forecast_tokens, place, main, temperature)
        yield _Task("forecast", "forecast", f"{main.name}-T{temperature:g}", made)
    for context in range(min(preset.prompts, 4)):
        yield _Task(
            "forecast",
            "estimates",
            f"{small.name}-{context}",
            partial(checks.check_estimates, place, small, context),
        )
    for temperature in preset.temperatures:
        made = partial(stages.measure_acceptance, place, main, temperature)
        yield _Task("decode", "acceptance", f"{main.name}-T{temperature:g}", made)
        for batch in preset.batches:
            made = partial(stages.decode, place, main, temperature, batch)
            yield _Task("decode", "decoding", f"{main.name}-T{temperature:g}-b{batch}", made)
    for seed in range(preset.law_seeds):
        yield _Task(
            "decode", "law", f"{small.name}-{seed}", partial(checks.check_law, place, small, seed)
        )
    for width in preset.widths:
        yield _Task("decode", "overhead", str(width), partial(checks.time_width, place, width))


def _part(place: Workplace, task: _Task) -> Path:
    return place.folder / "parts" / f"{task.table}-{task.name}.parquet"


def _run(place: Workplace, task: _Task) -> None:
    begun, path = time.perf_counter(), _part(place, task)
    table = pd.DataFrame(task.rows())
    table["part_seconds"] = time.perf_counter() - begun
    write_parquet(path, table)


def _claim(place: Workplace) -> None:
    settings = json.dumps(asdict(place.preset), indent=2, sort_keys=True)
    path = place.folder / "preset.json"
    if path.exists() and path.read_text("utf-8") != settings:
        raise ValueError(
            f"{str(place.folder)!r} holds a validation of other settings: choose another folder "
            "or delete it"
        )
    write_text(path, settings)


def _require_earlier(place: Workplace, stage: str | None) -> None:
    before = STAGES[: STAGES.index(stage)] if stage else ()
    for task in _tasks(place):
        if task.stage in before and not _part(place, task).exists():
            raise ValueError(
                f"stage {stage!r} needs {task.stage!r} first ({task.table} {task.name} is missing)"
            )


def _report(place: Workplace) -> None:
    from cpmtp.validation.summary import write_results  # figures are drawn here only

    tables: dict[str, list[pd.DataFrame]] = {}
    for task in _tasks(place):
        tables.setdefault(task.table, []).append(pd.read_parquet(_part(place, task)))
    write_results(
        {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}, place
    )
