"""Small probes beside a study: what heads of its models would earn, in a given time."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from cpmtp.whole_files import write_text

FOLDER = "forecast"
# Candidates by what a study needs them for: the reference, then what usually earns the most for its
# time, then what tells more.
_PREFERRED = (("cp", 1), ("markov", 1), ("cp", 4), ("recurrent", 1))
_FEWEST = 2
# Of the time: steps of probes; the rest is for held-out texts, step times and judging.
_STEPS_SHARE = 0.55
# Documents that steps are timed on.
_TEXTS_TRIED = 8


Asked = dict[str, dict[str, Any]]


def affordable_probes(settings, seconds: float) -> Asked:
    """What every model of a study that has hidden states can be probed with in its share of the
    time: candidates, positions, and whether that is enough.
    """
    from cpmtp.study.models import open_language_model

    texts = _texts(settings)
    found: Asked = {}
    for name in settings.models:
        lm = open_language_model(name, settings.device, settings.dtype)
        if hasattr(lm, "full_logits"):
            share = _STEPS_SHARE * seconds / len(settings.models)
            try:
                found[name] = _affordable(lm, texts, settings.seed, share)
            except ValueError:  # too little text: said when its turn comes
                continue
    return found


def probe_models(
    settings, out: Path, *, seconds: float, asked: Asked, say=lambda line: None
) -> None:
    """Forecast heads of every model of a study, each in its share of the time; what is forecast
    already, or cannot be, is left as it is.

    Parameters
    ----------
    settings : StudySettings
    out : path
        The study's folder.
    asked : dict
        What is known already of `affordable_probes`.
    say : callable
        Told what is done.
    """
    from cpmtp.study.models import open_language_model

    begun = time.perf_counter()
    texts = _texts(settings)
    for place, name in enumerate(settings.models):
        folder = out / FOLDER / f"{place}"
        lm = open_language_model(name, settings.device, settings.dtype)
        if not hasattr(lm, "full_logits"):
            say(f"{name}: no probes, since its hidden states are not known")
            continue
        left = seconds - (time.perf_counter() - begun)
        share = max(left, 1.0) / (len(settings.models) - place)
        if _is_forecast(folder, share):
            continue
        say(f"{name}: probes of heads, about {share / 60:.1f} minutes")
        try:
            _forecast(lm, name, settings, folder, texts, share, asked.get(name))
        except ValueError as error:  # a study of ceilings is worth having without
            say(f"{name}: no forecast: {error}")


def _texts(settings) -> list[str] | None:
    """Documents of all domains in turn; None: the model's own samples."""
    from cpmtp.corpora import read_corpus

    found = [
        [document.text for document in read_corpus(some, field=settings.text_field).documents]
        for some in settings.corpora.values()
    ]
    if not found:
        return None
    longest = max(map(len, found))
    return [texts[i] for i in range(longest) for texts in found if i < len(texts)]


def _is_forecast(folder: Path, seconds: float) -> bool:
    """Whether the folder has a forecast, or one that had as much time and not enough."""
    try:
        told = json.loads((folder / "forecast.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return not told.get("status") or 60 * told["settings"]["minutes"] >= 0.8 * seconds


def _forecast(lm, name: str, settings, folder: Path, texts, seconds: float, known) -> None:
    from cpmtp.forecasting.head_forecast import forecast_heads

    begun = time.perf_counter()
    plan = _asked(lm, settings, folder, texts, seconds, known)
    left = max(seconds - (time.perf_counter() - begun), 1.0)
    found = forecast_heads(
        lm,
        plan["candidates"],
        texts=texts,
        out=folder,
        probe_budget=plan["positions"],
        minutes=left / 60,
        temperature=settings.temperatures[0],
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    corpus = [*settings.corpus, *(pattern for _, pattern in settings.domains)]
    asked = {"model": name, "corpus": corpus, "text_field": settings.text_field}
    found.write(folder, studied_as=name, asked=asked)


def _asked(lm, settings, folder: Path, texts, seconds: float, known) -> dict[str, Any]:
    """Candidates and the largest probe's positions that there is time for, as they were chosen when
    this folder's probes were begun.
    """
    file = folder / "asked.json"
    if file.is_file():
        return dict(json.loads(file.read_text("utf-8")))
    share = _STEPS_SHARE * seconds
    if known is None:
        found = _affordable(lm, texts, settings.seed, share)
    else:  # contexts may have left more time, or less
        found = known | _positions(share, known["step_seconds"], known["step"])
    if found["enough"]:
        write_text(file, json.dumps(found))
    return found


def _affordable(lm, texts, seed: int, seconds: float) -> dict[str, Any]:
    """As many candidates as can have two probes, and positions for those."""
    from cpmtp.forecasting.candidates import candidates_of, with_draft_vocabulary
    from cpmtp.forecasting.held_out import split_texts
    from cpmtp.forecasting.probes import ProbePlan, step_seconds, training_windows
    from cpmtp.training.head_settings import quick_precision

    plan = ProbePlan((), precision=quick_precision(lm.device.type), seed=seed)
    training = None if texts is None else split_texts(texts)[0][:_TEXTS_TRIED]
    few, _ = training_windows(lm, training, length=plan.length, positions=plan.step, seed=seed)
    begun, spent = time.perf_counter(), 0.0
    chosen: list[dict[str, Any]] = []
    for keywords in _by_preference():
        asked = with_draft_vocabulary(lm, [*chosen, keywords], training, seed=seed)
        # All together: one pass of the base model serves them all.
        together = step_seconds(lm, candidates_of(lm, asked), plan, few[: plan.rows * 4])
        left = seconds - (time.perf_counter() - begun)
        enough = _largest_steps(left, together) > 0
        if len(chosen) >= _FEWEST and not enough:
            break
        chosen, spent = [*chosen, keywords], together
        if not enough:  # others only add to it
            break
    return {
        "candidates": chosen,
        "step_seconds": spent,
        "step": plan.step,
        **_positions(left, spent, plan.step),
    }


def _positions(seconds: float, step_seconds: float, step: int) -> dict[str, Any]:
    """Positions of the largest probe that a time is enough for, and whether it is for any."""
    steps = _largest_steps(seconds, step_seconds)
    return {"positions": max(steps, 1) * step, "enough": steps > 0}


def _largest_steps(seconds: float, step_seconds: float) -> int:
    """Steps of the largest of three or at least two probes that there is time for; else 0."""
    from cpmtp.forecasting.probes import FEWEST_STEPS, STEPS_OF_PROBES

    three = int(seconds / step_seconds / sum(STEPS_OF_PROBES))
    if three * STEPS_OF_PROBES[0] >= FEWEST_STEPS:
        return three
    most = math.ceil(FEWEST_STEPS / STEPS_OF_PROBES[0]) - 1  # one more would be three probes
    two = min(int(seconds / step_seconds / sum(STEPS_OF_PROBES[1:])), most)
    return two if two * STEPS_OF_PROBES[1] >= FEWEST_STEPS else 0


def _by_preference() -> list[dict[str, Any]]:
    """The forecast's own candidates, the most telling ones first."""
    from cpmtp.forecasting.head_forecast import CANDIDATES

    places = {sizes: place for place, sizes in enumerate(_PREFERRED)}
    place_of = lambda one: places.get((one["form"], one.get("rank", 1)), len(places))  # noqa: E731
    return sorted(map(dict, CANDIDATES), key=place_of)
