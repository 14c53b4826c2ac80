"""Implied acceptance: the definitions, their order, their conventions."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force_survival, conditionals
from rounding import rounding
from samples import random_cp, random_joint
from scipy.optimize import linprog

from cpmtp.acceptance.implied import (
    acceptance_profiles,
    implied_acceptance,
    revealed_component_survival,
)
from cpmtp.acceptance.verification import verify
from cpmtp.decomposition.fitting import fit
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.language_model import MarkovLanguageModel, separated_hmm
from cpmtp.sampling_law import SamplingLaw

RULES = ("token", "block", "coupling")
# A survival adds at most 4 ** 3 products of six conditionals, quotients of sums of as many.
ROUNDING = 2 * rounding(torch.float64, 4**3 + 6 * 2 * 4**3)
pairs = st.tuples(
    st.integers(2, 4), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 0.4])
)


def pair(vocab, horizon, seed, zeros) -> tuple[JointDistribution, JointDistribution]:
    return tuple(JointDistribution(random_joint(vocab, horizon, seed + k, zeros)) for k in (0, 1))


def test_the_worked_example_gives_ten_eleven_and_twelve_ninths():
    third = torch.tensor([1, 2], dtype=torch.float64) / 3
    target = JointDistribution(torch.outer(third, third))
    draft = CPDistribution(torch.ones(1, dtype=torch.float64), [third.flip(0)[:, None]] * 2)
    for rule, ninths in zip(RULES, (10, 11, 12), strict=True):
        profile = implied_acceptance(target, draft, rule=rule, first_token="draft")
        assert profile.survival.sum().item() == pytest.approx(ninths / 9, abs=ROUNDING)
        assert profile.tokens_per_call == pytest.approx(1 + ninths / 9, abs=ROUNDING)


@settings(max_examples=1000, deadline=None)
@given(pairs, st.sampled_from(["target", "draft"]))
def test_token_is_at_most_block_is_at_most_coupling_and_all_agree_on_the_first(case, first_token):
    target, draft = pair(*case)
    found = {
        r: p.survival
        for r, p in acceptance_profiles(target, draft, RULES, first_token=first_token).items()
    }
    assert (found["token"] <= found["block"] + ROUNDING).all()
    assert (found["block"] <= found["coupling"] + ROUNDING).all()
    judged = min(int(first_token == "target"), len(found["token"]) - 1)
    torch.testing.assert_close(found["token"][: judged + 1], found["coupling"][: judged + 1])
    assert (found["block"].diff() <= ROUNDING).all()


@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_ten_thousand_random_pairs_keep_the_order(first_token):
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(2, 10_000, 3, 3, 3, generator=generator, dtype=torch.float64) ** 4
    raw = raw / raw.sum((2, 3, 4), keepdim=True)
    target, draft = (JointDistribution(r, 3) for r in raw)
    found = acceptance_profiles(target, draft, RULES, first_token=first_token)
    assert (found["token"].survival <= found["block"].survival + ROUNDING).all()
    assert (found["block"].survival <= found["coupling"].survival + ROUNDING).all()


@settings(max_examples=60, deadline=None)
@given(pairs, st.sampled_from(RULES))
def test_survival_is_the_definition_sequence_by_sequence(case, rule):
    target, draft = pair(*case)
    drafted = implied_acceptance(target, draft, rule=rule, first_token="draft").survival
    expected = brute_force_survival(target.probs, draft.probs, rule)
    torch.testing.assert_close(drafted, expected, atol=ROUNDING, rtol=0)
    if target.horizon > 1:
        told = implied_acceptance(target, draft, rule=rule, first_token="target").survival
        expected = brute_force_survival(target.probs, draft.probs, rule, "target")
        torch.testing.assert_close(told, expected, atol=ROUNDING, rtol=0)


@settings(max_examples=60, deadline=None)
@given(pairs, st.integers(1, 3), st.sampled_from(RULES), st.sampled_from(["target", "draft"]))
def test_a_cp_distribution_and_its_tensor_earn_the_same(case, rank, rule, first_token):
    target, _ = pair(*case)
    draft = random_cp((), case[0], case[1], rank, case[2])
    dense = implied_acceptance(
        target, JointDistribution(draft.to_tensor()), rule=rule, first_token=first_token
    )
    found = implied_acceptance(target, draft, rule=rule, first_token=first_token)
    torch.testing.assert_close(found.survival, dense.survival, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_a_draft_that_is_the_target_is_accepted_whole(rule, first_token):
    target = JointDistribution(random_joint(4, 3, 0, zeros=0.3))
    profile = implied_acceptance(target, target, rule=rule, first_token=first_token)
    torch.testing.assert_close(profile.survival, torch.ones(3, dtype=torch.float64))
    assert profile.tokens_per_call == pytest.approx(3 + (first_token == "draft"))


@pytest.mark.parametrize("rule", [*RULES, "greedy", "typical"])
def test_a_batch_is_its_entries_one_by_one(rule):
    probs = torch.stack([random_joint(3, 3, seed, zeros=0.2) for seed in range(5)])
    draft = random_cp((5,), 3, 3, 2)
    for first_token in ("target", "draft"):
        together = implied_acceptance(
            JointDistribution(probs, 3), draft, rule=rule, first_token=first_token
        )
        assert together.tokens_per_call.shape == (5,)
        for i in range(5):
            alone = implied_acceptance(
                JointDistribution(probs[i]), draft[i], rule=rule, first_token=first_token
            )
            torch.testing.assert_close(together.survival[i], alone.survival)


@pytest.mark.parametrize("rule", RULES)
def test_an_anchored_draft_of_the_posteriors_is_the_unanchored_one(rule):
    target, draft = JointDistribution(random_joint(4, 3, 0)), random_cp((), 4, 3, 3)
    told = [draft.condition(torch.tensor([x])) for x in range(4)]
    anchored = CPDistribution(
        torch.stack([t.weights for t in told]),
        [torch.stack([t.factors[i] for t in told]) for i in range(2)],
    )
    expected = implied_acceptance(target, draft, rule=rule).survival
    torch.testing.assert_close(implied_acceptance(target, anchored, rule=rule).survival, expected)
    with pytest.raises(ValueError, match="cannot give it"):
        implied_acceptance(target, anchored, rule=rule, first_token="draft")


def test_the_exact_conditionals_as_anchored_draft_earn_everything():
    target = JointDistribution(random_joint(4, 3, 3, zeros=0.4))
    assert implied_acceptance(target, target.given_first_token()).tokens_per_call == pytest.approx(
        3
    )


def test_a_first_token_without_mass_in_the_draft_is_answered_with_the_prior():
    target = JointDistribution(torch.tensor([[0.0, 0.0], [0.3, 0.7]], dtype=torch.float64))
    factors = [
        torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        torch.tensor([[0.5], [0.5]], dtype=torch.float64),
    ]
    draft = CPDistribution(torch.ones(1, dtype=torch.float64), factors)
    for d in (draft, JointDistribution(draft.to_tensor())):
        assert implied_acceptance(target, d, rule="token").survival[1].item() == pytest.approx(0.8)


def test_greedy_follows_the_argmax_path():
    target = JointDistribution(torch.tensor([[0.1, 0.1], [0.2, 0.6]], dtype=torch.float64))
    draft = JointDistribution(torch.tensor([[0.4, 0.1], [0.3, 0.2]], dtype=torch.float64))
    assert implied_acceptance(
        target, draft, rule="greedy", first_token="draft"
    ).survival.tolist() == pytest.approx([0.5, 0.2])
    assert implied_acceptance(target, draft, rule="greedy").survival.tolist() == pytest.approx(
        [1.0, 0.4]
    )
    greedy_draft = implied_acceptance(
        target, draft, rule="greedy", first_token="draft", temperature=0
    )
    assert greedy_draft.survival.tolist() == [0, 0]
    assert implied_acceptance(target, target, rule="greedy", temperature=0).survival.tolist() == [
        1,
        1,
    ]


def test_at_temperature_zero_every_lossless_rule_is_the_greedy_rule():
    lm = separated_hmm(3, 6, seed=1)
    context = torch.tensor([0, 3])
    cold = exact_joint(lm, context, 3, temperature=0)
    draft = random_cp((), 6, 3, 2)
    greedy = implied_acceptance(exact_joint(lm, context, 3), draft, rule="greedy").survival
    for rule in RULES:
        torch.testing.assert_close(implied_acceptance(cold, draft, rule=rule).survival, greedy)


def test_typical_acceptance_counts_what_passes_the_threshold():
    target = JointDistribution(torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64))
    draft = JointDistribution(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
    entropy = target.entropy().item()
    threshold = min(0.3, 0.4 * torch.exp(torch.tensor(-entropy)).item())
    expected = sum(
        q for p, q in zip((0.7, 0.25, 0.05), (0.2, 0.3, 0.5), strict=True) if p > threshold
    )
    found = implied_acceptance(target, draft, rule="typical", first_token="draft", delta=0.4)
    assert found.survival.item() == pytest.approx(expected)


def test_a_small_language_model_is_a_draft_like_its_joint():
    target_lm, draft_lm = (
        separated_hmm(3, 5, seed=1),
        MarkovLanguageModel(torch.ones(5) / 5, torch.full((5, 5), 0.2)),
    )
    context = torch.tensor([1])
    target = exact_joint(target_lm, context, 3)
    expected = implied_acceptance(target, exact_joint(draft_lm, context, 3))
    assert (
        implied_acceptance(target, draft_lm, context=context).tokens_per_call
        == expected.tokens_per_call
    )
    with pytest.raises(ValueError, match="context="):
        implied_acceptance(target, draft_lm)


@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_the_drafts_conditionals_go_through_the_law(first_token):
    law = SamplingLaw(temperature=0.5, top_k=2)
    target, draft = (
        JointDistribution(random_joint(3, 2, 0)),
        JointDistribution(random_joint(3, 2, 1)),
    )
    first = draft.prefix_probs(1)
    second = law.process(draft.probs / first[:, None])
    processed = JointDistribution(law.process(first)[:, None] * second)
    if first_token == "target":
        processed = JointDistribution(first[:, None] * second)
    expected = implied_acceptance(target, processed, first_token=first_token).survival
    found = implied_acceptance(
        target, draft, first_token=first_token, temperature=0.5, top_k=2
    ).survival
    torch.testing.assert_close(found, expected)


def test_verifying_against_the_sampled_component_earns_less_and_less_with_rank():
    lm = separated_hmm(4, 8)
    target = exact_joint(lm, torch.tensor([0]), 3)
    losses = []
    for rank in (1, 2, 4):
        draft = fit(target, rank, "em", seed=0).distribution
        for first_token in ("target", "draft"):
            mixture = implied_acceptance(target, draft, first_token=first_token).survival.sum()
            loss = (
                mixture - revealed_component_survival(target, draft, first_token=first_token).sum()
            ).item()
        losses.append(loss)
    assert losses[0] == pytest.approx(0, abs=8 * ROUNDING)
    assert losses[2] > losses[1] > 0.05


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_gradients_agree_with_finite_differences(rule, first_token):
    target = JointDistribution(random_joint(4, 3, 0))

    def earned(*scores):
        weights, *factors = (s.softmax(0) for s in scores)
        draft = CPDistribution(weights, factors)
        return implied_acceptance(target, draft, rule=rule, first_token=first_token).survival.sum()

    generator = torch.Generator().manual_seed(2)
    shapes = [(3,), (4, 3), (4, 3), (4, 3)]
    scores = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    assert torch.autograd.gradcheck(earned, scores, eps=1e-7, atol=1e-6)


def test_gradients_at_zero_probabilities_are_finite():
    target = JointDistribution(random_joint(3, 3, 0, zeros=0.5))
    factor = torch.tensor(
        [[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]], dtype=torch.float64, requires_grad=True
    )
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    for rule in RULES:
        for first_token in ("target", "draft"):
            draft = CPDistribution(weights, [factor] * 3)
            earned = implied_acceptance(
                target, draft, rule=rule, first_token=first_token
            ).survival.sum()
            assert all(
                torch.isfinite(g).all() for g in torch.autograd.grad(earned, [factor, weights])
            )


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_simulated_verifier_agrees_within_four_standard_errors(rule):
    target, draft = JointDistribution(random_joint(4, 3, 5)), random_cp((), 4, 3, 2, seed=3)
    count = 20_000
    paths = draft.sample(count, seed=0)
    dense = draft.to_tensor()
    p = torch.stack(
        [
            torch.stack([*conditionals(target.probs, x), torch.full((4,), 0.25)])
            for x in paths.unique(dim=0).tolist()
        ]
    )
    q = torch.stack([torch.stack(conditionals(dense, x)) for x in paths.unique(dim=0).tolist()])
    unique, index = paths.unique(dim=0, return_inverse=True)
    lengths = verify(p, q, unique, rule).accepted_length_probs[index]
    accepted = torch.multinomial(lengths, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    expected = implied_acceptance(target, draft, rule=rule, first_token="draft").survival
    for k in range(1, 4):
        rate = (accepted >= k).double().mean()
        error = (expected[k - 1] * (1 - expected[k - 1]) / count).sqrt()
        assert (rate - expected[k - 1]).abs() < 4 * error


_TIGHT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def best_single_path_scheme(target: torch.Tensor, draft: torch.Tensor) -> float:
    """Most drafted tokens any valid single-path scheme can keep, by linear programming.

    A scheme keeps exactly the first ``t`` tokens of a path with probability ``a_t(path)``. It is
    valid when what it emits, the correction chosen at will and the target sampled from then on, can
    follow the target's law: after every prefix, what survives there may not exceed what the target
    sends there, out of what survived before it.
    """
    vocab, n = len(target), draft.ndim
    paths = list(itertools.product(range(vocab), repeat=n))
    # Unknowns: draft probability of the path times a_t(path), t = 1 … n.
    at = {(path, t): i for i, (path, t) in enumerate(itertools.product(paths, range(1, n + 1)))}
    through: dict[tuple, np.ndarray] = {}
    for (path, t), i in at.items():
        for k in range(1, t + 1):
            through.setdefault(path[:k], np.zeros(len(at)))[i] = 1
    rows, bounds = [], []
    for path in paths:
        rows.append(np.zeros(len(at)))
        rows[-1][[at[path, t] for t in range(1, n + 1)]] = 1
        bounds.append(draft[path].item())
    for prefix, survives in through.items():
        last = conditionals(target, prefix)[-1][prefix[-1]].item()
        # Nothing is asked of what follows an impossible prefix: nothing survives there.
        before = through[prefix[:-1]] * last if len(prefix) > 1 else 0.0
        rows.append(survives - before)
        bounds.append(last if len(prefix) == 1 else 0.0)
    reward = -np.array([float(t) for _, t in at])
    found = linprog(
        reward, np.stack(rows), bounds, bounds=(0, None), method="highs", options=_TIGHT
    )
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize(
    ("vocab", "horizon", "cases"),
    [(2, 2, 70), (3, 2, 70), (4, 2, 60), (2, 3, 60), (3, 3, 30), (4, 3, 5), (2, 4, 20)],
)
def test_block_verification_is_the_best_valid_single_path_scheme(vocab, horizon, cases):
    for seed in range(cases):
        zeros = 0.2 * (seed % 2)
        target = random_joint(vocab, horizon, seed, zeros=0.2 * (seed % 3 == 0))
        pair = (
            JointDistribution(target),
            JointDistribution(random_joint(vocab, horizon, seed + 500, zeros=zeros)),
        )
        earned, bound = (
            implied_acceptance(*pair, rule=rule, first_token="draft").survival.sum().item()
            for rule in ("block", "coupling")
        )
        assert earned == pytest.approx(best_single_path_scheme(target, pair[1].probs), abs=1e-9)
        assert earned <= bound + ROUNDING


def test_a_profile_carries_the_textbook_approximation_and_the_serving_rates():
    profile = implied_acceptance(JointDistribution(random_joint(4, 3, 0)), random_cp((), 4, 3, 2))
    alpha = profile.survival[1].item()
    assert profile.iid_tokens_per_call == pytest.approx(1 + alpha + alpha**2)
    assert profile.conditional.tolist() == pytest.approx(
        [1, alpha, (profile.survival[2] / alpha).item()]
    )
    rates = json.loads(profile.to_vllm_synthetic())["synthetic_acceptance_rates"]
    assert rates == profile.survival[1:].tolist()
    drafted = implied_acceptance(
        JointDistribution(random_joint(4, 3, 0)), random_cp((), 4, 3, 2), first_token="draft"
    )
    assert len(json.loads(drafted.to_vllm_synthetic())["synthetic_acceptance_rates"]) == 3
    assert drafted.iid_tokens_per_call == pytest.approx(
        1 + sum(drafted.survival[0].item() ** k for k in (1, 2, 3))
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rule": "best"}, "unknown rule 'best'"),
        ({"first_token": "last"}, "unknown first_token 'last'"),
        ({"rule": "greedy", "temperature": 1.0}, "at temperature 0 only"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"draft": random_cp((), 3, 3, 2)}, "share a vocabulary"),
        ({"draft": random_cp((), 4, 2, 2)}, "horizon 2"),
        ({"draft": random_cp((2,), 4, 3, 2)}, "batch axes (2,)"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_was_expected(change, said):
    options = {"draft": random_cp((), 4, 3, 2)} | change
    with pytest.raises(ValueError) as error:
        implied_acceptance(
            JointDistribution(random_joint(4, 3, 0)), options.pop("draft"), **options
        )
    assert said in str(error.value)
