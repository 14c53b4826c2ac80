"""No fit falls below its floor, and floors are sharp where they are known to be."""

import math

import pytest
import torch
from rounding import kl_rounding, rounding
from samples import peaked_joint

from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.floors import rank_floors
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_no_fit_falls_below_its_floors(horizon):
    for seed in range(3):
        joint, ranks = peaked_joint(5, horizon, seed), [1, 2, 3, 6]
        floors = rank_floors(joint, ranks)
        for place, rank in enumerate(ranks):
            for method in ("em", "gradient", "als", "hals") if horizon > 1 else ("em",):
                found = divergences(joint, fit(joint, rank, method).distribution)
                assert found.kl_nats >= floors.kl_nats[place] - 4 * kl_rounding(5**horizon)
                # Of the square: a sum of squares, and singular values to the precision of theirs.
                floor = floors.relative_frobenius[place].square()
                assert found.relative_frobenius**2 >= floor - rounding(
                    torch.float64, 8 * 5**horizon
                )


def test_at_rank_one_the_divergence_is_the_total_correlation():
    joint = peaked_joint(6, 3, 0)
    assert fit(joint, 1).objective == pytest.approx(
        rank_floors(joint, [1]).kl_nats.item(), abs=4 * kl_rounding(6**3)
    )


def test_a_copied_token_needs_as_many_components_as_it_has_values():
    joint = JointDistribution(torch.eye(8, dtype=torch.float64) / 8)
    floors = rank_floors(joint, [1, 2, 4, 8])
    expected = [math.log(8 / rank) for rank in (1, 2, 4, 8)]
    allowed = 4 * kl_rounding(8**2)
    assert floors.kl_from_mutual_information.tolist() == pytest.approx(expected, abs=allowed)
    assert floors.relative_frobenius.square().tolist() == pytest.approx(
        [1 - rank / 8 for rank in (1, 2, 4, 8)], abs=rounding(torch.float64, 8 * 8**2)
    )


def test_the_unfolding_floor_is_that_of_the_best_low_rank_matrix():
    joint = peaked_joint(5, 2, 3)
    u, s, v = torch.linalg.svd(joint.probs)
    best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    expected = ((joint.probs - best).norm() / joint.probs.norm()).item()
    found = rank_floors(joint, [2]).relative_frobenius.item()
    assert found**2 == pytest.approx(expected**2, abs=rounding(torch.float64, 8 * 5**2))


@pytest.mark.parametrize("states", [3, 4])
def test_floors_vanish_at_the_planted_rank_and_not_one_below(states):
    floors = rank_floors(exact_joint(separated_hmm(states, 16), EMPTY, 3), [states - 1, states])
    assert floors.relative_frobenius[0] > 1e-3
    assert floors.relative_frobenius[1] < rounding(torch.float64, 16**3)


def test_floors_of_a_batch_are_those_of_its_entries():
    joint = peaked_joint(4, 3, 0, batch=(2, 2))
    together = rank_floors(joint, [1, 3])
    alone = rank_floors(JointDistribution(joint.probs[1, 0]), [1, 3])
    assert together.kl_nats.shape == (2, 2, 2)
    torch.testing.assert_close(together.kl_nats[1, 0], alone.kl_nats)


@pytest.mark.parametrize("ranks", [[], [0, 1]])
def test_ranks_below_one_are_refused(ranks):
    with pytest.raises(ValueError, match="expected at least one"):
        rank_floors(peaked_joint(4, 2, 0), ranks)
