"""What a cycle keeps, looked at over few tokens, is what the rule says over all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpmtp.acceptance.verification import VERIFIED, accepted_lengths, residual_law
from cpmtp.decoding.judging import judge
from cpmtp.drafts.blocks import Drafted
from cpmtp.sampling_law import SamplingLaw, draw

ROWS, LENGTH, VOCAB = 500, 3, 11
IDS = torch.tensor([0, 2, 3, 7, 10])


def scores(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, LENGTH + 1, VOCAB, generator=generator, dtype=dtype)


def numbers(count: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(ROWS, count, generator=generator, dtype=torch.float64)


def a_draft(target: torch.Tensor, law: SamplingLaw) -> Drafted:
    """Near the target, over few ids, and drawn from itself."""
    generator = torch.Generator().manual_seed(1)
    near = target[:, :LENGTH, IDS]
    near = near + 0.7 * torch.randn(near.shape, generator=generator, dtype=near.dtype)
    q = law.of_logits(near)
    places = draw(q, numbers(LENGTH, seed=2))
    return Drafted(IDS[places], places, q, IDS)


@pytest.mark.parametrize("law", [SamplingLaw(), SamplingLaw(0.7, top_k=6)], ids=str)
@pytest.mark.parametrize("rule", VERIFIED)
def test_a_draft_of_few_ids_is_judged_as_over_the_whole_vocabulary(rule, law):
    """By the same uniform numbers: the lengths, and the tokens after them, are the same."""
    target = scores()
    drafted, uniform = a_draft(target, law), numbers(2)
    found, after = judge(target, drafted, law, rule, uniform)
    p, q = law.process(target.softmax(-1)), drafted.over_all(VOCAB)
    lengths, scale = accepted_lengths(p, q, drafted.tokens, rule)
    expected = draw(lengths, uniform[:, 0])
    assert torch.equal(found, expected)
    assert len(found.unique()) == LENGTH + 1
    for row, length in enumerate(expected.tolist()):
        last = p[row, length]
        if length < LENGTH:
            last = residual_law(last, q[row, length], scale[row, length])
        assert after[row] == draw(last, uniform[row, 1])


@pytest.mark.parametrize("rule", VERIFIED)
def test_single_precision_decides_as_double_does(rule):
    """All but the cases at an edge, which are as many as rounding makes: here none."""
    target, law = scores(), SamplingLaw(0.7)
    drafted = a_draft(target, law)
    single = replace(drafted, probs=drafted.probs.float())
    found = judge(target.float(), single, law, rule, numbers(2))
    for one, other in zip(found, judge(target, drafted, law, rule, numbers(2)), strict=True):
        assert torch.equal(one, other)


def test_at_temperature_0_tokens_are_compared():
    target = scores()
    best = target.argmax(-1)
    path = best[:, :LENGTH].clone()
    path[torch.arange(ROWS), torch.arange(ROWS) % LENGTH] += 1
    drafted = Drafted(path % VOCAB, path % VOCAB, None)
    found, after = judge(target, drafted, SamplingLaw(0.0), "block", numbers(2))
    assert torch.equal(found, torch.arange(ROWS) % LENGTH)
    assert torch.equal(after, best[torch.arange(ROWS), found])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_score_that_is_no_number_is_refused(temperature):
    target = scores()
    target[3, 1, 5] = torch.nan
    nothing = Drafted.empty(ROWS, target.device)
    with pytest.raises(ValueError, match="NaN"):
        judge(target, nothing, SamplingLaw(temperature), "block", numbers(2))
