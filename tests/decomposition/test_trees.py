"""A fit to a tree is the dense fit where the tree is complete, by every method, and stays near it
where it is not.
"""

from __future__ import annotations

import math

import pytest
import torch
from rounding import FORWARD, kl_rounding, rounding
from samples import RecurrentModel

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.descent.em import Targets, em_runs
from cpmtp.decomposition.descent.gradient import (
    Goal,
    acceptance_runs,
    gradient_runs,
    tree_acceptance_runs,
)
from cpmtp.decomposition.fitting import fit, fit_path
from cpmtp.decomposition.mixtures import Mixtures
from cpmtp.decomposition.restarts import Items, climb, planned
from cpmtp.decomposition.starts import disturbed_marginals
from cpmtp.decomposition.trees import problem
from cpmtp.decomposition.trees.nodes import first_token_forest, tree_forest
from cpmtp.decomposition.trees.starts import tree_fibre_starts
from cpmtp.decomposition.trees.targets import TreeTargets
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import separated_hmm
from cpmtp.prefix_tree import complete_joint, truncated_joint

CONTEXT = torch.tensor([1, 0, 2])


def test_the_fit_to_a_tree_of_everything_is_the_fit_to_the_joint():
    lm = RecurrentModel(6)
    dense = fit(exact_joint(lm, CONTEXT, 3), rank=3, restarts=2, seed=1, max_iterations=100)
    sparse = fit(
        truncated_joint(lm, CONTEXT, 3, mass=1.0), rank=3, restarts=2, seed=1, max_iterations=100
    )
    # Their starts may differ: both stop within the default tolerance, 1e-4 nats, of one end.
    assert sparse.objective == pytest.approx(dense.objective, abs=1e-4)
    torch.testing.assert_close(
        sparse.distribution.to_tensor(), dense.distribution.to_tensor(), atol=1e-3, rtol=0
    )


def test_the_anchored_fit_to_a_tree_of_everything_is_the_anchored_fit_to_the_joint():
    lm = RecurrentModel(5)
    dense = fit(exact_joint(lm, CONTEXT, 3), rank=2, seed=1, anchored=True)
    sparse = fit(truncated_joint(lm, CONTEXT, 3, mass=1.0), rank=2, seed=1, anchored=True)
    assert sparse.distribution.batch_shape == (5,) and sparse.distribution.horizon == 2
    assert sparse.objective == pytest.approx(dense.objective, abs=1e-4)


@pytest.mark.parametrize("nodes", [3, 20, 60])
def test_the_nodes_of_any_tree_share_out_all_the_mass(nodes):
    tree = truncated_joint(RecurrentModel(8), CONTEXT, 3, mass=1.0, max_nodes=nodes)
    for most in (5, 50, 1000):
        forest = tree_forest(tree, most)
        own = torch.cat([forest.roots, *(level.own for level in forest.levels)])
        # What a prefix's children take from it and give to theirs adds up over three levels.
        allowed = 2 * rounding(torch.float64, 8 + 8**2 + 8**3)
        assert own.sum().item() == pytest.approx(1.0, abs=allowed)
        assert (own >= 0).all() and sum(map(len, forest.levels)) <= most


def test_what_follows_each_first_token_shares_out_its_mass():
    tree = truncated_joint(RecurrentModel(8), CONTEXT, 3, mass=1.0, max_nodes=20)
    forest, tokens, mass = first_token_forest(tree, 1e-8)
    total = forest.roots.clone()
    for level in forest.levels:
        total.index_add_(0, level.owners, level.own)
    allowed = 2 * rounding(torch.float64, 8 + 8**2 + 8**3) / mass.min().item()
    torch.testing.assert_close(total, torch.ones(len(tokens)).double(), atol=allowed, rtol=0)


