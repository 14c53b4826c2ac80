"""Runs that go down side by side, and how alike two fits are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from samples import peaked_joint, random_cp
from torch import Tensor

from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.mixtures import Mixtures, descend, factor_match_score
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Halving:
    """Runs whose objective falls to a share of itself with every pass."""

    values: Tensor
    shares: Tensor

    def __getitem__(self, runs: Tensor) -> Halving:
        return Halving(self.values[runs], self.shares[runs])


def advanced(alive: Tensor, point: Halving) -> tuple[Halving, list[int]]:
    assert len(alive) == len(point.values)
    return replace(point, values=point.values * point.shares), [1] * len(alive)


def halving(*shares: float) -> Halving:
    ends = torch.tensor(shares, dtype=torch.float64)
    return Halving(torch.ones_like(ends), ends)


def test_every_run_ends_by_itself_and_keeps_its_place():
    start = halving(0.5, 0.99, 0.1, 0.5)
    found = descend(start, advanced, max_passes=60, tolerance=1e-3)
    values = torch.cat([end.values for end in found.ends])[found.order]
    lengths = [len(trace) - 1 for trace in found.traces]
    for share, value, trace, passes in zip(
        start.shares.tolist(), values.tolist(), found.traces, lengths, strict=True
    ):
        assert value == trace[-1] == pytest.approx(share**passes)
    # The fast ones stop gaining and say so; the slow one takes all its passes.
    assert found.converged.tolist() == [True, False, True, True]
    assert lengths[1] == 60 and lengths[2] < lengths[0] == lengths[3] < 60
    alone = descend(halving(0.99), advanced, max_passes=60, tolerance=1e-3)
    assert alone.traces[0] == found.traces[1]


def test_passes_of_one_step_are_all_counted():
    def twice(alive, point):
        return advanced(alive, point)[0], [2] * len(alive)

    found = descend(halving(0.9), twice, max_passes=7, tolerance=0.0)
    assert len(found.traces[0]) - 1 == 8 and not found.converged.item()


def test_no_pass_is_taken_where_none_is_allowed():
    def never(alive, point):
        raise AssertionError

    found = descend(halving(0.5, 0.1), never, max_passes=0, tolerance=0.0)
    assert found.traces == ([1.0], [1.0]) and not found.converged.any()


def test_mixtures_of_a_distribution_are_its_entries():
    draft = random_cp((2, 3), 4, 3, 2)
    runs = Mixtures.of(draft)
    assert len(runs) == 6 and runs.rank == 2
    again = CPDistribution(
        runs.weights.view(2, 3, 2),
        [factor.mT.reshape(2, 3, 4, 2) for factor in runs.factors.unbind(1)],
    )
    assert torch.equal(again.to_tensor(), draft.to_tensor())


def test_restarts_agree_on_the_components_at_the_planted_rank_and_not_above_it():
    joint = exact_joint(separated_hmm(4, 16), EMPTY, 3)
    planted = fit(joint, 4, restarts=4)
    assert (planted.restart_match_scores > 0.99).all()
    assert fit(joint, 6, restarts=4).restart_match_scores.min() < 0.9


def test_a_match_score_ignores_the_order_of_components_and_sees_their_difference():
    dist = fit(peaked_joint(6, 3), 3).distribution
    order = torch.tensor([2, 0, 1])
    shuffled = CPDistribution(dist.weights[order], tuple(f[:, order] for f in dist.factors))
    assert factor_match_score(dist, shuffled) == pytest.approx(1.0)
    other = fit(peaked_joint(6, 3, seed=5), 3).distribution
    assert factor_match_score(dist, other) == pytest.approx(factor_match_score(other, dist))
    assert factor_match_score(dist, other) < 0.9


def test_fits_of_different_shapes_are_not_matched():
    joint = peaked_joint(5, 3)
    with pytest.raises(ValueError, match="expected equal"):
        factor_match_score(fit(joint, 2).distribution, fit(joint, 3).distribution)
