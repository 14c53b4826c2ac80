"""Temperature, top-k and top-p: transformers' own processors, and what they are meant to be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rounding import rounding
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpmtp.sampling_law import SamplingLaw

INFINITY = float("inf")
PRECISIONS = [torch.float32, torch.float64]

# Few different values make many ties; the first is always possible.
few = st.sampled_from([-INFINITY, -2.0, -1.0, 0.0, 0.0, 1.0, 1.5])
rows = st.lists(st.one_of(few, st.floats(-8, 8)), min_size=0, max_size=12).map(
    lambda rest: [0.5, *rest]
)
laws = st.builds(
    SamplingLaw,
    temperature=st.sampled_from([1.0, 0.25, 0.7, 1.3, 5.0]),
    top_k=st.one_of(st.none(), st.integers(1, 14)),
    top_p=st.one_of(st.none(), st.sampled_from([1e-9, 0.5, 0.9, 1 - 1e-9]), st.floats(0.01, 0.99)),
)


def by_transformers(law: SamplingLaw, scores: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of transformers' processors in transformers' order; two axes."""
    warpers = LogitsProcessorList()
    if law.temperature != 1:
        warpers.append(TemperatureLogitsWarper(law.temperature))
    if law.top_k is not None:
        warpers.append(TopKLogitsWarper(law.top_k))
    if law.top_p is not None and law.top_p < 1:
        warpers.append(TopPLogitsWarper(law.top_p))
    return warpers(torch.zeros(len(scores), 1, dtype=torch.long), scores).log_softmax(-1)


def assert_same_law(law: SamplingLaw, scores: torch.Tensor) -> None:
    """Of log-probabilities and of probabilities: the same tokens kept, with the same chances."""
    assert torch.equal(law.process_log_probs(scores), by_transformers(law, scores))
    probs = scores.exp()
    assert torch.equal(law.process(probs), by_transformers(law, probs.log()).exp())


@pytest.mark.parametrize("dtype", PRECISIONS)
@settings(max_examples=300, deadline=None)
@given(law=laws.filter(lambda law: not law.is_identity), row=rows)
@example(law=SamplingLaw(top_k=2), row=[0.0, 0.0, 0.0])
@example(law=SamplingLaw(top_k=3), row=[0.0, -INFINITY, -INFINITY])
@example(law=SamplingLaw(top_p=0.5), row=[0.0, 0.0, 0.0, 0.0])
@example(law=SamplingLaw(top_p=1e-9), row=[0.0, 0.0])
@example(law=SamplingLaw(temperature=0.5, top_k=1, top_p=0.5), row=[0.0])
def test_a_law_is_what_transformers_processors_make_of_the_same_scores(dtype, law, row):
    assert_same_law(law, torch.tensor([row], dtype=dtype).log_softmax(-1))


