"""What a study will take, before it is begun."""

from __future__ import annotations

from dataclasses import dataclass

from cpmtp.study.effort.trees import most_nodes
from cpmtp.study.effort.trial import Trial
from cpmtp.study.plan import (
    JOINTS_HELD,
    default_workers,
    is_completed,
    open_language_model,
    plan_study,
    study_cells,
    tree_horizons,
)
from cpmtp.study.rows import one_thread
from cpmtp.study.settings import StudySettings

# Read off a two-core machine: bytes of an idle worker with a small model.
_IDLE_BYTES = 600_000_000
# Entries a tree stands for in the estimate of memory: its expanded prefixes' kept children.
_CHILDREN_KEPT = 100


@dataclass(frozen=True)
class StudyEstimate:
    """What a study will take: rows, bytes, seconds; and which models' horizons are truncated.

    Attributes
    ----------
    cells : int
    workers : int
    joint_bytes, memory_bytes : int
        Of the largest joint; of all workers together.
    seconds : float
        From a trial on this machine.
    truncated : tuple of str
    contexts : int
        Of every model and domain.
    prefixes_per_second : dict of str to float
        Of every model, one thread.
    """

    cells: int
    workers: int
    joint_bytes: int
    memory_bytes: int
    seconds: float
    truncated: tuple[str, ...]
    contexts: int
    prefixes_per_second: dict[str, float]


def estimate_study(
    settings: StudySettings,
    workers: int | None = None,
    *,
    seconds: float | None = None,
    trial: Trial | None = None,
) -> StudyEstimate:
    """Rows, memory and time of a study, from a trial of its models on its first contexts.

    Parameters
    ----------
    seconds : float, optional
        What there is: then as many contexts as it has room for.
    trial : Trial, optional
        What is known already.
    """
    with one_thread():
        units, _ = plan_study(settings)
    trial = trial or Trial.of(settings, units)
    places = len({(unit.model, unit.domain, unit.temperature) for unit in units})
    workers = min(workers or default_workers(settings), len(units))
    contexts = settings.contexts if seconds is None else trial.room(seconds, workers, settings)
    workers = min(workers, contexts * places)
    cells, largest, loaded = 0, 0, 0
    truncated: list[str] = []
    for name in settings.models:
        lm = open_language_model(name, settings.device, settings.dtype)
        trees = tree_horizons(lm.vocab_size, settings)
        sizes = [_entries(settings, n, lm.vocab_size, n in trees) for n in settings.horizons]
        truncated += [f"{name}, horizon {n}" for n in trees if not is_completed(settings, n)]
        own = (len(study_cells(settings, trees, context)) for context in range(contexts))
        cells += sum(own) * places // len(settings.models)
        largest, loaded = max(largest, 8 * max(sizes)), loaded + _bytes_of(lm)
    return StudyEstimate(
        cells=cells,
        workers=workers,
        joint_bytes=largest,
        memory_bytes=(workers + 1) * (_IDLE_BYTES + loaded)
        + workers * JOINTS_HELD * largest * settings.restarts,
        seconds=trial.seconds(contexts, workers, settings),
        truncated=tuple(truncated),
        contexts=contexts,
        prefixes_per_second=trial.prefixes_per_second,
    )


def _entries(settings: StudySettings, horizon: int, vocab_size: int, is_tree: bool) -> int:
    """Sequences of a dense joint or a complete tree; what a truncated one may come to."""
    if not is_tree:
        return vocab_size**horizon
    if is_completed(settings, horizon):
        return settings.top_k**horizon
    nodes = most_nodes(settings, horizon) if settings.cheapest else settings.tree_nodes
    return nodes * _CHILDREN_KEPT


def _bytes_of(lm: object) -> int:
    """Of a model's weights, where it has some."""
    parameters = getattr(getattr(lm, "model", None), "parameters", None)
    return sum(p.nbytes for p in parameters()) if callable(parameters) else 0
