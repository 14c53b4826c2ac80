"""The tree of a context: complete, or no larger than a decision needs."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree import PrefixTree, complete_joint, pruned, truncated_joint
from cpmtp.sampling_law import SamplingLaw
from cpmtp.study.plan import is_completed
from cpmtp.study.settings import StudySettings

# Of the width that bounds may have: what a tree grows to, and what it is cut back to. Between them
# lies room for the rounding of sums.
_GROWN, _CUT = 0.8, 0.98
# Where bounds stay too wide: sequences that have no more than this share of what is missing anyway
# are not worth fitting to.
_NEGLIGIBLE = 0.1


def context_tree(
    settings: StudySettings, lm: LanguageModel, context: Tensor, horizon: int, law: SamplingLaw
) -> PrefixTree:
    """A context's tree, as the settings want it."""
    kept = asdict(law)
    if settings.cheapest:
        return _cheapest(settings, lm, context, horizon, law)
    if is_completed(settings, horizon):
        return complete_joint(lm, context, horizon, **kept)
    limits = {"mass": settings.tree_mass, "max_nodes": settings.tree_nodes}
    return truncated_joint(lm, context, horizon, **limits, **kept)


def most_nodes(settings: StudySettings, horizon: int) -> int:
    """Prefixes that the cheapest tree may expand: what samples would cost, so that the dearer of
    both ways, tried first, costs at most as much again.
    """
    return max(min(settings.tree_nodes, settings.samples * (horizon - 1)), horizon)


def _cheapest(
    settings: StudySettings, lm: LanguageModel, context: Tensor, horizon: int, law: SamplingLaw
) -> PrefixTree:
    """Grown until the sum of what is missing at each length, which no interval exceeds, is within
    the width; then cut back to it.
    """
    for missing in (_GROWN * settings.width, _GROWN * settings.width / (horizon - 1)):
        tree = truncated_joint(
            lm,
            context,
            horizon,
            mass=max(1 - missing, 0.5),
            max_nodes=most_nodes(settings, horizon),
            **asdict(law),
        )
        above = float((1 - tree.mass[:-1]).sum())  # of the shorter prefixes
        unkept = float(1 - tree.mass[-1])
        if above + unkept <= _CUT * settings.width:
            return pruned(tree, _CUT * settings.width - above)
        if unkept > missing:  # the nodes are spent
            break
    return pruned(tree, (1 + _NEGLIGIBLE) * unkept)
