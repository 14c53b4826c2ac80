"""What a study is made of: its settings, its models and its contexts."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import no_type_check

import torch

from cpmtp.corpora import corpus_hash, read_documents
from cpmtp.decomposition.fitting import METHODS
from cpmtp.joint_distribution import check_context, conditional_log_probs
from cpmtp.language_model import LanguageModel, sample_sequences
from cpmtp.pretrained import load_language_model
from cpmtp.sampling_law import SamplingLaw

OWN_SAMPLES, CORPUS = "own samples", "corpus"
LONGEST_HORIZON = 16
_AXES = ("models", "corpus", "horizons", "ranks", "methods", "anchored", "temperatures")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


# Fields take one value or any sequence and refuse the rest themselves; then they hold tuples.
@no_type_check
@dataclass(frozen=True)
class StudySettings:
    """What defines a study; two equal settings give the same table but for its timing columns.

    Attributes
    ----------
    models : sequence of str
        Embedded names, local folders, hub ids, or ``module:factory`` for a `LanguageModel` of your
        own.
    corpus : sequence of str
        Files, folders or glob patterns to cut contexts from; empty: contexts are sampled from each
        model itself.
    domains : mapping of str to path, or pairs
        Named corpora side by side, each a file, folder or glob pattern; a name may come several
        times.
    horizons, ranks : sequence of int
    methods : sequence of str
        Methods of `cpmtp.fit`; ``em``, ``gradient`` and ``acceptance`` are fitted along the ranks
        (`cpmtp.fit_path`), ``acceptance`` from the fits by ``em`` where both are asked for.
    anchored : sequence of bool
        Whether drafts are told the first token; both values to compare (anchored ones from horizon
        3 on).
    temperatures : sequence of float
        Of the target's law; each context is studied at every one.
    contexts : int
        Contexts per model and domain.
    context_length : int
        Tokens in a context.
    restarts : int
        Random starts per fit; the best is kept.
    max_bytes : int
        Memory a worker may take for dense joints and their fits; where a vocabulary and horizon
        need more, a truncated tree takes the joint's place, fitted by ``em`` only, and tokens per
        call become certified lower bounds, upper ones beside.
    tree_mass, tree_nodes : float, int
        Of truncated trees: the probability they should keep, and the most prefixes they may expand.
    seed : int

    Raises
    ------
    ValueError
        If a value is out of range, or a method is unknown.
    """

    models: tuple[str, ...] = ("code", "prose")
    corpus: tuple[str, ...] = ()
    domains: tuple[tuple[str, str], ...] = ()
    horizons: tuple[int, ...] = (2, 3)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    methods: tuple[str, ...] = ("als", "em", "gradient", "acceptance")
    anchored: tuple[bool, ...] = (False,)
    temperatures: tuple[float, ...] = (1.0,)
    contexts: int = 8
    context_length: int = 64
    restarts: int = 1
    max_bytes: int = 4_000_000_000
    tree_mass: float = 0.95
    tree_nodes: int = 20_000
    seed: int = 0

    def __post_init__(self):
        for name in _AXES:
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        object.__setattr__(self, "models", tuple(map(str, self.models)))
        object.__setattr__(self, "corpus", tuple(map(str, self.corpus)))
        object.__setattr__(self, "domains", _named_patterns(self.domains))
        for name in set(_AXES) - {"corpus"}:
            _require(len(getattr(self, name)) > 0, f"{name} is empty: name at least one")
            _require(
                len(set(getattr(self, name))) == len(getattr(self, name)),
                f"{name} {getattr(self, name)} holds one twice",
            )
        _require(all(self.models), "a model's name is empty")
        for rank in self.ranks:
            _require(_is_positive_integer(rank), f"rank {rank}: expected an integer of at least 1")
        for horizon in self.horizons:
            _require(
                _is_positive_integer(horizon),
                f"horizon {horizon}: expected an integer of at least 1",
            )
            _require(
                horizon >= 2,
                f"horizon {horizon}: a study needs at least 2 (one token has nothing to decompose)",
            )
            _require(
                horizon <= LONGEST_HORIZON,
                f"horizon {horizon}: a study goes up to {LONGEST_HORIZON} tokens; for one context "
                "see truncated_joint",
            )
        for method in self.methods:
            _require(
                method in METHODS,
                f"unknown method {method!r}: expected one of {', '.join(METHODS)}",
            )
        for name in ("contexts", "context_length", "restarts", "max_bytes", "tree_nodes"):
            _require(
                _is_positive_integer(getattr(self, name)),
                f"{name} {getattr(self, name)}: expected an integer of at least 1",
            )
        _require(isinstance(self.seed, int), f"seed {self.seed!r}: expected an integer")
        for temperature in self.temperatures:
            _require(
                isinstance(temperature, int | float),
                f"temperature {temperature!r}: expected a number of at least 0",
            )
            SamplingLaw(temperature)
        _require(
            all(isinstance(a, bool) for a in self.anchored),
            f"anchored {self.anchored}: expected True, False or both",
        )
        _require(
            False in self.anchored or max(self.horizons) >= 3,
            "anchored drafts need a horizon of at least 3: add one or False",
        )
        _require(
            isinstance(self.tree_mass, int | float) and 0 < self.tree_mass < 1,
            f"tree_mass {self.tree_mass}: expected a probability between 0 and 1",
        )

    @property
    def corpora(self) -> dict[str, list[str]]:
        """Patterns by domain; empty: the model's own samples."""
        found: dict[str, list[str]] = {CORPUS: list(self.corpus)} if self.corpus else {}
        for name, pattern in self.domains:
            found.setdefault(name, []).append(pattern)
        return found


