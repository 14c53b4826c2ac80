"""All rows of one context: its joint once, then every fit. What a worker does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from cpmtp.decomposition.fit_result import FitResult
from cpmtp.decomposition.fitting import KL_METHODS, fit, fit_path
from cpmtp.decomposition.floors import rank_floors
from cpmtp.decomposition.trees.memory import token_memory
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.joint_distribution import JointDistribution, check_context, exact_joint
from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree import PrefixTree
from cpmtp.study.effort.trees import context_tree
from cpmtp.study.plan import (
    StudyCell,
    StudyUnit,
    is_completed,
    open_language_model,
    study_cells,
)
from cpmtp.study.quality import SharedPaths, qualities
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import SCHEMA_VERSION


def study_unit_rows(settings: StudySettings, unit: StudyUnit) -> list[dict]:
    """All rows of one context. Never raises for what one cell does."""
    with one_thread():
        cells = study_cells(settings, unit.trees, unit.context)
        try:
            lm = open_language_model(unit.model, settings.device, settings.dtype)
        except Exception as error:  # the study's own process has loaded it
            return failed_rows(settings, unit, f"{TRIED_AGAIN}{type(error).__name__}: {error}")
        try:
            ids = torch.tensor(unit.token_ids, dtype=torch.long)
            check_context(lm, ids, max(settings.horizons))
            facts = {"context_nats": _context_nats(lm, unit)}
        except Exception as error:
            return failed_rows(settings, unit, _said(error))
        rows, shared = [], SharedPaths(settings, unit, lm)
        dense = [n for n in settings.horizons if n not in unit.trees]
        longest = (
            unit_joint(settings, unit, lm, max(dense))
            if dense
            else (RuntimeError("not computed"), 0.0)
        )
        for horizon in settings.horizons:
            joint, seconds = (
                unit_joint(settings, unit, lm, horizon) if horizon in unit.trees else longest
            )
            here = [cell for cell in cells if cell.horizon == horizon]
            if isinstance(joint, Exception):
                rows += [_failed(settings, unit, c, _said(joint)) | facts for c in here]
                continue
            if isinstance(joint, JointDistribution):
                joint = joint.marginal(horizon)
            known = facts | {"joint_seconds": seconds} | _joint_facts(joint)
            if set(settings.forms) != {"cp"}:
                known |= memory_facts(joint)
            fits = unit_fits(settings, joint, here, unit.seed(settings.seed) % 2**31)
            floors = _kl_floors(joint, here)
            found, computed = qualities(joint, fits, shared)
            for cell in here:
                # The floors are of mixtures that do not look at the token before.
                plain = cell.transition_rank == 0
                floor = floors.get((cell.rank, cell.anchored), math.nan) if plain else math.nan
                row = _fit_row(settings, unit, cell, fits[cell], found[cell])
                rows.append(row | known | {"kl_floor_nats": floor} | computed)
        return rows


def failed_rows(settings: StudySettings, unit: StudyUnit, message: str) -> list[dict]:
    """The rows of a context of which nothing came."""
    return [
        _failed(settings, unit, cell, message)
        for cell in study_cells(settings, unit.trees, unit.context)
    ]


# How a message begins that tells of what may have passed by the next time.
TRIED_AGAIN = "tried again by the next run: "


def may_pass(error: Exception) -> bool:
    """Whether the same work may succeed another time: memory or a device was short, or a file could
    not be read.

    Examples
    --------
    >>> may_pass(MemoryError()), may_pass(ValueError("rank 0"))
    (True, False)
    """
    words = str(error).lower()
    short = any(w in words for w in ("out of memory", "allocate memory", "not enough memory"))
    return isinstance(error, MemoryError | OSError) or (isinstance(error, RuntimeError) and short)


def _said(error: Exception) -> str:
    return f"{TRIED_AGAIN if may_pass(error) else ''}{type(error).__name__}: {error}"


_lock = threading.Lock()
_inside, _threads_before = 0, 1
_blas: threadpool_limits | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and BLAS, until the last of those who asked for it is done.

    Workers of several threads each fight for the cores; and sums of one thread have one order,
    hence the same bits.
    """
    global _inside, _threads_before, _blas
    with _lock:
        if not _inside:
            _threads_before, _blas = torch.get_num_threads(), threadpool_limits(1)
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_threads_before)
                assert _blas is not None  # set by the first who came
                _blas.restore_original_limits()


