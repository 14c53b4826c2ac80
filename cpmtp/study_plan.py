"""What a study is made of: its settings, its models and its contexts."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from cpmtp.corpora import corpus_hash, read_documents
from cpmtp.decomposition.fitting import METHODS
from cpmtp.joint_distribution import check_context, check_joint_size, conditional_log_probs
from cpmtp.language_model import LanguageModel, sample_sequences
from cpmtp.pretrained import load_language_model
from cpmtp.sampling_law import SamplingLaw

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class StudySettings:
    """What defines a study; two equal settings give the same table but for its timing columns.

    Attributes
    ----------
    models : sequence of str
        Embedded names, local folders, hub ids, or ``module:factory`` for a `LanguageModel` of your own.
    corpus : sequence of str
        Files, folders or glob patterns to cut contexts from; empty: contexts are sampled from each model itself.
    horizons, ranks : sequence of int
    methods : sequence of str
        Methods of `cpmtp.fit`.
    contexts : int
        Contexts per model.
    context_length : int
        Tokens in a context.
    restarts : int
        Random starts per fit; the best is kept.
    max_bytes : int
        Largest dense joint allowed.
    seed : int

    Raises
    ------
    ValueError
        If a value is out of range, or a method is unknown.
    """

    models: tuple[str, ...] = ("code", "prose")
    corpus: tuple[str, ...] = ()
    horizons: tuple[int, ...] = (2, 3)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    methods: tuple[str, ...] = ("als", "em", "gradient")
    contexts: int = 8
    context_length: int = 64
    temperature: float = 1.0
    restarts: int = 1
    max_bytes: int = 4_000_000_000
    seed: int = 0

    def __post_init__(self):
        for name in ("models", "corpus", "horizons", "ranks", "methods"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int, Path)) else tuple(value))
        for name in ("models", "horizons", "ranks", "methods"):
            _require(len(getattr(self, name)) > 0, f"{name} is empty: name at least one")
            _require(len(set(getattr(self, name))) == len(getattr(self, name)), f"{name} {getattr(self, name)} holds one twice")
        object.__setattr__(self, "corpus", tuple(str(pattern) for pattern in self.corpus))
        for rank in self.ranks:
            _require(_is_positive_integer(rank), f"rank {rank}: expected an integer of at least 1")
        for horizon in self.horizons:
            _require(_is_positive_integer(horizon), f"horizon {horizon}: expected an integer of at least 1")
            _require(horizon >= 2, f"horizon {horizon}: a study needs at least 2 (one token has nothing to decompose)")
        for method in self.methods:
            _require(method in METHODS, f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
        for name in ("contexts", "context_length", "restarts"):
            _require(_is_positive_integer(getattr(self, name)), f"{name} {getattr(self, name)}: expected at least 1")
        SamplingLaw(self.temperature)


@dataclass(frozen=True)
class StudyUnit:
    """One context of one model: what a worker is sent."""

    model: str
    domain: str
    document: str
    context: int
    token_ids: tuple[int, ...]
    text: str

    @property
    def key(self) -> str:
        """File name of the unit's part of the table."""
        digest = hashlib.sha256(json.dumps([self.model, self.domain, self.context, self.token_ids]).encode()).hexdigest()
        return f"{self.context:05d}-{digest[:16]}"

    def seed(self, base: int) -> int:
        """A seed that depends on the study's seed and on this unit alone."""
        return int.from_bytes(hashlib.sha256(f"{base}/{self.key}".encode()).digest()[:4], "big")


def study_cells(settings: StudySettings) -> list[tuple[int, int, str]]:
    """All (horizon, rank, method) of a context, in the table's order."""
    return [(n, r, m) for n in settings.horizons for r in settings.ranks for m in settings.methods]


def plan_study(settings: StudySettings) -> tuple[list[StudyUnit], dict]:
    """All units of a study and what identifies its inputs; loads the models and tries each once.

    Raises
    ------
    ValueError
        If a model or corpus cannot be used, or a joint would be too large.
    """
    units: list[StudyUnit] = []
    identity: dict = {"models": {}, "corpus_sha256": None, "corpus_replaced_bytes": 0}
    documents = read_documents(list(settings.corpus)) if settings.corpus else []
    if documents:
        identity["corpus_sha256"] = corpus_hash(documents)
        identity["corpus_replaced_bytes"] = sum(d.replaced_bytes for d in documents)
    for name in settings.models:
        lm = open_language_model(name)
        check_joint_size(lm.vocab_size, max(settings.horizons), settings.max_bytes)
        found = list(_cut_contexts(lm, name, documents, settings) if documents else _sampled_contexts(lm, name, settings))
        first = torch.tensor(found[0].token_ids)
        check_context(lm, first, max(settings.horizons))
        # One evaluation before any work: a model with broken weights is refused here, not in every cell.
        conditional_log_probs(lm, first, torch.empty(1, 0, dtype=torch.long), SamplingLaw())
        units += found
        identity["models"][name] = {"vocab_size": lm.vocab_size, "sha256": getattr(lm, "fingerprint", None)}
    return units, identity