@dataclass(frozen=True)
class StudyCell:
    """One fit of a context."""

    horizon: int
    rank: int
    method: str
    anchored: bool = False


@dataclass(frozen=True)
class StudyUnit:
    """One context of one model at one temperature: what a worker is sent.

    Attributes
    ----------
    text_bytes : int
        UTF-8 bytes of the context's text after its first token; 0 where the model does not decode.
    trees : tuple of int
        Horizons whose joint is too large to hold: truncated trees.
    """

    model: str
    domain: str
    document: str
    context: int
    token_ids: tuple[int, ...]
    text: str
    text_bytes: int = 0
    temperature: float = 1.0
    trees: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """File name of the unit's part of the table."""
        return f"{self._context_key}-t{self.temperature:g}"

    @property
    def _context_key(self) -> str:
        digest = hashlib.sha256(
            json.dumps([self.model, self.domain, self.context, self.token_ids]).encode()
        ).hexdigest()
        return f"{self.context:05d}-{digest[:16]}"

    def seed(self, base: int) -> int:
        """A seed that depends on the study's seed and on this context alone: temperatures are
        compared from the same starts.
        """
        return int.from_bytes(
            hashlib.sha256(f"{base}/{self._context_key}".encode()).digest()[:4], "big"
        )


def study_cells(settings: StudySettings, trees: tuple[int, ...] = ()) -> list[StudyCell]:
    """All fits of a context, in the table's order; those that exist for its `trees` only where the
    joint is one.
    """
    return [
        StudyCell(n, r, m, a)
        for n in settings.horizons
        for r in settings.ranks
        for m in settings.methods
        for a in settings.anchored
        if (n >= 3 or not a) and (n not in trees or m == "em")
    ]


def tree_horizons(vocab_size: int, settings: StudySettings) -> tuple[int, ...]:
    """Horizons at which a dense joint and the fits to it would not stay within the settings'
    memory.

    Raises
    ------
    ValueError
        If there are any and none of the methods fits trees.
    """
    found = tuple(
        n for n in settings.horizons if 8 * vocab_size**n * _JOINTS_HELD > settings.max_bytes
    )
    if found and "em" not in settings.methods:
        raise ValueError(
            f"horizon {found[0]} over {vocab_size} tokens needs "
            f"{8 * vocab_size ** found[0] / 1e9:.3g} GB for a dense joint; a "
            "truncated tree takes its place, which only em fits: add em to the methods, lower the "
            "horizon or raise max_bytes"
        )
    return found


def plan_study(settings: StudySettings) -> tuple[list[StudyUnit], dict]:
    """All units of a study and what identifies its inputs; loads the models and tries each once.

    Raises
    ------
    ValueError
        If a model or corpus cannot be used.
    """
    corpora = {name: read_documents(patterns) for name, patterns in settings.corpora.items()}
    units: list[StudyUnit] = []
    models: dict[str, dict] = {}
    for name in settings.models:
        lm = open_language_model(name)
        trees = tree_horizons(lm.vocab_size, settings)
        found = [
            unit
            for domain, documents in corpora.items()
            for unit in _cut_contexts(lm, name, domain, documents, settings)
        ]
        found = found or list(_sampled_contexts(lm, name, settings))
        first = torch.tensor(found[0].token_ids)
        check_context(lm, first, max(settings.horizons))
        # One evaluation before any work: a model with broken weights is refused here, not in every
        # cell.
        probe = conditional_log_probs(lm, first, torch.empty(1, 0, dtype=torch.long), SamplingLaw())
        units += [
            replace(unit, temperature=t, trees=trees)
            for unit in found
            for t in settings.temperatures
        ]
        models[name] = {
            "vocab_size": lm.vocab_size,
            # A model of the user's own has no files to hash; its answer tells whether it is still
            # the same.
            "sha256": getattr(lm, "fingerprint", None)
            or hashlib.sha256(probe.numpy().tobytes()).hexdigest(),
            "truncated_horizons": list(trees),
        }
    identity = {
        "models": models,
        "corpora": {
            name: {
                "sha256": corpus_hash(documents),
                "documents": len(documents),
                "replaced_bytes": sum(d.replaced_bytes for d in documents),
            }
            for name, documents in corpora.items()
        },
    }
    return units, identity


