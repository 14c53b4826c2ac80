"""Contexts on whatever executor there is; workers may vanish."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager

from loky import ProcessPoolExecutor
from loky.backend import get_context

from cpmtp.study.plan import StudyUnit, default_workers
from cpmtp.study.rows import TRIED_AGAIN, failed_rows, study_unit_rows
from cpmtp.study.settings import StudySettings

# One thread each; and memory that is freed stays with the process: fits take and drop tensors of a
# joint's size all the time, and fetching fresh pages for each took half of the evaluation's time
# and a tenth of the fits' (glibc only). Loky would take such memory for a leak and start the
# process again.
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",
}
# How often a context may take its worker down before it counts as failed.
_ATTEMPTS = 3
# Contexts handed to an executor of the caller's at a time; a cluster may have many workers.
_AHEAD = 256
# How often a worker looks whether its parent is still there.
_WATCH_SECONDS = 0.5

Result = tuple[StudyUnit, list[dict], bool]


def unit_results(
    settings: StudySettings,
    units: Sequence[StudyUnit],
    executor: Executor | None,
    workers: int | None,
    *,
    is_over: Callable[[StudyUnit], bool] = lambda unit: False,
) -> Generator[Result, None, None]:
    """Rows of each unit as they come, and whether they are final: those of a unit whose worker
    vanished, or whose model or memory was not there, are not. A unit that `is_over` when its turn
    comes is left out.
    """
    count = min(workers or default_workers(settings), len(units))
    if not units:
        return
    if executor is not None:
        yield from _results_on(settings, units, [executor] * _AHEAD, is_over)
    elif count <= 1:
        # One after another: each is written before the next begins.
        for unit in units:
            yield from _results_on(settings, [unit], [_Here()], is_over)
    else:
        with _local_processes(count) as processes:
            yield from _results_on(settings, units, processes, is_over)


def _results_on(
    settings: StudySettings,
    units: Sequence[StudyUnit],
    idle: Sequence[Executor],
    is_over: Callable[[StudyUnit], bool],
) -> Generator[Result, None, None]:
    """Every executor named in `idle` gets one unit at a time; one it does not finish is tried on
    another.
    """
    waiting, free = deque(units), deque(idle)
    running: dict[Future, tuple[StudyUnit, Executor]] = {}
    attempts: Counter[StudyUnit] = Counter()
    found: list[Result] = []
    try:
        while waiting or running:
            while waiting and free:
                unit = waiting.popleft()
                if is_over(unit):
                    continue
                executor = free.popleft()
                attempts[unit] += 1
                running[_submitted(executor, settings, unit)] = unit, executor

            # Whoever asks for them writes them while the next units are at work.
            yield from found
            found = []

            if not running:  # nothing was left to begin
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit, executor = running.pop(future)
                free.append(executor)
                rows, why = _outcome(future)
                final = rows is not None and not any(map(_may_pass, rows))
                if not final and attempts[unit] < _ATTEMPTS:
                    waiting.append(unit)
                    continue
                said = f"given up after {_ATTEMPTS} attempts: {why}"
                found.append((unit, rows or failed_rows(settings, unit, said), final))
        yield from found
    finally:
        for future in running:
            future.cancel()


def _may_pass(row: dict) -> bool:
    return str(row["message"]).startswith(TRIED_AGAIN)


def _submitted(executor: Executor, settings: StudySettings, unit: StudyUnit) -> Future:
    """The unit's future, also where the executor takes no work."""
    try:
        return executor.submit(study_unit_rows, settings, unit)
    except RuntimeError as error:  # shut down or broken
        refused: Future = Future()
        refused.set_exception(error)
        return refused


def _outcome(future: Future) -> tuple[list[dict] | None, str]:
    """The rows, or what kept them from coming."""
    try:
        return future.result(), ""
    # Executors have many exceptions of their own for a worker that is gone, and none is of the
    # unit's doing.
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _local_processes(count: int) -> Iterator[Sequence[Executor]]:
    """So many processes; what they still compute in the end is thrown away."""
    processes = [_LocalProcess() for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.shutdown()


class _Here(Executor):
    """The process itself: what is submitted is done at once."""

    def submit(self, function, /, *arguments, **options) -> Future:
        done: Future = Future()
        try:
            done.set_result(function(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        return done


class _LocalProcess(Executor):
    """One process, started when there is work and again when it died.

    A pool of many processes breaks as a whole, without saying whose unit took one down.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, function, /, *arguments, **options) -> Future:
        if self._pool is not None:
            try:
                return self._pool.submit(function, *arguments, **options)
            except BrokenExecutor:
                self.shutdown()
        self._pool = _started_pool()
        return self._pool.submit(function, *arguments, **options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait, kill_workers=cancel_futures)


def _started_pool() -> ProcessPoolExecutor:
    # Loky's processes import nothing of the caller's main module: a script needs no main guard.
    pool = ProcessPoolExecutor(
        1,
        context=get_context("loky"),
        env=_WORKER_ENVIRONMENT,
        initializer=_begin_worker,
        initargs=(os.getpid(),),
    )
    with _interrupts_ignored():
        pool.submit(int)
    return pool


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


def _begin_worker(parent: int) -> None:
    """A worker ends with its parent: a killed one leaves nobody behind."""
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