@lru_cache(maxsize=2)
def open_language_model(name: str) -> LanguageModel:
    """A model by name, folder, hub id, or ``module:factory``; kept for the process."""
    if not _FACTORY.fullmatch(name):
        return load_language_model(name)
    module, factory = name.split(":")
    try:
        lm = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"model {name!r}: {error}; expected an importable module and a factory without arguments") from error
    if not isinstance(lm, LanguageModel):
        raise ValueError(f"model {name!r} is a {type(lm).__name__}: expected vocab_size and next_token_log_probs")
    return lm


@dataclass(frozen=True)
class StudyEstimate:
    """What a study will take: rows, bytes, seconds."""

    cells: int
    workers: int
    joint_bytes: int
    memory_bytes: int
    seconds: float


# Read off a two-core machine: bytes of an idle worker, joints a worker holds while it fits one, and seconds per entry of the
# joint and component of an average fit.
_IDLE_BYTES, _JOINTS_HELD, _SECONDS_PER_ENTRY = 600_000_000, 8, 1.25e-7


def estimate_study(settings: StudySettings, workers: int | None = None) -> StudyEstimate:
    """Rows, memory and time of a study, from the models' vocabularies alone; nothing is computed."""
    workers = min(workers or os.cpu_count() or 1, settings.contexts * len(settings.models))
    vocabularies = [open_language_model(name).vocab_size for name in settings.models]
    for vocab in vocabularies:
        check_joint_size(vocab, max(settings.horizons), settings.max_bytes)
    cells = study_cells(settings)
    joint_bytes = 8 * max(vocabularies) ** max(settings.horizons)
    work = sum(v**n * r for v in vocabularies for n, r, _ in cells) * settings.contexts * settings.restarts
    return StudyEstimate(
        cells=len(cells) * settings.contexts * len(settings.models),
        workers=workers,
        joint_bytes=joint_bytes,
        memory_bytes=(workers + 1) * _IDLE_BYTES + workers * _JOINTS_HELD * joint_bytes * settings.restarts,
        seconds=work * _SECONDS_PER_ENTRY / workers,
    )


def _sampled_contexts(lm: LanguageModel, name: str, settings: StudySettings) -> Iterator[StudyUnit]:
    """The ends of sequences the model itself wrote: what decoding meets. Each is a document of its own."""
    window = getattr(lm, "max_context", None) or sys.maxsize
    longest = min(4 * settings.context_length, max(window - max(settings.horizons), settings.context_length))
    tokens = sample_sequences(lm, settings.contexts, longest, seed=settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    for index in range(settings.contexts):
        # Cut at a random place, so that not every context is the beginning of a document.
        end = int(torch.randint(settings.context_length, longest + 1, (), generator=generator))
        yield _unit(lm, name, "own samples", f"sample {index}", index, tokens[index, end - settings.context_length : end])


def _cut_contexts(lm: LanguageModel, name: str, documents, settings: StudySettings) -> Iterator[StudyUnit]:
    """Windows at random places of the documents; documents in turn, so that they are as many as can be."""
    if not hasattr(lm, "encode_document"):
        raise ValueError(f"model {name!r} has no encode_document(text): a corpus cannot be turned into its tokens")
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    encoded = {i: lm.encode_document(documents[i].text) for i in order[: settings.contexts]}
    for index in range(settings.contexts):
        chosen = order[index % len(order)]
        ids = encoded[chosen]
        length = min(settings.context_length, len(ids))
        start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        yield _unit(lm, name, "corpus", documents[chosen].name, index, ids[start : start + length])


def _unit(lm, name: str, domain: str, document: str, index: int, ids: torch.Tensor) -> StudyUnit:
    text = lm.decode(ids) if hasattr(lm, "decode") else ""
    return StudyUnit(name, domain, document, index, tuple(ids.tolist()), text)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