@lru_cache(maxsize=2)
def open_language_model(name: str) -> LanguageModel:
    """A model by name, folder, hub id, or ``module:factory``; kept for the process."""
    if not _FACTORY.fullmatch(name):
        return load_language_model(name)
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


@dataclass(frozen=True)
class StudyEstimate:
    """What a study will take: rows, bytes, seconds."""

    cells: int
    workers: int
    joint_bytes: int
    memory_bytes: int
    seconds: float


# Read off a two-core machine: bytes of an idle worker, joints a worker holds while it fits one, and
# seconds per entry of the joint and component of an average fit.
_IDLE_BYTES, _JOINTS_HELD, _SECONDS_PER_ENTRY = 600_000_000, 8, 1.25e-7
# Entries a tree stands for in the estimate: its expanded prefixes' kept children.
_CHILDREN_KEPT = 100


def estimate_study(settings: StudySettings, workers: int | None = None) -> StudyEstimate:
    """Rows, memory and time of a study, from the vocabularies alone; nothing is computed."""
    per_model = settings.contexts * max(len(settings.corpora), 1) * len(settings.temperatures)
    workers = min(workers or os.cpu_count() or 1, per_model * len(settings.models))
    cells, work, largest = 0, 0, 0
    for name in settings.models:
        vocab = open_language_model(name).vocab_size
        trees = tree_horizons(vocab, settings)
        sizes = {
            n: settings.tree_nodes * _CHILDREN_KEPT if n in trees else vocab**n
            for n in settings.horizons
        }
        found = study_cells(settings, trees)
        cells += len(found) * per_model
        work += sum(sizes[c.horizon] * c.rank for c in found) * per_model * settings.restarts
        largest = max(largest, 8 * max(sizes.values()))
    return StudyEstimate(
        cells=cells,
        workers=workers,
        joint_bytes=largest,
        memory_bytes=(workers + 1) * _IDLE_BYTES
        + workers * _JOINTS_HELD * largest * settings.restarts,
        seconds=work * _SECONDS_PER_ENTRY / workers,
    )


def _sampled_contexts(lm: LanguageModel, name: str, settings: StudySettings) -> Iterator[StudyUnit]:
    """The ends of sequences the model itself wrote: what decoding meets. Each is a document of its
    own.
    """
    window = getattr(lm, "max_context", None) or sys.maxsize
    longest = min(
        4 * settings.context_length, max(window - max(settings.horizons), settings.context_length)
    )
    tokens = sample_sequences(lm, settings.contexts, longest, seed=settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    for index in range(settings.contexts):
        # Cut at a random place, so that not every context is the beginning of a document.
        end = int(torch.randint(settings.context_length, longest + 1, (), generator=generator))
        yield _unit(
            lm,
            name,
            OWN_SAMPLES,
            f"sample {index}",
            index,
            tokens[index, end - settings.context_length : end],
        )


def _cut_contexts(
    lm: LanguageModel, name: str, domain: str, documents, settings: StudySettings
) -> Iterator[StudyUnit]:
    """Windows at random places of the documents; documents in turn, so that they are as many as can
    be.
    """
    if not hasattr(lm, "encode_document"):
        raise ValueError(
            f"model {name!r} has no encode_document(text): a corpus cannot be turned into its "
            "tokens"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    encoded = {i: lm.encode_document(documents[i].text) for i in order[: settings.contexts]}
    for index in range(settings.contexts):
        chosen = order[index % len(order)]
        ids = encoded[chosen]
        length = min(settings.context_length, len(ids))
        start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        yield _unit(lm, name, domain, documents[chosen].name, index, ids[start : start + length])


def _unit(lm, name: str, domain: str, document: str, index: int, ids: torch.Tensor) -> StudyUnit:
    text = lm.decode(ids) if hasattr(lm, "decode") else ""
    text_bytes = (
        len(text.encode()) - len(lm.decode(ids[:1]).encode()) if hasattr(lm, "decode") else 0
    )
    return StudyUnit(name, domain, document, index, tuple(ids.tolist()), text, text_bytes)


def _several(name: str, value: object) -> tuple:
    if isinstance(value, str | int | float | Path):
        return (value,)
    try:
        several: tuple = tuple(value)  # type: ignore[arg-type]
        hash(several)
    except TypeError:
        raise ValueError(f"{name} {value!r}: expected one value or a sequence of them") from None
    return several


def _named_patterns(domains) -> tuple[tuple[str, str], ...]:
    pairs = _several("domains", domains.items() if isinstance(domains, Mapping) else domains)
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"domain {pair!r}: expected a name and a path")
        name, pattern = map(str, pair)
        _require(bool(name.strip()), f"domain {name!r} of {pattern!r}: its name is empty")
        _require(bool(pattern), f"domain {name!r}: its path is empty")
        _require(
            name not in (OWN_SAMPLES, CORPUS),
            f"domain {name!r}: this name is taken; choose another",
        )
        found.append((name, pattern))
    _require(len(set(found)) == len(found), f"domains {tuple(found)} hold one twice")
    return tuple(found)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
