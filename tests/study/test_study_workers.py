"""Local processes: nothing of the caller's is touched, and one that dies takes nobody along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cpmtp.study.plan import StudySettings, plan_study
from cpmtp.study.running import run_study

TINY = StudySettings(
    models=("watched:model",),
    horizons=(2,),
    ranks=(1, 2),
    methods=("em",),
    contexts=5,
    context_length=4,
)

# In a worker it insists on the worker's settings, takes its time, and dies of one context.
MODEL = """
import os, signal, time
import torch
from samples import BigramTable

IN_WORKER = os.getpid() != int(os.environ.get("CALLER", os.getpid()))

class Watched(BigramTable):
    def next_token_log_probs(self, token_ids):
        if IN_WORKER:
            time.sleep(float(os.environ.get("SECONDS", 0)))
            if token_ids[0, :4].tolist() == eval(os.environ.get("DEADLY", "[]")):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().next_token_log_probs(token_ids)

def model():
    if IN_WORKER:
        assert os.environ["OMP_NUM_THREADS"] == "1" and torch.get_num_threads() == 1
        assert os.environ["MALLOC_TRIM_THRESHOLD_"] == str(2 * 1024**3)
    return Watched()
"""


@pytest.fixture
def watched(tmp_path, monkeypatch, root) -> dict[str, str]:
    """Where the model can be imported from, here and in processes started with this environment."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "watched.py").write_text(MODEL)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "watched", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CALLER", str(os.getpid()))
    places = [str(root), str(root / "tests"), str(folder)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)}


def test_a_context_that_always_kills_its_worker_fails_alone(watched, tmp_path, monkeypatch):
    expected = run_study(TINY, tmp_path / "alone", workers=1)
    deadly = next(unit for unit in plan_study(TINY)[0] if unit.context == 2)
    monkeypatch.setenv("DEADLY", str(list(deadly.token_ids)))
    found = run_study(TINY, tmp_path / "out", workers=2)
    failed = found["context"] == 2
    assert (found[failed]["status"] == "failed").all()
    assert found[failed]["message"].str.contains("given up after 3 attempts: Terminated").all()
    assert (found[~failed]["status"] == "ok").all()
    assert found[~failed]["kl_nats"].equals(expected[~failed]["kl_nats"])
    assert len(list((tmp_path / "out" / "parts").glob("[0-9]*.parquet"))) == 4


SCRIPT = """
import os, sys
os.environ["CALLER"] = str(os.getpid())
from cpmtp.study.running import run_study
from test_study_workers import TINY
print("begun", flush=True)
before = sys.modules["__main__"], dict(os.environ)
table = run_study(TINY, sys.argv[1], workers=2)
assert before == (sys.modules["__main__"], dict(os.environ))
assert (table["status"] == "ok").all()
"""


def test_a_script_needs_no_main_guard_and_its_environment_stays_as_it_is(watched, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    watched["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    command = [sys.executable, script, tmp_path / "out"]
    done = subprocess.run(command, env=watched, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "working"])
def test_workers_end_with_a_parent_that_is_killed(watched, tmp_path, moment):
    watched |= {"SECONDS": "0.2", "PYTHONUNBUFFERED": "1"}
    watched["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    running = subprocess.Popen([sys.executable, script, out], env=watched)
    here, deadline = psutil.Process(running.pid), time.monotonic() + 240
    while not (here.children() if moment == "starting" else list(out.glob("parts/[0-9]*"))):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = here.children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not psutil.wait_procs(workers, timeout=120)[1]