@pytest.mark.parametrize("dtype", PRECISIONS)
@settings(max_examples=200, deadline=None)
@given(row=rows, data=st.data(), temperature=st.sampled_from([1.0, 0.5]))
def test_at_the_very_edge_of_top_p_the_same_tokens_are_kept(dtype, row, data, temperature):
    scores = torch.tensor([row], dtype=dtype).log_softmax(-1)
    mass = (scores / temperature).sort().values.softmax(-1).cumsum(-1)[0]
    edge = 1 - data.draw(st.sampled_from(mass.tolist()))
    for top_p in (edge, math.nextafter(edge, 0), math.nextafter(edge, 1)):
        if 0 < top_p < 1:
            assert_same_law(SamplingLaw(temperature, top_p=top_p), scores)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rows_of_a_large_vocabulary_are_what_transformers_makes_of_each(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(16, 3000, generator=generator, dtype=dtype).mul(4)
    scores = scores.mul(2).round().div(2)  # ties by the dozen
    scores[torch.rand(16, 3000, generator=generator) < 0.3] = -INFINITY
    scores = scores.log_softmax(-1)
    for law in (
        SamplingLaw(0.7),
        SamplingLaw(top_k=50),
        SamplingLaw(top_p=0.95),
        SamplingLaw(1.3, 200, 0.9),
        SamplingLaw(0.5, 5, 0.3),
    ):
        assert_same_law(law, scores)
        stacked = law.process_log_probs(scores.view(4, 4, 3000))
        assert torch.equal(stacked, law.process_log_probs(scores).view(4, 4, 3000))


@settings(max_examples=200, deadline=None)
@given(row=rows, top_k=st.integers(1, 14))
def test_top_k_keeps_what_fewer_than_k_tokens_exceed(row, top_k):
    probs = torch.tensor(row, dtype=torch.float64).softmax(-1)
    kept = (probs[:, None] > probs).sum(0) < top_k
    found = SamplingLaw(top_k=top_k).process(probs)
    assert torch.equal(found > 0, kept & (probs > 0))
    expected = torch.where(kept, probs, 0) / probs[kept].sum()
    torch.testing.assert_close(found, expected, rtol=rounding(torch.float64, 64), atol=0)


@settings(max_examples=200, deadline=None)
@given(row=rows, top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_most_probable_tokens_whose_mass_reaches_it(row, top_p):
    probs = torch.tensor(row, dtype=torch.float64).softmax(-1)
    found = SamplingLaw(top_p=top_p).process(probs)
    kept = found > 0
    allowed = rounding(torch.float64, 64)
    assert probs[kept].sum() >= top_p - allowed
    assert (probs[kept].sum() - probs[kept].min()) <= top_p + allowed
    assert not (~kept).any() or probs[kept].min() >= probs[~kept].max() * (1 - allowed)
    torch.testing.assert_close(found[kept], probs[kept] / probs[kept].sum(), rtol=allowed, atol=0)


@settings(max_examples=100, deadline=None)
@given(row=rows, temperature=st.floats(0.1, 10))
def test_temperature_is_a_power_of_the_probabilities(row, temperature):
    # From 10 ** -7 on powers keep their digits: a logarithm's last digit counts ten times.
    probs = torch.tensor(row, dtype=torch.float64).clamp_min(-8).softmax(-1)
    powers = probs ** (1 / temperature)
    # A logarithm of at most 19, in units of its last digit, divided by at least a tenth.
    allowed = rounding(torch.float64, 64 + 4 * 190)
    found = SamplingLaw(temperature).process(probs)
    torch.testing.assert_close(found, powers / powers.sum(), rtol=allowed, atol=0)


@settings(max_examples=100, deadline=None)
@given(row=rows, law=laws)
def test_impossible_tokens_stay_impossible_and_what_is_left_is_a_distribution(row, law):
    probs = torch.tensor(row, dtype=torch.float64).softmax(-1)
    found = law.process(probs)
    assert (found[probs == 0] == 0).all() and (found >= 0).all()
    assert abs(found.sum().item() - 1) <= rounding(torch.float64, 64)


@pytest.mark.parametrize("dtype", PRECISIONS)
@settings(max_examples=100, deadline=None)
@given(row=rows, top_k=st.one_of(st.none(), st.just(3)), top_p=st.one_of(st.none(), st.just(0.5)))
def test_at_temperature_zero_the_first_of_the_most_probable_tokens_has_it_all(
    dtype, row, top_k, top_p
):
    law, probs = SamplingLaw(0.0, top_k, top_p), torch.tensor(row, dtype=dtype).softmax(-1)
    one_hot = torch.zeros_like(probs)
    one_hot[probs.tolist().index(max(probs.tolist()))] = 1
    assert torch.equal(law.process(probs), one_hot)
    assert torch.equal(law.process_log_probs(probs.log()), one_hot.log())


@pytest.mark.parametrize("law", [SamplingLaw(), SamplingLaw(top_p=1.0)])
def test_the_identity_gives_back_what_it_was_given(law):
    probs = torch.tensor([0.2, 0.8])
    assert law.is_identity and law.process(probs) is probs
    assert law.process_log_probs(probs) is probs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": INFINITY}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_what_is_no_law_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SamplingLaw(**settings)
