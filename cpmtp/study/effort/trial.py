"""A trial of some seconds on this machine: how fast the model is, and what a context takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cpmtp.decomposition.fit_result import FitResult
from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree.children import next_tokens
from cpmtp.study.plan import StudyUnit, open_language_model, study_cells
from cpmtp.study.quality import SharedPaths, qualities
from cpmtp.study.rows import one_thread, unit_fits, unit_joint
from cpmtp.study.settings import StudySettings

# Next tokens that a model is timed on at once, and for how long.
_TIMED, _SECONDS = 32, 1.0
# Contexts that are tried in part: at least one of every model and domain, more while this is not
# spent.
_MOST_PILOTS, _PILOT_SECONDS = 4, 5.0
# What starting a worker takes beside loading its models.
STARTING_SECONDS = 4.0
# Ranks that pilots fit. What larger ones take grows with the rank by a power, a method's own: read
# off fits to dense joints of 104 tokens and to trees of SmolLM2's, ranks 2 to 16. Rank 1
# counts by itself: by `em` it takes no sweeps.
_PILOT_RANKS = 2
_POWERS = {"em": 0.8, "gradient": 0.35, "acceptance": 0.35, "als": 1.0, "hals": 1.1, "mu": 0.8}


@dataclass(frozen=True)
class Trial:
    """What was found.

    Attributes
    ----------
    prefixes_per_second : dict of str to float
        Of every model: next-token distributions after many prefixes of one context, one thread.
    round_seconds : float
        One context of every model and domain at every temperature, on one core.
    acceptance_seconds : float
        Of these, those of fits by ``acceptance``.
    start_seconds : float
        What every worker takes to load the models.
    sequences : int
        Of the largest joint or tree seen.
    pilots : int
        Contexts that were tried.
    """

    prefixes_per_second: dict[str, float]
    round_seconds: float
    acceptance_seconds: float
    start_seconds: float
    sequences: int
    pilots: int

    @classmethod
    def of(cls, settings: StudySettings, units: Sequence[StudyUnit]) -> Trial:
        """Try the models of a study on the first of its contexts."""
        with one_thread():
            speeds, loading = {}, 0.0
            for name in settings.models:
                begun = time.perf_counter()
                lm = open_language_model(name, settings.device, settings.dtype)
                loading += time.perf_counter() - begun
                speeds[name] = _prefixes_per_second(lm, settings)
            rounds = _by_place(units)
            spent: dict[tuple, list[tuple[float, float]]] = {place: [] for place in rounds}
            largest, begun = 1, time.perf_counter()
            for turn in range(_MOST_PILOTS):
                for place, own in rounds.items():
                    late = time.perf_counter() - begun > _PILOT_SECONDS
                    if turn >= len(own) or (late and spent[place]):
                        continue
                    *seconds, sequences = _pilot(settings, own[turn])
                    spent[place].append((seconds[0], seconds[1]))
                    largest = max(largest, sequences)
        means = [
            [statistics.fmean(column) for column in zip(*some, strict=True)]
            for some in spent.values()
            if some
        ]
        return cls(
            speeds,
            sum(whole for whole, _ in means),
            sum(acceptance for _, acceptance in means),
            loading,
            largest,
            sum(map(len, spent.values())),
        )

    def seconds(self, contexts: int, workers: int, settings: StudySettings) -> float:
        """What so many contexts of every model and domain take on so many cores."""
        own = self.start_seconds + STARTING_SECONDS if workers > 1 else 0.0
        few = settings.acceptance_contexts
        without = 0 if few is None else max(contexts - few, 0)
        work = contexts * self.round_seconds - without * self.acceptance_seconds
        return own + work / workers

    def room(self, seconds: float, workers: int, settings: StudySettings) -> int:
        """Contexts of every model and domain that there is time for: at least one."""
        wanted = range(2, settings.contexts + 1)
        room = (n for n in wanted if self.seconds(n, workers, settings) <= seconds)
        return max(room, default=1)


def _by_place(units: Sequence[StudyUnit]) -> dict[tuple, list[StudyUnit]]:
    """Units of every model, domain and temperature."""
    found: dict[tuple, list[StudyUnit]] = {}
    for unit in units:
        found.setdefault((unit.model, unit.domain, unit.temperature), []).append(unit)
    return found


def _prefixes_per_second(lm: LanguageModel, settings: StudySettings) -> float:
    """Next-token distributions among many, after a context of the study's length."""
    window = getattr(lm, "max_context", None) or settings.context_length + 1
    generator = torch.Generator().manual_seed(0)
    length = max(min(settings.context_length, window - 1), 1)
    context = torch.randint(lm.vocab_size, (length,), generator=generator)
    prefixes = torch.randint(lm.vocab_size, (_TIMED, 1), generator=generator)
    law = settings.law(settings.temperatures[0])
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begun < _SECONDS:
        before = time.perf_counter()
        next_tokens(lm, context, prefixes, law, settings.top_k or lm.vocab_size)
        times.append(time.perf_counter() - before)
        if len(times) == 1:  # the first time a model is used it is tried as well
            begun = time.perf_counter()
    return _TIMED / statistics.median(times[1:])


