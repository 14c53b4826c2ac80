"""The certified interval contains the exact acceptance, and closes as the kept mass grows."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force_survival
from rounding import FORWARD, rounding
from samples import BigramTable, RecurrentModel, random_draft

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.acceptance.truncated import certified_acceptance
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.prefix_tree import truncated_joint
from cpmtp.pretrained import load_language_model

CONTEXT = torch.tensor([1, 0, 2])
RULES = ["token", "block", "coupling", "typical"]
# Sums of at most 6 ** 4 products of eight conditionals, four of them a model's; tokens per call
# add four of such sums.
ROUNDING = 4 * (rounding(torch.float64, 6**4 + 8 * 6) + 4 * FORWARD)


def assert_contains(bounds, exact):
    assert (bounds.survival_lower <= exact + ROUNDING).all()
    assert (exact <= bounds.survival_upper + ROUNDING).all()
    total = float(exact.sum()) + (bounds.first_token == "draft")
    assert (
        bounds.tokens_per_call_lower - ROUNDING <= total <= bounds.tokens_per_call_upper + ROUNDING
    )


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50, deadline=None)
@given(
    vocab=st.integers(2, 5),
    horizon=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    nodes=st.integers(3, 40),
    children=st.integers(1, 5),
    first_token=st.sampled_from(["target", "draft"]),
)
def test_the_interval_contains_the_exact_value(
    rule, vocab, horizon, seed, nodes, children, first_token
):
    lm, draft = BigramTable(vocab, seed), random_draft(vocab, horizon, 2, seed)
    context = torch.zeros(1, dtype=torch.long)
    tree = truncated_joint(lm, context, horizon, mass=0.9, max_nodes=nodes, max_children=children)
    exact = brute_force_survival(
        exact_joint(lm, context, horizon).probs, draft.to_tensor(), rule, first_token
    )
    bounds = certified_acceptance(tree, draft, rule=rule, first_token=first_token)
    assert_contains(bounds, exact)
    assert (bounds.survival_upper.diff() <= ROUNDING).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_the_width_falls_to_zero_as_the_mass_grows_to_one(rule, first_token):
    lm, draft = RecurrentModel(6), random_draft(6, 4, 3, 0)
    widths = []
    for mass in (0.5, 0.9, 0.99, 0.999, 1.0):
        bounds = certified_acceptance(
            truncated_joint(lm, CONTEXT, 4, mass=mass), draft, rule=rule, first_token=first_token
        )
        widths.append(bounds.tokens_per_call_upper - bounds.tokens_per_call_lower)
    assert all(later <= earlier + ROUNDING for earlier, later in itertools.pairwise(widths))
    assert widths[-1] <= ROUNDING < widths[0]


@pytest.mark.parametrize("rule", RULES)
def test_the_interval_is_never_wider_than_the_mass_that_was_not_kept(rule):
    lm, draft = RecurrentModel(6), random_draft(6, 3, 2, 1)
    tree = truncated_joint(lm, CONTEXT, 3, mass=0.8, max_children=4)
    bounds = certified_acceptance(tree, draft, rule=rule, first_token="draft")
    for k in range(1, 4):
        q_lost = 1 - float(draft.log_prob(tree.prefixes(k)).exp().sum())
        p_lost = 1 - float(tree.mass[k - 1])
        lost = q_lost if rule == "typical" else min(p_lost, q_lost)
        assert bounds.survival_upper[k - 1] - bounds.survival_lower[k - 1] <= lost + ROUNDING


@pytest.mark.parametrize("rule", ["token", "block", "coupling"])
def test_a_draft_that_is_the_target_may_be_accepted_always_and_surely_on_what_is_kept(rule):
    lm = RecurrentModel(6)
    tree = truncated_joint(lm, CONTEXT, 3, mass=0.8)
    bounds = certified_acceptance(tree, lm, rule=rule, context=CONTEXT)
    torch.testing.assert_close(bounds.survival_upper, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(bounds.survival_lower[1:], tree.mass[1:], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_greedy_acceptance_is_exact_on_the_smallest_tree(first_token):
    lm, draft = RecurrentModel(6), random_draft(6, 3, 2, 1)
    tree = truncated_joint(lm, CONTEXT, 3, max_nodes=3)
    bounds = certified_acceptance(tree, draft, rule="greedy", first_token=first_token)
    path = tree.greedy_path
    drafted = torch.stack([draft.log_prob(path[:k]).exp() for k in range(1, 4)])
    expected = drafted if first_token == "draft" else drafted / drafted[0]
    torch.testing.assert_close(bounds.survival_lower, expected)
    assert bounds.survival_upper.equal(bounds.survival_lower)


def test_one_draft_as_mixture_tensor_and_anchored_batch_gets_one_interval():
    draft = random_draft(5, 3, 2, 3)
    tree = truncated_joint(RecurrentModel(5), CONTEXT, 3, mass=0.9)
    expected = certified_acceptance(tree, draft)
    joint = JointDistribution(draft.to_tensor())
    anchored = joint.given_first_token()
    for other in (joint, anchored):
        found = certified_acceptance(tree, other)
        torch.testing.assert_close(found.survival_lower, expected.survival_lower)
        torch.testing.assert_close(found.survival_upper, expected.survival_upper)
    first = draft.factors[0]
    posterior = (draft.weights * first) / (draft.weights * first).sum(1, keepdim=True)
    batch = CPDistribution(posterior, [f.expand(5, 5, 2) for f in draft.factors[1:]])
    torch.testing.assert_close(
        certified_acceptance(tree, batch).survival_lower, expected.survival_lower
    )


def test_a_first_token_that_the_draft_excludes_leaves_it_its_prior():
    draft = random_draft(4, 3, 2, 5)
    first = torch.zeros(4, 2, dtype=torch.float64)
    first[0] = 1.0
    blind = CPDistribution(draft.weights, (first, *draft.factors[1:]))
    always = CPDistribution(
        draft.weights, (torch.full((4, 2), 0.25, dtype=torch.float64), *draft.factors[1:])
    )
    tree = truncated_joint(RecurrentModel(4), CONTEXT, 3, mass=1.0)
    for other in (blind, JointDistribution(blind.to_tensor())):
        torch.testing.assert_close(
            certified_acceptance(tree, other).survival_lower,
            certified_acceptance(tree, always).survival_lower,
        )


def test_the_drafts_conditionals_are_processed_as_asked():
    lm = RecurrentModel(5)
    tree = truncated_joint(lm, CONTEXT, 3, mass=1.0, temperature=0.5, top_k=3)
    bounds = certified_acceptance(tree, lm, context=CONTEXT, temperature=0.5, top_k=3)
    torch.testing.assert_close(
        bounds.survival_lower, torch.ones(3, dtype=torch.float64), atol=ROUNDING, rtol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "hope"}, "unknown rule 'hope': expected one of token, block"),
        ({"first_token": "both"}, "unknown first_token 'both'"),
        ({"rule": "greedy", "temperature": 0.5}, "rule 'greedy' at temperature 0.5"),
        ({"draft": random_draft(4, 3, 1, 0)}, "a draft over 4 tokens for a target over 5"),
        ({"draft": random_draft(5, 2, 1, 0)}, "a draft of horizon 2 .* a joint of horizon 3"),
        (
            {"draft": random_draft(5, 2, 1, 0, (5,)), "first_token": "draft"},
            "an anchored draft is told the first token",
        ),
        ({"draft": random_draft(5, 2, 1, 0, (3,))}, "batch axes"),
        ({"draft": BigramTable(5)}, "needs context="),
    ],
)
def test_a_draft_that_does_not_fit_gets_a_clear_answer(options, message):
    tree = truncated_joint(RecurrentModel(5), CONTEXT, 3, mass=0.9)
    options = {"draft": random_draft(5, 3, 1, 0)} | options
    with pytest.raises(ValueError, match=message):
        certified_acceptance(tree, **options)


@pytest.mark.slow
def test_a_real_models_interval_is_narrow_in_seconds(stories):
    lm = load_language_model(stories)
    for seed in range(10):
        context = lm.sample_tokens(1, 64, seed=seed)[0]
        tree = truncated_joint(lm, context, 4, mass=0.996)
        bounds = certified_acceptance(tree, random_draft(512, 4, 4, seed))
        assert bounds.tokens_per_call_upper - bounds.tokens_per_call_lower <= 0.02


def test_implied_acceptance_of_a_tree_is_the_interval_around_that_of_the_joint():
    lm, draft = RecurrentModel(6), random_draft(6, 3, 2, 1)
    tree, joint = truncated_joint(lm, CONTEXT, 3, mass=0.95), exact_joint(lm, CONTEXT, 3)
    for rule in (*RULES, "greedy"):
        for first_token in ("target", "draft"):
            for law in ({}, {"top_k": 4}):
                exact = implied_acceptance(joint, draft, rule=rule, first_token=first_token, **law)
                bounds = implied_acceptance(tree, draft, rule=rule, first_token=first_token, **law)
                assert_contains(bounds, exact.survival)
