"""Contexts on whatever executor there is; workers may vanish."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager

from cpmtp.study.plan import StudyUnit
from cpmtp.study.rows import failed_rows, study_unit_rows
from cpmtp.study.settings import StudySettings

# One thread each; and memory that is freed stays with the process: fits take and drop tensors of a
# joint's size all the time, and fetching fresh pages for each took half of the evaluation's time
# and a tenth of the fits' (glibc only).
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
}
# How often a context may take its worker down before it counts as failed.
_ATTEMPTS = 3
# Contexts handed to an executor of the caller's at a time; a cluster may have many workers.
_AHEAD = 256

Result = tuple[StudyUnit, list[dict], bool]


def unit_results(
    settings: StudySettings,
    units: Sequence[StudyUnit],
    executor: Executor | None,
    workers: int | None,
) -> Generator[Result, None, None]:
    """Rows of each unit as they come, and whether they are final: those of a unit whose worker
    vanished are not.
    """
    count = min(workers or os.cpu_count() or 1, len(units))
    if not units:
        return
    if executor is not None:
        yield from _on_borrowed(settings, units, executor)
    elif count <= 1:
        for unit in units:
            yield unit, study_unit_rows(settings, unit), True
    else:
        yield from _on_local_processes(settings, units, count)


def _on_borrowed(
    settings: StudySettings, units: Sequence[StudyUnit], executor: Executor
) -> Generator[Result, None, None]:
    waiting, attempts = deque(units), dict.fromkeys(units, 0)
    running: dict[Future, StudyUnit] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _AHEAD:
                unit = waiting.popleft()
                attempts[unit] += 1
                try:
                    running[executor.submit(study_unit_rows, settings, unit)] = unit
                except RuntimeError as error:  # shut down or broken: it takes no more
                    yield (
                        unit,
                        failed_rows(settings, unit, f"the executor takes no work: {error}"),
                        False,
                    )
            for future in _finished(running):
                unit = running.pop(future)
                rows, why = _outcome(future)
                if rows is not None:
                    yield unit, rows, True
                elif attempts[unit] < _ATTEMPTS:
                    waiting.append(unit)
                else:
                    yield (
                        unit,
                        failed_rows(settings, unit, f"given up after {_ATTEMPTS} attempts: {why}"),
                        False,
                    )
    finally:
        for future in running:
            future.cancel()


def _finished(running: dict[Future, StudyUnit]) -> set[Future]:
    return wait(running, return_when=FIRST_COMPLETED).done if running else set()


def _outcome(future: Future) -> tuple[list[dict] | None, str]:
    """The rows, or what happened to the worker."""
    try:
        return future.result(), ""
    # Executors have many exceptions of their own for a worker that is gone, and none is of the
    # unit's doing.
    except (Exception, CancelledError) as error:
        return None, f"{type(error).__name__}: {error}"


def _on_local_processes(
    settings: StudySettings, units: Sequence[StudyUnit], count: int
) -> Generator[Result, None, None]:
    waiting, suspects = deque(units), deque[StudyUnit]()
    deaths: Counter[StudyUnit] = Counter()
    while waiting or suspects:
        running: dict[Future, StudyUnit] = {}
        with _local_processes(count) as pool:
            try:
                while waiting or suspects or running:
                    for unit in _next_units(waiting, suspects, running, deaths, count):
                        running[_submitted(pool, settings, unit)] = unit
                    for future in _finished(running):
                        error = future.exception()
                        if isinstance(error, BrokenExecutor):
                            continue
                        unit = running.pop(future)
                        yield (
                            (unit, failed_rows(settings, unit, str(error)), False)
                            if error
                            else (unit, future.result(), True)
                        )
                    if any(future.done() for future in running):
                        break
            except BaseException:
                _stop_now(pool)
                raise
        deaths.update(running.values())
        for unit in running.values():
            if deaths[unit] < _ATTEMPTS:
                suspects.append(unit)
            else:
                yield (
                    unit,
                    failed_rows(
                        settings,
                        unit,
                        f"its worker died {_ATTEMPTS} times: is there enough memory?",
                    ),
                    False,
                )


def _next_units(waiting, suspects, running, deaths, count: int) -> list[StudyUnit]:
    """What to hand out now: two units per worker keep it busy, and few are suspect when it dies.

    Whoever was at work when a worker died goes alone from then on, so that only the guilty one is
    counted out.
    """
    if any(deaths[unit] for unit in running.values()):
        return []
    if suspects:
        return [] if running else [suspects.popleft()]
    return [waiting.popleft() for _ in range(min(2 * count - len(running), len(waiting)))]


def _submitted(pool: Executor, settings: StudySettings, unit: StudyUnit) -> Future:
    try:
        return pool.submit(study_unit_rows, settings, unit)
    except BrokenExecutor as error:
        broken: Future = Future()
        broken.set_exception(error)
        return broken


@contextmanager
def _local_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned workers import the caller's main module, which starts a script without a main guard
    # all over again. They need nothing from it, so an empty one stands in while they start.
    main, environment = sys.modules["__main__"], dict(os.environ)
    os.environ |= _WORKER_ENVIRONMENT
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    try:
        sys.modules["__main__"] = types.ModuleType("__main__")
        with _interrupts_ignored():
            for _ in range(count):
                pool.submit(_nothing)
        sys.modules["__main__"] = main
        yield pool
    finally:
        sys.modules["__main__"] = main
        os.environ.clear()
        os.environ.update(environment)
        pool.shutdown(cancel_futures=True)


def _stop_now(pool: ProcessPoolExecutor) -> None:
    """After Ctrl-C, or when nobody wants the rest: what is being computed is thrown away."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started here leave Ctrl-C to the parent, which stops them; without it each would
    print a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_worker() -> None:
    """A worker ends with its parent: a killed one leaves nobody behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.join,), daemon=True).start()


def _end_after(waiting: Callable[[], None]) -> None:
    waiting()
    os._exit(1)


def _nothing() -> None:
    """Starts a worker."""