def dense_mixtures(mixtures: Mixtures, forest) -> Mixtures:
    """The same over all tokens."""
    wide = [
        forest.support.scatter(i, mixtures.factors[:, i, :, :size])
        for i, size in enumerate(forest.support.sizes)
    ]
    return Mixtures(mixtures.weights, torch.stack(wide, 1))


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("method", ["em", "gradient", "token", "block", "coupling"])
def test_from_one_start_a_complete_tree_and_the_dense_joint_lead_to_one_end(method, anchored):
    lm, law = RecurrentModel(9), {"top_k": 4, "temperature": 0.8}
    tree, joint = complete_joint(lm, CONTEXT, 4, **law), exact_joint(lm, CONTEXT, 4, **law)
    if anchored:
        forest, tokens, _ = first_token_forest(tree, 1e-8)
        joint = type(joint)(joint.given_first_token().probs[tokens], 3)
    else:
        forest, joint = tree_forest(tree), type(joint)(joint.probs[None], 4)
    start = disturbed_marginals(forest.marginals, 3, 1, seed=5)
    targets, wide = TreeTargets.of(forest), dense_mixtures(start, forest)
    effort = {"max_iterations": 25, "tolerance": 0.0}
    if method == "em":
        ends = em_runs(targets, start, **effort), em_runs(Targets.of(joint), wide, **effort)
    elif method == "gradient":
        dense = gradient_runs(Targets.of(joint), wide, **effort)
        ends = gradient_runs(targets, start, **effort), dense
    else:
        goal = Goal(method, "draft" if anchored else "target")
        dense = acceptance_runs(joint, targets.owner, wide, goal, **effort)
        ends = tree_acceptance_runs(targets, start, goal, **effort), dense
    # Twenty-five passes apart by rounding alone; a wrong count or gradient is off in the first.
    torch.testing.assert_close(ends[0].objective, ends[1].objective, atol=1e-6, rtol=0)
    found = dense_mixtures(ends[0].mixtures, forest)
    torch.testing.assert_close(found.weights, ends[1].mixtures.weights, atol=1e-3, rtol=0)


@pytest.mark.parametrize("anchored", [False, True])
def test_acceptance_says_of_a_fit_to_a_complete_tree_what_the_fit_says_of_itself(anchored):
    lm = RecurrentModel(40)
    tree = complete_joint(lm, CONTEXT, 3, top_k=5)
    em = fit_path(tree, [1, 2, 4], anchored=anchored)
    accepted = fit_path(tree, [1, 2, 4], "acceptance", anchored=anchored, starts=em)
    for near, best in zip(em, accepted, strict=True):
        bounds = implied_acceptance(tree, best.distribution)
        assert bounds.tokens_per_call_upper - bounds.tokens_per_call_lower < 3e-9
        assert -best.objective == pytest.approx(bounds.tokens_per_call_lower, abs=1e-8)
        earned = implied_acceptance(tree, near.distribution).tokens_per_call_lower
        assert bounds.tokens_per_call_lower >= earned - 1e-9
    assert em[0].objective > em[1].objective > em[2].objective
    with pytest.raises(ValueError, match="starts of another tree"):
        other = complete_joint(lm, CONTEXT, 3, top_k=6)
        fit_path(other, [1, 2, 4], "acceptance", anchored=anchored, starts=em)


def test_a_fit_to_a_tree_runs_over_the_ids_that_occur_there():
    tree = complete_joint(RecurrentModel(40), CONTEXT, 3, top_k=3)
    found = fit(tree, 2).distribution
    for position, level in enumerate(tree.levels):
        ids = found.support.ids[position]
        assert torch.equal(ids[ids < 40], level.tokens.unique())
    anchored = fit(tree, 2, anchored=True).distribution
    assert anchored.batch_shape == (40,) and len(anchored.entries.weights) == 4
    for number, first in enumerate(anchored.first_tokens.tolist()):
        own = tree.levels[1].tokens[tree.levels[1].parents == number]
        ids = anchored[first].support.ids[0]
        assert torch.equal(ids[ids < 40], own.sort().values)
    torch.testing.assert_close(
        anchored.expanded().factors[0].sum(1), torch.ones(40, 2).double(), atol=1e-12, rtol=0
    )


def test_starts_around_a_trees_own_sequences_have_their_fibres():
    tree = complete_joint(RecurrentModel(7), CONTEXT, 3, top_k=3)
    forest = tree_forest(tree)
    start = tree_fibre_starts(forest, rank=27, restarts=1, seed=0)
    joint = exact_joint(RecurrentModel(7), CONTEXT, 3, top_k=3).probs
    laws = (dense_mixtures(start, forest).factors[0] - 0.05 * dense_marginals(forest)) / 0.95
    fibres = torch.stack([joint.movedim(i, -1).flatten(0, 1) for i in range(3)])  # (3, 49, 7)
    fibres = fibres[fibres.sum(-1) > 0]
    fibres = fibres / fibres.sum(-1, keepdim=True)
    for law in laws.flatten(0, 1):
        assert (fibres - law).abs().sum(-1).min() < 1e-9


