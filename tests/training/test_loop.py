"""The training loop: an interrupted training is the unbroken one, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from cpmtp.training.loop import Batch, Run, Schedule, drawn_windows, train
from cpmtp.training.muon import Muon

SCHEDULE = Schedule(steps=8, warmup=3, decay=0.5)


@dataclass(frozen=True)
class Outcome:
    loss: Tensor


class Tied(nn.Module):
    """An embedding that is the output's matrix, too, and a matrix between."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding.from_pretrained(
            torch.randn(5, 4, generator=generator), freeze=False
        )
        self.middle = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Outcome:
        logits = self.out(self.embedding(tokens[:, :-1]) @ self.middle)
        return Outcome(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def a_run(checkpoint=None, *, key: str = "k", seed: int = 0) -> Run:
    model = Tied(seed)
    optimisers = [
        torch.optim.AdamW([model.embedding.weight], lr=0.1),
        Muon([model.middle], 0.05),
    ]
    return Run(model, model, optimisers, checkpoint=checkpoint, key=key)


def a_batch(step: int) -> Batch:
    windows = drawn_windows(50, 3, seed=1, step=step)
    return Batch(windows.tolist(), ((windows[:, None] + torch.arange(6)) % 5,))


def trained(
    *runs: Run, stop=None, every: float = 0.0, schedule: Schedule = SCHEDULE
) -> list[bytes]:
    """The runs' weights; `stop` is the (index, step) after which somebody presses Ctrl-C."""

    def record(index, run, out):
        run.metrics.append(f"{run.step} {out.loss.item()}")
        if (index, run.step) == stop:
            raise KeyboardInterrupt
        return {}

    train(runs, a_batch, schedule, record=record, checkpoint_seconds=every)
    return [weights(run) for run in runs]


def weights(run: Run) -> bytes:
    return b"".join(w.detach().numpy().tobytes() for w in run.model.parameters())


@pytest.mark.parametrize("step", range(1, 9))
def test_a_training_stopped_at_any_step_ends_with_the_same_weights(tmp_path, step):
    whole = a_run()
    expected = trained(whole)
    with pytest.raises(KeyboardInterrupt):
        trained(a_run(tmp_path / "c"), stop=(0, step))
    resumed = a_run(tmp_path / "c")
    assert resumed.step == step - 1
    assert trained(resumed) == expected
    assert resumed.metrics == whole.metrics
    assert resumed.model.out.weight is resumed.model.embedding.weight


@pytest.mark.parametrize("index", [0, 1, 2])
def test_models_side_by_side_go_on_together_from_checkpoints_of_different_steps(tmp_path, index):
    expected = [trained(a_run(seed=seed))[0] for seed in range(3)]
    places = [tmp_path / str(seed) for seed in range(3)]
    runs = [a_run(place, seed=seed) for seed, place in enumerate(places)]
    with pytest.raises(KeyboardInterrupt):
        trained(*runs, stop=(index, 5))
    runs[0].save()  # the moment of a kill between two checkpoints
    resumed = [a_run(place, seed=seed) for seed, place in enumerate(places)]
    assert [run.step for run in resumed] == [5, 4, 4]
    assert trained(*resumed) == expected


KILLED = """
import os, signal, sys
from pathlib import Path
import cpmtp.training.loop as loop
from test_loop import a_run, trained

whole, left = loop.write_tensors, [int(sys.argv[2])]

def killed(path, tensors, metadata):
    left[0] -= 1
    if not left[0]:
        def half(partial):
            partial.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        from cpmtp.whole_files import write_whole
        write_whole(path, half)
    return whole(path, tensors, metadata)

loop.write_tensors = killed
trained(a_run(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("checkpoint", [1, 5])
def test_a_training_killed_while_it_writes_a_checkpoint_goes_on_from_the_last(
    tmp_path, root, checkpoint
):
    places = [str(root), str(root / "tests"), os.path.dirname(__file__)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", KILLED, tmp_path / "c", str(checkpoint)]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.partial"))) == 1
    resumed = a_run(tmp_path / "c")
    assert resumed.step == checkpoint - 1
    assert trained(resumed) == trained(a_run())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_loss_that_is_no_number_leaves_the_model_and_the_last_checkpoint_as_they_were(tmp_path):
    run, usual = a_run(tmp_path / "c"), a_batch

    def broken(step):
        if step == 3:
            run.model.register_forward_hook(lambda *_: Outcome(torch.tensor(float("inf"))))
        return usual(step)

    with pytest.raises(ValueError, match=r"loss is inf at step 3, windows \[\d+, \d+, \d+\]"):
        train([run], broken, SCHEDULE, record=lambda *_: {}, checkpoint_seconds=0.0)
    kept = a_run(tmp_path / "c")
    assert kept.step == run.step == 3 and weights(kept) == weights(run)


def test_a_checkpoint_with_another_key_is_refused(tmp_path):
    trained(a_run(tmp_path / "c"))
    with pytest.raises(ValueError, match="other settings"):
        a_run(tmp_path / "c", key="other")


def test_a_time_budget_ends_a_training_and_counts_what_was_spent_before(tmp_path):
    schedule = Schedule(steps=1, warmup=1, decay=0.5, seconds=0.3)
    begun, run = time.monotonic(), a_run(tmp_path / "c")
    trained(run, every=9.0, schedule=schedule)
    assert run.step > 3 and time.monotonic() - begun >= 0.3
    again = a_run(tmp_path / "c")
    assert again.seconds == run.seconds > 0.2
    trained(again, schedule=schedule)
    assert again.step < run.step + run.step / 2 + 10


def test_rates_rise_over_steps_stay_and_fall_to_nothing_at_the_end_of_steps_or_time():
    schedule = Schedule(steps=1000, warmup=10, decay=0.4)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(300, 0.3) == 1
    assert schedule.rate(800, 0.8) == pytest.approx(0.5)
    assert 0 < schedule.rate(999, schedule.done(999, 0.0)) < 0.01
    timed = Schedule(steps=1000, warmup=10, decay=0.4, seconds=20.0)
    assert timed.done(999, 5.0) == 0.25 and timed.rate(999, 0.9) == pytest.approx(0.25)
    assert Schedule(steps=5, warmup=1, decay=0.0).rate(4, 0.8) == pytest.approx(1)


def test_a_steep_gradient_is_clipped_to_norm_one_and_scaled_by_the_rate():
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return Outcome(1e6 * self.model(x).sum())

    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    run = Run(model, Steep(), [optimiser], checkpoint=None, key="")
    run.advance(Batch([0], (torch.ones(1, 3),)), rate=0.2)
    assert float((model.weight - before).detach().norm()) == pytest.approx(0.1, rel=1e-5)


def test_windows_depend_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = drawn_windows(1000, 8, seed=2, step=5)
    torch.manual_seed(9)
    assert torch.equal(first, drawn_windows(1000, 8, seed=2, step=5))
    assert not torch.equal(first, drawn_windows(1000, 8, seed=2, step=6))
    assert not torch.equal(first, drawn_windows(1000, 8, seed=3, step=5))
