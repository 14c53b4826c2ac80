"""The study: every (model, context, temperature, horizon, rank, method) as one row of a table;
resumable, on any executor.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.habits import refuse_unknown
from cpmtp.joint_distribution.progress import progress_bar
from cpmtp.study.effort.limits import StudyLimit, read_limit
from cpmtp.study.folder import StudyFolder
from cpmtp.study.models import named_models, several_models
from cpmtp.study.older import completed
from cpmtp.study.plan import StudyUnit, plan_study
from cpmtp.study.rows import domain_bits_per_byte, one_thread
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import joined, packed, rows_to_table, with_best
from cpmtp.study.workers import unit_results


@takes_what_is_given
def run_study(
    settings: StudySettings | None = None,
    out: str | Path | None = None,
    executor: Executor | None = None,
    *,
    models: Any = None,
    texts: Sequence[Any] | None = None,
    workers: int | None = None,
    progress: bool | None = None,
    limit: StudyLimit | None = None,
    callback: Callable[[StudyUnit, pd.DataFrame], None] | None = None,
    **changes: Any,
) -> pd.DataFrame:
    """Run a study, or what is left of it, and return its table.

    One row per (model, domain, context, temperature, horizon, rank, method, anchored). Each
    context's rows are written to a Parquet part of their own as soon as they are there; started
    again with the same settings and folder, finished contexts are not computed again and damaged
    parts are set aside. What fails is a row with ``status`` and ``message``; a context whose worker
    vanished, or whose model or memory was not there three times, is tried again by the next run.
    The column `best` marks the best method's rows (`best_fits` takes them): a mean over all methods
    is nothing that any of them reaches.

    Parameters
    ----------
    settings : StudySettings, optional
        Default: what `changes` say.
    out : path, optional
        Folder for `manifest.json`, `parts/` and `table.parquet`; without it nothing is kept.
    executor : concurrent.futures.Executor, optional
        Where contexts are computed (Dask: ``Client(address).get_executor()``); default: local
        processes.
    models : sequence, optional
        Instead of the settings': names as there, language models of your own, models of
        transformers, alone or in a pair with their tokenizers. Objects are studied in this process.
    texts : sequence of str, optional
        Documents in memory to cut contexts from, instead of files.
    workers : int, optional
        Number of local processes (default: one per core; 1 stays in this process).
    progress : bool, optional
        Whether to show a bar (default: on a terminal and in a notebook).
    limit : StudyLimit, optional
        As much of it as there is time for, see `cpmtp.study.effort.limits.planned_limit`. Contexts
        are taken in turn from all models and domains: less time is a smaller study, and an
        interruption leaves the table of what is finished.
    callback : callable, optional
        Called with each context and its rows as soon as they are there.
    changes
        Fields of the settings to replace: ``run_study(models=[lm], texts=[…], ranks=(1, 4))``.

    Raises
    ------
    ValueError
        If a model or corpus cannot be used, `out` holds another study, or another run is using it.
        Nothing is computed then.
    OSError
        If the finished table cannot be written. What could be kept is kept.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    several = None if models is None else several_models(models)
    objects = [model for model in several or () if not isinstance(model, str)]
    if objects and (executor is not None or (workers or 1) > 1):
        raise ValueError(
            "models that are objects are studied in this process: leave out executor and workers, "
            "or give names of models"
        )
    with named_models(several or ()) as names, _folder(out) as path:
        chosen = _settings(settings, changes | ({"models": names} if several is not None else {}))
        with one_thread():
            units, identity = plan_study(chosen, texts)
        with StudyFolder.opened(path, chosen, identity) as folder:
            if limit is not None:
                units = limit.first_of(units)
                limit.write(path)
            watched = _Watched(progress, limit, callback)
            try:
                parts = _computed(folder, units, executor, 1 if objects else workers, watched)
            except KeyboardInterrupt:
                # What has a limit is a whole study wherever it is stopped.
                kept = [] if limit is None else _finished(folder, units)
                if kept:
                    folder.write_table(_table_of(kept, chosen))
                raise
            table = _table_of(parts, chosen)
            folder.write_table(table)
    return _frame(table)


def _settings(settings: StudySettings | None, changes: dict[str, Any]) -> StudySettings:
    """The settings with these fields changed.

    Raises
    ------
    ValueError
        If there is no such field.
    """
    known = [f.name for f in fields(StudySettings)]
    refuse_unknown("run_study", changes, known)
    return StudySettings(**changes) if settings is None else replace(settings, **changes)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The folder, or one that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="cpmtp-study-") as folder:
        yield Path(folder)


