"""The study: every (model, context, horizon, rank, method) as one row of a table; resumable, on any executor."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from cpmtp.acceptance import acceptance_profiles
from cpmtp.decomposition.fitting import FitResult, fit
from cpmtp.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.study_plan import StudySettings, StudyUnit, open_language_model, plan_study, study_cells

SCHEMA_VERSION = 1
RULES = ("token", "block", "coupling")
FIRST_TOKENS = ("target", "draft")
TIMING_COLUMNS = ("joint_seconds", "fit_seconds")
# One thread each; and memory that is freed stays with the process: fits take and drop tensors of a joint's size all the time,
# and fetching fresh pages for each took half of the evaluation's time and a tenth of the fits' (glibc only).
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
}
_PACKAGES = ("cpmtp", "torch", "transformers", "tensorly", "numpy", "scipy", "pandas", "pyarrow")


def run_study(
    settings: StudySettings,
    out: str | Path,
    executor: Executor | None = None,
    *,
    workers: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Run a study, or what is left of it, and return its table.

    One row per (model, domain, context, horizon, rank, method). Each context's rows are written to a Parquet part of their own
    as soon as they are there; started again with the same settings and folder, finished contexts are not computed again.

    Parameters
    ----------
    settings : StudySettings
    out : path
        Folder for `manifest.json`, `parts/` and `table.parquet`.
    executor : concurrent.futures.Executor, optional
        Where contexts are computed; default: local processes.
    workers : int, optional
        Number of local processes (default: one per core; 1 stays in this process).
    progress : bool, optional
        Whether to show a bar (default: only on a terminal).

    Raises
    ------
    ValueError
        If a model or corpus cannot be used, a joint would be too large, or `out` holds another study. Nothing is computed then.
    """
    folder = Path(out)
    with _one_thread():
        units, identity = plan_study(settings)
    _open_folder(folder, settings, identity)
    pending = [unit for unit in units if not _part(folder, unit).exists()]
    hidden = not sys.stderr.isatty() if progress is None else not progress
    with tqdm(total=len(units), initial=len(units) - len(pending), unit="context", disable=hidden) as bar:
        for unit, rows in _results(settings, pending, executor, workers):
            _write_parquet(_part(folder, unit), pd.DataFrame(rows))
            bar.update()
    table = pd.concat([pd.read_parquet(_part(folder, unit)) for unit in units], ignore_index=True)
    _write_parquet(folder / "table.parquet", table)
    return table


def read_study(folder: str | Path) -> tuple[pd.DataFrame, dict]:
    """A finished study's table and manifest.

    Raises
    ------
    ValueError
        If the folder holds no finished study.
    """
    folder = Path(folder)
    if not (folder / "table.parquet").is_file() or not (folder / "manifest.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no finished study: run `cpmtp study --out {folder}` first")
    return pd.read_parquet(folder / "table.parquet"), json.loads((folder / "manifest.json").read_text("utf-8"))


def study_unit_rows(settings: StudySettings, unit: StudyUnit) -> list[dict]:
    """All rows of one context: its joint once, then every fit. Never raises for what one cell does."""
    with _one_thread():
        lm = open_language_model(unit.model)
        begun = time.perf_counter()
        try:
            joint = exact_joint(
                lm,
                torch.tensor(unit.token_ids, dtype=torch.long),
                max(settings.horizons),
                temperature=settings.temperature,
                max_bytes=settings.max_bytes,
            )
        except (ValueError, RuntimeError, MemoryError) as error:
            return [_row(settings, unit, cell, error=error) for cell in study_cells(settings)]
        seconds = time.perf_counter() - begun
        rows = []
        for horizon in settings.horizons:
            shorter = joint.marginal(horizon)
            facts = {"joint_seconds": seconds, **_joint_facts(shorter)}
            rows += [_fit_row(settings, unit, shorter, c, facts) for c in study_cells(settings) if c[0] == horizon]
        return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    # Workers of several threads each fight for the cores; and sums of one thread have one order, hence the same bits.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _fit_row(settings, unit: StudyUnit, joint: JointDistribution, cell: tuple[int, int, str], facts: dict) -> dict:
    _, rank, method = cell
    try:
        result = fit(joint, rank, method, restarts=settings.restarts, seed=unit.seed(settings.seed) % 2**31)
        return _row(settings, unit, cell, facts, _fit_facts(result) | _quality(joint, result))
    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        return _row(settings, unit, cell, facts, error=error)


def _row(settings, unit: StudyUnit, cell, *facts: dict, error: Exception | None = None) -> dict:
    horizon, rank, method = cell
    row: dict[str, object] = dict.fromkeys(table_columns(settings), math.nan)
    row |= {"schema_version": SCHEMA_VERSION, "model": unit.model, "domain": unit.domain, "document": unit.document}
    row |= {"context": unit.context, "context_text": unit.text, "context_tokens": len(unit.token_ids)}
    row |= {"horizon": horizon, "rank": rank, "method": method, "temperature": settings.temperature}
    row |= {"restarts": settings.restarts, "status": "ok", "message": ""}
    for some in facts:
        row |= some
    if error is not None:
        row |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    return row


