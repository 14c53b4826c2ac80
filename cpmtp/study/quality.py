"""What the fits of one joint earn, and how far they are from it: exactly, within certified bounds,
or estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpmtp.acceptance.implied import acceptance_profiles
from cpmtp.acceptance.paths import SampledPaths
from cpmtp.acceptance.sampled import sampled_acceptance
from cpmtp.acceptance.truncated import AcceptanceInterval, certified_acceptance
from cpmtp.acceptance.verification import VERIFIED
from cpmtp.decomposition.fit_result import FitResult
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution
from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree import PrefixTree
from cpmtp.sampling_law import SamplingLaw
from cpmtp.study.plan import StudyCell, StudyUnit
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import FIRST_TOKENS, RULES

# Texts that tell how many are needed, and what is added for luck.
_FEW_TEXTS, _MORE = 250, 1.2

# Of each source of the first token, what each rule says.
Bounds = dict[str, dict[str, AcceptanceInterval]]
Outcome = Mapping[StudyCell, dict | Exception]


@dataclass
class SharedPaths:
    """Texts drawn from the target after one context, once, for whatever is judged on them."""

    settings: StudySettings
    unit: StudyUnit
    lm: LanguageModel
    _drawn: dict[int, SampledPaths] = field(default_factory=dict)

    def beside(self, tree: PrefixTree, samples: int) -> SampledPaths:
        """Those of the tree's horizon, marked where they leave it."""
        if samples not in self._drawn:
            ids = torch.tensor(self.unit.token_ids, dtype=torch.long)
            law: SamplingLaw = self.settings.law(self.unit.temperature)
            options = {"samples": samples, "seed": self.unit.seed(self.settings.seed)}
            longest = max(self.unit.trees)
            self._drawn[samples] = SampledPaths.drawn(self.lm, ids, longest, law=law, **options)
        return self._drawn[samples].first(tree.horizon).outside_of(tree)

    def more(self, samples: int, width: float) -> int:
        """Texts that would make the widest of these intervals narrow enough; as many as there are
        where it is, or where no more are wanted.
        """
        most, wanted = self.settings.samples, self.settings.width
        if not width > wanted or samples >= most:
            return samples
        return min(most, math.ceil(_MORE * samples * (width / wanted) ** 2))

    @property
    def first(self) -> int:
        """Texts to begin with."""
        few = min(_FEW_TEXTS, self.settings.samples)
        return few if self.settings.cheapest else self.settings.samples


def qualities(
    joint: JointDistribution | PrefixTree,
    fits: Mapping[StudyCell, FitResult | Exception],
    shared: SharedPaths,
) -> tuple[Outcome, dict]:
    """Columns of every fit's quality, or what kept them from being known; and columns that say how
    all of them were computed.

    Where a truncated tree leaves any of them an interval wider than wanted, all are estimated, on
    the same texts: ranks and methods are compared like with like.
    """
    if isinstance(joint, JointDistribution):
        return {cell: _tried(_dense_quality, joint, fits[cell], cell) for cell in fits}, {}
    bounds = {cell: _tried(_bounds, joint, fits[cell], cell) for cell in fits}
    known = {cell: found for cell, found in bounds.items() if not isinstance(found, Exception)}
    if joint.is_complete or _widest(known.values()) <= shared.settings.width:
        found = {cell: _certified_quality(joint, fits[cell], cell, b) for cell, b in known.items()}
        return bounds | found, {}
    try:
        estimates = _sampled(joint, fits, known, shared)
    except Exception as error:
        return dict.fromkeys(fits, error), {}
    return bounds | dict(estimates), {"computed": "sampled"}


def _sampled(tree: PrefixTree, fits, known: Mapping[StudyCell, Bounds], shared) -> Outcome:
    """Estimates of every fit, from as many texts as are wanted."""
    samples, wanted = 0, shared.first
    found: dict[StudyCell, Any] = {}
    while samples < wanted:
        samples, paths = wanted, shared.beside(tree, wanted)
        found = {cell: _tried(_sampled_quality, paths, fits[cell], b) for cell, b in known.items()}
        wanted = shared.more(samples, max(map(_width, found.values()), default=0.0))
    return found


def _width(quality: dict | Exception) -> float:
    """The widest interval of tokens per call among a fit's columns."""
    if isinstance(quality, Exception):
        return 0.0
    begins = "tokens_per_call_lower_"
    ends = {name.removeprefix(begins): low for name, low in quality.items() if begins in name}
    return max(quality[f"tokens_per_call_upper_{name}"] - low for name, low in ends.items())


def _tried(quality, joint, result: FitResult | Exception, *more):
    """What it says of a fit, or what kept it from being made or judged."""
    if isinstance(result, Exception):
        return result
    try:
        return quality(joint, result, *more)
    except Exception as error:
        return error


def _first_tokens(cell: StudyCell) -> tuple[str, ...]:
    return ("target",) if cell.anchored else FIRST_TOKENS


def _dense_quality(joint: JointDistribution, result: FitResult, cell: StudyCell) -> dict:
    quality: dict = asdict(divergences(joint, result.distribution))
    for first in _first_tokens(cell):
        for rule, profile in acceptance_profiles(
            joint, result.distribution, RULES, first_token=first
        ).items():
            earned = profile.tokens_per_call
            quality |= _acceptance(rule, first, (earned, earned, earned), profile.survival)
    return quality


def _bounds(tree: PrefixTree, result: FitResult, cell: StudyCell) -> Bounds:
    return {
        first: {
            rule: certified_acceptance(tree, result.distribution, rule=rule, first_token=first)
            for rule in RULES
        }
        for first in _first_tokens(cell)
    }


def _widest(several) -> float:
    """The widest interval of tokens per call under a rule that samples can judge, too."""
    widths = [
        of_first[rule].tokens_per_call_upper - of_first[rule].tokens_per_call_lower
        for bounds in several
        for of_first in bounds.values()
        for rule in VERIFIED
    ]
    return max(widths, default=0.0)


def _certified_quality(tree: PrefixTree, result, cell: StudyCell, bounds: Bounds) -> dict:
    # Of a complete tree the objective of a fit by em or gradient is the divergence itself.
    exact = tree.is_complete and cell.method != "acceptance"
    quality: dict = {"kl_nats": float(result.objective)} if exact else {}
    for first, of_first in bounds.items():
        for rule, b in of_first.items():
            low, high = b.tokens_per_call_lower, b.tokens_per_call_upper
            quality |= _acceptance(rule, first, (low, low, high), b.survival_lower)
    return quality


def _sampled_quality(paths: SampledPaths, result: FitResult, bounds: Bounds) -> dict:
    quality: dict = {}
    for first, of_first in bounds.items():
        # The tree is of the processed law already: its fits are read as they are.
        found = sampled_acceptance(paths, result.distribution, first_token=first, bounds=of_first)
        for rule, estimate in found.items():
            ends = (estimate.tokens_per_call, *estimate.tokens_per_call_interval)
            quality |= _acceptance(rule, first, ends, estimate.survival)
    return quality


def _acceptance(rule: str, first: str, earned: tuple, survival: Tensor) -> dict:
    """Columns of one rule: tokens per call with its lower and upper end, and survival."""
    names = ("tokens_per_call", "tokens_per_call_lower", "tokens_per_call_upper")
    found = {f"{name}_{rule}_{first}": e for name, e in zip(names, earned, strict=True)}
    return found | {
        f"survival_{rule}_{first}_{k}": s for k, s in enumerate(survival.tolist(), start=1)
    }
