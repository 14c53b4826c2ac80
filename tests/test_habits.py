"""Options by the names that other libraries have for them, and what answers show of themselves."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from random_forms import random_form
from samples import BigramTable

import cpmtp
from cpmtp.latency import HeadTime, PlainTime

TABLE = BigramTable()
JOINT = torch.ones(3, 3, 3).double() / 27
IDS = [3, 1, 2]


def refused(call, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def lm():
    return tiny("llama")


@pytest.fixture(scope="module")
def head(lm):
    return cpmtp.train_head(lm, horizon=3, rank=2, steps=1, rows=1, length=8, sequences=1)


# A call for every function that takes options, and what it calls the seed.
CALLS = {
    "fit": lambda **o: cpmtp.fit(JOINT, 1, **o),
    "fit_path": lambda **o: cpmtp.fit_path(JOINT, [1], **o),
    "speculative_generate": lambda **o: cpmtp.speculative_generate(TABLE, None, IDS, **o),
    "custom_generate": lambda **o: cpmtp.custom_generate(tiny("llama"), None, **o),
    "estimate_acceptance": lambda **o: cpmtp.estimate_acceptance(TABLE, TABLE, IDS, **o),
    "sample_sequences": lambda **o: cpmtp.sample_sequences(TABLE, 2, 3, **o),
    "run_study": lambda **o: cpmtp.run_study(models=[TABLE], **o),
    "train_head": lambda **o: cpmtp.train_head(tiny("llama"), **o),
    "train_base": lambda **o: cpmtp.train_base("code", "nowhere", cpmtp.BaseTrainingSettings(**o)),
    "forecast_heads": lambda **o: cpmtp.forecast_heads(tiny("llama"), **o),
    "measure_latency": lambda **o: cpmtp.measure_latency(tiny("llama"), **o),
    "waterfall": lambda **o: cpmtp.waterfall(tiny("llama"), [], {}, **o),
    "select_rank": lambda **o: cpmtp.select_rank(None, **o),
    "compare_criteria": lambda **o: cpmtp.compare_criteria(None, **o),
    "paired_gains": lambda **o: cpmtp.paired_gains(None, **o),
    "compare_studies": lambda **o: cpmtp.compare_studies(None, None, **o),
    "StudySettings": lambda **o: cpmtp.StudySettings(**o),
    "HeadTrainingSettings": lambda **o: cpmtp.HeadTrainingSettings(**o),
    "ForecastSettings": lambda **o: cpmtp.ForecastSettings(**o),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_by_another_name_is_told_its_own(name):
    for habit in ("random_state", "generator"):
        refused(lambda h=habit: CALLS[name](**{h: 3}), f"no option '{habit}': it is called seed")


HABITS = [
    (lambda: cpmtp.fit(JOINT, n_components=1), "'n_components': .* rank here"),
    (lambda: cpmtp.fit(JOINT, 1, tol=1e-3), "'tol': .* tolerance here"),
    (lambda: cpmtp.fit(JOINT, 1, n_iter_max=9), "'n_iter_max': .* max_iterations here"),
    (lambda: cpmtp.fit_path(JOINT, [1], init="svd"), "'init': .* restarts here"),
    (lambda: cpmtp.fit(JOINT, 1, verbose=True), "'verbose' and nothing like it: leave it out"),
    (lambda: cpmtp.exact_joint(TABLE, prompt=IDS, horizon=2), "context here"),
    (lambda: cpmtp.exact_joint(TABLE, IDS, 2, verbose=1), "'verbose': .* progress here"),
    (lambda: cpmtp.exact_joint(TABLE, IDS, 2, random_state=1), "nothing like it: leave it out"),
    (lambda: cpmtp.speculative_generate(TABLE, None, IDS, max_tokens=2), "max_new_tokens here"),
    (lambda: cpmtp.speculative_generate(TABLE, None, IDS, stop="x"), "stop_strings here"),
    (lambda: cpmtp.run_study(models=[TABLE], n_jobs=2), "workers here"),
    (lambda: cpmtp.run_study(models=[TABLE], n_components=2), "ranks here"),
    (lambda: cpmtp.run_study(models=[TABLE], colour=2), "expected one of models"),
    (lambda: cpmtp.train_head(tiny("llama"), lr=2), "'lr': .* learning_rate here"),
    (lambda: cpmtp.train_head(tiny("llama"), max_iter=2), "'max_iter': .* steps here"),
    (lambda: cpmtp.train_head(tiny("llama"), verbose=2), "nothing like it"),
    (lambda: cpmtp.train_head(tiny("llama"), colour=2), "no option 'colour': expected one of form"),
    (lambda: cpmtp.forecast_heads(tiny("llama"), colour=2), "expected one of budget"),
    (lambda: cpmtp.measure_latency(tiny("llama"), batch_size=2), "batches here"),
    (lambda: cpmtp.DraftHead(hidden_size=2, vocab_size=3, n_components=2), "rank here"),
    (lambda: cpmtp.CPHead(hidden_size=2, vocab_size=3, n_components=2), "rank here"),
]


@pytest.mark.parametrize(("call", "said"), HABITS)
def test_an_option_by_another_librarys_name_is_told_its_own(call, said):
    refused(call, said)


def test_an_option_that_nothing_is_called_is_a_type_error():
    with pytest.raises(TypeError, match="nonsense"):
        cpmtp.fit(JOINT, 1, nonsense=3)
    with pytest.raises(TypeError, match="nonsense"):
        cpmtp.StudySettings(nonsense=3)


def test_what_is_shown_of_an_object_is_one_short_line(lm, head):
    joint = cpmtp.exact_joint(TABLE, IDS, 3)
    tree = cpmtp.truncated_joint(TABLE, IDS, 3)
    fit = cpmtp.fit(joint, 2)
    tokens = cpmtp.sample_sequences(lm, 3, 12, seed=0)
    one = cpmtp.speculative_generate(lm, head, IDS, max_new_tokens=40, audit=True)
    table = cpmtp.run_study(
        models=[TABLE], ranks=(1, 2), methods="em", contexts=3, context_length=4
    )
    curve = cpmtp.StepCurve("an engine", tuple(cpmtp.StepTime(1, t, 0.01 * t) for t in (1, 2, 4)))
    model = cpmtp.LatencyModel(0.01, 0.01)
    plain = (PlainTime(1, 0.01, "the model's own cache"),)
    heads = (HeadTime("cp", 3, 2, 0, 1, 0.001, 0.001, 0.001, 0.01, 0.0),)
    latency = cpmtp.MeasuredLatency(model, (curve,), heads, plain, {"device": "cpu"})
    shown = {
        "JointDistribution(horizon=3": joint,
        "PrefixTree(horizon=3": tree,
        "FitResult(em": fit,
        "FitResult(em, CPDistribution rank=2, batch": cpmtp.fit(joint, 2, anchored=True),
        "CPDistribution(rank=2": fit.distribution,
        "MarkovMixture(": random_form("markov_mixture", 4, 3, 2, 0),
        "Support(sizes": cpmtp.fit(tree, 2).distribution.support,
        "Divergences(kl_nats=": cpmtp.divergences(joint, fit),
        "RankFloors(": cpmtp.rank_floors(joint, [1, 2]),
        "AcceptanceProfile(survival=[1, ": cpmtp.implied_acceptance(joint, fit),
        "AcceptanceProfile(survival=tensor of (2, 3)": cpmtp.AcceptanceProfile(
            torch.ones(2, 3).double(), "block", "target"
        ),
        "AcceptanceInterval(": cpmtp.implied_acceptance(tree, fit),
        "AcceptanceEstimate(": cpmtp.estimate_acceptance(TABLE, fit, IDS, samples=20),
        "LookupDraft(text of 3 tokens": cpmtp.LookupDraft(torch.tensor(IDS), 6, 3),
        "HuggingFaceLanguageModel('llama'": lm,
        "HiddenMarkovLanguageModel(states=2": cpmtp.separated_hmm(2, 6),
        "MarkovLanguageModel(vocab_size=2": cpmtp.MarkovLanguageModel(
            torch.ones(2) / 2, torch.eye(2)
        ),
        "DraftHead('cp', horizon=3, rank=2": head,
        "Generation(1 text, GenerationStats(40 tokens": one,
        "GenerationStats(40 tokens in": one.stats,
        "CycleForecast(tokens_per_call=": cpmtp.forecast_cycles(lm, head, tokens),
        "RankChoice(criterion='tolerance', rank={3: ": cpmtp.select_rank(table),
        "StepCurve('an engine', 3 times": curve,
        "MeasuredLatency(plain step 10 ms of cpu": latency,
    }
    for begins, found in shown.items():
        text = repr(found)
        assert text.startswith(begins), text
        assert "\n" not in text and " at 0x" not in text and len(text) < 400, text
