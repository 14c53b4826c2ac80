"""The Monte Carlo estimate is unbiased, and its interval covers as often as it says."""

from __future__ import annotations

import pytest
import torch
from chances import assert_share
from reference import brute_force_survival
from rounding import FORWARD, rounding
from samples import BigramTable, RecurrentModel, random_draft

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.acceptance.paths import SampledPaths
from cpmtp.acceptance.sampled import estimate_acceptance, sampled_acceptance
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import MarkovLanguageModel
from cpmtp.prefix_tree import truncated_joint
from cpmtp.sampling_law import SamplingLaw

CONTEXT = torch.tensor([1, 0, 2])
# Means of 20,000 products of six conditionals, three of them a model's, and sums of four of them.
ROUNDING = 4 * (rounding(torch.float64, 20_000 + 6 * 6) + 2 * 3 * FORWARD)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_the_estimate_is_within_four_standard_errors_of_the_exact_survival(rule, first_token):
    lm, draft = RecurrentModel(5), random_draft(5, 3, 2, 0)
    exact = brute_force_survival(
        exact_joint(lm, CONTEXT, 3).probs, draft.to_tensor(), rule, first_token
    )
    estimate = estimate_acceptance(
        lm, draft, CONTEXT, samples=20_000, rule=rule, first_token=first_token
    )
    assert ((estimate.survival - exact).abs() <= 4 * estimate.survival_error + ROUNDING).all()
    low, high = estimate.tokens_per_call_interval
    assert low <= estimate.tokens_per_call <= high
    assert estimate.tokens_per_call == pytest.approx(
        float(estimate.survival.sum()) + (first_token == "draft")
    )


def _hits(rule, first_token, runs):
    """Runs whose interval holds the exact value."""
    lm, draft = BigramTable(6, 1), random_draft(6, 3, 2, 4)
    exact = brute_force_survival(
        exact_joint(lm, CONTEXT, 3).probs, draft.to_tensor(), rule, first_token
    )
    wanted = float(exact.sum()) + (first_token == "draft")
    hits = 0
    for seed in range(runs):
        low, high = estimate_acceptance(
            lm, draft, CONTEXT, samples=300, seed=seed, rule=rule, first_token=first_token
        ).tokens_per_call_interval
        hits += low <= wanted <= high
    return hits


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_the_interval_covers_the_exact_value_in_95_of_100_runs(rule, first_token):
    assert_share(_hits(rule, first_token, 2500), 2500, 0.95, wrong=0.915)


def test_the_interval_covers_the_exact_value_as_often_as_it_says():
    assert_share(_hits("block", "target", 1500), 1500, 0.95, wrong=0.9)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_interval_holds_where_acceptance_rests_on_texts_too_rare_to_be_drawn(rule):
    # The draft always says 1; the target says 0 over and over but for one time in 1,000.
    lm = MarkovLanguageModel(
        torch.tensor([0.5, 0.5]), torch.tensor([[0.999, 0.001], [0.001, 0.999]])
    )
    context, draft = (
        torch.tensor([0]),
        CPDistribution(torch.ones(1), [torch.tensor([[1e-6], [1 - 1e-6]])] * 3),
    )
    exact = brute_force_survival(
        exact_joint(lm, context, 3).probs, draft.to_tensor(), rule, "target"
    ).sum()
    hits = 0
    for seed in range(200):
        low, high = estimate_acceptance(
            lm, draft, context, samples=300, seed=seed, rule=rule
        ).tokens_per_call_interval
        hits += low <= float(exact) <= high
    assert hits >= 0.9 * 200


def test_a_draft_that_is_the_target_is_always_accepted():
    lm = RecurrentModel(5)
    for draft in (lm, exact_joint(lm, CONTEXT, 3)):
        estimate = estimate_acceptance(
            lm, draft, CONTEXT, samples=50, horizon=3, first_token="draft"
        )
        assert estimate.tokens_per_call == pytest.approx(4.0, abs=ROUNDING)


def test_the_same_seed_gives_the_same_estimate_and_another_seed_another():
    lm, draft = RecurrentModel(5), random_draft(5, 3, 2, 0)
    runs = [
        estimate_acceptance(lm, draft, CONTEXT, samples=100, seed=seed).tokens_per_call
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_anchored_drafts_are_estimated_too():
    lm, draft = RecurrentModel(5), random_draft(5, 3, 2, 3)
    anchored = JointDistribution(draft.to_tensor()).given_first_token()
    expected = estimate_acceptance(lm, draft, CONTEXT, samples=100).survival
    torch.testing.assert_close(
        estimate_acceptance(lm, anchored, CONTEXT, samples=100).survival, expected
    )


def test_tokens_without_probability_are_never_drawn():
    lm = MarkovLanguageModel(
        torch.tensor([1.0, 0.0, 0.0]),
        torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]),
    )
    uniform = CPDistribution(torch.ones(1), [torch.full((3, 1), 1 / 3)] * 3)
    estimate = estimate_acceptance(lm, uniform, torch.tensor([0]), samples=500, first_token="draft")
    assert torch.isfinite(estimate.survival).all()
    assert estimate.survival[0] == pytest.approx(1 / 3)


