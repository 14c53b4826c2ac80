"""A study's models: by name, kept for the process, or objects of the caller's."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from cpmtp.joint_distribution.given import as_language_model
from cpmtp.language_model import LanguageModel
from cpmtp.pretrained import load_language_model

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_opening = threading.Lock()
_given: dict[str, LanguageModel] = {}


def open_language_model(name: str, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """A model by name, folder, file, hub id, or ``module:factory``; kept for the process, whose
    threads share it. The name of an object that a study was given means this object.
    """
    with _opening:
        return _given[name] if name in _given else opened_language_model(name, device, dtype)


@lru_cache(maxsize=2)
def opened_language_model(name: str, device: str, dtype: str) -> LanguageModel:
    """The same for names alone, one thread at a time."""
    if not _FACTORY.fullmatch(name):
        return load_language_model(name, device=device, dtype=dtype)
    module, factory = name.split(":")
    try:
        lm = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # a factory of the user's may raise anything
        raise ValueError(
            f"model {name!r}: {error}; expected an importable module and a factory without "
            "arguments"
        ) from error
    if not isinstance(lm, LanguageModel):
        raise ValueError(
            f"model {name!r} is a {type(lm).__name__}: expected vocab_size and next_token_log_probs"
        )
    return lm


def several_models(given: Any) -> Sequence[Any]:
    """Models where one was given, alone or in a pair with its tokenizer, or several."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given]
    if isinstance(given, tuple) and len(given) == 2 and _is_transformers(given[0]):
        other = isinstance(given[1], str | tuple | LanguageModel) or _is_transformers(given[1])
        return given if other else [given]
    return given


def _is_transformers(given: Any) -> bool:
    return hasattr(given, "get_output_embeddings")


@contextmanager
def named_models(models: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    """Names of models that are objects or names already; objects go by theirs until the end.

    Raises
    ------
    ValueError
        If one is no language model.
    """
    names: list[str] = []
    mine: dict[str, LanguageModel] = {}
    for model in models:
        if isinstance(model, str):
            names.append(model)
            continue
        lm = as_language_model(model)
        base = str(getattr(lm, "name", "") or type(lm).__name__)
        taken = {*names, *_given, *mine}
        name = next(
            n for k in range(len(taken) + 1) if (n := f"{base} {k + 1}" if k else base) not in taken
        )
        mine[name] = lm
        names.append(name)
    _given.update(mine)
    try:
        yield tuple(names)
    finally:
        for name in mine:
            del _given[name]