def _pilot(settings: StudySettings, unit: StudyUnit) -> tuple[float, float, int]:
    """Seconds that a context would take, from its joints and its fits of small ranks, those of fits
    by ``acceptance``, and the sequences of its largest joint. A context that fails takes none.
    """
    ranks = tuple(r for r in sorted(settings.ranks) if r <= _PILOT_RANKS) or (min(settings.ranks),)
    small = replace(settings, ranks=ranks)
    lm = open_language_model(unit.model, settings.device, settings.dtype)
    shared, total, acceptance, largest = SharedPaths(small, unit, lm), 0.0, 0.0, 1
    dense = [n for n in settings.horizons if n not in unit.trees]
    whole, seconds = unit_joint(small, unit, lm, max(dense)) if dense else (None, 0.0)
    total += seconds
    for horizon in settings.horizons:
        joint = whole if horizon in dense else None
        if horizon in unit.trees:
            joint, seconds = unit_joint(small, unit, lm, horizon)
            total += seconds
        if joint is None or isinstance(joint, Exception):
            continue
        if horizon in dense:
            joint, size = joint.marginal(horizon), lm.vocab_size**horizon
        else:
            size = len(joint.levels[-1])
        largest = max(largest, size)
        cells = [c for c in study_cells(small, unit.trees) if c.horizon == horizon]
        fits = unit_fits(small, joint, cells, unit.seed(settings.seed) % 2**31)
        begun = time.perf_counter()
        qualities(joint, fits, shared)
        judged = time.perf_counter() - begun
        fitting = _fitting(settings, ranks, fits)
        own = fitting.get("acceptance", 0.0)
        total += judged * len(settings.ranks) / len(ranks) + sum(fitting.values())
        acceptance += own
    return total, acceptance, largest


def _fitting(settings: StudySettings, ranks: tuple[int, ...], fits: dict) -> dict[str, float]:
    """Seconds of all fits by method, from those of small ranks."""
    found = dict.fromkeys(settings.methods, 0.0)
    for method in settings.methods:
        mine = [(c.rank, f) for c, f in fits.items() if c.method == method]
        spent = [(rank, f.seconds) for rank, f in mine if isinstance(f, FitResult)]
        # of rank 1 alone nothing else is known
        lowest = 1 if max(ranks) > 1 else 0
        wanted, tried = (
            sum(rank ** _POWERS[method] for rank in some if rank > lowest)
            for some in (settings.ranks, ranks)
        )
        more = sum(seconds for rank, seconds in spent if rank > lowest)
        found[method] = sum(s for rank, s in spent if rank <= lowest) + more * wanted / tried
    return found