def test_processing_applies_to_both():
    lm = RecurrentModel(5)
    estimate = estimate_acceptance(
        lm, lm, CONTEXT, samples=50, horizon=3, temperature=0.5, top_p=0.8, first_token="draft"
    )
    assert estimate.tokens_per_call == pytest.approx(4.0, abs=ROUNDING)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_a_fit_to_a_processed_joint_is_read_as_it_is_where_that_is_asked_for(rule, first_token):
    lm, draft = RecurrentModel(5), random_draft(5, 3, 2, 0)
    law, options = (
        {"temperature": 0.7, "top_k": 3},
        {"rule": rule, "first_token": first_token},
    )
    joint = exact_joint(lm, CONTEXT, 3, **law)
    as_is = brute_force_survival(joint.probs, draft.to_tensor(), rule, first_token)
    processed = implied_acceptance(joint, draft, **options, **law).survival
    options |= {"samples": 20_000, **law}
    for exact, found in (
        (as_is, estimate_acceptance(lm, draft, CONTEXT, draft_law=SamplingLaw(), **options)),
        (processed, estimate_acceptance(lm, draft, CONTEXT, **options)),
    ):
        allowed = 4 * found.survival_error + ROUNDING
        assert ((found.survival - exact).abs() <= allowed).all()
        other = processed if exact is as_is else as_is
        assert ((found.survival - other).abs() > allowed).any()


def test_drafts_judged_on_the_same_paths_are_as_if_each_had_been_judged_alone():
    lm = RecurrentModel(5)
    paths = SampledPaths.drawn(lm, CONTEXT, 3, samples=200, seed=3)
    steps = [exact_joint(lm, CONTEXT, 3).conditional_probs(k) for k in (1, 2, 3)]
    x, y, z = paths.tokens.unbind(1)
    expected = torch.stack([steps[0][x], steps[1][x, y], steps[2][x, y, z]], 1)
    torch.testing.assert_close(paths.probs, expected, rtol=ROUNDING, atol=0)
    for draft in (random_draft(5, 3, 2, 0), random_draft(5, 3, 1, 1)):
        together = sampled_acceptance(paths, draft)
        for rule in ("token", "block"):
            alone = estimate_acceptance(lm, draft, CONTEXT, samples=200, seed=3, rule=rule)
            assert together[rule].survival.equal(alone.survival)
            assert together[rule].tokens_per_call_interval == alone.tokens_per_call_interval
    # Shorter paths are the same ones, cut.
    shorter = SampledPaths.drawn(lm, CONTEXT, 2, samples=200, seed=3)
    assert paths.first(2).tokens.equal(shorter.tokens)
    assert paths.first(2).probs.equal(shorter.probs)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_what_a_tree_holds_is_exact_and_the_rest_is_estimated(rule, first_token):
    lm, law = RecurrentModel(5), SamplingLaw(0.7)
    draft = random_draft(5, 3, 2, 0)
    tree = truncated_joint(lm, CONTEXT, 3, mass=0.9, temperature=0.7)
    joint = exact_joint(lm, CONTEXT, 3, temperature=0.7)
    exact = brute_force_survival(joint.probs, draft.to_tensor(), rule, first_token)
    paths = SampledPaths.drawn(lm, CONTEXT, 3, samples=20_000, law=law).outside_of(tree)
    for depth in (1, 2, 3):
        kept = {tuple(row) for row in tree.prefixes(depth).tolist()}
        inside = [tuple(row) in kept for row in paths.tokens[:, :depth].tolist()]
        assert paths.outside[:, depth - 1].tolist() == [not here for here in inside]
    bounds = {rule: implied_acceptance(tree, draft, rule=rule, first_token=first_token)}
    plain, found = (
        sampled_acceptance(paths, draft, (rule,), first_token=first_token, bounds=known)[rule]
        for known in (None, bounds)
    )
    assert ((found.survival - exact).abs() <= 4 * found.survival_error + ROUNDING).all()
    assert ((plain.survival - exact).abs() <= 4 * plain.survival_error + ROUNDING).all()
    # A tenth of the mass is left to chance, and with it a part of the variance.
    widths = [high - low for low, high in (i.tokens_per_call_interval for i in (found, plain))]
    assert widths[0] < 0.8 * widths[1]
    assert bounds[rule].tokens_per_call_lower < found.tokens_per_call_interval[0]
    with pytest.raises(ValueError, match=r"of horizon 3 over 5 tokens under .* expected the same"):
        SampledPaths.drawn(lm, CONTEXT, 3, samples=2).outside_of(tree)
    with pytest.raises(ValueError, match="mark the paths first"):
        sampled_acceptance(paths.first(3), draft, bounds=bounds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples 1: expected at least 2"),
        ({"rule": "typical"}, "unknown rule 'typical': expected one of token, block"),
        ({"confidence": 1.0}, "confidence 1.0"),
        ({"horizon": 2}, "a draft of horizon 3 .* a joint of horizon 2"),
        ({"draft": BigramTable(5)}, "a language model as draft has none of its own"),
        ({"first_token": "both"}, "unknown first_token"),
    ],
)
def test_bad_arguments_get_a_clear_answer(options, message):
    options = {"draft": random_draft(5, 3, 1, 0), "context": CONTEXT} | options
    with pytest.raises(ValueError, match=message):
        estimate_acceptance(RecurrentModel(5), **options)
