"""What one token of memory can do, against the joint written out."""

import pytest
import torch
from rounding import kl_rounding
from samples import RecurrentModel, peaked_joint

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.trees.memory import token_memory
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.prefix_tree import complete_joint, truncated_joint

CONTEXT = torch.tensor([1, 0, 2])


def chain_of(probs: torch.Tensor) -> torch.Tensor:
    """``P(x_1) prod P(x_i | x_{i-1})`` of one joint, written out."""
    horizon = probs.ndim
    chain = probs.sum(tuple(range(1, horizon)))
    for i in range(1, horizon):
        others = tuple(axis for axis in range(horizon) if axis not in (i - 1, i))
        pair = probs.sum(others) if others else probs
        total = pair.sum(1, keepdim=True)
        chain = chain.unsqueeze(-1) * torch.where(total > 0, pair / total, 0.0)
    return chain


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("horizon", [2, 3, 4])
def test_the_chain_of_neighbours_is_the_one_written_out(horizon, rule):
    joint = peaked_joint(4, horizon, power=4)
    memory, chain = token_memory(joint, rule=rule), JointDistribution(chain_of(joint.probs))
    allowed = kl_rounding(4**horizon, 20.0)
    kl = divergences(joint, chain).kl_nats
    assert float(memory.beyond_one_token.sum()) == pytest.approx(kl, abs=allowed)
    assert len(memory.beyond_one_token) == horizon - 2
    earned = implied_acceptance(joint, chain, rule=rule).tokens_per_call
    assert memory.markov_tokens_per_call == pytest.approx(earned, abs=allowed)

    product = joint.probs.new_ones(())
    for law in joint.marginals():
        product = product.unsqueeze(-1) * law
    correlation = divergences(joint, JointDistribution(product)).kl_nats
    assert memory.total_correlation == pytest.approx(correlation, abs=allowed)

    if horizon == 2:
        assert memory.markov_tokens_per_call_anchored == 2.0
        return
    given = joint.given_first_token().probs
    told = JointDistribution(torch.stack([chain_of(one) for one in given]), horizon - 1)
    earned = implied_acceptance(joint, told, rule=rule).tokens_per_call
    assert memory.markov_tokens_per_call_anchored == pytest.approx(earned, abs=allowed)
    kl = divergences(joint, told).kl_nats
    assert float(memory.beyond_one_token_anchored.sum()) == pytest.approx(kl, abs=allowed)


def test_a_complete_tree_and_its_joint_say_the_same():
    lm = RecurrentModel(6)
    tree = token_memory(complete_joint(lm, CONTEXT, 4, top_k=3))
    joint = token_memory(exact_joint(lm, CONTEXT, 4, top_k=3))
    # Conditionals of both come from float32 passes of other batch shapes.
    for name in vars(tree):
        a, b = (torch.as_tensor(getattr(one, name)) for one in (tree, joint))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, check_dtype=False)


def test_what_means_nothing_is_refused():
    lm = RecurrentModel(6)
    with pytest.raises(ValueError, match="expected a complete one"):
        token_memory(truncated_joint(lm, CONTEXT, 3, mass=1.0, max_nodes=20))
    with pytest.raises(ValueError, match="expected one context"):
        token_memory(peaked_joint(4, 3, batch=(2,)))
    with pytest.raises(ValueError, match="expected token, block"):
        token_memory(peaked_joint(4, 3), rule="greedy")
