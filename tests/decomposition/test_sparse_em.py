"""A fit to a truncated joint is the dense fit where the tree is whole, and stays near it where it
is not.
"""

from __future__ import annotations

import math

import pytest
import torch
from rounding import FORWARD, kl_rounding, rounding
from samples import RecurrentModel

from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.sparse_em import tree_cells
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import separated_hmm
from cpmtp.prefix_tree import truncated_joint

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
def test_the_cells_of_any_tree_share_out_all_the_mass(nodes):
    tree = truncated_joint(RecurrentModel(8), CONTEXT, 3, mass=1.0, max_nodes=nodes)
    for most in (5, 50, 1000):
        cells = tree_cells(tree, most)
        # What a prefix's children take from it and give to theirs adds up over three levels.
        allowed = 2 * rounding(torch.float64, 8 + 8**2 + 8**3)
        assert cells.weights.sum().item() == pytest.approx(1.0, abs=allowed)
        assert (cells.weights > 0).all() and len(cells.weights) <= most + 1 + tree.horizon


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


def test_only_em_fits_a_tree():
    tree = truncated_joint(RecurrentModel(5), CONTEXT, 3, mass=0.9)
    with pytest.raises(ValueError, match="method 'als' on a truncated joint: only 'em'"):
        fit(tree, rank=2, method="als")
