"""What a model is put through before it is trusted: full passes against every shorter way.

A way is trusted for texts up to a length once it agreed with full forward passes on texts that
cross every window or rope boundary below that length.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Names of settings that may say at which length a model begins to work differently.
_BOUNDARY_WORDS = ("window", "chunk", "local", "block", "original_max", "span", "topk", "sink")
# Texts of the first trial, without any boundary: short ones, of different lengths.
SHORT = (9, 4, 14)
# Rounding of logits in units of the last place of the largest: recurrent states amplify it most.
_ULPS = 512
# How often what two passes of different batch shape differ by may be exceeded.
_TIMES = 8
# What a way through a model that does not suit it may end with.
FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    AssertionError,
)

# Largest total variation of a way through a model to full passes, on prompts of some lengths.
Gap = Callable[[Any, tuple[int, ...]], float]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes
    ----------
    gap : float
        Largest total variation to full passes.
    allowed : float
        What rounding may make.
    failure : str
        Why the way could not be gone at all; empty otherwise.
    """

    gap: float
    allowed: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the way is as good as full passes."""
        return not self.failure and self.gap <= self.allowed


class Trials:
    """A model's trials: each way at each boundary once, when a text that long is first asked for.

    Attributes
    ----------
    outcomes : dict of (way, boundary) to Outcome
        The boundary None stands for short texts.
    """

    def __init__(self, lm: Any):
        self._lm, self._lock = lm, threading.RLock()
        self.outcomes: dict[tuple[str, int | None], Outcome] = {}

    def passes(self, way: str, length: int, gap: Gap) -> bool:
        """Whether a way passes at every boundary that texts of at most `length` tokens cross."""
        limit = self._lm.max_context
        longest = length if limit is None else min(length, limit - 12)
        wanted = [None, *boundaries(self._lm.model.config, longest)]
        with self._lock:
            new = [at for at in wanted if (way, at) not in self.outcomes]
            twin = self._lm.twin if new else self._lm
            for at in new:
                self.outcomes[way, at] = _tried(twin, at, gap)
                if not self.outcomes[way, at].passed:
                    break
            if twin is not self._lm:
                del twin
                gc.collect()  # a model refers to itself: it would stay for long
            found = [self.outcomes.get((way, at)) for at in wanted]
            return all(outcome is not None and outcome.passed for outcome in found)

    def said(self, way: str) -> str:
        """What was found of a way that failed, in words."""
        worst = max((o for (w, _), o in self.outcomes.items() if w == way), key=lambda o: o.gap)
        return worst.failure or f"total variation {worst.gap:.3g}, allowed {worst.allowed:.1g}"


def _tried(lm: Any, boundary: int | None, gap: Gap) -> Outcome:
    lengths = trial_lengths(boundary)
    try:
        with torch.inference_mode():
            return Outcome(gap(lm, lengths), tolerance(lm, max(lengths)))
    except FAILURES as error:
        return Outcome(1.0, 0.0, f"{type(error).__name__}: {first_line(error)}")


def boundaries(config: Any, longest: int) -> list[int]:
    """Lengths below `longest` at which the configuration says that something changes.

    Examples
    --------
    >>> from transformers import MistralConfig
    >>> boundaries(MistralConfig(sliding_window=64), 1000)
    [64]
    """
    found = set(_named_lengths(config.to_dict()))
    return sorted(length for length in found if 1 < length < longest)


def _named_lengths(settings: Any, name: str = "") -> Iterator[int]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _named_lengths(value, f"{key}")
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _named_lengths(value, name)
    elif isinstance(settings, int) and any(word in name for word in _BOUNDARY_WORDS):
        yield int(settings)


def trial_lengths(boundary: int | None) -> tuple[int, ...]:
    """Lengths of a ragged batch of prompts that comes to stand on both sides of a boundary."""
    return (
        SHORT if boundary is None else (max(boundary - 2, 1), max(boundary // 2, 1), boundary + 1)
    )


def trial_ids(vocab_size: int, length: int, seed: int) -> Int[Tensor, " length"]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
    return torch.randint(vocab_size, (length,), generator=generator)


def total_variation(
    a: Float[Tensor, "*rows vocab"], b: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """``1/2 sum |p - q|`` of two sets of logits or log-probabilities; 1 where one is not finite."""
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    gap = 0.5 * (p - q.to(p.device)).abs().sum(-1)
    return torch.where(torch.isfinite(gap), gap, 1.0)


def tolerance(lm: Any, length: int) -> float:
    """The total variation up to which two ways through a model count as the same.

    Eight times that of two full passes of different batch shape: three texts at once, and a text of
    eight tokens without its last three, which in half precision may make at most eight units in
    the last place (more is no rounding) and counts as one where it makes none, since a cache is
    read in other shapes still. In single precision at least what 512 units in the last place of the
    largest logit can make.
    """
    ids = trial_ids(lm.vocab_size, length, 1)[None]  # (1, length)
    alone = lm.full_logits(ids)  # (1, length, vocab)
    beside = lm.full_logits(ids.expand(3, -1))[:1]
    measured = _TIMES * float(total_variation(alone, beside).max())
    epsilon = torch.finfo(lm.model.dtype).eps
    if epsilon > torch.finfo(torch.float32).eps:
        shorter = min(later_tokens_gap(lm, ()), _TIMES * epsilon)
        return max(measured, _TIMES * max(shorter, epsilon))
    return max(measured, 0.5 * _ULPS * epsilon * (1 + float(alone.abs().max())))


def fits_twice(model: Any) -> bool:
    """Whether a copy of the model in single precision fits into free memory beside it."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    if model.device.type == "cuda":
        return needed < 0.9 * torch.cuda.mem_get_info(model.device)[0]
    pages = "SC_AVPHYS_PAGES"
    if pages not in os.sysconf_names:
        return needed < 2_000_000_000
    return needed < 0.8 * os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def later_tokens_gap(lm: Any, lengths: tuple[int, ...]) -> float:
    """Largest total variation that the last tokens of a text of eight make to what comes before."""
    ids = trial_ids(lm.vocab_size, 8, 2)[None]  # (1, 8)
    whole, part = lm.full_logits(ids), lm.full_logits(ids[:, :5])
    return float(total_variation(whole[:, :5], part).max())


