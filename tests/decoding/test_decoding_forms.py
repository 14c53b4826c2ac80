"""Decoding with heads of every form: the target's law untouched, greedy equal to greedy, and as
many tokens as the forecast says.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import kstest

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.drafts import blocks
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.heads.draft_head import DraftHead
from cpmtp.joint_distribution import exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.new_models import new_llama
from cpmtp.validation.checks import law_p_value

VOCAB = 5
FORMS = [
    {"form": "markov", "transition_rank": 3},
    {"form": "markov_mixture", "rank": 2, "transition_rank": 3, "anchored": False},
    {"form": "recurrent"},
    {"form": "recurrent", "anchored": False},
    {"form": "cp", "rank": 2, "vocabulary": (0, 1, 4)},
    {"form": "markov_mixture", "rank": 2, "transition_rank": 3, "vocabulary": (0, 1, 4)},
]
EACH = pytest.mark.parametrize("form", FORMS, ids=str)


@pytest.fixture(scope="module")
def lm() -> HuggingFaceLanguageModel:
    model = new_llama(VOCAB, width=96, layers=1, window=64, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(
        0.05 * torch.randn(VOCAB, 96, generator=generator, dtype=torch.float64)
    )
    return HuggingFaceLanguageModel(model)


def a_head(lm, *, anchored=True, **form) -> DraftHead:
    """Another law than the target's, that depends on what was drafted."""
    torch.manual_seed(3)
    head = DraftHead(hidden_size=96, vocab_size=VOCAB, horizon=4, anchored=anchored, **form)
    for name, parameter in head.named_parameters():
        strength = 1.2 if name in ("left", "right") else 0.15
        parameter.data += strength * torch.randn(parameter.shape)
    return head.attach(lm).eval().requires_grad_(False)


def p_value(lm, form: dict, *, seed: int = 4, rows: int = 800, **law) -> float:
    """Of the first three tokens, of more: near its end a text has no room for whole drafts."""
    prompt = torch.tensor([2, 1])
    out = speculative_generate(
        lm, a_head(lm, **form), [prompt] * rows, max_new_tokens=6, seed=seed, **law
    )
    drawn = torch.stack([row[:3] for row in out.token_ids])  # (rows, 3)
    return law_p_value(drawn, exact_joint(lm, prompt, 3, **law).probs)


@EACH
def test_what_is_emitted_follows_the_targets_joint(lm, form):
    assert p_value(lm, form) > 1e-3
    assert p_value(lm, form, temperature=0.7, top_k=3) > 1e-3


@pytest.mark.slow
@EACH
def test_p_values_over_seeds_are_uniform(lm, form):
    laws = ({}, {"temperature": 0.7}, {"top_k": 4})
    values = [p_value(lm, form, seed=seed, rows=800, **laws[seed % 3]) for seed in range(40)]
    assert kstest(values, "uniform").pvalue >= 0.01


def test_a_block_that_forgets_what_it_drafted_is_rejected(lm, monkeypatch):
    """Drawn from rows that read the drafted token, verified against rows that do not."""

    def forgetful(length, rows, ids, law, uniform):
        drawn = usual(length, rows, ids, law, uniform)
        others = usual(length, lambda k, token: rows(k, None), ids, law, uniform)
        return replace(drawn, probs=others.probs)

    usual = blocks._chain_in_turn
    assert p_value(lm, FORMS[0], rows=2000) > 1e-3
    monkeypatch.setattr(blocks, "_chain_in_turn", forgetful)
    assert p_value(lm, FORMS[0], rows=2000) < 1e-6


@EACH
def test_greedy_output_is_plain_greedy_decoding(lm, form):
    head, prompt = a_head(lm, **form), torch.tensor([1, 3, 0, 2, 4])
    options = {"max_new_tokens": 30, "temperature": 0}
    plain = speculative_generate(lm, None, prompt, **options).token_ids
    for rule in ("greedy", "block"):
        out = speculative_generate(lm, head, prompt, rule=rule, **options)
        assert torch.equal(out.token_ids, plain)


@EACH
def test_decoding_earns_what_is_forecast(lm, form):
    head, prompts = a_head(lm, **form), [torch.tensor([2, 1])] * 150
    texts = torch.stack(speculative_generate(lm, None, prompts, max_new_tokens=24).sequences)
    forecast = forecast_cycles(lm, head, texts, start=2)
    stats = speculative_generate(lm, head, prompts, max_new_tokens=24, seed=1).stats
    spread = torch.tensor(stats.tokens_per_call_by_row).std() / 150**0.5
    half = (forecast.interval[1] - forecast.interval[0]) / 2
    # Four standard errors of the measurement, and two of the forecast's own.
    assert abs(stats.tokens_per_call - forecast.tokens_per_call) < 4 * spread + half
    assert forecast.survival[0].item() == pytest.approx(1.0)
    assert 1 < forecast.tokens_per_call < 4
