"""Which rank does a multi-token prediction head need, and what will it buy?

Public names are loaded when they are first used, so that ``import cpmtp`` costs hardly more than ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cpmtp.acceptance import AcceptanceProfile, implied_acceptance
    from cpmtp.cp_distribution import CPDistribution
    from cpmtp.cp_head import CPHead
    from cpmtp.decomposition.fitting import FitResult, fit
    from cpmtp.divergence import Divergences, divergences
    from cpmtp.head_evaluation import head_draft, held_out_survival, waterfall
    from cpmtp.head_training import HeadTrainingSettings, train_head
    from cpmtp.joint_distribution import JointDistribution, exact_joint
    from cpmtp.language_model import HiddenMarkovLanguageModel, LanguageModel, MarkovLanguageModel, separated_hmm
    from cpmtp.prefix_tree import PrefixTree, truncated_joint
    from cpmtp.pretrained import HuggingFaceLanguageModel, embedded_models, load_language_model
    from cpmtp.rank_selection import RankChoice, select_rank
    from cpmtp.report import write_report
    from cpmtp.sampled_acceptance import AcceptanceEstimate, estimate_acceptance
    from cpmtp.sampling_law import SamplingLaw
    from cpmtp.speculative_decoding import speculative_generate
    from cpmtp.study import run_study
    from cpmtp.study_comparison import compare_studies
    from cpmtp.study_plan import StudySettings
    from cpmtp.training import BaseTrainingSettings, train_base
    from cpmtp.truncated_acceptance import AcceptanceInterval

_HOME = {
    "AcceptanceProfile": "acceptance",
    "implied_acceptance": "acceptance",
    "CPDistribution": "cp_distribution",
    "CPHead": "cp_head",
    "CycleForecast": "cycle_forecast",
    "forecast_cycles": "cycle_forecast",
    "FitResult": "decomposition.fitting",
    "fit": "decomposition.fitting",
    "Divergences": "divergence",
    "divergences": "divergence",
    "JointDistribution": "joint_distribution",
    "exact_joint": "joint_distribution",
    "head_draft": "head_evaluation",
    "held_out_survival": "head_evaluation",
    "waterfall": "head_evaluation",
    "HeadTrainingSettings": "head_training",
    "train_head": "head_training",
    "HiddenMarkovLanguageModel": "language_model",
    "LanguageModel": "language_model",
    "MarkovLanguageModel": "language_model",
    "separated_hmm": "language_model",
    "PrefixTree": "prefix_tree",
    "truncated_joint": "prefix_tree",
    "HuggingFaceLanguageModel": "pretrained",
    "embedded_models": "pretrained",
    "load_language_model": "pretrained",
    "RankChoice": "rank_selection",
    "select_rank": "rank_selection",
    "write_report": "report",
    "AcceptanceEstimate": "sampled_acceptance",
    "estimate_acceptance": "sampled_acceptance",
    "AcceptanceInterval": "truncated_acceptance",
    "SamplingLaw": "sampling_law",
    "speculative_generate": "speculative_decoding",
    "StudySettings": "study_plan",
    "run_study": "study",
    "compare_studies": "study_comparison",
    "BaseTrainingSettings": "training",
    "train_base": "training",
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
