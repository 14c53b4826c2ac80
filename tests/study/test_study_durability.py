"""Whatever happens to a study, its table is whole in the end: killed, interrupted, disk full,
damaged parts, lost workers.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import replace

import pandas as pd
import psutil
import pytest
from command_line import process, run, words
from samples import tiny_study, without_times

from cpmtp.study.folder import StudyFolder
from cpmtp.study.plan import plan_study
from cpmtp.study.running import read_study, run_study
from cpmtp.study.table import KEY_COLUMNS, TIMING_COLUMNS

TINY = tiny_study()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return run_study(TINY, tmp_path_factory.mktemp("whole"), workers=1)


def parts_of(folder):
    return sorted((folder / "parts").glob("[0-9]*.parquet"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: part.write_bytes(b""),
        lambda part: part.write_bytes(b"PAR1 nothing"),
        lambda part: part.write_bytes(part.read_bytes()[:-200]),
        lambda part: pd.DataFrame({"a": [1]}).to_parquet(part),
    ],
    ids=["empty", "garbage", "cut", "other columns"],
)
def test_a_damaged_part_is_set_aside_and_computed_again(table, tmp_path, damage):
    run_study(TINY, tmp_path, workers=1)
    first, second = parts_of(tmp_path)[:2]
    damage(first)
    os.replace(second, second.with_name(".gone"))
    again = run_study(TINY, tmp_path, workers=1)
    pd.testing.assert_frame_equal(without_times(again), without_times(table))
    assert len(list((tmp_path / "parts" / "damaged").iterdir())) == 1


def test_a_bit_that_flips_anywhere_in_a_part_is_noticed_or_changes_nothing(tmp_path):
    run_study(TINY, tmp_path, workers=1)
    unit = plan_study(TINY)[0][0]
    folder = StudyFolder(tmp_path, TINY)
    whole, part = folder.read(unit), tmp_path / "parts" / f"{unit.key}.parquet"
    content = part.read_bytes()
    noticed = 0
    for at in range(0, len(content), len(content) // 150):
        part.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        found = folder.read(unit)
        noticed += found is None
        assert found is None or found.to_pandas().equals(whole.to_pandas())
    assert noticed > 50


def test_a_part_under_another_ones_name_is_not_believed(table, tmp_path):
    run_study(TINY, tmp_path, workers=1)
    first, second = parts_of(tmp_path)[:2]
    first.write_bytes(second.read_bytes())
    pd.testing.assert_frame_equal(
        without_times(run_study(TINY, tmp_path, workers=1)), without_times(table)
    )


def test_a_disk_that_is_full_for_a_while_costs_nothing(table, tmp_path, monkeypatch):
    whole, refused = StudyFolder.write, []

    def full_once(self, unit, table):
        if unit.context == 1 and not refused:
            refused.append(unit)
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, unit, table)

    monkeypatch.setattr(StudyFolder, "write", full_once)
    pd.testing.assert_frame_equal(
        without_times(run_study(TINY, tmp_path, workers=1)), without_times(table)
    )
    assert len(parts_of(tmp_path)) == 4 and len(refused) == 1


def test_a_part_that_cannot_be_written_is_in_the_table_all_the_same(table, tmp_path, monkeypatch):
    def full(self, unit, table):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StudyFolder, "write", full)
    pd.testing.assert_frame_equal(
        without_times(run_study(TINY, tmp_path, workers=1)), without_times(table)
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_is_one_line_and_status_one(monkeypatch, capsys, tmp_path):
    def full(path, table, **_):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    monkeypatch.setattr("cpmtp.study.table.write_parquet", full)
    monkeypatch.setattr("cpmtp.study.folder.write_parquet", full)
    line = "study --model samples:bigram --contexts 2 --context-length 4 --ranks 1 --methods em"
    more = ("--workers", 1, "--out", tmp_path)
    status, _, err = run(monkeypatch, capsys, *words(line), *more)
    assert status == 1 and "No space left on device" in err


class Forgetful(ThreadPoolExecutor):
    """An executor whose workers vanish."""

    def __init__(self, losses: int):
        super().__init__(1)
        self.losses = losses

    def submit(self, function, *arguments, **options):
        if arguments and self.losses and arguments[-1].context == 2:
            self.losses -= 1
            lost: Future = Future()
            lost.set_exception(BrokenExecutor("worker gone"))
            return lost
        return super().submit(function, *arguments, **options)


def test_a_context_whose_worker_vanished_is_sent_again(table, tmp_path):
    with Forgetful(2) as executor:
        found = run_study(TINY, tmp_path, executor)
    pd.testing.assert_frame_equal(without_times(found), without_times(table))


def test_a_context_that_always_takes_its_worker_down_fails_alone_and_is_tried_again_by_the_next_run(
    table, tmp_path
):
    with Forgetful(99) as executor:
        found = run_study(TINY, tmp_path, executor)
    failed = found["context"] == 2
    assert (found[failed]["status"] == "failed").all() and found[failed]["message"].str.contains(
        "worker gone"
    ).all()
    columns = [c for c in table if c not in (*TIMING_COLUMNS, "domain_bits_per_byte")]
    pd.testing.assert_frame_equal(found[~failed][columns], table[~failed][columns])
    pd.testing.assert_frame_equal(
        without_times(run_study(TINY, tmp_path, workers=1)), without_times(table)
    )


def test_an_executor_that_takes_no_work_leaves_failed_rows(tmp_path):
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    found = run_study(TINY, tmp_path, executor)
    assert (found["status"] == "failed").all() and len(found) == 8


def test_two_runs_do_not_share_a_folder(tmp_path):
    identity = plan_study(TINY)[1]
    with (
        StudyFolder.opened(tmp_path, TINY, identity),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
    ):
        run_study(TINY, tmp_path, workers=1)
    assert len(run_study(TINY, tmp_path, workers=1)) == 8


HOLDER = """
import sys, time
from pathlib import Path
from test_study_durability import TINY, StudyFolder, plan_study
with StudyFolder.opened(Path(sys.argv[1]), TINY, plan_study(TINY)[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_free_again_when_the_process_that_used_it_is_killed(tmp_path, root):
    places = [str(root), str(root / "tests"), str(root / "tests" / "study")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
                run_study(TINY, tmp_path, workers=1)
        finally:
            holder.kill()
    assert len(run_study(TINY, tmp_path, workers=1)) == 8


def test_another_text_under_the_same_name_is_another_study(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdef" * 20)
    settings = replace(TINY, models=("samples:characters",), domains={"letters": text}, contexts=2)
    run_study(settings, tmp_path / "out", workers=1)
    text.write_text("fedcba" * 20)
    with pytest.raises(ValueError, match="the texts of domain 'letters' itself"):
        run_study(settings, tmp_path / "out", workers=1)


def test_another_model_under_the_same_name_is_another_study(tmp_path, monkeypatch):
    import samples

    from cpmtp.study.models import opened_language_model

    run_study(TINY, tmp_path, workers=1)
    monkeypatch.setattr(samples, "bigram", lambda: samples.BigramTable(seed=5))
    opened_language_model.cache_clear()
    with pytest.raises(ValueError, match="the model 'samples:bigram' itself"):
        run_study(TINY, tmp_path, workers=1)
    opened_language_model.cache_clear()


# So many contexts that the signal comes before the end, however slow the machine.
COMMAND = process(
    "study --model samples:hidden_markov --contexts 400 --context-length 4 --horizons 2 "
    "--ranks 1,2 --methods em --quiet --workers 2"
)


def started(root, out, **options):
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*COMMAND, "--out", out],
        cwd=root,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for_parts(running, out, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(parts_of(out)) < count:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_nobody_behind(tmp_path, root):
    running = started(root, tmp_path, start_new_session=True)
    wait_for_parts(running, tmp_path, 2)
    workers = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert len(err.strip().splitlines()) == 1 and "goes on from there" in err
    assert not psutil.wait_procs(workers, timeout=20)[1]


LONGER = replace(TINY, models=("samples:hidden_markov",), contexts=24)


def run_in_a_process(out, workers: int):
    """A study in a process of its own that has everything imported already; its moments are those
    of the work.
    """
    process = multiprocessing.get_context("fork").Process(
        target=run_study, args=(LONGER, out), kwargs={"workers": workers}
    )
    process.start()
    return process


def assert_whole(out, expected: pd.DataFrame) -> None:
    found = read_study(out)[0]
    assert not found.duplicated(list(KEY_COLUMNS)).any()
    pd.testing.assert_frame_equal(without_times(found), without_times(expected))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_random_moments_the_table_is_the_unbroken_one(tmp_path):
    begun = time.perf_counter()
    whole = run_in_a_process(tmp_path / "whole", 1)
    whole.join()
    seconds, chance = time.perf_counter() - begun, random.Random(0)
    expected = read_study(tmp_path / "whole")[0]
    left = []
    for moment in range(20):
        out = tmp_path / str(moment)
        for _ in range(2):
            running = run_in_a_process(out, 1)
            time.sleep(chance.random() * seconds)
            running.kill()
            running.join()
            left.append(len(parts_of(out)))
        again = run_in_a_process(out, 1)
        again.join()
        assert again.exitcode == 0
        assert_whole(out, expected)
    assert len(set(left)) > 5, left


@pytest.mark.slow
def test_workers_killed_at_twenty_random_moments_cost_nothing(tmp_path, monkeypatch, root):
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
    expected = run_study(LONGER, tmp_path / "whole", workers=1)
    chance, killed, studies = random.Random(1), 0, 0
    while killed < 20:
        out, studies = tmp_path / str(studies), studies + 1
        running = run_in_a_process(out, 2)
        while running.is_alive() and killed < 20:
            done = len(parts_of(out))
            time.sleep(chance.random() * 2)
            workers = [p for p in children_of(running.pid) if len(parts_of(out)) > done]
            if workers:
                chance.choice(workers).kill()
                killed += 1
        running.join()
        again = run_in_a_process(out, 1)
        again.join()
        assert_whole(out, expected)


def children_of(pid: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if "popen_loky" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_gives_the_same_table(table, tmp_path, root):
    distributed = pytest.importorskip("distributed")
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    base = [sys.executable, "-m", "distributed.cli"]
    address_file = tmp_path / "scheduler.json"
    options = ["--scheduler-file", str(address_file), "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    scheduler = [
        *base[:2],
        "distributed.cli.dask_scheduler",
        *options,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    worker = [*base[:2], "distributed.cli.dask_worker", *options, "--nthreads", "1", "--no-nanny"]
    running = [subprocess.Popen(command, **quiet) for command in (scheduler, worker, worker)]
    settings = replace(TINY, models=("samples:hidden_markov",), horizons=(2, 3), contexts=24)
    expected = run_study(settings, tmp_path / "local", workers=1)
    try:
        with distributed.Client(
            scheduler_file=str(address_file), timeout="60s", set_as_default=False
        ) as client:
            client.wait_for_workers(2, timeout=60)
            killer = ThreadPoolExecutor(1)
            killed = killer.submit(kill_when, running[1], tmp_path / "dask", 3)
            found = run_study(settings, tmp_path / "dask", client.get_executor(pure=False))
            assert killed.result() < 24
            # The command line takes the scheduler's address.
            command = [*COMMAND[:-2], "--dask", client.scheduler.address, "--out", tmp_path / "cli"]
            done = subprocess.run(command, cwd=root, env=environment, check=False)
            assert done.returncode == 0 and len(read_study(tmp_path / "cli")[0]) == 24 * 2
    finally:
        for process in running:
            process.kill()
            process.wait()
    pd.testing.assert_frame_equal(without_times(found), without_times(expected))


def kill_when(process, folder, count: int) -> int:
    """Kill a process when some parts are there; how many there were."""
    while len(parts_of(folder)) < count:
        time.sleep(0.002)
    process.kill()
    return len(parts_of(folder))
