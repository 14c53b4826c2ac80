"""What calls cost on this device: measured, for this model, in rounds that take turns.

Every round measures everything once, in an order of its own, so that a device that slows down slows
all of it; the first round warms up and is not counted. A head's weights are random: times depend on
sizes alone.
"""

from __future__ import annotations

import datetime
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.decoding.stats import STAGES, Progress
from cpmtp.decoding.trials import open_target
from cpmtp.forecasting.candidates import Candidate, new_head, sizes_of
from cpmtp.heads.draft_head import DraftHead
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.latency import (
    OURS,
    HeadTime,
    LatencyModel,
    MeasuredLatency,
    PlainTime,
    StepCurve,
    StepTime,
)
from cpmtp.pretrained.trials import trial_ids

VERIFIED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HEADS: tuple[dict[str, Any], ...] = ({"rank": 1}, {"rank": 4})
# What begins after something else finds that in the caches, and a processor that was busy with it:
# cycles, and seconds, that warm up and that are counted; cycles at most of short ones.
_WARMING, _CYCLES, _MOST_CYCLES = 3, 6, 64
_WARM_SECONDS, _SECONDS = 0.05, 0.05
_FEWEST_ROUNDS, _MUCH_TOO_LONG = 3, 1.5
_SHORT_CALL = 16


@takes_what_is_given
def measure_latency(
    lm: Any,
    heads: Sequence[DraftHead | Mapping[str, Any]] = HEADS,
    verified_tokens: Sequence[int] = VERIFIED_TOKENS,
    *,
    batches: Sequence[int] = (1,),
    context: int = 128,
    rounds: int = 9,
    seconds: float = 60.0,
    seed: int = 0,
) -> MeasuredLatency:
    """Times of target calls, heads and plain steps on the device that the model is on.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
    heads : sequence of heads or dicts
        Heads, or keywords of `DraftHead` for heads with random weights.
    verified_tokens : sequence of int
        Tokens of a call, in each request; what the model's window has no room for is left out.
    batches : sequence of int
        Requests decoded together.
    context : int
        Tokens before the call.
    rounds : int
        At most so many, at least three (two where three take far longer than `seconds`).
    seconds : float
        No round begins later than this, once enough are done.
    seed : int
        Of weights, tokens and the order within rounds.

    Returns
    -------
    MeasuredLatency
        Medians and quartiles.

    Raises
    ------
    ValueError
        If a number is out of range, or the window has no room for a call.
    """
    for name, values in (("verified_tokens", verified_tokens), ("batches", batches)):
        if not values or min(values) < 1:
            raise ValueError(f"{name} {tuple(values)}: expected numbers of at least 1")
    if context < 1 or rounds < 1 or not seconds > 0:
        raise ValueError(
            f"context {context}, rounds {rounds}, seconds {seconds}: expected at least 1 each"
        )
    if not hasattr(lm, "full_logits"):
        raise ValueError("latency is measured of a pretrained model: load one first")
    tokens = _within_window(lm, sorted(set(verified_tokens)), context)
    made = [head if isinstance(head, DraftHead) else _made(lm, head, seed) for head in heads]
    watch = _Stopwatch(lm, context, seed)
    jobs: dict[tuple, Callable[[], dict[str, float]]] = {}
    for batch in sorted(set(batches)):
        for count in tokens:
            jobs["step", batch, count] = watch.step(batch, count, tokens[-1])
        for index, head in enumerate(made):
            jobs["head", batch, index] = watch.cycles(batch, head)
        jobs["loop", batch, 0] = watch.cycles(batch, None)
        jobs["generate", batch, 0] = watch.generate(batch)
    return _summary(lm, _measured(jobs, rounds, seconds, seed), made, context)


def _made(lm: Any, keywords: Mapping[str, Any], seed: int) -> DraftHead:
    return new_head(lm, Candidate.of(lm, keywords).keywords, seed=seed)


def _within_window(lm: Any, tokens: list[int], context: int) -> list[int]:
    if lm.max_context is None:
        return tokens
    kept = [count for count in tokens if context + count <= lm.max_context]
    if not kept:
        raise ValueError(
            f"no room for {tokens[0]} tokens after {context} in a window of {lm.max_context}: "
            "shorten the context"
        )
    return kept


