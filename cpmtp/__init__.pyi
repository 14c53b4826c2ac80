# The one list of public names. Each is loaded from here when it is first used; `docs/api.md` is
# made from it, and nothing else is promised.

# Language models
from cpmtp.language_model import HiddenMarkovLanguageModel as HiddenMarkovLanguageModel
from cpmtp.language_model import HiddenStateLanguageModel as HiddenStateLanguageModel
from cpmtp.language_model import LanguageModel as LanguageModel
from cpmtp.language_model import MarkovLanguageModel as MarkovLanguageModel
from cpmtp.language_model import TextLanguageModel as TextLanguageModel
from cpmtp.joint_distribution.given import sample_sequences as sample_sequences
from cpmtp.language_model import separated_hmm as separated_hmm
from cpmtp.pretrained import HuggingFaceLanguageModel as HuggingFaceLanguageModel
from cpmtp.pretrained import embedded_heads as embedded_heads
from cpmtp.pretrained import embedded_models as embedded_models
from cpmtp.pretrained import load_language_model as load_language_model
from cpmtp.sampling_law import SamplingLaw as SamplingLaw

# Exact joints
from cpmtp.joint_distribution import JointDistribution as JointDistribution
from cpmtp.joint_distribution import exact_joint as exact_joint
from cpmtp.prefix_tree import PrefixTree as PrefixTree
from cpmtp.prefix_tree import complete_joint as complete_joint
from cpmtp.prefix_tree import truncated_joint as truncated_joint

# Drafts and their fits
from cpmtp.drafts.cp_distribution import CPDistribution as CPDistribution
from cpmtp.drafts.hmm_distribution import HMMDistribution as HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture as MarkovMixture
from cpmtp.drafts.divergence import Divergences as Divergences
from cpmtp.drafts.divergence import divergences as divergences
from cpmtp.drafts.lookup import LookupDraft as LookupDraft
from cpmtp.drafts.protocol import Draft as Draft
from cpmtp.drafts.support import Support as Support
from cpmtp.decomposition.fit_result import FitResult as FitResult
from cpmtp.decomposition.components import top_tokens as top_tokens
from cpmtp.decomposition.fitting import fit as fit
from cpmtp.decomposition.floors import RankFloors as RankFloors
from cpmtp.decomposition.floors import rank_floors as rank_floors
from cpmtp.decomposition.mixtures import factor_match_score as factor_match_score
from cpmtp.decomposition.fitting import fit_path as fit_path
from cpmtp.decomposition.forms.population import PopulationFit as PopulationFit
from cpmtp.decomposition.forms.population import fit_population as fit_population
from cpmtp.decomposition.trees.memory import TokenMemory as TokenMemory
from cpmtp.decomposition.trees.memory import token_memory as token_memory

# Acceptance
from cpmtp.acceptance.best_path import TokensPerCallBounds as TokensPerCallBounds
from cpmtp.acceptance.best_path import best_path_tokens_per_call as best_path_tokens_per_call
from cpmtp.acceptance.implied import AcceptanceProfile as AcceptanceProfile
from cpmtp.acceptance.implied import implied_acceptance as implied_acceptance
from cpmtp.acceptance.implied import revealed_component_survival as revealed_component_survival
from cpmtp.acceptance.paths import SampledPaths as SampledPaths
from cpmtp.acceptance.sampled import AcceptanceEstimate as AcceptanceEstimate
from cpmtp.acceptance.sampled import estimate_acceptance as estimate_acceptance
from cpmtp.acceptance.sampled import sampled_acceptance as sampled_acceptance
from cpmtp.acceptance.truncated import AcceptanceInterval as AcceptanceInterval

# Studies
from cpmtp.study.running import read_study as read_study
from cpmtp.study.running import run_study as run_study
from cpmtp.study.settings import StudySettings as StudySettings

# Learned heads
from cpmtp.heads.cp_head import CPHead as CPHead
from cpmtp.heads.draft_head import DraftHead as DraftHead
from cpmtp.heads.evaluation import head_draft as head_draft
from cpmtp.heads.evaluation import held_out_survival as held_out_survival
from cpmtp.heads.evaluation import reachable_survival as reachable_survival
from cpmtp.heads.evaluation import waterfall as waterfall
from cpmtp.training.head_settings import HeadTrainingSettings as HeadTrainingSettings
from cpmtp.training.heads import train_head as train_head

# Decoding and its forecast
from cpmtp.decoding.audit import AuditFindings as AuditFindings
from cpmtp.decoding.prompt_lookup import PromptLookup as PromptLookup
from cpmtp.decoding.speculative import Generation as Generation
from cpmtp.decoding.generation_hook import custom_generate as custom_generate
from cpmtp.decoding.speculative import speculative_generate as speculative_generate
from cpmtp.decoding.stats import GenerationStats as GenerationStats
from cpmtp.forecasting.cycles import CycleForecast as CycleForecast
from cpmtp.forecasting.cycles import forecast_cycles as forecast_cycles

# The forecast before training
from cpmtp.forecasting.forecast_plan import ForecastSettings as ForecastSettings
from cpmtp.forecasting.head_choice import HeadChoice as HeadChoice
from cpmtp.forecasting.head_forecast import HeadForecast as HeadForecast
from cpmtp.forecasting.head_forecast import forecast_heads as forecast_heads
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice as ShapeChoice
from cpmtp.forecasting.step_times import measure_latency as measure_latency
from cpmtp.latency import MeasuredLatency as MeasuredLatency
from cpmtp.latency import StepCurve as StepCurve
from cpmtp.latency import StepTime as StepTime
from cpmtp.latency import read_latency as read_latency

# The choice of a rank
from cpmtp.latency import LatencyModel as LatencyModel
from cpmtp.latency import Throughput as Throughput
from cpmtp.latency import memory_bound_latency as memory_bound_latency
from cpmtp.latency import predicted_speedup as predicted_speedup
from cpmtp.ranking.comparison import compare_studies as compare_studies
from cpmtp.ranking.forms import form_summary as form_summary
from cpmtp.ranking.parts import best_fits as best_fits
from cpmtp.ranking.selection import RankChoice as RankChoice
from cpmtp.ranking.selection import compare_criteria as compare_criteria
from cpmtp.ranking.selection import needed_ranks as needed_ranks
from cpmtp.ranking.selection import paired_gains as paired_gains
from cpmtp.ranking.selection import select_rank as select_rank
from cpmtp.ranking.summary import method_summary as method_summary
from cpmtp.ranking.summary import objective_gap as objective_gap

# Report and figures
from cpmtp.report.document import write_report as write_report
from cpmtp.report.learned import LearnedShare as LearnedShare
from cpmtp.report.plots import COLOURS as COLOURS
from cpmtp.report.plots import house_style as house_style
from cpmtp.report.plots import plot_components as plot_components
from cpmtp.report.plots import plot_error_against_rank as plot_error_against_rank
from cpmtp.report.plots import plot_forecast as plot_forecast
from cpmtp.report.plots import plot_lines_over_rank as plot_lines_over_rank
from cpmtp.report.plots import plot_losses_over_rank as plot_losses_over_rank
from cpmtp.report.plots import plot_speedup as plot_speedup
from cpmtp.report.plots import plot_tokens_per_call as plot_tokens_per_call
from cpmtp.report.plots import plot_waterfall as plot_waterfall

# Base models of one's own
from cpmtp.training.base_models import BaseTrainingSettings as BaseTrainingSettings
from cpmtp.training.base_models import train_base as train_base

__version__: str
