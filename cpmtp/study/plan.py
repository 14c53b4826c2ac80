"""What a study is made of: its models, its contexts and the fits of each."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cpmtp.corpora import Corpus, Document, corpus_hash, read_corpus
from cpmtp.decomposition.fitting import KL_METHODS
from cpmtp.joint_distribution import check_context, conditional_log_probs
from cpmtp.language_model import LanguageModel, sample_sequences, writes_text
from cpmtp.sampling_law import SamplingLaw
from cpmtp.study.models import open_language_model
from cpmtp.study.settings import OWN_SAMPLES, TEXTS, StudySettings

# Joints a worker holds while it fits one.
JOINTS_HELD = 8


@dataclass(frozen=True)
class StudyCell:
    """One fit of a context."""

    horizon: int
    rank: int
    method: str
    anchored: bool = False
    form: str = "cp"
    transition_rank: int = 0


@dataclass(frozen=True)
class StudyUnit:
    """One context of one model at one temperature: what a worker is sent.

    Attributes
    ----------
    text_bytes : int
        UTF-8 bytes of the context's text after its first token; 0 where the model does not decode.
    trees : tuple of int
        Horizons whose joint is too large to hold: trees.
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


def study_cells(
    settings: StudySettings, trees: tuple[int, ...] = (), context: int = 0
) -> list[StudyCell]:
    """All fits of a context, by its number, in the table's order; those that exist for its `trees`
    only where the joint is one.
    """
    return [
        StudyCell(n, r, m, a, form, k)
        for n in settings.horizons
        for form in settings.forms
        for k in (settings.transition_ranks if form.startswith("markov") else (0,))
        for r in _ranks_of(form, settings)
        for m in settings.methods_of(context)
        for a in settings.anchored
        if (n >= 3 or not a) and ((n not in trees and form == "cp") or m in KL_METHODS)
    ]


def _ranks_of(form: str, settings: StudySettings) -> list[int]:
    """One chain has one component, and a mixture several."""
    if form == "markov":
        return [1]
    return [rank for rank in settings.ranks if rank > 1 or form != "markov_mixture"]


def tree_horizons(vocab_size: int, settings: StudySettings) -> tuple[int, ...]:
    """Horizons at which a dense joint and the fits to it would not stay within the settings'
    memory.

    Raises
    ------
    ValueError
        If there are any and none of the methods fits trees.
    """
    found = tuple(
        n for n in settings.horizons if 8 * vocab_size**n * JOINTS_HELD > settings.max_bytes
    )
    if found and not set(settings.methods) & set(KL_METHODS):
        raise ValueError(
            f"horizon {found[0]} over {vocab_size} tokens needs "
            f"{8 * vocab_size ** found[0] / 1e9:.3g} GB for a dense joint; a tree takes its place, "
            f"which only {', '.join(KL_METHODS)} fit: add one of them to the methods, lower the "
            "horizon or raise max_bytes"
        )
    return found


def is_completed(settings: StudySettings, horizon: int) -> bool:
    """Whether a tree of this horizon is complete: its law leaves few enough sequences."""
    kept = settings.top_k
    return kept is not None and kept ** (horizon - 1) <= settings.tree_nodes


def plan_study(
    settings: StudySettings, texts: Sequence[Any] | None = None
) -> tuple[list[StudyUnit], dict]:
    """All units of a study and what identifies its inputs; loads the models and tries each once.

    With `texts` contexts are cut from these, a document each, instead of from files.

    Raises
    ------
    ValueError
        If a model or corpus cannot be used.
    """
    corpora = {
        name: read_corpus(patterns, field=settings.text_field)
        for name, patterns in settings.corpora.items()
    }
    if texts is not None:
        corpora = {TEXTS: _corpus_of(texts, corpora)}
    units: list[StudyUnit] = []
    models: dict[str, dict] = {}
    for name in settings.models:
        lm = open_language_model(name, settings.device, settings.dtype)
        settings.law(1.0).check_vocabulary(lm.vocab_size)
        trees = tree_horizons(lm.vocab_size, settings)
        found = [
            unit
            for domain, corpus in corpora.items()
            for unit in _cut_contexts(lm, name, domain, corpus.documents, settings)
        ]
        found = found or list(_sampled_contexts(lm, name, settings))
        first = _first_possible(lm, found, max(settings.horizons))
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
            "tree_horizons": list(trees),
            "truncated_horizons": [n for n in trees if not is_completed(settings, n)],
        }
    identity = {
        "models": models,
        "corpora": {
            name: {
                "sha256": corpus_hash(list(corpus.documents)),
                "documents": len(corpus.documents),
                "replaced_bytes": sum(d.replaced_bytes for d in corpus.documents),
                "skipped": list(corpus.skipped),
            }
            for name, corpus in corpora.items()
        },
    }
    return units, identity


def _corpus_of(texts: Sequence[Any], others: Mapping[str, Corpus]) -> Corpus:
    """Texts in memory as documents."""
    if others:
        raise ValueError(f"texts beside the domains {', '.join(others)}: give one of them")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts: expected a list of strings, one per document")
    named = (Document(f"text {k}", text) for k, text in enumerate(texts))
    found = tuple(document for document in named if document.text.strip())
    if not found:
        raise ValueError(f"{len(texts)} texts, none with a word in it: give at least one")
    return Corpus(found)


def _first_possible(lm: LanguageModel, units: Sequence[StudyUnit], horizon: int) -> torch.Tensor:
    """The first context that the model can take; one that it cannot is a failed row.

    Raises
    ------
    ValueError
        If it can take none: what is wrong with the first.
    """
    refused = None
    for unit in units:
        ids = torch.tensor(unit.token_ids, dtype=torch.long)
        try:
            check_context(lm, ids, horizon)
        except ValueError as error:
            refused = refused or error
        else:
            return ids
    assert refused is not None  # there is at least one context
    window = getattr(lm, "max_context", None)
    if window is not None and len(units[0].token_ids) + horizon - 1 > window:
        raise ValueError(f"{refused} (context_length, --context-length)") from None
    raise refused


def default_workers(settings: StudySettings) -> int:
    """One per core; one alone where the model is on an accelerator, which all would share."""
    return (os.cpu_count() or 1) if settings.device == "cpu" else 1


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
    lm: LanguageModel,
    name: str,
    domain: str,
    documents: Sequence[Document],
    settings: StudySettings,
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
    cut: list[tuple[str, torch.Tensor]] = []
    for place in order:
        ids = lm.encode_document(documents[place].text)  # (time,)
        # What tokenizes to nothing is no context.
        cut += [(documents[place].name, ids)] if len(ids) else []
        if len(cut) == settings.contexts:
            break
    if not cut:
        raise ValueError(
            f"no document of domain {domain!r} has a token of model {name!r}: give other texts"
        )
    for index in range(settings.contexts):
        document, ids = cut[index % len(cut)]
        length = min(settings.context_length, len(ids))
        start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        yield _unit(lm, name, domain, document, index, ids[start : start + length])


def _unit(lm, name: str, domain: str, document: str, index: int, ids: torch.Tensor) -> StudyUnit:
    text, text_bytes = "", 0
    if writes_text(lm):
        text = lm.decode(ids)
        text_bytes = len(text.encode()) - len(lm.decode(ids[:1]).encode())
    return StudyUnit(name, domain, document, index, tuple(ids.tolist()), text, text_bytes)