def _measured(
    jobs: Mapping[tuple, Callable[[], dict[str, float]]], rounds: int, seconds: float, seed: int
) -> dict[tuple, dict[str, list[float]]]:
    """What every job said in each round but the first."""
    found: dict[tuple, dict[str, list[float]]] = {name: {} for name in jobs}
    order, chance = list(jobs), random.Random(seed)
    begun = time.perf_counter()
    for turn in range(max(rounds, _FEWEST_ROUNDS) + 1):
        # Two rounds are the fewest that have quartiles; three are taken where there is time.
        spent = time.perf_counter() - begun
        if spent > seconds and turn > (2 if spent > _MUCH_TOO_LONG * seconds else _FEWEST_ROUNDS):
            break
        chance.shuffle(order)
        for name in order:
            for what, value in jobs[name]().items():
                if turn:
                    found[name].setdefault(what, []).append(value)
    return found


@dataclass(frozen=True)
class _Planned:
    """Cycles that warm up and that are counted."""

    warming: int
    counted: int

    @property
    def whole(self) -> int:
        return self.warming + self.counted

    @classmethod
    def least(cls, most: int) -> _Planned:
        """Where nothing is known of their seconds."""
        return cls._within(_WARMING, _CYCLES, most)

    @classmethod
    def of(cls, seconds: float, most: int) -> _Planned:
        """Of cycles of so many seconds, at most so many that count."""
        each = max(seconds, 1e-9)
        warming = max(_WARMING, math.ceil(min(_WARM_SECONDS / each, _MOST_CYCLES)))
        counted = max(_CYCLES, math.ceil(min(_SECONDS / each, _MOST_CYCLES)))
        return cls._within(warming, counted, most)

    @classmethod
    def _within(cls, warming: int, counted: int, most: int) -> _Planned:
        """The same shares of what there is room for; one is counted at least."""
        whole = min(warming + counted, most)
        kept = max(whole * counted // (warming + counted), 1)
        return cls(whole - kept, kept)


@dataclass
class _Stopwatch:
    """Times one thing at a time on one model."""

    lm: Any
    context: int
    seed: int
    targets: dict[int, Any] = field(default_factory=dict)

    def prompts(self, batch: int) -> list[Tensor]:
        """Of different lengths, as the rows of a batch are while they are decoded."""
        lengths = [max(self.context - row % 3, 1) for row in range(batch)]
        return [
            trial_ids(self.lm.vocab_size, length, self.seed + row)
            for row, length in enumerate(lengths)
        ]

    def now(self) -> float:
        """The clock, after what the device has been given is done."""
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)
        return time.perf_counter()

    def step(self, batch: int, count: int, longest: int) -> Callable[[], dict[str, float]]:
        """One call over `count` tokens of every request, and their probabilities."""
        # (batch, count)
        more = trial_ids(self.lm.vocab_size, batch * count, self.seed + 1).view(batch, count)
        running, nothing = set(range(batch)), torch.zeros(batch, dtype=torch.long)

        @torch.inference_mode()
        def timed() -> dict[str, float]:
            target = self._target(batch, longest)
            spent, times = 0.0, []
            while spent < _WARM_SECONDS + _SECONDS:
                begun = self.now()
                scores, _ = target.extend(more.to(self.lm.device), running)
                probs = scores.double().softmax(-1)  # (batch, count, vocab)
                bool(torch.isnan(probs.sum()))
                times.append((spent >= _WARM_SECONDS, self.now() - begun))
                spent += times[-1][1]
                target.keep(nothing)
            warm = [seconds for is_warm, seconds in times if is_warm]
            return {"seconds": statistics.mean(warm or [times[-1][1]])}

        return timed

    def _target(self, batch: int, longest: int) -> Any:
        if batch not in self.targets:
            whole = self.context + longest
            target = open_target(self.lm, rows=batch, longest=whole, hidden=True).target
            target.begin(self.prompts(batch))
            self.targets[batch] = target
        return self.targets[batch]

    def cycles(self, batch: int, head: DraftHead | None) -> Callable[[], dict[str, float]]:
        """Mean seconds of each stage over cycles of the loop that follow others."""
        drafted = 1 if head is None else head.horizon
        most = self._room(drafted, 2)
        if most < 1:
            raise ValueError(
                f"no room for cycles of {drafted} tokens after {self.context} in a window of "
                f"{self.lm.max_context}: shorten the context"
            )
        planned = _Planned.least(most)

        def timed() -> dict[str, float]:
            nonlocal planned
            before = self._stages(batch, head, drafted, planned.whole)
            skipped = min(planned.warming, len(before) - 2)
            counted = len(before) - 1 - skipped
            stages = {
                name: (spent - before[skipped][name]) / counted
                for name, spent in before[-1].items()
            }
            cycle = sum(stages.values())
            planned = _Planned.of(cycle, most)
            return stages | {"cycle": cycle}

        return timed

    def _room(self, drafted: int, spare: int) -> int:
        """Cycles of so many tokens that the model's window has room for, as far as they count."""
        if self.lm.max_context is None:
            return _MOST_CYCLES
        return min((self.lm.max_context - self.context) // drafted - spare, _MOST_CYCLES)

    def _stages(
        self, batch: int, head: DraftHead | None, drafted: int, cycles: int
    ) -> list[dict[str, float]]:
        """Seconds of each stage so far, before the first cycle and after every one."""
        blocks, before = [0] * batch, [dict.fromkeys(STAGES, 0.0)]

        def noted(progress: Progress) -> None:
            before.append(progress.stage_seconds)

        def goes_on(row: int, _: Tensor) -> bool:
            blocks[row] += 1
            return blocks[row] <= cycles

        asked: dict[str, Any] = {"callback": goes_on, "watch": noted, "seed": self.seed}
        asked |= {"max_new_tokens": (cycles + 1) * drafted}
        found = speculative_generate(self.lm, head, self.prompts(batch), **asked)
        before[-1] = dict(found.stats.stage_seconds)
        return before

    def generate(self, batch: int) -> Callable[[], dict[str, float]]:
        """A step of transformers' own generation: several steps less one."""
        tokens = trial_ids(self.lm.vocab_size, batch * self.context, self.seed)
        tokens = tokens.view(batch, self.context).to(self.lm.device)  # (batch, context)
        most = self._room(1, 1)
        planned = _Planned.least(most)

        def run(count: int) -> float:
            begun = self.now()
            self.lm.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=True,
                top_k=0,
                eos_token_id=None,
                pad_token_id=0,
            )
            return self.now() - begun

        def timed() -> dict[str, float]:
            nonlocal planned
            with torch.random.fork_rng(devices=[]):
                first, whole = run(planned.warming + 1), run(planned.whole + 1)
            step = max(whole - first, 0.0) / planned.counted
            planned = _Planned.of(step, most)
            return {"cycle": step}

        return timed