def unit_joint(settings: StudySettings, unit: StudyUnit, lm: LanguageModel, horizon: int):
    """The joint or tree, or what kept it from being made; and seconds."""
    begun = time.perf_counter()
    ids = torch.tensor(unit.token_ids, dtype=torch.long)
    joint: JointDistribution | PrefixTree | Exception
    law = settings.law(unit.temperature)
    try:
        if horizon not in unit.trees:
            joint = exact_joint(lm, ids, horizon, max_bytes=settings.max_bytes, **asdict(law))
        else:
            joint = context_tree(settings, lm, ids, horizon, law)
    except Exception as error:
        joint = error
    return joint, time.perf_counter() - begun


def _context_nats(lm: LanguageModel, unit: StudyUnit) -> float:
    """``-log p`` of the context's tokens after the first."""
    ids = torch.tensor(unit.token_ids, dtype=torch.long)
    own = getattr(lm, "sequence_log_probs", None)
    if own is not None and len(ids) > 1:
        return -own(ids).double().sum().item()
    laws = [lm.next_token_log_probs(ids[None, :t])[0, ids[t]] for t in range(1, len(ids))]
    return -sum(float(law) for law in laws)


def unit_fits(
    settings: StudySettings,
    joint: JointDistribution | PrefixTree,
    cells: list[StudyCell],
    seed: int,
) -> dict[StudyCell, FitResult | Exception]:
    """Every cell's fit of one joint, or what kept it from being made."""
    found: dict[StudyCell, FitResult | Exception] = {}
    # Fits by tokens per call come last: they begin from those by em.
    for method in sorted(settings.methods, key=lambda name: name == "acceptance"):
        for anchored in settings.anchored:
            here = [c for c in cells if (c.method, c.anchored) == (method, anchored)]
            for form, width in dict.fromkeys((c.form, c.transition_rank) for c in here):
                path = [c for c in here if (c.form, c.transition_rank) == (form, width)]
                path.sort(key=lambda cell: cell.rank)
                options: dict = {"restarts": settings.restarts, "seed": seed, "anchored": anchored}
                if form != "cp":
                    options |= {"form": form, "transition_rank": width}
                    options["gated"] = is_gated(path[0], joint.vocab_size)
                near = [found.get(replace(cell, method="em")) for cell in path]
                starts = [start for start in near if isinstance(start, FitResult)]
                if method == "acceptance" and form == "cp" and len(starts) == len(path):
                    options["starts"] = starts
                found |= _fits_along_ranks(joint, path, options)
    return found


def is_gated(cell: StudyCell, vocab_size: int) -> bool:
    """Whether first tokens have gates of their own: where they share left and right factors that
    are no full matrices.
    """
    return cell.anchored and 0 < cell.transition_rank < vocab_size


def _fits_along_ranks(
    joint: JointDistribution | PrefixTree, path: list[StudyCell], options: dict
) -> dict[StudyCell, FitResult | Exception]:
    """Fits of one method at increasing ranks: in one go where the method can."""
    if path and path[0].method in KL_METHODS:
        ranks = [cell.rank for cell in path]
        try:
            return dict(zip(path, fit_path(joint, ranks, path[0].method, **options), strict=True))
        except Exception as error:
            if may_pass(error):
                return dict.fromkeys(path, error)
            # What fails at one rank must not lose the others: each is fitted by itself.
    options.pop("starts", None)
    found: dict[StudyCell, FitResult | Exception] = {}
    for cell in path:
        try:
            found[cell] = fit(joint, cell.rank, cell.method, **options)
        except Exception as error:
            found[cell] = error
    return found


def _kl_floors(
    joint: JointDistribution | PrefixTree, cells: list[StudyCell]
) -> dict[tuple[int, bool], float]:
    """Least divergence (nats) of any draft by (rank, anchored); none of a tree."""
    if isinstance(joint, PrefixTree):
        return {}
    ranks = sorted({cell.rank for cell in cells})
    plain = rank_floors(joint, ranks).kl_nats  # (ranks,)
    floors = {(rank, False): floor for rank, floor in zip(ranks, plain.tolist(), strict=True)}
    if any(cell.anchored for cell in cells):
        # An anchored draft is one for every first token: the mean of their floors.
        after = rank_floors(joint.given_first_token(), ranks).kl_nats  # (vocab, ranks)
        mean = joint.prefix_probs(1) @ after  # (ranks,)
        floors |= {(rank, True): floor for rank, floor in zip(ranks, mean.tolist(), strict=True)}
    return floors


