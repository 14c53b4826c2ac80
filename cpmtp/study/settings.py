"""What defines a study, and what is refused before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import no_type_check

from cpmtp.decomposition.forms.entrance import FORMS
from cpmtp.decomposition.restarts import KL_METHODS, METHODS
from cpmtp.joint_distribution.habits import knows_habits
from cpmtp.sampling_law import SamplingLaw

OWN_SAMPLES, CORPUS, TEXTS = "own samples", "corpus", "texts"
LONGEST_HORIZON = 16
_AXES = (
    "models",
    "corpus",
    "horizons",
    "ranks",
    "methods",
    "forms",
    "transition_ranks",
    "temperatures",
    "anchored",
)


# Fields take one value or any sequence and refuse the rest themselves; then they hold tuples.
@knows_habits
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
    text_field : str
        Of a file of JSON lines: the field that holds a line's text; every line is a document.
    horizons, ranks : sequence of int
    methods : sequence of str
        Methods of `cpmtp.fit`; ``em``, ``gradient`` and ``acceptance`` are fitted along the ranks
        (`cpmtp.fit_path`), ``acceptance`` from the fits by ``em`` where both are asked for.
    forms : sequence of str
        Forms of `cpmtp.fit`: ``cp``, ``markov`` (one component, whatever the ranks are),
        ``markov_mixture`` (the ranks above 1), ``hmm``. All but ``cp`` are fitted by ``em``,
        ``gradient`` and ``acceptance`` only.
    transition_ranks : sequence of int
        Of the Markov forms. Left and right factors are a context's own; anchored, its first tokens
        share them and have gates of their own.
    anchored : sequence of bool, optional
        Whether drafts are told the first token; both values to compare. Default: they are, as the
        heads of `train_head` are; but not in a study with a horizon of 2, where a draft that is
        told the first token has one token left, which rank 1 gives exactly.
    temperatures : sequence of float
        Of the target's law; each context is studied at every one.
    top_k, top_p : int, float, optional
        The rest of the target's law, as the model is served: joints are those of what it leaves.
    contexts : int
        Contexts per model and domain.
    context_length : int
        Tokens in a context.
    restarts : int
        Random starts per fit; the best is kept.
    max_bytes : int
        Memory a worker may take for dense joints and their fits; where a vocabulary and horizon
        need more, a tree takes the joint's place, fitted by ``em``, ``gradient`` and ``acceptance``
        only. Under a top-k that leaves few enough sequences it is complete, and exact; otherwise it
        is truncated, and tokens per call become certified lower bounds, upper ones beside, or
        estimates.
    width : float
        Tokens per call: where a truncated tree leaves any fit of a context a certified interval
        that is wider, all fits to this tree are judged on sampled texts instead, and have estimates
        with 95 % intervals.
    samples : int
        Texts drawn per context for that, the same for all fits.
    acceptance_contexts : int, optional
        Contexts of every model and domain, the first ones, that are fitted by ``acceptance`` too,
        where other methods are asked for; default: all.
    cheapest : bool
        Of trees, whether each context takes the cheapest way whose intervals are as narrow as
        `width`: complete only where that is needed, bounds from the most probable sequences where
        these are few enough, else as many texts as it takes, up to `samples`.
    tree_mass, tree_nodes : float, int
        Of truncated trees: the probability they should keep; of all: the most prefixes they may
        expand.
    device, dtype : str
        Where and in what precision models run that are loaded by name.
    seed : int

    Raises
    ------
    ValueError
        If a value is out of range, or a method is unknown.
    """

    models: tuple[str, ...] = ("code", "prose")
    corpus: tuple[str, ...] = ()
    domains: tuple[tuple[str, str], ...] = ()
    text_field: str = "text"
    horizons: tuple[int, ...] = (3,)
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    methods: tuple[str, ...] = ("als", "em", "gradient", "acceptance")
    forms: tuple[str, ...] = ("cp",)
    transition_ranks: tuple[int, ...] = (16,)
    anchored: tuple[bool, ...] = None  # type: ignore[assignment]  # chosen below
    temperatures: tuple[float, ...] = (1.0,)
    top_k: int = None  # type: ignore[assignment]  # all tokens
    top_p: float = None  # type: ignore[assignment]
    contexts: int = 8
    context_length: int = 64
    restarts: int = 1
    max_bytes: int = 4_000_000_000
    width: float = 0.05
    samples: int = 2000
    acceptance_contexts: int = None  # type: ignore[assignment]  # all
    cheapest: bool = False
    tree_mass: float = 0.95
    tree_nodes: int = 20_000
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for name in _AXES[:-1]:
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        anchored = 2 not in self.horizons if self.anchored is None else self.anchored
        object.__setattr__(self, "anchored", _several("anchored", anchored))
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
        _require(
            isinstance(self.text_field, str) and bool(self.text_field),
            f"text_field {self.text_field!r}: expected the name of a field",
        )
        for rank in self.ranks:
            _require(_is_positive_integer(rank), f"rank {rank}: expected an integer of at least 1")
            _require(rank < 2**31, f"rank {rank}: expected a number of components, below 2 ** 31")
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
        for form in self.forms:
            _require(form in FORMS, f"form {form!r}: expected one of {', '.join(FORMS)}")
        for width in self.transition_ranks:
            _require(
                _is_positive_integer(width),
                f"transition_rank {width}: expected an integer of at least 1",
            )
        _require(
            set(self.forms) == {"cp"} or bool(set(self.methods) & set(KL_METHODS)),
            f"forms {', '.join(self.forms)} by {', '.join(self.methods)}: all but cp need one of "
            f"the methods {', '.join(KL_METHODS)}",
        )
        for name in ("contexts", "context_length", "restarts", "max_bytes", "tree_nodes"):
            _require(
                _is_positive_integer(getattr(self, name)),
                f"{name} {getattr(self, name)}: expected an integer of at least 1",
            )
        _require(
            _is_positive_integer(self.samples) and self.samples >= 2,
            f"samples {self.samples}: expected an integer of at least 2",
        )
        _require(
            isinstance(self.width, int | float) and 0 < self.width < math.inf,
            f"width {self.width!r}: expected tokens per call, a number above 0",
        )
        few = self.acceptance_contexts
        _require(
            few is None or _is_positive_integer(few),
            f"acceptance_contexts {few!r}: expected an integer of at least 1, or none for all",
        )
        _require(
            isinstance(self.cheapest, bool), f"cheapest {self.cheapest!r}: expected True or False"
        )
        _require(isinstance(self.seed, int), f"seed {self.seed!r}: expected an integer")
        for temperature in self.temperatures:
            _require(
                isinstance(temperature, int | float),
                f"temperature {temperature!r}: expected a number of at least 0",
            )
            self.law(temperature)
        _require(
            all(isinstance(a, bool) for a in self.anchored),
            f"anchored {self.anchored}: expected True, False or both",
        )
        _require(
            False in self.anchored or min(self.horizons) >= 3,
            "anchored drafts need a horizon of at least 3: leave out horizon 2 or add False "
            "(--anchored no or both)",
        )
        _require(
            isinstance(self.tree_mass, int | float) and 0 < self.tree_mass < 1,
            f"tree_mass {self.tree_mass}: expected a probability between 0 and 1",
        )

    def law(self, temperature: float) -> SamplingLaw:
        """The target's law at one of the temperatures."""
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            _require(
                value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
                f"{name} {value!r}: expected a number, or none to keep all tokens",
            )
        return SamplingLaw(temperature, self.top_k, self.top_p)

    def methods_of(self, context: int) -> tuple[str, ...]:
        """The methods that a context is fitted by; `context` is its number within model and
        domain.

        Examples
        --------
        >>> settings = StudySettings(methods=("em", "acceptance"), acceptance_contexts=6)
        >>> settings.methods_of(5), settings.methods_of(6)
        (('em', 'acceptance'), ('em',))
        """
        few = self.acceptance_contexts
        if few is None or context < few or self.methods == ("acceptance",):
            return self.methods
        return tuple(method for method in self.methods if method != "acceptance")

    @property
    def corpora(self) -> dict[str, list[str]]:
        """Patterns by domain; empty: the model's own samples."""
        found: dict[str, list[str]] = {CORPUS: list(self.corpus)} if self.corpus else {}
        for name, pattern in self.domains:
            found.setdefault(name, []).append(pattern)
        return found


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
            name not in (OWN_SAMPLES, CORPUS, TEXTS),
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
