"""Fits along the ranks: never worse than below, what single fits are, on joints and trees."""

from itertools import pairwise

import pytest
import torch
from rounding import kl_rounding
from samples import RecurrentModel, peaked_joint

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition import fitting, restarts
from cpmtp.decomposition.fitting import fit, fit_path
from cpmtp.decomposition.restarts import Core
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution
from cpmtp.prefix_tree import truncated_joint

CONTEXT = torch.tensor([1, 0, 2])


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
    assert (path[0].objective >= path[1].objective).all() and (
        path[1].objective >= path[2].objective
    ).all()


@pytest.mark.parametrize(
    ("ranks", "method", "words"),
    [([1], "als", "start from a fit"), ([], "em", "no ranks"), ([0], "em", "rank 0")],
)
def test_a_path_that_cannot_be_is_refused_in_words(ranks, method, words):
    with pytest.raises(ValueError, match=words):
        fit_path(peaked_joint(4, 3), ranks, method)


@pytest.mark.parametrize("method", ["em", "gradient"])
@pytest.mark.parametrize("anchored", [False, True])
def test_no_rank_of_a_path_is_worse_than_its_single_fit(method, anchored):
    joint, ranks = peaked_joint(7, 3, seed=2), [1, 2, 3, 5]
    path = fit_path(joint, ranks, method, anchored=anchored, seed=4)
    for rank, found in zip(ranks, path, strict=True):
        alone = fit(joint, rank, method, anchored=anchored, seed=4)
        assert found.objective <= alone.objective + 1e-9


def test_where_random_starts_fail_the_fit_of_the_rank_below_is_a_start(monkeypatch):
    joint = peaked_joint(6, 3, seed=1)
    two = fit_path(joint, [2, 3])[0]
    real = fitting.solve

    def poor(items, rank, plan):
        """At rank three, as good as one component."""
        solved = real(items, 1 if rank == 3 else rank, plan)
        if rank != 3:
            return solved
        mixtures = restarts.doubled(solved.best.mixtures, 3)
        return restarts.replace(solved, best=restarts.replace(solved.best, mixtures=mixtures))

    monkeypatch.setattr(fitting, "solve", poor)
    again, rescued = fit_path(joint, [2, 3])
    assert again.objective == two.objective
    assert rescued.objective < two.objective - 1e-3
    assert rescued.distribution.rank == 3
    assert rescued.objective == pytest.approx(
        divergences(joint, rescued.distribution).kl_nats, abs=1e-9
    )


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_acceptance_climbs_from_the_em_fits_it_is_given(anchored, rule):
    joint, ranks = peaked_joint(6, 3, seed=3), [1, 2, 4]
    starts = fit_path(joint, ranks, anchored=anchored)
    path = fit_path(joint, ranks, "acceptance", anchored=anchored, rule=rule, starts=starts)
    for start, found in zip(starts, path, strict=True):
        earned = implied_acceptance(joint, start.distribution, rule=rule).tokens_per_call
        assert -found.objective >= earned - 1e-12
        assert -found.objective == pytest.approx(
            implied_acceptance(joint, found.distribution, rule=rule).tokens_per_call, abs=1e-6
        )
    without = fit_path(joint, ranks, "acceptance", anchored=anchored, rule=rule)
    assert [f.objective for f in without] == [f.objective for f in path]
    assert sum(f.seconds for f in without) > 0


def test_on_a_core_acceptance_never_ends_below_its_start(monkeypatch):
    monkeypatch.setattr(restarts, "CORE_FROM", 1)
    rarity = torch.cat([torch.ones(5), torch.full((4,), 1e-4)]).double()
    probs = peaked_joint(9, 3).probs * rarity[:, None, None] * rarity[:, None] * rarity
    joint = JointDistribution(probs / probs.sum())
    assert len(Core.of(joint).tokens) < 9
    starts = fit_path(joint, [1, 3])
    for start, found in zip(
        starts, fit_path(joint, [1, 3], "acceptance", starts=starts), strict=True
    ):
        earned = implied_acceptance(joint, start.distribution).tokens_per_call
        assert -found.objective > earned
        assert -found.objective == pytest.approx(
            implied_acceptance(joint, found.distribution).tokens_per_call, abs=1e-9
        )


@pytest.mark.parametrize("anchored", [False, True])
def test_a_tree_has_a_path_and_that_of_a_tree_of_everything_is_the_joints(anchored):
    tree = truncated_joint(RecurrentModel(6), CONTEXT, 3, mass=1.0)
    some = truncated_joint(RecurrentModel(6), CONTEXT, 3, mass=0.8)
    whole = fit_path(tree, [1, 2, 4], anchored=anchored)
    for path in (whole, fit_path(some, [1, 2, 4], anchored=anchored)):
        assert all(later.objective <= earlier.objective for earlier, later in pairwise(path))
        assert path[0].distribution.batch_shape == ((6,) if anchored else ())
    alone = fit(tree, 4, anchored=anchored)
    assert whole[-1].objective <= alone.objective + 1e-9
    assert whole[0].objective == pytest.approx(fit(tree, 1, anchored=anchored).objective, abs=1e-9)


def test_starts_of_other_ranks_are_refused():
    joint = peaked_joint(5, 3)
    with pytest.raises(ValueError, match=r"starts of ranks \[1, 2\]: expected \[1, 3\]"):
        fit_path(joint, [1, 3], "acceptance", starts=fit_path(joint, [1, 2]))
    with pytest.raises(ValueError, match="starts for 'em'"):
        fit_path(joint, [1, 2], "em", starts=fit_path(joint, [1, 2]))
