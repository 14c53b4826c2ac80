"""Markov and hidden Markov forms on trees: of everything what they are on the joint."""

from itertools import pairwise

import pytest
import torch
from rounding import kl_rounding
from samples import RecurrentModel

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.fitting import fit, fit_path
from cpmtp.decomposition.forms.chains import Chains, chain_counts, chain_curvature, surprise
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.forms.hmm import Hidden, hidden_counts
from cpmtp.decomposition.forms.likelihood import HalvedTargets
from cpmtp.decomposition.trees.chains import tree_counts, tree_curvature, tree_surprise
from cpmtp.decomposition.trees.hidden import HiddenTrees
from cpmtp.decomposition.trees.neighbours import TreeGroups, leading
from cpmtp.decomposition.trees.nodes import first_token_forest, tree_forest
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import exact_joint
from cpmtp.prefix_tree import complete_joint, truncated_joint
from cpmtp.pretrained import embedded_models, load_language_model

EVERYTHING = ("weights", "logits", "gate", "left", "right")
CONTEXT = torch.tensor([1, 0, 2])
FORMS = {
    "markov": {"rank": 1, "transition_rank": 2},
    "markov_mixture": {"rank": 2, "transition_rank": 1},
    "hmm": {"rank": 2},
}
FEW = {"max_iterations": 8}


