"""What a forecast compares: heads by their sizes, before any of them is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpmtp.forecasting.learning_curves.tasks import candidate_name
from cpmtp.heads.draft_head import DraftHead
from cpmtp.language_model import sample_sequences
from cpmtp.training.head_settings import LEARNING_RATE
from cpmtp.training.new_models import locally_seeded

# What a head is asked for where a candidate says nothing.
DEFAULTS = {"form": "cp", "horizon": 4, "anchored": True, "blocks": 1}
KNOWN = (*DEFAULTS, "rank", "transition_rank", "gated", "width", "vocabulary", "over_text")
# Of the training, not of the head. With steps of 256 positions the default rate is the best of
# three for every form after 256 steps, and within one per cent of the best one after 32.
TRAINING = ("learning_rate",)
# From so many tokens on, heads draft the most frequent ones alone unless they are told otherwise.
LARGE_VOCABULARY, DRAFTED = 1 << 14, 1 << 12
_SAMPLED = (64, 64)  # of a model that is given no text: samples and tokens of each


@dataclass(frozen=True)
class Candidate:
    """A head that might be trained.

    Attributes
    ----------
    keywords : dict
        Of the head and its training, those that were given and the defaults.
    sizes : dict
        `form`, `horizon`, `rank`, `transition_rank`, `width`, `blocks`: as a head of them has them.
    """

    keywords: dict[str, Any]
    sizes: dict[str, Any]

    @classmethod
    def of(cls, lm: Any, keywords: Mapping[str, Any]) -> Candidate:
        """From `DraftHead`'s keywords; what is not given is the head's own default.

        Raises
        ------
        ValueError
            If a keyword is none of a head, or a size is out of range.
        """
        unknown = sorted(set(keywords) - {*KNOWN, *TRAINING})
        if unknown:
            raise ValueError(
                f"a candidate with {', '.join(unknown)}: expected keywords of a head, "
                f"{', '.join((*KNOWN, *TRAINING))}"
            )
        chosen = {k: v for k, v in (DEFAULTS | dict(keywords)).items() if v is not None}
        chosen.setdefault("learning_rate", LEARNING_RATE)
        return cls(chosen, sizes_of(new_head(lm, chosen)))

    @property
    def name(self) -> str:
        """In a few words, without the horizon; the trunk where it is not the default one."""
        told = {k: self.sizes[k] for k in ("form", "rank", "transition_rank")}
        told |= {k: self.keywords.get(k) for k in ("gated", "width")}
        blocks = self.keywords["blocks"]
        return candidate_name(told | {"blocks": None if blocks == DEFAULTS["blocks"] else blocks})

    @property
    def told(self) -> dict[str, Any]:
        """Its keywords, the number of drafted tokens for the tokens themselves."""
        drafted = self.keywords.get("vocabulary")
        if drafted is None or isinstance(drafted, int):
            return dict(self.keywords)
        return self.keywords | {"vocabulary": len(drafted)}

    def at(self, horizon: int) -> dict[str, Any]:
        """The sizes of such a head with another horizon."""
        return self.sizes | {"horizon": horizon}


def candidates_of(lm: Any, candidates: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    """Every candidate once.

    Raises
    ------
    ValueError
        If there is none.
    """
    found: dict[str, Candidate] = {}
    for keywords in candidates:
        candidate = Candidate.of(lm, keywords)
        found.setdefault(repr(sorted(candidate.sizes.items())) + candidate.name, candidate)
    if not found:
        raise ValueError(
            "no candidates: expected at least one dict of a head's keywords, such as "
            '{"form": "cp", "rank": 4, "horizon": 4}'
        )
    return list(found.values())


def with_draft_vocabulary(
    lm: Any, candidates: Iterable[Mapping[str, Any]], texts: Sequence[str] | None, *, seed: int
) -> list[dict[str, Any]]:
    """Candidates that draft the most frequent tokens alone, where the vocabulary is large; those
    that say what they draft are left as they are.

    Every component of a head is an unembedding: over all tokens probes of a large vocabulary take
    the time that training takes over few.
    """
    made = [dict(keywords) for keywords in candidates]
    if lm.vocab_size <= LARGE_VOCABULARY or all("vocabulary" in keywords for keywords in made):
        return made
    if texts is None:
        tokens = sample_sequences(lm, *_SAMPLED, seed=seed).flatten()
    else:
        tokens = torch.cat([lm.encode_document(text) for text in texts])
    counts = torch.bincount(tokens, minlength=lm.vocab_size)
    kept = counts.topk(min(DRAFTED, int((counts > 0).sum()))).indices.sort().values
    vocabulary = tuple(kept.tolist())
    return [{"vocabulary": vocabulary} | keywords for keywords in made]


def new_head(lm: Any, keywords: Mapping[str, Any], *, seed: int = 0) -> DraftHead:
    """A head of these sizes for this model, with random weights."""
    with locally_seeded(seed):
        head = DraftHead(**_asked_of_head(lm, keywords))
    return head.to(lm.device).attach(lm).eval().requires_grad_(False)


def _asked_of_head(lm: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is of the training, and with the model's sizes."""
    own = {name: value for name, value in keywords.items() if name not in TRAINING}
    return own | {"hidden_size": lm.unembedding.shape[1], "vocab_size": lm.vocab_size}


def weight_bytes(lm: Any, candidate: Candidate, horizon: int) -> int:
    """Bytes of the weights of such a head with another horizon: what serving it holds in memory
    beside the base model, whose unembedding it shares, in the precision it is trained in.
    """
    asked = _asked_of_head(lm, candidate.keywords) | {"horizon": horizon}
    with torch.device("meta"):  # nothing is allocated
        head = DraftHead(**asked)
    return sum(weights.nbytes for weights in head.parameters())


def sizes_of(head: DraftHead) -> dict[str, Any]:
    """What tells heads apart that are trained alike."""
    return {
        "form": head.form,
        "horizon": head.horizon,
        "rank": head.rank,
        "transition_rank": head.transition_rank,
        "width": int(head.maps.shape[-1]),
        "blocks": 0 if head.plain else len(head.blocks),
    }
