"""The head's loss at the size of a real vocabulary: memory against the logits it does not keep,
time against its products.

Run with ``pytest tests/benchmarks/test_head_loss.py -n 0 --benchmark-only -s``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

LOSS = r"""
import re, sys, time
import torch
from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.losses import head_loss

positions, objective = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
vocab, d, horizon, rank = 32_000, 512, 4, 8
unembedding = torch.randn(vocab, d) / d**0.5
head = CPHead(hidden_size=d, vocab_size=vocab, horizon=horizon, rank=rank)
head = head.attach_weights(unembedding, unembedding)
length = positions + horizon
hidden, tokens = torch.randn(1, length, d), torch.randint(vocab, (1, length))
step = lambda count: head_loss(
    head,
    hidden[:, : count + horizon],
    tokens[:, : count + horizon],
    lambda h: h @ unembedding.T,
    objective=objective,
).loss.backward()

def products(count):
    # Of every position: the logits twice (the second time on the way back), their gradient to the
    # moved hidden states; the maps forward, and back to their weights. The frozen unembedding takes
    # no gradient. In chunks that the loss uses too.
    for rows in torch.arange(count * horizon * rank).split(1024):
        moved = torch.empty(len(rows), d)
        for _ in range(2):
            logits = moved @ unembedding.T
        logits @ unembedding
    h = hidden[0, :count]
    moved = h @ head.maps.detach().flatten(0, 1).T
    moved.T @ h
    for _ in range(2):
        h.repeat(horizon - 1, 1) @ unembedding.T  # the target's laws

def seconds(work, count):
    begun = time.perf_counter()
    work(count)
    return time.perf_counter() - begun

step(16), products(16)
# Not ru_maxrss, which a child inherits from whoever started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before = peak()
if positions > 512:
    step(positions)
    print(peak() - before, 0.0, 0.0)
else:
    times = [(seconds(step, positions), seconds(products, positions)) for _ in range(3)]
    print(peak() - before, *map(min, zip(*times)))
"""
NAIVE_BYTES = 4 * 2048 * 4 * 8 * 32_000


def measure(positions: int, objective: str) -> tuple[float, float, float]:
    """Bytes above what the head and its inputs take; seconds of loss and gradients; seconds of the
    products alone.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOSS, str(positions), objective],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(map(float, done.stdout.split()))


@pytest.mark.parametrize("objective", ["likelihood", "distillation"])
def test_the_loss_takes_hardly_longer_than_its_matrix_products(benchmark, objective):
    _, loss, products = benchmark.pedantic(measure, (128, objective), rounds=1, iterations=1)
    print(
        f"\n{objective}: loss and gradients / matrix products = {loss / products:.2f} ({loss:.1f} "
        "s)"
    )
    assert loss <= 1.5 * products


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["likelihood", "distillation"])
def test_the_loss_needs_a_twentieth_of_the_memory_of_its_logits(benchmark, objective):
    peak, *_ = benchmark.pedantic(measure, (2048, objective), rounds=1, iterations=1)
    print(
        f"\n{objective}: peak {peak / 1e6:.0f} MB above head and inputs, {NAIVE_BYTES / peak:.0f} "
        "times less than the logits"
    )
    assert peak <= NAIVE_BYTES / 20


SHARE = r"""
import sys
import torch
from torch.profiler import ProfilerActivity, profile
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.losses import head_loss

torch.set_num_threads(1)
torch.manual_seed(0)
form, vocab, d, kept, rows, length = eval(sys.argv[1])
unembedding = torch.randn(vocab, d) / d**0.5
shape = {"hidden_size": d, "vocab_size": vocab, "anchored": True, "blocks": 1}
head = DraftHead(vocabulary=None if kept is None else range(kept), **shape, **form)
head = head.attach_weights(unembedding, unembedding)
hidden, tokens = torch.randn(rows, length, d), torch.randint(kept or vocab, (rows, length))
step = lambda: head_loss(head, hidden, tokens, lambda h: h @ unembedding.T).loss.backward()
step()
with profile(activities=[ProfilerActivity.CPU]) as found:
    for _ in range(3):
        step()
times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
print(sum(times.values()) / sum(times.get(f"aten::{name}", 0) for name in ("mm", "bmm", "addmm")))
"""
FORMS = [
    {"form": "cp", "rank": 1},
    {"form": "cp", "rank": 8},
    {"form": "markov"},
    {"form": "markov_mixture"},
    {"form": "recurrent"},
]


@pytest.mark.parametrize("size", [(104, 192, None, 8, 256), (16_384, 576, 4_096, 2, 128)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_loss_of_every_form_takes_hardly_longer_than_its_own_matrix_products(
    benchmark, form, size
):
    command = [sys.executable, "-c", SHARE, repr((form, *size))]
    done = benchmark.pedantic(
        subprocess.run, (command,), {"capture_output": True, "text": True, "check": True}, rounds=1
    )
    ratio = float(done.stdout)
    print(f"\n{form}, {size}: loss and gradients / matrix products = {ratio:.2f}")
    assert ratio <= 1.5