def dense_marginals(forest) -> torch.Tensor:
    """(horizon, 1, vocab)."""
    sizes = enumerate(forest.support.sizes)
    rows = [forest.support.scatter(i, forest.marginals[:, i, :size]) for i, size in sizes]
    return torch.stack(rows, 1)[0, :, None]


def test_the_objective_never_rises_and_never_exceeds_the_divergence_of_the_whole_joint():
    lm = RecurrentModel(8)
    joint = exact_joint(lm, CONTEXT, 3)
    # The tree's passes have other shapes: three conditionals of every text, times its nats.
    allowed = kl_rounding(8**3) + 3 * FORWARD * math.log(8**3)
    gaps = []
    for mass in (0.6, 0.9, 0.999):
        found = fit(truncated_joint(lm, CONTEXT, 3, mass=mass), rank=3, seed=0)
        assert all(
            later <= earlier + allowed
            for earlier, later in zip(found.trace[:-1], found.trace[1:], strict=True)
        )
        gaps.append(divergences(joint, found.distribution).kl_nats - found.objective)
    assert all(gap >= -2 * allowed for gap in gaps)
    assert gaps[-1] == min(gaps)


def test_a_planted_rank_is_recovered_from_a_tree():
    lm = separated_hmm(3, 12)
    tree = truncated_joint(lm, torch.tensor([0]), 3, mass=1.0)
    assert fit(tree, rank=3, restarts=4).objective <= 1e-5
    assert fit(tree, rank=2, restarts=4).objective >= 1e-3


def test_the_squared_error_methods_do_not_fit_a_tree():
    tree = truncated_joint(RecurrentModel(5), CONTEXT, 3, mass=0.9)
    with pytest.raises(ValueError, match="method 'als' on a tree: expected one of em, gradient"):
        fit(tree, rank=2, method="als")


@pytest.mark.parametrize("anchored", [False, True])
def test_a_fit_by_tokens_per_call_to_a_truncated_tree_raises_the_certified_lower_bound(anchored):
    tree = truncated_joint(RecurrentModel(8), CONTEXT, 3, mass=0.7, max_nodes=12)
    em, best = (fit(tree, 2, method, anchored=anchored) for method in ("em", "acceptance"))
    low = [implied_acceptance(tree, f.distribution).tokens_per_call_lower for f in (em, best)]
    assert low[1] >= low[0] - 1e-9
    kept = float(tree.levels[0].probs.sum())
    assert -best.objective == pytest.approx(low[1], abs=2 * (1 - kept) + 1e-9)


@pytest.mark.parametrize("method", ["em", "acceptance"])
def test_trees_that_are_fitted_apart_by_size_end_where_they_end_together(method, monkeypatch):
    tree = truncated_joint(RecurrentModel(24), CONTEXT, 3, mass=0.5, top_p=0.5)
    forest, *_ = first_token_forest(tree, 1e-8)
    items = Items(TreeTargets.of(forest))
    start = disturbed_marginals(forest.marginals, 3, 1, seed=4)
    limits = {"max_iterations": 30, "tolerance": 1e-6, "restarts": 1, "seed": 0}
    plan = planned(tree, method, **limits)
    monkeypatch.setattr(problem, "_OVERHEAD", 5)
    groups = problem.groups_by_width(items)
    widths = [group.items.marginals.shape[-1] for group in groups]
    assert len(groups) > 1 and max(widths) == forest.width > min(widths)
    numbers = torch.cat([group.numbers for group in groups])
    assert numbers.tolist() != sorted(numbers.tolist()) == list(range(len(forest)))

    def climbed(some, begin, below):
        assert below is None
        return climb(some, begin, plan)

    together = climbed(items, start, None)
    apart = problem.solved_apart(groups, climbed, start, None)
    allowed = kl_rounding(24**3) if method == "em" else 1e-9
    assert torch.allclose(apart.best.objective, together.best.objective, atol=allowed, rtol=0)
    assert apart.best.mixtures.factors.shape == together.best.mixtures.factors.shape
    assert apart.best.traces[0][0] == pytest.approx(together.best.traces[0][0], abs=allowed)
