"""The law of what the decoding loop emits, and what its cycles keep by the rules' definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import brute_force_survival
from samples import random_draft
from scipy.stats import kstest

from cpmtp.acceptance.verification import VERIFIED
from cpmtp.decoding import judging
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import MarkovLanguageModel
from cpmtp.validation.checks import law_p_value


def a_chain(seed: int = 0) -> MarkovLanguageModel:
    """A chain in which some tokens never follow others."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4, 4, generator=generator, dtype=torch.float64).mul(1.5).softmax(1)
    table[0, 2] = table[3, 1] = 0.0
    table = table / table.sum(1, keepdim=True)
    return MarkovLanguageModel(table[0], table)


def a_draft(seed: int = 1, horizon: int = 2, vocab: int = 4):
    """Another law than the target's for every known token."""
    laws = [random_draft(vocab, horizon, 2, seed=seed + 10 * token) for token in range(vocab)]
    return lambda text: laws[int(text[-1])]


def p_value(seed: int, *, rule="block", temperature=1.0, rows=1500, horizon=3) -> float:
    lm = a_chain()
    prompt = torch.tensor([1])
    out = speculative_generate(
        lm,
        a_draft(),
        [prompt] * rows,
        max_new_tokens=horizon,
        rule=rule,
        temperature=temperature,
        seed=seed,
    )
    joint = exact_joint(lm, prompt, horizon, temperature=temperature).probs
    return law_p_value(torch.stack(list(out.token_ids)), joint)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_what_is_emitted_follows_the_targets_joint(rule, temperature):
    assert p_value(0, rule=rule, temperature=temperature) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["token", "block"])
def test_p_values_over_seeds_are_uniform(rule):
    values = [p_value(seed, rule=rule, temperature=(0.7, 1.0, 1.3)[seed % 3]) for seed in range(50)]
    assert kstest(values, "uniform").pvalue >= 0.01


def _correction_from_the_target(p, drafted, rule, uniform):
    accepted, _ = judging_verified(p, drafted, rule, uniform)
    return accepted, judging.draw(p[torch.arange(len(p)), accepted], uniform[:, 1])


def _everything_accepted(p, drafted, rule, uniform):
    return torch.full((len(p),), drafted.length), judging.draw(p[:, -1], uniform[:, 1])


def _another_temperature(p, drafted, rule, uniform):
    flat = drafted.probs.sqrt() / drafted.probs.sqrt().sum(-1, keepdim=True)
    return judging_verified(p, replace(drafted, probs=flat), rule, uniform)


def _greedy_match(p, drafted, rule, uniform):
    same = (p[:, :-1].argmax(-1) == drafted.tokens).long().cumprod(1).sum(1)
    return same, judging.draw(p[torch.arange(len(p)), same], uniform[:, 1])


judging_verified = judging.verified


@pytest.mark.parametrize(
    "variant",
    [_correction_from_the_target, _everything_accepted, _another_temperature, _greedy_match],
)
def test_a_lossy_variant_in_the_loop_is_rejected(variant, monkeypatch):
    monkeypatch.setattr(judging, "verified", variant)
    assert p_value(0, rows=4000) < 1e-6


def kept_by_first_cycles(lm, draft, rule: str, *, drafted: int, rows: int) -> torch.Tensor:
    """How many drafted tokens the first cycle of every row keeps, after a prompt of one token."""
    released: list[list[int]] = [[] for _ in range(rows)]
    speculative_generate(
        lm,
        draft,
        [torch.tensor([1])] * rows,
        max_new_tokens=drafted + 2,
        rule=rule,
        seed=5,
        callback=lambda row, block: released[row].append(len(block)),
    )
    # The first block is the known token, the second what one cycle makes of it.
    return torch.tensor([blocks[1] - 1.0 for blocks in released], dtype=torch.float64)


def kept_by_definition(lm, draft, rule: str, *, drafted: int) -> float:
    """The same, expected over the known token."""
    expected = 0.0
    for known, mass in enumerate(lm.transition[1]):
        target = exact_joint(lm, torch.tensor([known]), drafted).probs
        law = draft(torch.tensor([known])).to_tensor()
        expected += float(mass * brute_force_survival(target, law, rule).sum())
    return expected


@pytest.mark.parametrize("rule", VERIFIED)
def test_a_cycle_keeps_as_many_drafted_tokens_as_the_definition_says(rule):
    lm, draft, rows = a_chain(), a_draft(), 4000
    kept = kept_by_first_cycles(lm, draft, rule, drafted=2, rows=rows)
    expected = kept_by_definition(lm, draft, rule, drafted=2)
    assert abs(float(kept.mean()) - expected) <= 4 * float(kept.std()) / rows**0.5


@pytest.mark.parametrize("rule", VERIFIED)
def test_where_draft_and_target_are_far_apart_a_cycle_keeps_what_its_own_rule_says(rule):
    """What one token loses the next may win back under the block rule, and may not under the other:
    so each rule is told from the other, and from a verification that mixes them.
    """
    third = torch.tensor([1, 2], dtype=torch.float64) / 3
    lm, drafted, rows = MarkovLanguageModel(third, third.expand(2, 2)), 4, 3000
    contrary = CPDistribution(third.new_ones(1), [third.flip(0)[:, None]] * drafted)
    kept = kept_by_first_cycles(lm, lambda text: contrary, rule, drafted=drafted, rows=rows)
    own, other = (
        kept_by_definition(lm, lambda text: contrary, name, drafted=drafted)
        for name in (rule, *(set(VERIFIED) - {rule}))
    )
    allowed = 4 * float(kept.std()) / rows**0.5
    assert abs(own - other) > 2 * allowed
    assert abs(float(kept.mean()) - own) <= allowed