def one_pass_gap(lm: Any, lengths: tuple[int, ...]) -> float:
    """The same of longer texts: whether one pass says everywhere what a pass per prefix does.

    Positions that depend on a text's whole length, or that choose among all its tokens, do not. A
    choice seldom shows, so that short texts are tried eight at a time.
    """
    worst = 0.0
    for length in lengths:
        texts = max(1, min(8, 512 // length))
        ids = torch.stack([trial_ids(lm.vocab_size, length + 6, 2 + k) for k in range(texts)])
        whole = lm.full_logits(ids)  # (texts, length + 6, vocab)
        for end in {max(length // 2, 1), length, length + 2, length + 4, length + 5}:
            prefix = lm.next_token_log_probs(ids[:, :end])  # (texts, vocab)
            worst = max(worst, float(total_variation(whole[:, end - 1], prefix).max()))
    return worst


def hidden_gap(lm: Any, lengths: tuple[int, ...]) -> float:
    """Largest total variation of what is made of last hidden states to the model's own logits.

    Raises
    ------
    ValueError
        If there are no such hidden states.
    """
    ids = trial_ids(lm.vocab_size, 7, 0)[None].to(lm.device)  # (1, time)
    hidden = lm.trunk(input_ids=ids, use_cache=False).last_hidden_state  # (1, time, d)
    logits, width = lm.full_logits(ids), lm.model.get_output_embeddings().weight.shape[1]
    if hidden.ndim != 3 or hidden.shape[1] != ids.shape[1] or hidden.shape[2] != width:
        raise ValueError(f"they have shape {tuple(hidden.shape)}, the unembedding takes {width}")
    return float(total_variation(lm.unembed(hidden), logits).max())


def tree_gap(lm: Any, lengths: tuple[int, ...]) -> float:
    """Largest total variation of next tokens after branches of a shared context to full passes."""
    worst = 0.0
    for length in lengths:
        context = trial_ids(lm.vocab_size, length, 3)
        branches = trial_ids(lm.vocab_size, 12, length).reshape(4, 3)  # (branches, 3)
        branches[1::2, 0] = branches[::2, 0]
        rows = torch.cat([context.expand(4, -1), branches], 1)  # (branches, length + 3)
        found = torch.cat(list(lm._shared_prefix_logits(context, branches)))  # (branches, vocab)
        worst = max(worst, float(total_variation(found, lm.next_token_log_probs(rows)).max()))
    return worst


def growth_gap(lm: Any, lengths: tuple[int, ...]) -> float:
    """The same of rows of one length that the model's own cache follows token by token."""
    worst = 0.0
    for length in lengths:
        rows = torch.stack([trial_ids(lm.vocab_size, length + 4, seed) for seed in (4, 5)])
        expected = lm.full_logits(rows)  # (2, length + 4, vocab)
        logits, cache = lm.step(rows[:, :length])
        found = [logits[:, -1]]
        for at in range(length, length + 4):
            logits, cache = lm.step(rows[:, at : at + 1], cache)
            found.append(logits[:, -1])
        gaps = total_variation(torch.stack(found, 1), expected[:, length - 1 :])  # (2, 5)
        worst = max(worst, float(gaps.max()))
    return worst


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