def read_study(folder: str | Path) -> tuple[pd.DataFrame, dict]:
    """A finished study's table and manifest.

    A table of an earlier version gets the columns of this one: `best` is computed, what that
    version could not do yet (anchored drafts, truncated joints) is filled in.

    Raises
    ------
    ValueError
        If the folder holds no finished study.
    """
    folder = Path(folder)
    if not (folder / "table.parquet").is_file() or not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no finished study: run `cpmtp study --out {folder}` first"
        )
    try:
        table = completed(_frame(pq.read_table(folder / "table.parquet")))
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        limit = read_limit(folder)
        return table, manifest | ({"limit": limit} if limit else {})
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"{str(folder)!r} holds a damaged study ({error}): run `cpmtp study --out {folder}` "
            "again"
        ) from error


def _frame(table: pa.Table) -> pd.DataFrame:
    # Columns go over one by one, each given up on the way: the table is never held twice.
    return table.to_pandas(split_blocks=True, self_destruct=True)


@dataclass(frozen=True)
class _Watched:
    """Who watches the work, and when it is over."""

    progress: bool | None
    limit: StudyLimit | None
    callback: Callable[[StudyUnit, pd.DataFrame], None] | None

    def is_over(self, unit: StudyUnit) -> bool:
        """Whether this unit is not to be begun any more."""
        return self.limit is not None and unit.context > 0 and self.limit.is_over

    def tell(self, unit: StudyUnit, table: pa.Table) -> None:
        """What was found of one unit."""
        if self.callback is not None:
            self.callback(unit, with_best(table).to_pandas())


def _computed(
    folder: StudyFolder, units: Sequence[StudyUnit], executor, workers, watched: _Watched
) -> list[bytes]:
    """Every unit's rows in the order of `units`, packed; from the folder or computed now."""
    parts: dict[StudyUnit, bytes | None] = dict.fromkeys(units)
    unwritten: list[tuple[StudyUnit, pa.Table]] = []
    failures = 0
    for unit in units:
        table = folder.read(unit)
        if table is not None:
            parts[unit], failures = packed(table), failures + _failures(table)
    # In turn from all models and domains: what is stopped is a smaller study.
    pending = [unit for unit, part in parts.items() if part is None]
    pending.sort(key=lambda unit: unit.context)
    results = unit_results(folder.settings, pending, executor, workers, is_over=watched.is_over)
    with (
        closing(results),
        progress_bar(
            len(units), "context", shown=watched.progress, initial=len(units) - len(pending)
        ) as bar,
    ):
        for unit, rows, final in results:
            table = rows_to_table(rows, folder.settings)
            parts[unit], failures = packed(table), failures + _failures(table)
            if final and not _kept(folder, unit, table):
                unwritten.append((unit, table))
            if failures:
                bar.set_postfix(failed=failures, refresh=False)
            bar.update()
            watched.tell(unit, table)
    # A disk that was full for a while: what is here is kept now.
    for unit, table in unwritten:
        _kept(folder, unit, table)
    return [part for part in parts.values() if part is not None]


def _finished(folder: StudyFolder, units: Sequence[StudyUnit]) -> list[bytes]:
    """Rows of the units that the folder has, packed."""
    found = (folder.read(unit) for unit in units)
    return [packed(table) for table in found if table is not None]


def _table_of(parts: list[bytes], settings: StudySettings) -> pa.Table:
    """The study's table from its contexts' rows."""
    return with_best(_with_domain_bits(joined(parts, settings)))


def _kept(folder: StudyFolder, unit: StudyUnit, table: pa.Table) -> bool:
    """Whether the rows could be written; a full disk must not cost what the other contexts will
    give.
    """
    try:
        folder.write(unit, table)
    except OSError:
        return False
    return True


def _failures(table: pa.Table) -> int:
    return pc.sum(pc.equal(table.column("status"), "failed")).as_py() or 0


def _with_domain_bits(table: pa.Table) -> pa.Table:
    """The table with the bits per byte of each model and domain, every context counted once."""
    columns = ["model", "domain", "context", "context_nats", "context_bytes"]
    contexts = table.select(columns).to_pandas().drop_duplicates(columns[:3])
    sums = contexts.dropna().groupby(["model", "domain"])[["context_nats", "context_bytes"]].sum()
    bits = {
        key: domain_bits_per_byte(row.context_nats, int(row.context_bytes))
        for key, row in sums.iterrows()
    }
    keys = zip(table.column("model").to_pylist(), table.column("domain").to_pylist(), strict=True)
    index = table.schema.get_field_index("domain_bits_per_byte")
    values = pa.array([bits.get(key, float("nan")) for key in keys], pa.float64())
    return table.set_column(index, table.schema.field(index), values)
