"""A truncated joint is exact on what it keeps, and says how much that is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import FORWARD, rounding
from samples import BigramTable, BrokenModel, RecurrentModel

from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import MarkovLanguageModel
from cpmtp.prefix_tree import PrefixTree, truncated_joint
from cpmtp.pretrained import HuggingFaceLanguageModel, load_language_model
from cpmtp.training.new_models import new_llama

CONTEXT = torch.tensor([1, 0, 2])


def check_tree(tree: PrefixTree, joint, *, model: float = 0.0) -> None:
    """Everything a tree promises, against the dense joint; `model` is what passes of other shapes
    change a log-probability by.
    """
    # Products of conditionals that sum to one, against quotients of sums of those products.
    rtol = 4 * rounding(torch.float64, joint.probs.numel() + 64) + tree.horizon * model
    for k, level in enumerate(tree.levels, 1):
        prefixes = tree.prefixes(k)
        index = tuple(prefixes.T)
        assert len(prefixes.unique(dim=0)) == len(prefixes)
        torch.testing.assert_close(level.probs, joint.prefix_probs(k)[index], atol=0, rtol=rtol)
        torch.testing.assert_close(
            level.conditionals, joint.conditional_probs(k)[index], atol=0, rtol=rtol
        )
        torch.testing.assert_close(
            tree.mass[k - 1], level.probs.sum().clamp(max=1.0), atol=0, rtol=rtol
        )
        laws = joint.conditional_probs(k)[tuple(tree.expanded_prefixes(k - 1).T)].view(
            -1, tree.vocab_size
        )
        entropies = -torch.special.xlogy(laws, laws).sum(1)
        # A probability that is off moves p log p by (log p + 1) times as much, and all sum to one.
        allowed = (math.log(tree.vocab_size) + 1) * rtol
        torch.testing.assert_close(level.parent_entropies, entropies, atol=allowed, rtol=0)
    assert (tree.mass.diff() <= rtol).all()


@settings(max_examples=30, deadline=None)
@given(
    vocab=st.integers(2, 6),
    horizon=st.integers(1, 4),
    seed=st.integers(0, 99),
    nodes=st.integers(4, 200),
)
def test_what_is_kept_is_exact(vocab, horizon, seed, nodes):
    lm = BigramTable(vocab, seed)
    context = torch.zeros(2, dtype=torch.long)
    tree = truncated_joint(lm, context, horizon, mass=0.97, max_nodes=nodes)
    check_tree(tree, exact_joint(lm, context, horizon))
    assert tree.expanded_nodes <= nodes


@pytest.mark.parametrize(
    "law", [{"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 0.0}]
)
def test_the_tree_of_a_processed_law_is_exact_under_that_law(law):
    lm = RecurrentModel(6)
    tree = truncated_joint(lm, CONTEXT, 3, mass=1.0, **law)
    check_tree(tree, exact_joint(lm, CONTEXT, 3, **law), model=2 * FORWARD)
    assert tree.mass[-1].item() == pytest.approx(1.0, abs=rounding(torch.float64, 4 * 6**3))


def test_a_tree_of_everything_is_the_dense_joint():
    lm = RecurrentModel(5)
    tree, joint = truncated_joint(lm, CONTEXT, 3, mass=1.0), exact_joint(lm, CONTEXT, 3)
    dense = torch.zeros_like(joint.probs)
    dense[tuple(tree.prefixes(3).T)] = tree.levels[2].probs
    torch.testing.assert_close(dense, joint.probs, atol=0, rtol=3 * FORWARD)


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9, 0.99])
def test_the_wanted_mass_is_kept_without_much_more_work_than_needed(mass):
    lm = RecurrentModel(8)
    tree = truncated_joint(lm, CONTEXT, 4, mass=mass)
    assert tree.mass[-1] >= mass
    joint = exact_joint(lm, CONTEXT, 4)
    needed = int(
        (joint.prefix_probs(3).flatten().sort(descending=True).values.cumsum(0) < mass).sum()
    )
    assert tree.expanded_nodes <= 2 * needed + 64 + 4


def test_the_greedy_path_is_kept_however_few_nodes_there_are():
    lm = RecurrentModel(8)
    tree = truncated_joint(lm, CONTEXT, 4, mass=1.0, max_nodes=4)
    assert tree.expanded_nodes == 4
    expected = exact_joint(lm, CONTEXT, 4, temperature=0.0).probs.argmax()
    assert (tree.greedy_path * 8 ** torch.arange(3, -1, -1)).sum() == expected
    assert (tree.prefixes(4) == tree.greedy_path).all(1).any()


def test_ties_on_the_greedy_path_go_to_the_lowest_token():
    lm = MarkovLanguageModel(torch.full((3,), 1 / 3), torch.tensor([[0.2, 0.4, 0.4]] * 3))
    assert truncated_joint(lm, CONTEXT, 2).greedy_path.tolist() == [1, 1]


def test_dropped_children_are_the_least_probable_and_count_as_lost():
    lm = RecurrentModel(8)
    tree = truncated_joint(lm, CONTEXT, 2, mass=1.0, max_children=3)
    joint = exact_joint(lm, CONTEXT, 2)
    assert len(tree.levels[0]) == 3 and len(tree.levels[1]) == 9
    best = joint.prefix_probs(1).topk(3)
    assert set(tree.levels[0].tokens.tolist()) == set(best.indices.tolist())
    assert tree.mass[0].item() == pytest.approx(best.values.sum().item(), abs=2 * FORWARD)
    check_tree(tree, joint, model=FORWARD)


def test_more_nodes_keep_more_mass():
    lm = RecurrentModel(8)
    masses = [
        truncated_joint(lm, CONTEXT, 4, mass=1.0, max_nodes=n).mass[-1].item()
        for n in (10, 50, 100, 585)
    ]
    assert masses == sorted(masses)
    assert masses[-1] == pytest.approx(1.0, abs=rounding(torch.float64, 4 * 8**4))


def test_progress_counts_the_expanded_nodes():
    seen = []
    tree = truncated_joint(RecurrentModel(8), CONTEXT, 3, mass=0.9, progress=seen.append)
    assert sum(seen) == tree.expanded_nodes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon 0: expected at least 1"),
        ({"mass": 0.0}, "mass 0.0: expected a probability above 0"),
        ({"mass": 1.5}, "mass 1.5"),
        ({"max_nodes": 2}, "max_nodes 2: the greedy path alone expands 3"),
        ({"max_children": 0}, "max_children 0"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_limits_get_a_clear_answer(options, message):
    with pytest.raises(ValueError, match=message):
        truncated_joint(BigramTable(4), CONTEXT, **({"horizon": 3} | options))


def test_a_broken_model_and_a_full_window_are_found_out():
    with pytest.raises(ValueError, match="NaN"):
        truncated_joint(BrokenModel(4), CONTEXT, 2)
    lm = HuggingFaceLanguageModel(new_llama(11, width=32, layers=1, window=8, seed=0))
    with pytest.raises(ValueError, match="run past the model's 8 positions"):
        truncated_joint(lm, torch.zeros(7, dtype=torch.long), 3)


def test_a_real_models_tree_agrees_with_its_dense_joint(stories):
    lm = load_language_model(stories, dtype=torch.float64)
    context = lm.sample_tokens(1, 24, seed=3)[0]
    check_tree(
        truncated_joint(lm, context, 2, mass=0.99), exact_joint(lm, context, 2), model=FORWARD
    )