def _summary(
    lm: Any, found: Mapping[tuple, Mapping[str, list[float]]], heads: list[DraftHead], context: int
) -> MeasuredLatency:
    steps = tuple(
        StepTime(batch, count, *_quartiles(said["seconds"]), context=context)
        for (what, batch, count), said in sorted(found.items())
        if what == "step"
    )
    timed = tuple(
        _head_time(heads[index], batch, said)
        for (what, batch, index), said in sorted(found.items())
        if what == "head"
    )
    plain = tuple(_plain_time(found, batch) for batch in sorted({batch for _, batch, _ in found}))
    smallest = min(time.batch for time in plain)
    ours = [time for time in timed if time.batch == smallest]
    first = next(time.seconds for time in plain if time.batch == smallest)
    calls = [t for t in steps if t.batch == smallest and t.tokens <= _SHORT_CALL]
    model = LatencyModel.fitted(
        first,
        [*(t.horizon for t in ours), *(t.tokens for t in calls)],
        [*(t.rank for t in ours), *(0 for _ in calls)],
        [*(t.cycle for t in ours), *(t.seconds for t in calls)],
    )
    return MeasuredLatency(model, (StepCurve(OURS, steps),), timed, plain, _whereabouts(lm, found))


def _head_time(head: DraftHead, batch: int, said: Mapping[str, list[float]]) -> HeadTime:
    middle = {name: statistics.median(values) for name, values in said.items()}
    _, low, high = _quartiles(said["cycle"])
    return HeadTime(
        **sizes_of(head),
        batch=batch,
        draft=middle["draft"],
        verification=middle["verification"],
        rest=middle["rest"],
        cycle=middle["cycle"],
        spread=(high - low) / 2,
    )


def _plain_time(found: Mapping[tuple, Mapping[str, list[float]]], batch: int) -> PlainTime:
    """The faster of both ways."""
    ways = {"generate": "transformers' generate", "loop": OURS}
    times = []
    for name, way in ways.items():
        middle, low, high = _quartiles(found[name, batch, 0]["cycle"])
        if middle > 0:
            times.append(PlainTime(batch, middle, way, (high - low) / 2))
    return min(times, key=lambda time: time.seconds)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _whereabouts(lm: Any, found: Mapping[tuple, Mapping[str, list[float]]]) -> dict[str, str]:
    cuda = lm.device.type == "cuda"
    device = torch.cuda.get_device_name(lm.device) if cuda else platform.processor() or "cpu"
    threads = torch.get_num_threads()
    rounds = min(len(values) for said in found.values() for values in said.values())
    return {
        "model": lm.name,
        "device": device if cuda else f"{device}, {threads} thread{'s' * (threads > 1)}",
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "rounds": str(rounds),
    }
