"""What a study will take, before it is begun."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree.children import next_tokens
from cpmtp.study.plan import (
    JOINTS_HELD,
    StudyCell,
    default_workers,
    is_completed,
    open_language_model,
    study_cells,
    tree_horizons,
)
from cpmtp.study.settings import StudySettings

# Next tokens that a model is timed on, at once.
_TIMED = 32


@dataclass(frozen=True)
class StudyEstimate:
    """What a study will take: rows, bytes, seconds; and which models' horizons are truncated."""

    cells: int
    workers: int
    joint_bytes: int
    memory_bytes: int
    seconds: float
    truncated: tuple[str, ...] = ()


# Read off a two-core machine: bytes of an idle worker, and seconds per entry of the joint and
# component of an average fit.
_IDLE_BYTES, _SECONDS_PER_ENTRY = 600_000_000, 1.25e-7
# Entries a tree stands for in the estimate: its expanded prefixes' kept children.
_CHILDREN_KEPT = 100
# An anchored fit takes about twice as long, a mixture for every first token; an entry of a tree
# four times as long as one of a dense joint.
_ANCHORED_WORK, _TREE_WORK = 2, 4


def estimate_study(settings: StudySettings, workers: int | None = None) -> StudyEstimate:
    """Rows, memory and time of a study; each model is asked for a few next tokens to be timed."""
    per_model = settings.contexts * max(len(settings.corpora), 1) * len(settings.temperatures)
    workers = min(workers or default_workers(settings), per_model * len(settings.models))
    cells, work, largest, evaluating = 0, 0, 0, 0.0
    truncated: list[str] = []
    for name in settings.models:
        lm = open_language_model(name, settings.device, settings.dtype)
        vocab = lm.vocab_size
        trees = tree_horizons(vocab, settings)
        sizes = {
            n: _tree_entries(settings, n) if n in trees else vocab**n for n in settings.horizons
        }
        truncated += [f"{name}, horizon {n}" for n in trees if not is_completed(settings, n)]
        found = study_cells(settings, trees)
        cells += len(found) * per_model
        work += sum(_work(c, sizes, trees) for c in found) * per_model * settings.restarts
        largest = max(largest, 8 * max(sizes.values()))
        evaluating += (
            _seconds_per_prefix(lm, settings) * _prefixes(vocab, settings, trees) * per_model
        )
    return StudyEstimate(
        cells=cells,
        workers=workers,
        joint_bytes=largest,
        memory_bytes=(workers + 1) * _IDLE_BYTES
        + workers * JOINTS_HELD * largest * settings.restarts,
        seconds=(work * _SECONDS_PER_ENTRY + evaluating) / workers,
        truncated=tuple(truncated),
    )


def _prefixes(vocab: int, settings: StudySettings, trees: tuple[int, ...]) -> int:
    """Prefixes that a context's joints ask the model for; shorter dense ones are marginals."""
    dense = [n for n in settings.horizons if n not in trees]
    found = sum(vocab**depth for depth in range(max(dense, default=0)))
    for n in trees:
        kept = settings.top_k if is_completed(settings, n) else 0
        found += sum(kept**depth for depth in range(n)) if kept else settings.tree_nodes
    longest = max((n for n in trees if not is_completed(settings, n)), default=1)
    return found + (longest - 1) * settings.samples


def _seconds_per_prefix(lm: LanguageModel, settings: StudySettings) -> float:
    """Of one next-token distribution among many, after a context of the study's length."""
    window = getattr(lm, "max_context", None) or settings.context_length + 1
    generator = torch.Generator().manual_seed(0)
    length = max(min(settings.context_length, window - 1), 1)
    context = torch.randint(lm.vocab_size, (length,), generator=generator)
    prefixes = torch.randint(lm.vocab_size, (_TIMED, 1), generator=generator)
    seconds = 0.0
    for _ in range(2):  # the first time a model is used it is tried as well
        begun = time.perf_counter()
        next_tokens(lm, context, prefixes, settings.law(settings.temperatures[0]), lm.vocab_size)
        seconds = time.perf_counter() - begun
    return seconds / _TIMED


def _tree_entries(settings: StudySettings, horizon: int) -> int:
    """Sequences of a complete tree; what a truncated one may come to."""
    if is_completed(settings, horizon):
        return settings.top_k**horizon
    return settings.tree_nodes * _CHILDREN_KEPT


def _work(cell: StudyCell, sizes: dict[int, int], trees: tuple[int, ...]) -> int:
    """Entries of the joint times components that a fit goes through, in those of a dense joint."""
    slower = (_ANCHORED_WORK if cell.anchored else 1) * (_TREE_WORK if cell.horizon in trees else 1)
    return sizes[cell.horizon] * cell.rank * slower
