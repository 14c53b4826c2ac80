"""The dense joint against its floor, against copying the cache per branch, and against a full pass
per prefix.

Run with
``pytest tests/benchmarks/test_joint_speed.py -n 0 --benchmark-only --benchmark-disable-gc -s``.
Every round times all arms one after another, so that a busy machine slows all alike; the ratios are
of the fastest rounds. How far a joint is above its floor depends on the processor, so that it is
printed and not asserted; asserted is what holds on any: the order of the arms, and that hardly a
token more is read than there are prefixes.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from transformers import DynamicCache

from cpmtp.joint_distribution import exact_joint, grid_rows
from cpmtp.pretrained import HuggingFaceLanguageModel, embedded_models, load_language_model
from cpmtp.training.new_models import new_llama

CONTEXT_TOKENS = 64
# Rows and tokens per row of the floor's plain batches.
SHAPES = ((16, 64), (64, 16), (128, 16), (256, 8), (32, 32))
ROUNDS = 3


def _model(name: str, root) -> HuggingFaceLanguageModel:
    if name == "stories260K":
        folder = root.parent / "shared" / "models" / name
        if not folder.is_dir():
            pytest.skip("the pretrained stories260K model is not beside this checkout")
        return load_language_model(folder)
    if name in embedded_models():
        return load_language_model(name)
    return HuggingFaceLanguageModel(
        new_llama(104, width=192, layers=4, window=512, seed=0), name="random"
    )


def _context(lm) -> torch.Tensor:
    return torch.randint(
        lm.vocab_size, (CONTEXT_TOKENS,), generator=torch.Generator().manual_seed(0)
    )


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def floor_seconds(lm, tokens: int, shape: tuple[int, int], share: float = 1.0) -> float:
    """Time of `tokens` tokens as plain batches, logits included; extrapolated from a share."""
    ids = torch.randint(lm.vocab_size, shape)
    passes = max(int(share * tokens / ids.numel()), 1)
    spent = seconds(
        lambda: [lm.model(input_ids=ids, use_cache=False).logits for _ in range(passes)]
    )
    return spent * tokens / (passes * ids.numel())


@torch.inference_mode()
def cache_copying_seconds(lm, context, horizon: int, share: float) -> float:
    """Each parent's cache repeated for all its children, one token per row; extrapolated from a
    share of the parents.
    """
    vocab = lm.vocab_size
    spent, measured = 0.0, 0
    for parents in _parents(vocab, horizon - 1, share):
        prefix = torch.cat([context, parents])
        spent += seconds(lambda prefix=prefix: _children_by_copying(lm, prefix))
        measured += 1
    return spent * vocab ** (horizon - 2) / measured


def _children_by_copying(lm, prefix: torch.Tensor) -> None:
    out = lm.model(input_ids=prefix[None], use_cache=True)
    cache = DynamicCache([(layer.keys, layer.values) for layer in out[lm.cache_name].layers])
    cache.batch_repeat_interleave(lm.vocab_size)
    logits = lm.model(
        input_ids=torch.arange(lm.vocab_size)[:, None], use_cache=True, **{lm.cache_name: cache}
    ).logits
    logits[:, -1].double().log_softmax(-1).exp()


@torch.inference_mode()
def naive_seconds(lm, context, horizon: int, share: float) -> float:
    """Every prefix through a full forward pass, in batches; extrapolated from a share of the
    prefixes.
    """
    vocab = lm.vocab_size
    count = max(int(share * vocab ** (horizon - 1)), 64)
    rows = grid_rows(0, count, vocab, horizon - 1)
    ids = torch.cat([context.expand(count, -1), rows], 1)
    return seconds(lambda: lm.next_token_log_probs(ids)) * vocab ** (horizon - 1) / count


def tokens_read(lm, work) -> int:
    """Tokens of all forward passes that some work needs."""
    counts = []
    hooks = [
        part.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: counts.append(inputs[0].numel())
        )
        for part in (lm.model, lm._tree_view)
    ]
    work()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def _parents(vocab: int, horizon: int, share: float):
    count = max(int(share * vocab ** (horizon - 1)), 2)
    return grid_rows(0, count, vocab, horizon - 1)


def _prefixes(vocab: int, horizon: int) -> int:
    return sum(vocab**depth for depth in range(horizon))


def measure(lm, horizon: int, shares: dict[str, float], rounds: int = ROUNDS) -> dict[str, float]:
    """Fastest time of every arm over interleaved rounds, in seconds."""
    context, tokens = _context(lm), _prefixes(lm.vocab_size, horizon)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for shape in SHAPES:
            times.setdefault(f"floor {shape}", []).append(
                floor_seconds(lm, tokens, shape, shares["floor"])
            )
        lm._context_cache = None
        times.setdefault("joint", []).append(seconds(lambda: exact_joint(lm, context, horizon)))
        if shares["copying"]:
            times.setdefault("copying", []).append(
                cache_copying_seconds(lm, context, horizon, shares["copying"])
            )
            times.setdefault("naive", []).append(
                naive_seconds(lm, context, horizon, shares["naive"])
            )
    fastest = {arm: min(values) for arm, values in times.items()}
    fastest["floor"] = min(value for arm, value in fastest.items() if arm.startswith("floor"))
    return fastest


def report(title: str, fastest: dict[str, float]) -> None:
    print(f"\n{title}: " + ", ".join(f"{arm} {value:.3g} s" for arm, value in fastest.items()))
    for arm in ("floor", "copying", "naive"):
        if arm in fastest:
            print(f"  joint / {arm} = {fastest['joint'] / fastest[arm]:.3g}")


@pytest.mark.parametrize("name", ["code", "stories260K"])
def test_three_tokens_read_hardly_more_than_their_prefixes(benchmark, name, root):
    lm = _model(name, root)
    large = lm.vocab_size > 200
    shares = {
        "floor": 0.1 if large else 1.0,
        "copying": 0.01 if large else 0.1,
        "naive": 0.002 if large else 0.03,
    }
    fastest = benchmark.pedantic(
        measure, (lm, 3, shares, 2 if large else ROUNDS), rounds=1, iterations=1
    )
    benchmark.extra_info.update(fastest)
    report(f"{lm.name}, V={lm.vocab_size}, n=3", fastest)
    assert fastest["joint"] < fastest["copying"] < fastest["naive"]
    _check_tokens(lm, 3)


@pytest.mark.slow
def test_four_tokens_read_hardly_more_than_their_prefixes(benchmark, root):
    lm = _model("code", root)
    fastest = benchmark.pedantic(
        measure, (lm, 4, {"floor": 0.003, "copying": 0.0}, 1), rounds=1, iterations=1
    )
    benchmark.extra_info.update(fastest)
    report(f"{lm.name}, V={lm.vocab_size}, n=4", fastest)
    _check_tokens(lm, 4)


def _check_tokens(lm, horizon: int) -> None:
    """The context once, each prefix once, and in every pass what its continuations share: their
    parents, of which there is one for every V of them, and one more at either end of a pass.
    """
    context, prefixes = _context(lm), _prefixes(lm.vocab_size, horizon) - 1
    lm._context_cache = None
    read = tokens_read(lm, lambda: exact_joint(lm, context, horizon))
    chains = 3 * (horizon - 2) / lm.vocab_size
    assert len(context) + prefixes <= read <= len(context) + prefixes * (1 + chains)


PEAK = r"""
import re, sys
import torch
from cpmtp import exact_joint, load_language_model
lm, horizon = load_language_model(sys.argv[1]), int(sys.argv[2])
context = torch.randint(lm.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
exact_joint(lm, context, 2)
# Not ru_maxrss, which a child inherits from whoever started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before = peak()
joint = exact_joint(lm, context, horizon)
print(peak(), peak() - before - joint.probs.nbytes)
"""


def peak_bytes(model: str, horizon: int) -> tuple[float, float]:
    """Of a process that makes one joint: all of it, and what it needs beyond the joint."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, model, str(horizon)],
        capture_output=True,
        text=True,
        check=True,
    )
    whole, beyond = map(float, done.stdout.split())
    return whole, beyond


@pytest.mark.slow
def test_four_tokens_need_a_gigabyte_beyond_the_joint(benchmark):
    _, beyond = benchmark.pedantic(peak_bytes, ("code", 4), rounds=1, iterations=1)
    print(f"\n10^8 entries: {beyond / 1e6:.0f} MB beyond the joint")
    assert beyond <= 1e9


def test_five_hundred_tokens_at_three_fit_into_two_and_a_half_gigabytes(benchmark, root):
    _model("stories260K", root)  # skips where it is not
    whole, _ = benchmark.pedantic(
        peak_bytes,
        (str(root.parent / "shared" / "models" / "stories260K"), 3),
        rounds=1,
        iterations=1,
    )
    print(f"\n1.3 10^8 entries: {whole / 1e9:.2f} GB in all")
    assert whole <= 2.5e9
