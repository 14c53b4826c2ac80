"""The exact joint is the chain rule over every prefix, whatever the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force_joint
from rounding import FORWARD, rounding
from samples import BigramTable, BrokenModel, RecurrentModel
from unchecked import unchecked

from cpmtp.joint_distribution import (
    JointDistribution,
    conditional_log_probs,
    conditional_probs,
    exact_joint,
)
from cpmtp.language_model import MarkovLanguageModel, separated_hmm
from cpmtp.sampling_law import SamplingLaw

CONTEXT = torch.tensor([1, 0, 2])


@pytest.mark.parametrize(
    ("lm", "log_error"),
    [
        (BigramTable(5), rounding(torch.float32, 20)),
        (RecurrentModel(4), FORWARD),
        (separated_hmm(2, 4), FORWARD),
    ],
    ids=["table", "lstm", "hmm"],
)
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_the_joint_of_any_model_with_two_names_is_the_chain_rule(lm, log_error, horizon):
    joint = exact_joint(lm, CONTEXT, horizon)
    assert joint.probs.dtype == torch.float64
    assert abs(joint.probs.sum().item() - 1) <= rounding(torch.float64, 2 * 5**horizon)
    assert_is_chain_rule(joint, lm, log_error)


def assert_is_chain_rule(joint, lm, log_error, context=CONTEXT) -> None:
    """Every probability is a product of conditionals whose logarithms are off by `log_error` and
    which sum to one only to that.
    """
    expected = brute_force_joint(lm, context, joint.horizon)
    allowed = 2 * joint.horizon * log_error + rounding(torch.float64, 64)
    torch.testing.assert_close(joint.probs, expected, atol=0, rtol=allowed)


def test_a_single_precision_models_joint_is_its_chain_rule_to_that_precision():
    single, double = (RecurrentModel(4, dtype=dtype) for dtype in (torch.float32, torch.float64))
    joint, expected = exact_joint(single, CONTEXT, 3), brute_force_joint(single, CONTEXT, 3)
    # What the precision costs on this machine, eightfold: passes of other shapes cost no more.
    cost = (brute_force_joint(double, CONTEXT, 3) / expected - 1).abs().max().item()
    assert 0 < cost < 1e-4
    torch.testing.assert_close(joint.probs, expected, atol=0, rtol=8 * cost)


@settings(max_examples=25, deadline=None)
@given(vocab=st.integers(1, 6), horizon=st.integers(2, 4), seed=st.integers(0, 99))
def test_the_marginal_of_a_longer_joint_is_the_shorter_joint(vocab, horizon, seed):
    lm = BigramTable(vocab, seed)
    context = torch.zeros(2, dtype=torch.long)
    longer, shorter = exact_joint(lm, context, horizon), exact_joint(lm, context, horizon - 1)
    torch.testing.assert_close(
        longer.marginal(horizon - 1).probs,
        shorter.probs,
        atol=0,
        rtol=rounding(torch.float64, 2 * vocab + 8 * horizon),
    )


def test_an_empty_context_is_a_context():
    lm = BigramTable(4)
    empty = torch.empty(0, dtype=torch.long)
    # A table of single precision, rounded where log-probabilities come to twenty nats.
    assert_is_chain_rule(exact_joint(lm, empty, 2), lm, rounding(torch.float32, 20), empty)


def test_tokens_of_zero_probability_are_legal():
    lm = MarkovLanguageModel(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    joint = exact_joint(lm, torch.tensor([0]), 3)
    assert not joint.probs.isnan().any()
    assert joint.probs[0].sum() == 0


@pytest.mark.parametrize(
    "law", [{"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}, {"temperature": 0.0}]
)
def test_processing_applies_to_every_conditional(law):
    lm = RecurrentModel(5)
    joint = exact_joint(lm, CONTEXT, 2, **law)
    first = SamplingLaw(**law).process(lm.next_token_log_probs(CONTEXT[None])[0].double().exp())
    allowed = 4 * FORWARD  # a temperature of a half counts an error twice, of two tokens
    torch.testing.assert_close(joint.prefix_probs(1), first, atol=0, rtol=allowed)
    plain = exact_joint(lm, CONTEXT, 2)
    expected = first[:, None] * SamplingLaw(**law).process(plain.conditional_probs(2))
    torch.testing.assert_close(joint.probs, expected, atol=0, rtol=allowed)


def test_the_greedy_law_gives_one_sequence_everything():
    joint = exact_joint(RecurrentModel(5), CONTEXT, 3, temperature=0.0)
    assert joint.probs.max() == 1 and joint.probs.count_nonzero() == 1


def test_probabilities_and_their_logarithms_agree():
    lm, continuations = RecurrentModel(5), torch.tensor([[0], [3]])
    for law in (SamplingLaw(), SamplingLaw(temperature=0.7, top_k=3)):
        probs = conditional_probs(lm, CONTEXT, continuations, law)
        torch.testing.assert_close(
            probs, conditional_log_probs(lm, CONTEXT, continuations, law).exp()
        )


def test_progress_counts_every_prefix():
    seen = []
    exact_joint(BigramTable(5), CONTEXT, 3, progress=seen.append)
    assert sum(seen) == 1 + 5 + 25


class Huge(BigramTable):
    """Claims a vocabulary nobody could hold; asked for anything, it fails."""

    def __init__(self):
        self.vocab_size = 150_000

    def next_token_log_probs(self, token_ids):
        raise AssertionError("the size must be refused before the model is asked")


def test_a_joint_beyond_memory_is_refused_before_any_work_and_says_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"horizon 4 over 150000 tokens needs .* GB; the limit is 4 GB: .*truncated_joint",
    ):
        exact_joint(Huge(), CONTEXT, 4)
    with pytest.raises(ValueError, match=r"needs 0?.*MB; the limit is .*truncated_joint"):
        exact_joint(BigramTable(64), CONTEXT, 3, max_bytes=1000)


@pytest.mark.parametrize(
    ("context", "horizon", "message"),
    [
        (torch.tensor([1]), 0, "horizon 0: expected at least 1"),
        (torch.tensor([[1]]), 2, "expected a 1-D tensor of token ids"),
        (torch.tensor([1.0]), 2, "expected a 1-D tensor of token ids"),
        (torch.tensor([6]), 2, r"must be in \[0, 6\): got 6 to 6"),
        (torch.tensor([-1]), 2, "got -1 to -1"),
    ],
)
def test_bad_input_gets_a_clear_answer(context, horizon, message):
    with pytest.raises(ValueError, match=message):
        unchecked(exact_joint, BigramTable(6), context, horizon)


def test_a_model_that_returns_no_distribution_is_found_out():
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        exact_joint(BrokenModel(4), CONTEXT, 2)

    class Unnormalised(BigramTable):
        def next_token_log_probs(self, token_ids):
            return super().next_token_log_probs(token_ids) + 0.1

    with pytest.raises(ValueError, match=r"not normalised.*0\.1.*log_softmax"):
        exact_joint(Unnormalised(4), CONTEXT, 2)

    class Short(BigramTable):
        def next_token_log_probs(self, token_ids):
            return super().next_token_log_probs(token_ids)[:, :-1]

    with pytest.raises(ValueError, match=r"shape \(1, 3\): expected \(1, 4\)"):
        exact_joint(Short(4), CONTEXT, 2)


def test_a_joint_comes_back_from_its_file(tmp_path):
    joint = exact_joint(BigramTable(4), CONTEXT, 3)
    joint.save(tmp_path / "joint.safetensors")
    assert JointDistribution.load(tmp_path / "joint.safetensors").probs.equal(joint.probs)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.tensor([0.5, 0.6]), "sum is off by 0.1"),
        (torch.tensor([1.5, -0.5]), "negative or non-finite"),
        (torch.tensor([float("nan"), 1.0]), "negative or non-finite"),
        (torch.full((2, 3), 1 / 6), "differ in length"),
    ],
)
def test_what_is_no_joint_is_refused(probs, message):
    with pytest.raises(ValueError, match=message):
        JointDistribution(probs)


def test_conditionals_times_prefixes_are_the_joint_and_zero_prefixes_give_zeros():
    probs = torch.tensor([[0.25, 0.75], [0.0, 0.0]], dtype=torch.float64)
    joint = JointDistribution(probs)
    torch.testing.assert_close(joint.conditional_probs(2) * joint.prefix_probs(1)[:, None], probs)
    torch.testing.assert_close(joint.given_first_token().probs[1], probs.sum(0))