def table_columns(settings: StudySettings) -> list[str]:
    """Names of the table's columns, in order; units are the suffixes, probabilities and counts have none."""
    outcome = [f"tokens_per_call_{rule}_{first}" for rule in RULES for first in FIRST_TOKENS]
    depths = range(1, max(settings.horizons) + 1)
    survival = [f"survival_{rule}_{first}_{k}" for rule in RULES for first in FIRST_TOKENS for k in depths]
    return [
        *("schema_version", "model", "domain", "document", "context", "context_text", "context_tokens", "temperature"),
        *("horizon", "rank", "method", "restarts", "status", "message", "converged", "iterations", "parameters"),
        *("objective", "kl_nats", "total_variation", "relative_frobenius", "hellinger"),
        *("raw_relative_error", "negative_mass", "mass_deficit"),
        *("joint_entropy_nats", "first_token_entropy_nats", "total_correlation_nats"),
        *outcome,
        *survival,
        *TIMING_COLUMNS,
    ]


def _joint_facts(joint: JointDistribution) -> dict:
    entropies = [-torch.special.xlogy(m, m).sum().item() for m in joint.marginals()]
    entropy = joint.entropy().item()
    return {
        "joint_entropy_nats": entropy,
        "first_token_entropy_nats": entropies[0],
        "total_correlation_nats": max(sum(entropies) - entropy, 0.0),
    }


def _fit_facts(result: FitResult) -> dict:
    return {
        "status": result.status,
        "message": result.message,
        "converged": float(result.converged),
        "iterations": float(result.iterations),
        "parameters": float(result.distribution.parameter_count),
        "objective": float(result.objective),
        "raw_relative_error": float(result.raw_relative_error),
        "negative_mass": float(result.negative_mass),
        "mass_deficit": float(result.mass_deficit),
        "fit_seconds": result.seconds,
    }


def _quality(joint: JointDistribution, result: FitResult) -> dict:
    quality = asdict(divergences(joint, result.distribution))
    for first in FIRST_TOKENS:
        for rule, profile in acceptance_profiles(joint, result.distribution, RULES, first_token=first).items():
            quality[f"tokens_per_call_{rule}_{first}"] = profile.tokens_per_call
            for k, survival in enumerate(profile.survival.tolist(), start=1):
                quality[f"survival_{rule}_{first}_{k}"] = survival
    return quality


def _results(settings, units, executor: Executor | None, workers: int | None) -> Iterator[tuple[StudyUnit, list[dict]]]:
    count = min(workers or os.cpu_count() or 1, len(units))
    if executor is None and count <= 1:
        for unit in units:
            yield unit, study_unit_rows(settings, unit)
        return
    with _local_processes(count) if executor is None else _borrowed(executor) as pool:
        futures = {pool.submit(study_unit_rows, settings, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextmanager
def _local_processes(count: int) -> Iterator[Executor]:
    # Spawned workers import the caller's main module, which starts a script without a main guard all over again. They need
    # nothing from it, so an empty one stands in while they start.
    main, environment = sys.modules["__main__"], dict(os.environ)
    os.environ |= _WORKER_ENVIRONMENT
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        sys.modules["__main__"] = types.ModuleType("__main__")
        for _ in range(count):
            pool.submit(_nothing)
        sys.modules["__main__"] = main
        yield pool
    finally:
        sys.modules["__main__"] = main
        os.environ.clear()
        os.environ.update(environment)
        pool.shutdown(cancel_futures=True)


def _nothing() -> None:
    """Starts a worker."""


@contextmanager
def _borrowed(executor: Executor) -> Iterator[Executor]:
    yield executor


def _open_folder(folder: Path, settings: StudySettings, identity: dict) -> None:
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "settings": json.loads(json.dumps(asdict(settings))),
        **identity,
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    path = folder / "manifest.json"
    if path.exists():
        _refuse_other_study(json.loads(path.read_text("utf-8")), manifest, folder)
        return
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    _write_atomically(path, lambda partial: partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8"))


def _refuse_other_study(there: dict, new: dict, folder: Path) -> None:
    compared = ("schema_version", "settings", "models", "corpus_sha256")
    different = [name for name in compared if name != "settings" and there.get(name) != new[name]]
    old = there.get("settings", {})
    different += [
        f"{f.name} ({old.get(f.name)} there, {new['settings'][f.name]} now)"
        for f in fields(StudySettings)
        if old.get(f.name) != new["settings"][f.name]
    ]
    if different:
        raise ValueError(f"{str(folder)!r} holds another study; it differs in {', '.join(different)}: choose another --out")


def _part(folder: Path, unit: StudyUnit) -> Path:
    return folder / "parts" / f"{unit.key}.parquet"


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    _write_atomically(path, lambda partial: table.to_parquet(partial, index=False))


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write(partial)
    os.replace(partial, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
