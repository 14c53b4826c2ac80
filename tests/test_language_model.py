"""The model classes whose joints are known, and sampling from any model."""

from __future__ import annotations

import pytest
import torch
from rounding import rounding
from samples import BigramTable, RecurrentModel

from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import LanguageModel, MarkovLanguageModel, sample_sequences, separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


def test_two_names_make_a_language_model():
    assert isinstance(BigramTable(), LanguageModel)
    assert isinstance(RecurrentModel(), LanguageModel)
    assert not isinstance(object(), LanguageModel)


def test_a_hidden_markov_joint_is_the_sum_over_paths():
    lm = separated_hmm(3, 5, seed=2)
    pi, a, b = lm.initial, lm.transition, lm.emission
    expected = torch.einsum("i,ix,ij,jy,jk,kz->xyz", pi, b, a, b, a, b)
    torch.testing.assert_close(exact_joint(lm, EMPTY, 3).probs, expected)


def test_a_hidden_markov_joint_of_three_tokens_has_the_rank_of_its_states():
    joint = exact_joint(separated_hmm(3, 8), EMPTY, 3).probs
    singular = torch.linalg.svdvals(joint.movedim(1, 0).reshape(8, 64))
    # Singular values are exact to rounding beside the largest, which is below one.
    assert (singular > rounding(torch.float64, 8 * 8**3)).sum() == 3


def test_separated_states_keep_the_stated_shares():
    lm = separated_hmm(4, 16, own=0.8, stay=0.5)
    own = torch.arange(16) * 4 // 16
    for state in range(4):
        assert lm.emission[state, own == state].sum().item() == pytest.approx(0.8)
    torch.testing.assert_close(lm.transition.diagonal(), torch.full((4,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(lm.transition.sum(1), torch.ones(4, dtype=torch.float64))


def test_one_state_and_as_many_states_as_tokens_are_laws_too():
    for states in (1, 4):
        lm = separated_hmm(states, 4)
        torch.testing.assert_close(lm.emission.sum(1), torch.ones(states, dtype=torch.float64))
        torch.testing.assert_close(lm.transition.sum(1), torch.ones(states, dtype=torch.float64))


def test_more_states_than_tokens_are_refused():
    with pytest.raises(ValueError, match="5 states over 4 tokens"):
        separated_hmm(5, 4)


def test_sampled_sequences_follow_the_chain_and_repeat_with_the_seed():
    lm = MarkovLanguageModel(torch.tensor([1.0, 0.0]), torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    drawn = sample_sequences(lm, 4000, 2, seed=3)
    assert torch.equal(drawn, sample_sequences(lm, 4000, 2, seed=3))
    assert (drawn[:, 0] == 0).all()
    assert drawn[:, 1].double().mean().item() == pytest.approx(
        0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5
    )


@pytest.mark.parametrize("model", [BigramTable(), RecurrentModel()])
def test_a_users_own_class_goes_from_joint_to_acceptance(model):
    import cpmtp

    joint = cpmtp.exact_joint(model, torch.tensor([1, 2]), 3)
    assert joint.probs.sum().item() == pytest.approx(1, abs=rounding(torch.float64, 2 * 8**3))
    result = cpmtp.fit(joint, rank=4, method="em", seed=0)
    profile = cpmtp.implied_acceptance(joint, result.distribution)
    assert 1 < profile.tokens_per_call <= 3
