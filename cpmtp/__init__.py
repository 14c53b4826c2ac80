"""Which draft head a language model needs, what it will earn, and what it buys.

Public names are loaded when they are first used, so that ``import cpmtp`` costs hardly more than
``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cpmtp.acceptance.implied import AcceptanceProfile, implied_acceptance
    from cpmtp.acceptance.sampled import AcceptanceEstimate, estimate_acceptance
    from cpmtp.acceptance.truncated import AcceptanceInterval
    from cpmtp.decoding.speculative import speculative_generate
    from cpmtp.decomposition.fit_result import FitResult
    from cpmtp.decomposition.fitting import fit, fit_path
    from cpmtp.decomposition.floors import RankFloors, rank_floors
    from cpmtp.decomposition.mixtures import factor_match_score
    from cpmtp.drafts.cp_distribution import CPDistribution
    from cpmtp.drafts.divergence import Divergences, divergences
    from cpmtp.heads.cp_head import CPHead
    from cpmtp.heads.evaluation import head_draft, held_out_survival, waterfall
    from cpmtp.joint_distribution import JointDistribution, exact_joint
    from cpmtp.language_model import (
        HiddenMarkovLanguageModel,
        LanguageModel,
        MarkovLanguageModel,
        separated_hmm,
    )
    from cpmtp.prefix_tree import PrefixTree, truncated_joint
    from cpmtp.pretrained import HuggingFaceLanguageModel, embedded_models, load_language_model
    from cpmtp.ranking.comparison import compare_studies
    from cpmtp.ranking.selection import RankChoice, select_rank
    from cpmtp.report.document import write_report
    from cpmtp.sampling_law import SamplingLaw
    from cpmtp.study.plan import StudySettings
    from cpmtp.study.running import run_study
    from cpmtp.training.base_models import BaseTrainingSettings, train_base
    from cpmtp.training.heads import HeadTrainingSettings, train_head

_HOME = {
    "AcceptanceProfile": "acceptance.implied",
    "implied_acceptance": "acceptance.implied",
    "CPDistribution": "drafts.cp_distribution",
    "CPHead": "heads.cp_head",
    "CycleForecast": "forecasting.cycles",
    "forecast_cycles": "forecasting.cycles",
    "FitResult": "decomposition.fit_result",
    "fit": "decomposition.fitting",
    "fit_path": "decomposition.fitting",
    "RankFloors": "decomposition.floors",
    "rank_floors": "decomposition.floors",
    "factor_match_score": "decomposition.mixtures",
    "Divergences": "drafts.divergence",
    "divergences": "drafts.divergence",
    "JointDistribution": "joint_distribution",
    "exact_joint": "joint_distribution",
    "head_draft": "heads.evaluation",
    "held_out_survival": "heads.evaluation",
    "waterfall": "heads.evaluation",
    "HeadTrainingSettings": "training.heads",
    "train_head": "training.heads",
    "HiddenMarkovLanguageModel": "language_model",
    "LanguageModel": "language_model",
    "MarkovLanguageModel": "language_model",
    "separated_hmm": "language_model",
    "PrefixTree": "prefix_tree",
    "truncated_joint": "prefix_tree",
    "HuggingFaceLanguageModel": "pretrained",
    "embedded_models": "pretrained",
    "load_language_model": "pretrained",
    "RankChoice": "ranking.selection",
    "select_rank": "ranking.selection",
    "write_report": "report.document",
    "AcceptanceEstimate": "acceptance.sampled",
    "estimate_acceptance": "acceptance.sampled",
    "AcceptanceInterval": "acceptance.truncated",
    "SamplingLaw": "sampling_law",
    "speculative_generate": "decoding.speculative",
    "StudySettings": "study.plan",
    "run_study": "study.running",
    "compare_studies": "ranking.comparison",
    "BaseTrainingSettings": "training.base_models",
    "train_base": "training.base_models",
}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'cpmtp' has no attribute {name!r}")
    value = getattr(import_module(f"cpmtp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
