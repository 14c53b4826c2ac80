"""Forecasts of decoding from texts alone: exact where everything can be enumerated, and what
decoding then measures.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from reference import verify
from rounding import rounding
from samples import random_draft
from unchecked import unchecked

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.forecasting.cycles import (
    ReadText,
    forecast_cycles,
    forecast_from_ratios,
    kept_along_text,
    start_probs,
)
from cpmtp.heads.cp_head import CPHead
from cpmtp.language_model import MarkovLanguageModel, sample_sequences
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.new_models import new_llama

VOCAB, DRAFTED = 3, 2


def a_chain() -> MarkovLanguageModel:
    """A chain that stays where it is for long at one token and not at the others."""
    table = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.1, 0.6], [0.2, 0.7, 0.1]], dtype=torch.float64)
    return MarkovLanguageModel(table[0], table)


def drafts():
    """A draft per known token, better after some than after others."""
    return [random_draft(VOCAB, DRAFTED, 2, seed=seed) for seed in (2, 3, 2)]


@cache
def cycle_from(known: int, length: int, rule: str) -> list[tuple[tuple[int, ...], float]]:
    """Emitted blocks of one cycle that drafts `length` tokens, with their probabilities; everything
    enumerated.
    """
    return list(_blocks(known, length, rule))


def _blocks(known: int, length: int, rule: str):
    table, draft = a_chain().transition, drafts()[known].marginal(length) if length else None
    for path in itertools.product(range(VOCAB), repeat=length):
        p = table[[known, *path]]
        if not length:
            yield from (((token,), float(p[0, token])) for token in range(VOCAB))
            continue
        tokens = torch.tensor(path)
        q = torch.stack([draft.next_token_probs(tokens[None, :k])[0] for k in range(length)])
        chance = float(draft.to_tensor()[path])
        verdict = verify(p, q, tokens, rule)
        for kept, token in itertools.product(range(length + 1), range(VOCAB)):
            share = float(
                verdict.accepted_length_probs[kept] * verdict.next_token_probs[kept, token]
            )
            yield (*path[:kept], token), chance * share


def enumerated_starts(time: int, rule: str) -> torch.Tensor:
    """(time - 1, vocab): the probability that decoding starts a cycle at a position with a known
    token there.
    """
    found = torch.zeros(time, VOCAB, dtype=torch.float64)
    found[0, 0] = 1
    for t in range(time - 1):
        for known in range(VOCAB):
            for block, chance in cycle_from(known, min(DRAFTED, time - 2 - t), rule):
                found[t + len(block), block[-1]] += found[t, known] * chance
    return found[:-1]


def ratios_of(texts: torch.Tensor) -> torch.Tensor:
    """Q / p along texts that begin with the first known token; what lies beyond their ends is 0."""
    table, joints = a_chain().transition, torch.stack([draft.to_tensor() for draft in drafts()])
    padded = torch.cat([texts, texts[:, -1:].expand(-1, DRAFTED)], 1)
    known, first, second = (padded[:, k : k + texts.shape[1] - 1] for k in range(3))
    alone = joints.sum(-1)[known, first]
    found = torch.stack(
        [alone / table[known, first], joints[known, first, second] / alone / table[first, second]],
        -1,
    )
    found[:, -1, 1] = 0
    return found


@pytest.mark.parametrize("rule", ["token", "block"])
def test_cycle_starts_given_the_text_are_those_of_decoding(rule):
    time = 6
    texts = torch.tensor([(0, *rest) for rest in itertools.product(range(VOCAB), repeat=time - 1)])
    weights = a_chain().transition[texts[:, :-1], texts[:, 1:]].prod(1)
    starts = start_probs(kept_along_text(ratios_of(texts), rule)) * weights[:, None]
    found = torch.stack([(starts * (texts[:, :-1] == token)).sum(0) for token in range(VOCAB)], 1)
    # Sums over 3 ** 5 texts of products of five steps of some sixteen operations.
    allowed = rounding(torch.float64, len(texts) + 5 * 16)
    torch.testing.assert_close(found, enumerated_starts(time, rule), atol=allowed, rtol=0)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_forecast_weighs_known_tokens_as_cycles_do_and_that_is_what_decoding_measures(rule):
    texts, time = 400, 301
    starts = enumerated_starts(time, rule)
    exact = (time - 1) / float(starts.sum())
    tokens = torch.cat(
        [
            torch.zeros(texts, 1, dtype=torch.long),
            sample_sequences(a_chain(), texts, time - 1, seed=4),
        ],
        1,
    )
    forecast = forecast_from_ratios(ratios_of(tokens), rule=rule, confidence=0.9999)
    assert forecast.interval[0] < exact < forecast.interval[1]
    # Far from both ends the known tokens of cycles follow their stationary law, which is not that
    # of the text.
    kernel, emitted = (
        torch.zeros(VOCAB, VOCAB, dtype=torch.float64),
        torch.zeros(VOCAB, dtype=torch.float64),
    )
    for known in range(VOCAB):
        for block, chance in cycle_from(known, DRAFTED, rule):
            kernel[known, block[-1]] += chance
            emitted[known] += chance * len(block)
    of_cycles, of_text = (
        torch.linalg.matrix_power(law, 1000)[0] for law in (kernel, a_chain().transition)
    )
    torch.testing.assert_close(starts[200] / starts[200].sum(), of_cycles, atol=1e-9, rtol=0)
    assert abs(float(of_cycles @ emitted) - exact) < 0.01
    assert not forecast.interval[0] < float(of_text @ emitted) < forecast.interval[1]
    assert abs(forecast.unweighted - float(of_text @ emitted)) < 0.02
    laws = drafts()
    out = speculative_generate(
        a_chain(),
        lambda text: laws[int(text[-1])],
        [torch.tensor([0])] * 60,
        max_new_tokens=time,
        rule=rule,
        seed=2,
    )
    by_row = torch.tensor(out.stats.tokens_per_call_by_row)
    assert abs(out.stats.tokens_per_call - exact) < 4 * float(by_row.std()) / 60**0.5


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_heads_forecast_is_what_decoding_with_it_measures(anchored, temperature):
    model = new_llama(5, width=96, layers=2, window=64, seed=0)
    generator = torch.Generator().manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(0.05 * torch.randn(5, 96, generator=generator))
    lm = HuggingFaceLanguageModel(model)
    torch.manual_seed(3)
    head = (
        CPHead(hidden_size=96, vocab_size=5, horizon=3, rank=2, anchored=anchored)
        .attach(lm)
        .requires_grad_(False)
    )
    prompts = [torch.tensor([1, 2])] * 300
    law = {"temperature": temperature}
    texts = torch.stack(
        speculative_generate(lm, None, prompts, max_new_tokens=40, seed=1, **law).sequences
    )
    for rule in ("token", "block"):
        forecast = forecast_cycles(lm, head, texts, start=2, rule=rule, **law)
        stats = speculative_generate(
            lm, head, prompts, max_new_tokens=40, rule=rule, seed=5, **law
        ).stats
        error = float(torch.tensor(stats.tokens_per_call_by_row).std()) / 300**0.5
        forecast_error = (forecast.interval[1] - forecast.tokens_per_call) / 1.96
        assert (
            abs(stats.tokens_per_call - forecast.tokens_per_call)
            < 4 * (error**2 + forecast_error**2) ** 0.5
        )


def test_a_perfect_draft_always_earns_the_horizon_but_for_the_texts_end():
    forecast = forecast_from_ratios(torch.ones(2, 9, 2))
    assert forecast.tokens_per_call == forecast.unweighted == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forecast_from_ratios(torch.ones(1, 3, 1)), "at least 2"),
        (lambda: forecast_from_ratios(torch.ones(2, 3, 1), rule="greedy"), "unknown rule"),
        (
            lambda: unchecked(
                forecast_cycles, None, None, torch.zeros(2, 3, dtype=torch.long), start=2
            ),
            "start 2",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class _Written:
    """A base model whose hidden states are its scores."""

    device = torch.device("cpu")

    def __init__(self, *scores: list[float]):
        self.scores = torch.tensor([scores])

    def hidden_states(self, tokens):
        return self.scores[:, : tokens.shape[1]]

    def unembed(self, hidden):
        return hidden


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (SamplingLaw(0.0), [1.0, 1.0]),
        (SamplingLaw(1.0, top_k=1), [1.0, 1.0]),
        (SamplingLaw(1.0), [0.5 / 1.1, 0.3]),
    ],
)
def test_a_token_that_another_pass_puts_just_outside_the_law_counts_as_its_edge(law, expected):
    first = [math.log(p) for p in (0.6 / 1.1, 0.5 / 1.1, 1e-9)]
    second = [math.log(p) for p in (0.3, 0.3 - 1e-4, 0.4 + 1e-4)]
    lm = _Written(first, second, [0.0, 0.0, 0.0])
    # Second best of 0.6 and 0.5; then 0.3, with 0.4 the best.
    text = ReadText.of(lm, torch.tensor([[2, 1, 0]]), law)
    torch.testing.assert_close(
        text.probs, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_a_text_that_the_law_cannot_write_is_refused_by_its_token():
    model = new_llama(5, width=96, layers=2, window=64, seed=0)
    lm = HuggingFaceLanguageModel(model)
    head = CPHead(hidden_size=96, vocab_size=5, horizon=3, rank=2).attach(lm)
    model.lm_head.weight = torch.nn.Parameter(3 * model.lm_head.weight)
    greedy = speculative_generate(
        lm, None, [torch.tensor([1, 2])] * 2, max_new_tokens=8, temperature=0.0
    )
    texts = torch.stack(greedy.sequences)
    found = forecast_cycles(lm, head, texts, start=2, temperature=0.0)
    assert 1 <= found.tokens_per_call <= 3
    last = lm.next_token_log_probs(texts[:1, :7])
    texts[0, 7] = last.flatten().argmin()
    with pytest.raises(ValueError, match="at position 7 of a text has no probability"):
        forecast_cycles(lm, head, texts, start=2, temperature=0.0)