def normal(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def chains_on(groups: TreeGroups, vocab: int, rank: int, width: int) -> tuple[Chains, Chains]:
    """Two runs over all tokens, impossible ones with logits that say so, and the same on trees."""
    members, positions = groups.mass.shape[1], groups.positions
    shapes = [(2, members, rank), (2, members, positions, rank, vocab)]
    shapes += [(2, members, positions - 1, width), (2, positions - 1, vocab, width)]
    weights, logits, gate, left, right = normal(rank, *shapes, (2, positions - 1, width, vocab))
    local = torch.full((*logits.shape[:4], groups.forest.width), -1e4, dtype=torch.float64)
    for position, ids in enumerate(groups.forest.support.ids):
        for member, row in enumerate(ids):
            own = row[row < vocab]
            local[:, member, position, :, : len(own)] = logits[:, member, position][..., own]
            never = torch.ones(vocab, dtype=torch.bool)
            never[own] = False
            logits[:, member, position, :, never] = -1e4
    tokens = groups.tokens
    dense = Chains(weights, logits, gate, left, right)
    return dense, Chains(weights, local, gate, left[:, :, tokens], right[..., tokens])


def both(name: str, anchored: bool) -> tuple[Groups, TreeGroups]:
    """An embedded model's joint of three tokens under top-k 16, dense and as a tree."""
    lm = load_language_model(name)
    context = torch.as_tensor(lm.encode("def plan(x):\n    ret"))
    dense = exact_joint(lm, context, 3, top_k=16)
    tree = complete_joint(lm, context, 3, top_k=16)
    one = torch.ones(1, 1, dtype=torch.float64)
    if not anchored:
        return Groups(dense.probs.double()[None, None], one), TreeGroups(tree_forest(tree), one)
    forest, tokens, mass = first_token_forest(tree, 1e-8)
    mass = (mass / mass.sum())[None]
    probs = dense.given_first_token().probs.double()[tokens]
    return Groups(probs[None], mass), TreeGroups(forest, mass)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("name", sorted(embedded_models()))
def test_counts_and_slopes_on_a_tree_are_those_of_the_joint(name, anchored, rank):
    joints, trees = both(name, anchored)
    dense, local = chains_on(trees, joints.vocab, rank, 4)
    owner = torch.zeros(2, dtype=torch.long)
    expected, found = chain_counts(joints, owner, dense), tree_counts(trees, local)
    # Conditionals of both come from float32 passes of other batch shapes.
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(found.kl, expected.kl, **close)
    torch.testing.assert_close(found.weights, expected.weights, **close)
    gradient = surprise(expected, dense)[1]
    slopes = tree_surprise(trees, found, local, EVERYTHING)[1]
    curvature = chain_curvature(joints, owner, dense), tree_curvature(trees, local)
    for wide, own in ((gradient, slopes), curvature):
        torch.testing.assert_close(own.gate, wide.gate, **close)
        torch.testing.assert_close(own.left, wide.left[:, :, trees.tokens], **close)
        torch.testing.assert_close(own.right, wide.right[..., trees.tokens], **close)
        for position, ids in enumerate(trees.forest.support.ids):
            size = int((ids[0] < joints.vocab).sum())
            torch.testing.assert_close(
                own.logits[:, 0, position, :, :size],
                wide.logits[:, 0, position][..., ids[0, :size]],
                **close,
            )


@pytest.mark.parametrize("horizon", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 3])
def test_on_the_same_numbers_the_tree_is_the_joint_to_rounding(rank, horizon):
    lm = RecurrentModel(5)
    tree = truncated_joint(lm, CONTEXT, horizon, mass=1.0)
    probs = torch.zeros((5,) * horizon, dtype=torch.float64)
    probs[tuple(tree.prefixes(horizon).T)] = tree.levels[-1].probs
    one = torch.ones(1, 1, dtype=torch.float64)
    joints, trees = Groups(probs[None, None], one), TreeGroups(tree_forest(tree), one)
    dense, local = chains_on(trees, 5, rank, 2)
    owner = torch.zeros(2, dtype=torch.long)
    expected, found = chain_counts(joints, owner, dense), tree_counts(trees, local)
    allowed = 4 * kl_rounding(5**horizon, 20.0)
    assert (found.kl - expected.kl).abs().max() <= allowed
    slope = tree_surprise(trees, found, local, EVERYTHING)[1].packed(EVERYTHING)
    assert (slope - surprise(expected, dense)[1].packed(EVERYTHING)).abs().max() <= 100 * allowed

    shapes = [(2, rank), (2, horizon - 1, rank, rank), (2, horizon, rank, 5)]
    hidden = Hidden(*normal(horizon, *shapes))
    halves = probs.reshape(1, 1, 5 ** (horizon // 2), -1)
    targets = HalvedTargets(halves, joints.negative_entropy)
    counts = hidden_counts(targets, owner, hidden)
    on_tree = hidden_counts(HiddenTrees(trees.forest), owner, hidden)
    assert (on_tree.kl - counts.kl).abs().max() <= allowed
    for name in ("weights", "transitions", "factors"):
        assert (getattr(on_tree, name) - getattr(counts, name)).abs().max() <= allowed


@pytest.mark.parametrize("anchored", [False, True])
def test_the_full_chain_of_a_tree_is_that_of_the_joint(anchored):
    lm = RecurrentModel(6)
    asked = {"rank": 1, "form": "markov", "transition_rank": "full", "anchored": anchored}
    dense = fit(exact_joint(lm, CONTEXT, 3), **asked, tolerance=1e-9)
    tree = fit(truncated_joint(lm, CONTEXT, 3, mass=1.0), **asked, tolerance=1e-9)
    allowed = 1e-6 if anchored else kl_rounding(6**3, 20.0)  # anchored: the end of a descent
    assert tree.objective == pytest.approx(dense.objective, abs=allowed)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("method", ["em", "gradient", "acceptance"])
@pytest.mark.parametrize("form", FORMS)
def test_the_objective_is_what_it_says_never_rises_and_never_above_cp(form, method, anchored):
    lm, horizon = RecurrentModel(6), 5 if form == "hmm" and anchored else 4
    tree = complete_joint(lm, CONTEXT, horizon, top_k=3)
    dense = exact_joint(lm, CONTEXT, horizon, top_k=3)
    found = fit(tree, method=method, form=form, anchored=anchored, **FORMS[form], **FEW)
    draft = found.distribution
    if anchored:
        draft = draft.expanded()
    everywhere = draft.without_support()
    # Of both a forward pass in float32 of other batch shapes.
    close = 1e-4
    if method == "acceptance":
        earned = implied_acceptance(dense, everywhere).tokens_per_call
        on_tree = implied_acceptance(tree, found.distribution)
        assert on_tree.tokens_per_call_lower == pytest.approx(earned, abs=close)
        assert -found.objective == pytest.approx(earned, abs=close)
    else:
        kl = divergences(dense, everywhere).kl_nats
        assert found.objective == pytest.approx(kl, abs=close)
    allowed = 4 * kl_rounding(6**horizon)
    assert all(b <= a + allowed for a, b in pairwise(found.trace))
    cp = fit(tree, FORMS[form]["rank"], method, anchored=anchored, **FEW)
    assert found.objective <= cp.objective + allowed


def test_a_mixture_on_a_tree_is_never_above_its_chain_nor_a_rank_above_a_smaller_one():
    tree = complete_joint(RecurrentModel(6), CONTEXT, 3, top_k=4)
    chain = fit(tree, 1, form="markov", transition_rank=1, **FEW)
    path = fit_path(tree, [1, 2, 3], form="markov_mixture", transition_rank=1, **FEW)
    values = [one.objective for one in path]
    assert values == sorted(values, reverse=True) and values[0] <= chain.objective + 1e-12
    assert [one.distribution.rank for one in path] == [1, 2, 3]


def test_a_truncated_tree_bounds_the_divergence_from_below():
    lm = RecurrentModel(6)
    dense = exact_joint(lm, CONTEXT, 3)
    for nodes in (20, 60, 120):
        tree = truncated_joint(lm, CONTEXT, 3, mass=1.0, max_nodes=nodes)
        found = fit(tree, 2, form="markov_mixture", transition_rank=2, **FEW)
        kl = divergences(dense, found.distribution.without_support()).kl_nats
        assert found.objective <= kl + 1e-9


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_given_transitions_stay_as_they_are_on_trees(anchored, gated):
    tree = complete_joint(RecurrentModel(6), CONTEXT, 3, top_k=4)
    steps = 1 if anchored else 2
    left, right = normal(0, (steps, 6, 2), (steps, 2, 6))
    asked = {"form": "markov_mixture", "transitions": (left, right), "gated": gated}
    found = fit(tree, 2, anchored=anchored, **asked, **FEW).distribution
    draft = found.entries if anchored else found
    tokens = TreeGroups(tree_forest(tree), torch.ones(1, 1).double()).tokens
    some = (draft.left != 0).any(-1)
    assert torch.equal(draft.left[some], left[some]) and bool(some[0].sum() <= len(tokens))
    assert bool((draft.gate != 1).any()) is gated


def test_subspace_iteration_finds_the_leading_singular_vectors():
    (matrix,) = normal(3, (40, 25))
    matrix = torch.where(matrix > 0.5, matrix, 0.0)
    u, s, v = leading(matrix.to_sparse(), 3, 0)
    exact = torch.linalg.svdvals(matrix)
    assert (s <= exact[:3] + 1e-9).all() and (s >= 0.9 * exact[:3]).all()
    assert (u.mT @ u - torch.eye(3)).abs().max() <= 1e-9
    assert (v @ v.mT - torch.eye(3)).abs().max() <= 1e-9


def test_many_tokens_begin_from_the_pairs_that_occur(monkeypatch):
    from cpmtp.decomposition.forms import starts

    tree = complete_joint(RecurrentModel(8), CONTEXT, 3, top_k=4)
    usual = fit(tree, 1, form="markov", transition_rank=3, tolerance=1e-7)
    monkeypatch.setattr(starts, "_DENSE_START", 1)
    sparse = fit(tree, 1, form="markov", transition_rank=3, tolerance=1e-7)
    cp = fit(tree, 1)
    assert sparse.objective <= usual.objective + 0.05 * (cp.objective - usual.objective)


def test_a_full_transition_rank_over_too_many_tokens_is_refused(monkeypatch):
    from cpmtp.decomposition.trees import forms

    monkeypatch.setattr(forms, "_MOST_COMPLETE", 3)
    tree = complete_joint(RecurrentModel(6), CONTEXT, 3, top_k=4)
    with pytest.raises(ValueError, match="give a smaller transition_rank"):
        fit(tree, 1, form="markov", transition_rank="full")
