"""Large joints are begun on their noticeable tokens: quicker, and to the same end."""

import pytest
import torch
from rounding import FITTED, kl_rounding

from cpmtp.decomposition import restarts
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.restarts import KL_METHODS, Core
from cpmtp.decomposition.starts import random_starts
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


@pytest.fixture
def every_joint_has_a_core(monkeypatch):
    monkeypatch.setattr(restarts, "CORE_FROM", 1)


def with_rare_tokens(seed: int = 0) -> JointDistribution:
    """Three tokens over 12, half of them rare everywhere."""
    rarity = torch.cat([torch.ones(6), torch.full((6,), 1e-5)]).double()
    values = (
        torch.rand(12, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ** 6
    )
    values = values * rarity[:, None, None] * rarity[:, None] * rarity
    return JointDistribution(values / values.sum())


def test_a_core_keeps_the_tokens_that_matter_and_their_law():
    joint = with_rare_tokens()
    small = Core.of(joint)
    assert small.tokens.tolist() == list(range(6))
    kept = joint.probs[:6, :6, :6]
    torch.testing.assert_close(small.joint.probs[0], kept / kept.sum())


def test_a_joint_of_one_sequence_keeps_a_core():
    probs = torch.zeros(5, 5, dtype=torch.float64)
    probs[3, 3] = 1.0
    assert Core.of(JointDistribution(probs)).tokens.tolist()


def test_lifted_mixtures_are_distributions_that_reach_every_token():
    joint = with_rare_tokens()
    small = Core.of(joint)
    lifted = small.lifted(random_starts(small.joint, 3, 2, 0))
    assert lifted.factors.shape == (2, 3, 3, 12)
    torch.testing.assert_close(lifted.factors.sum(-1), torch.ones(2, 3, 3, dtype=torch.float64))
    assert (lifted.factors > 0).all()


@pytest.mark.usefixtures("every_joint_has_a_core")
def test_a_planted_rank_is_found_through_the_core():
    joint = exact_joint(separated_hmm(4, 16), EMPTY, 3)
    assert fit(joint, 4, restarts=4).objective <= 1e-6


@pytest.mark.usefixtures("every_joint_has_a_core")
@pytest.mark.parametrize("method", KL_METHODS)
def test_a_fit_through_the_core_reports_the_whole_joint(method):
    joint = with_rare_tokens()
    result = fit(joint, 3, method, restarts=2)
    found = divergences(joint, result.distribution)
    assert found.kl_nats < float("inf")
    if method != "acceptance":
        assert result.objective == pytest.approx(found.kl_nats, abs=kl_rounding(12**3))
    assert all(
        later <= earlier + kl_rounding(12**3)
        for earlier, later in zip(result.trace[:-1], result.trace[1:], strict=True)
    )


@pytest.mark.usefixtures("every_joint_has_a_core")
def test_a_batch_through_its_cores_gives_what_its_entries_give_alone():
    joints = [with_rare_tokens(seed) for seed in range(3)]
    together = fit(JointDistribution(torch.stack([j.probs for j in joints]), 3), 3, restarts=2)
    for place, joint in enumerate(joints):
        alone = fit(joint, 3, restarts=2)
        torch.testing.assert_close(
            together.distribution[place].to_tensor(),
            alone.distribution.to_tensor(),
            rtol=0,
            atol=FITTED,
        )
