"""Fits along the rank path, and how alike fits are."""

from itertools import pairwise

import pytest
import torch
from rounding import kl_rounding

from cpmtp.decomposition.fitting import fit, fit_path
from cpmtp.decomposition.mixtures import factor_match_score
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import separated_hmm

EMPTY = torch.empty(0, dtype=torch.long)


def peaked_joint(
    vocab: int, horizon: int, seed: int = 0, batch: tuple[int, ...] = ()
) -> JointDistribution:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(*batch, *(vocab,) * horizon, generator=generator, dtype=torch.float64) ** 8
    return JointDistribution(
        values / values.sum(dim=tuple(range(-horizon, 0)), keepdim=True), horizon
    )


@pytest.mark.parametrize("method", ["em", "gradient", "acceptance"])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_objective_never_rises_along_the_path(method, anchored):
    joint = peaked_joint(6, 3)
    path = fit_path(joint, [6, 1, 2, 4, 3, 2], method, anchored=anchored, max_iterations=30)
    assert [result.distribution.rank for result in path] == [1, 2, 3, 4, 6]
    objectives = [result.objective for result in path]
    assert all(later <= earlier + kl_rounding(6**3) for earlier, later in pairwise(objectives))


def test_a_path_stopped_at_once_still_never_rises_and_reports_what_it_returns():
    path = fit_path(peaked_joint(8, 3), range(1, 12), max_iterations=0)
    for earlier, later in pairwise(path):
        assert later.objective <= earlier.objective + kl_rounding(8**3)
    for result in path:
        kl = divergences(peaked_joint(8, 3), result.distribution).kl_nats
        assert kl == pytest.approx(result.objective, abs=2 * kl_rounding(8**3))


def test_a_path_takes_batches():
    joint = peaked_joint(5, 2, batch=(3,))
    path = fit_path(joint, [1, 2, 4])
    assert all(result.objective.shape == (3,) for result in path)
    for earlier, later in pairwise(path):
        assert (later.objective <= earlier.objective + kl_rounding(5**2)).all()


@pytest.mark.parametrize(
    ("ranks", "method", "words"),
    [([1], "als", "start from a fit"), ([], "em", "no ranks"), ([0], "em", "rank 0")],
)
def test_a_path_that_cannot_be_is_refused_in_words(ranks, method, words):
    with pytest.raises(ValueError, match=words):
        fit_path(peaked_joint(4, 3), ranks, method)


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