def _fit_row(
    settings,
    unit: StudyUnit,
    cell: StudyCell,
    result: FitResult | Exception,
    quality: dict | Exception,
) -> dict:
    if isinstance(result, Exception):
        return _failed(settings, unit, cell, _said(result))
    if isinstance(quality, Exception):
        return _failed(settings, unit, cell, _said(quality))
    return _row(settings, unit, cell) | _fit_facts(result) | quality


def _failed(settings, unit: StudyUnit, cell: StudyCell, message: str) -> dict:
    return _row(settings, unit, cell) | {"status": "failed", "message": message}


def _row(settings, unit: StudyUnit, cell: StudyCell) -> dict:
    row: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "model": unit.model,
        "domain": unit.domain,
    }
    row |= {"document": unit.document, "context": unit.context, "context_text": unit.text}
    row |= {
        "context_tokens": len(unit.token_ids),
        "context_bytes": unit.text_bytes,
        "temperature": unit.temperature,
        "top_k": math.nan if settings.top_k is None else float(settings.top_k),
        "top_p": math.nan if settings.top_p is None else float(settings.top_p),
    }
    row |= asdict(cell) | {"gated": cell.anchored and cell.transition_rank > 0}
    row |= {"restarts": settings.restarts, "status": "ok", "message": ""}
    return row | _way(cell.horizon in unit.trees, _is_exact(settings, cell.horizon))


def _is_exact(settings: StudySettings, horizon: int) -> bool:
    """Whether a tree is complete before anything is known of it."""
    return is_completed(settings, horizon) and not settings.cheapest


def _way(is_tree: bool, is_complete: bool) -> dict:
    """How a cell is computed, in words."""
    if not is_tree:
        return {"joint": "dense", "computed": "complete"}
    if is_complete:
        return {"joint": "complete", "computed": "complete"}
    return {"joint": "tree", "computed": "certified"}


def _joint_facts(joint: JointDistribution | PrefixTree) -> dict:
    if isinstance(joint, PrefixTree):
        return {
            # A tree that was to be truncated may turn out to hold everything.
            **_way(True, joint.is_complete),
            "kept_mass": joint.mass[-1].item(),
            "first_token_entropy_nats": joint.levels[0].parent_entropies[0].item(),
        }
    entropies = [-torch.special.xlogy(m, m).sum().item() for m in joint.marginals()]
    entropy = joint.entropy().item()
    return {
        "kept_mass": 1.0,
        "joint_entropy_nats": entropy,
        "first_token_entropy_nats": entropies[0],
        "total_correlation_nats": max(sum(entropies) - entropy, 0.0),
    }


def memory_facts(joint: JointDistribution | PrefixTree) -> dict:
    """What one token of memory can do; of a truncated tree nothing is known."""
    if isinstance(joint, PrefixTree) and not joint.is_complete:
        return {}
    memory = token_memory(joint)
    return {
        "total_correlation_nats": memory.total_correlation,
        "beyond_one_token_nats": float(memory.beyond_one_token.sum()),
        "beyond_one_token_nats_anchored": float(memory.beyond_one_token_anchored.sum()),
        "markov_tokens_per_call": memory.markov_tokens_per_call,
        "markov_tokens_per_call_anchored": memory.markov_tokens_per_call_anchored,
    }


def _fit_facts(result: FitResult) -> dict:
    draft = result.distribution
    free, shared = numbers_of(draft)
    return {
        "status": result.status,
        "message": result.message,
        "converged": float(result.converged),
        "iterations": float(result.iterations),
        "parameters": float(free * math.prod(draft.batch_shape) + shared),
        "free_numbers": float(free),
        "shared_numbers": float(shared),
        "serial_steps": float(draft.serial_steps()),
        "objective": float(result.objective),
        "raw_relative_error": float(result.raw_relative_error),
        "negative_mass": float(result.negative_mass),
        "mass_deficit": float(result.mass_deficit),
        "fit_seconds": result.seconds,
    }


def numbers_of(draft: Any) -> tuple[int, int]:
    """Numbers that a draft has for every context (anchored: and first token), and numbers that its
    first tokens share.
    """
    if not isinstance(draft, MarkovMixture) or not draft.batch_shape:
        return draft.free_numbers, draft.shared_numbers
    # A context's own left and right factors, written once for every first token.
    one = draft[(0,) * len(draft.batch_shape)]
    plain = replace(one, gate=None)
    gated = draft.gate is not None and bool((draft.gate != 1).any())
    gates = gated * (draft.horizon - 1) * draft.transition_rank
    return plain.free_numbers + gates, plain.shared_numbers


def domain_bits_per_byte(nats: float, text_bytes: int) -> float:
    """Bits per byte; NaN where there is no text."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan
