"""Drafts that are looked up leave the distribution as it is, and pay where texts repeat."""

from __future__ import annotations

import pytest
import torch

from cpmtp.decoding.prompt_lookup import PromptLookup
from cpmtp.decoding.speculative import speculative_generate
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import MarkovLanguageModel
from cpmtp.sampling_law import SamplingLaw
from cpmtp.validation.checks import law_p_value


def a_chain(sharpness: float = 1.5) -> MarkovLanguageModel:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 4, generator=generator, dtype=torch.float64).mul(sharpness).softmax(1)
    return MarkovLanguageModel(table[0], table)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_what_is_emitted_follows_the_targets_joint(rule, temperature):
    lm, prompt = a_chain(), torch.tensor([0, 1, 2, 3, 0, 1])
    how = {"rule": rule, "temperature": temperature, "max_new_tokens": 3}
    out = speculative_generate(lm, PromptLookup(horizon=3), [prompt] * 1500, **how)
    assert max(out.stats.accepted_per_position) > 0
    joint = exact_joint(lm, prompt, 3, temperature=temperature).probs
    assert law_p_value(torch.stack(list(out.token_ids)), joint) > 1e-3


def test_greedy_output_is_plain_greedy_decoding_in_fewer_calls():
    lm, prompts = a_chain(), [torch.tensor([0, 1, 2]), torch.tensor([3])]
    plain = speculative_generate(lm, None, prompts, max_new_tokens=40, temperature=0)
    out = speculative_generate(lm, PromptLookup(), prompts, max_new_tokens=40, temperature=0)
    for one, other in zip(out.token_ids, plain.token_ids, strict=True):
        assert torch.equal(one, other)
    assert out.stats.calls < 0.5 * plain.stats.calls  # a chain without chance goes round in circles


def test_rows_that_find_less_go_on_with_a_guess():
    texts = [torch.tensor([5, 1, 2, 3, 1, 2]), torch.tensor([4, 6]), torch.tensor([7, 8, 7])]
    block = PromptLookup(horizon=4).block(texts)
    assert block.tokens.tolist() == [[3, 1, 2], [6, 6, 6], [8, 7, 7]]
    drafted = block.first(2).sample(SamplingLaw(), torch.rand(3, 4, dtype=torch.float64))
    assert torch.equal(drafted.over_all(9).argmax(-1), block.tokens[:, :2])
    assert torch.equal(drafted.over_all(9).sum(-1), torch.ones(3, 2))


def test_nothing_is_drafted_where_nothing_is_found():
    assert PromptLookup().block([torch.tensor([1, 2, 3])]).length == 0


@pytest.mark.parametrize("sizes", [{"horizon": 1}, {"max_ngram": 0}, {"min_ngram": 4}])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(ValueError, match="expected a horizon of at least 2"):
        PromptLookup(**sizes)
