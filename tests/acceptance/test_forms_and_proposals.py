"""Every form through every rule, on dense joints, trees and samples; argmax proposals; the best
path.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from random_drafts import FORMS, random_form
from reference_acceptance import conditionals, random_joint, survival, told_the_first
from reference_drafts import naive_tensor
from reference_joint import brute_force_survival
from rounding import FORWARD, rounding
from tiny_models import BigramTable, RecurrentModel

from cpmtp.acceptance.best_path import best_path_tokens_per_call
from cpmtp.acceptance.implied import acceptance_profiles, implied_acceptance
from cpmtp.acceptance.sampled import estimate_acceptance
from cpmtp.acceptance.verification import VERIFIED, verify
from cpmtp.drafts.lookup import LookupDraft
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.drafts.support import Support
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.prefix_tree import truncated_joint

VOCAB, HORIZON = 4, 3
CONTEXT = torch.tensor([1, 0, 2])
RULES = ("token", "block", "coupling", "greedy", "typical")
# Sums of at most 4 ** 3 products of conditionals, each a quotient of sums of as many.
ROUNDING = 4 * (rounding(torch.float64, 4**3 + 6 * 2 * 4**3) + 4 * FORWARD)
forms = pytest.mark.parametrize("form", FORMS)
firsts = pytest.mark.parametrize("first_token", ["target", "draft"])


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


def target() -> JointDistribution:
    return exact_joint(RecurrentModel(VOCAB), CONTEXT, HORIZON)


def as_one_joint(draft, first: torch.Tensor | None) -> torch.Tensor:
    """The draft's joint, by its definition; an anchored one with first tokens given to it."""
    if first is None:
        return naive_tensor(draft)
    return first[:, None, None] * torch.stack([naive_tensor(draft[x]) for x in range(VOCAB)])


@forms
@firsts
@pytest.mark.parametrize("anchored", [False, True])
def test_dense_sums_are_the_definition_for_every_form_and_rule(form, first_token, anchored):
    if anchored and first_token == "draft":
        return  # it is told the first token
    joint, lead = target(), (VOCAB,) if anchored else ()
    draft = random_form(form, VOCAB, HORIZON - anchored, 2, seed=1, batch=lead, own=True)
    whole = as_one_joint(draft, joint.prefix_probs(1) if anchored else None)
    found = acceptance_profiles(joint, draft, RULES, first_token=first_token)
    reference = told_the_first if first_token == "target" else survival
    for rule in ("token", "block", "coupling"):
        close(found[rule].survival, reference(joint.probs, whole, rule))
    close(
        found["typical"].survival,
        brute_force_survival(joint.probs, whole, "typical", first_token),
    )
    path = [int(law.argmax()) for law in _greedy_path(joint.probs)]
    masses = torch.stack([whole[tuple(path[:k])].sum() for k in range(1, HORIZON + 1)])
    close(found["greedy"].survival, masses / (masses[0] if first_token == "target" else 1))


def _greedy_path(probs: torch.Tensor) -> list[torch.Tensor]:
    path: list[int] = []
    for _ in range(probs.ndim):
        path.append(int(conditionals(probs, (*path, 0))[-1].argmax()))
    return conditionals(probs, path)


@forms
@firsts
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("law", [{}, {"temperature": 0.6, "top_k": 3}, {"proposal": "argmax"}])
def test_complete_trees_and_dense_joints_agree_and_truncated_ones_contain(
    form, first_token, some, law
):
    lm, joint = RecurrentModel(VOCAB), target()
    draft = random_form(form, VOCAB, HORIZON, 2, seed=2, some=some)
    complete = truncated_joint(lm, CONTEXT, HORIZON, mass=1.0)
    part = truncated_joint(lm, CONTEXT, HORIZON, mass=0.7, max_children=3)
    for rule in RULES:
        if rule == "greedy" and "temperature" in law:
            continue
        options = {"rule": rule, "first_token": first_token, **law}
        exact = implied_acceptance(joint, draft, **options).survival
        closed = implied_acceptance(complete, draft, **options)
        close(closed.survival_lower, exact)
        assert closed.survival_upper.equal(closed.survival_lower)
        bounds = implied_acceptance(part, draft, **options)
        assert (bounds.survival_lower <= exact + ROUNDING).all()
        assert (exact <= bounds.survival_upper + ROUNDING).all()


@forms
@pytest.mark.parametrize("proposal", ["sampled", "argmax"])
def test_anchored_drafts_over_a_support_agree_on_trees_joints_and_samples(form, proposal):
    lm, joint = RecurrentModel(VOCAB), target()
    draft = random_form(form, VOCAB, HORIZON - 1, 2, seed=3, batch=(VOCAB,), some=True)
    tree = truncated_joint(lm, CONTEXT, HORIZON, mass=1.0)
    for rule in VERIFIED:
        exact = implied_acceptance(joint, draft, rule=rule, proposal=proposal).survival
        masked = implied_acceptance(
            joint, draft.without_support(), rule=rule, proposal=proposal
        ).survival
        close(masked, exact)
        close(implied_acceptance(tree, draft, rule=rule, proposal=proposal).survival_lower, exact)
        estimate = estimate_acceptance(
            lm, draft, CONTEXT, samples=2000, rule=rule, proposal=proposal
        )
        assert ((estimate.survival - exact).abs() <= 4 * estimate.survival_error + ROUNDING).all()


def test_a_tree_that_lacks_less_than_1e9th_is_complete_and_one_that_lacks_more_is_not():
    draft = random_form("markov_mixture", VOCAB, HORIZON, 2, seed=4)
    lm = BigramTable(VOCAB, 3)
    tree = truncated_joint(lm, CONTEXT, HORIZON, mass=1.0, top_k=2)
    assert [len(level) for level in tree.levels] == [2, 4, 8]
    closed = implied_acceptance(tree, draft)
    assert closed.tokens_per_call_lower == closed.tokens_per_call_upper
    exact = implied_acceptance(exact_joint(lm, CONTEXT, HORIZON, top_k=2), draft).survival
    close(closed.survival_lower, exact)
    part = implied_acceptance(truncated_joint(lm, CONTEXT, HORIZON, mass=1.0, max_nodes=4), draft)
    assert part.tokens_per_call_upper > part.tokens_per_call_lower


@forms
def test_trees_over_a_large_vocabulary_make_no_table_over_it(form, monkeypatch):
    vocab, lm = 49_152, BigramTable(VOCAB, 3)
    small = truncated_joint(lm, CONTEXT, HORIZON, mass=1.0)
    far = torch.tensor([3, 70, 20_000, 49_151])  # where the small vocabulary's tokens are now
    levels = [replace(level, tokens=far[level.tokens]) for level in small.levels]
    tree = replace(
        small, vocab_size=vocab, levels=tuple(levels), greedy_path=far[small.greedy_path]
    )
    few = random_form(form, VOCAB, HORIZON, 2, seed=8)
    support = Support.of(far, vocab_size=vocab, positions=HORIZON)
    changed = {"support": support}
    if form == "markov_mixture":
        left = torch.zeros(HORIZON - 1, vocab, few.transition_rank, dtype=torch.float64)
        changed["left"] = left.index_copy(1, far, few.left)
    draft = replace(few, **changed)
    monkeypatch.setattr(Support, "scatter", lambda *_: pytest.fail("a table over the vocabulary"))
    for proposal in ("sampled", "argmax"):
        found = implied_acceptance(tree, draft, proposal=proposal).survival_lower
        close(found, implied_acceptance(small, few, proposal=proposal).survival_lower)
    assert best_path_tokens_per_call(tree) == best_path_tokens_per_call(small)


def emitted(target: torch.Tensor, draft, law_of) -> torch.Tensor:
    """Law of three tokens that a call emits whose two drafted ones are a draft's, every path and
    verdict enumerated; `law_of` says what the draft's conditionals are taken for.
    """
    law = torch.zeros_like(target)
    for path in itertools.product(range(VOCAB), repeat=2):
        tokens = torch.tensor(path)
        mass = draft.log_prob(tokens).exp()
        p = torch.stack(conditionals(target, (*path, 0)))
        q = torch.stack([law_of.next_token_probs(tokens[:i]) for i in range(2)])
        outcome = verify(p, q, tokens, "block")
        for accepted in range(3):
            for token in range(VOCAB):
                where = (*path[:accepted], token)
                share = target[where] / target[where].sum()
                stopped = mass * outcome.accepted_length_probs[accepted]
                law[where] += stopped * outcome.next_token_probs[accepted, token] * share
    return law


@forms
def test_block_verification_of_every_form_emits_the_targets_law(form):
    probs = random_joint(VOCAB, 3, seed=0)
    draft = random_form(form, VOCAB, 2, 2, seed=5)  # drawn without a look at the target
    assert (draft.to_tensor() - probs.sum(-1)).abs().sum() > 0.5
    law = emitted(probs, draft, draft)
    assert (law - probs).abs().max() <= rounding(torch.float64, 16 * 4**3)
    # With conditionals that are another draft's the law is another, too.
    other = random_form(form, VOCAB, 2, 2, seed=6)
    assert (emitted(probs, draft, other) - probs).abs().max() > 1e-3


def argmax_survival(probs: torch.Tensor, whole: torch.Tensor, told: bool) -> torch.Tensor:
    """``S_1 … S_n`` of argmax proposals, path by path."""
    found = torch.zeros(HORIZON, dtype=torch.float64)
    for first in range(VOCAB) if told else [None]:
        path = [first] if told else []
        while len(path) < HORIZON:
            path.append(int(conditionals(whole, (*path, 0))[-1].argmax()))
        found += torch.stack([probs[tuple(path[:k])].sum() for k in range(1, HORIZON + 1)])
    return found


@forms
@firsts
@pytest.mark.parametrize("seed", range(4))
def test_argmax_proposals_survive_where_the_target_follows_their_path(form, first_token, seed):
    joint = JointDistribution(random_joint(VOCAB, HORIZON, seed))
    draft = random_form(form, VOCAB, HORIZON, 2, seed)
    expected = argmax_survival(joint.probs, naive_tensor(draft), first_token == "target")
    options = {"first_token": first_token, "proposal": "argmax"}
    for law in ({}, {"temperature": 0.5}, {"top_k": 2}):
        found = acceptance_profiles(joint, draft, ("token", "block", "coupling"), **options, **law)
        for profile in found.values():
            close(profile.survival, expected)
    best = best_path_tokens_per_call(joint, first_token=first_token)
    assert found["block"].tokens_per_call <= best + ROUNDING


def test_argmax_goes_token_by_token_and_not_for_the_most_probable_path():
    whole = torch.tensor([[0.3, 0.3], [0.4, 0.0]], dtype=torch.float64)
    joint = JointDistribution(torch.tensor([[0.7, 0.1], [0.1, 0.1]], dtype=torch.float64))
    found = implied_acceptance(
        joint, JointDistribution(whole), first_token="draft", proposal="argmax"
    ).survival
    close(found, torch.tensor([0.8, 0.7], dtype=torch.float64))  # along 0, 0; 1, 0 has 0.2 and 0.1


def best_by_enumeration(probs: torch.Tensor, told: bool) -> float:
    horizon, vocab = probs.ndim, len(probs)

    def earned(path):
        return sum(probs[path[:k]].sum().item() for k in range(1, horizon + 1))

    paths = list(itertools.product(range(vocab), repeat=horizon))
    if not told:
        return 1 + max(map(earned, paths))
    return sum(max(earned(path) for path in paths if path[0] == x) for x in range(vocab))


@firsts
def test_the_best_path_is_the_best_of_all(first_token):
    told = first_token == "target"
    for horizon, seed in ((1, 0), (2, 1), (3, 2), (4, 3)):
        joint = JointDistribution(random_joint(3, horizon, seed, zeros=0.3))
        best = best_path_tokens_per_call(joint, first_token=first_token)
        assert best == pytest.approx(best_by_enumeration(joint.probs, told), abs=ROUNDING)
    batch = torch.stack([random_joint(3, 3, seed) for seed in range(2)])
    together = best_path_tokens_per_call(JointDistribution(batch, 3), first_token=first_token)
    for probs, best in zip(batch, together, strict=True):
        assert best.item() == pytest.approx(best_by_enumeration(probs, told), abs=ROUNDING)


@firsts
@pytest.mark.parametrize("seed", range(6))
def test_trees_bound_the_best_path_and_complete_ones_give_it(first_token, seed):
    lm = BigramTable(VOCAB, seed)
    exact = best_path_tokens_per_call(exact_joint(lm, CONTEXT, HORIZON), first_token=first_token)
    complete = best_path_tokens_per_call(
        truncated_joint(lm, CONTEXT, HORIZON, mass=1.0), first_token=first_token
    )
    assert complete.lower == complete.upper == pytest.approx(exact, abs=ROUNDING)
    for nodes, children in ((3, 4), (3, 1), (6, 2), (8, 3)):
        tree = truncated_joint(
            lm, CONTEXT, HORIZON, mass=1.0, max_nodes=nodes, max_children=children
        )
        bounds = best_path_tokens_per_call(tree, first_token=first_token)
        assert bounds.lower - ROUNDING <= exact <= bounds.upper + ROUNDING
        if first_token == "target":  # drafted, the one best path may be beyond doubt
            assert bounds.upper > bounds.lower + ROUNDING


@firsts
def test_prompt_lookup_earns_what_the_target_has_of_its_path(first_token):
    told = first_token == "target"
    text = torch.tensor([1, 2, 3, 0, 2, 3, 1, 2])
    lm = RecurrentModel(VOCAB)
    joint = exact_joint(lm, text, HORIZON)
    draft = LookupDraft(text, VOCAB, HORIZON, max_ngram=2)
    expected = torch.zeros(HORIZON, dtype=torch.float64)
    for first in range(VOCAB) if told else [None]:
        known = torch.tensor([first] if told else [], dtype=torch.long)
        path = (*known.tolist(), *draft.path(known).tolist())
        for k in range(1, len(path) + 1):
            expected[k - 1] += joint.probs[path[:k]].sum()
    for proposal, rule in itertools.product(("sampled", "argmax"), ("token", "block", "coupling")):
        options = {"rule": rule, "first_token": first_token, "proposal": proposal}
        close(implied_acceptance(joint, draft, **options).survival, expected)
        close(implied_acceptance(joint, draft, **options, temperature=0.7).survival, expected)
        part = implied_acceptance(
            truncated_joint(lm, text, HORIZON, mass=0.7, max_children=3), draft, **options
        )
        assert (part.survival_lower <= expected + ROUNDING).all()
        assert (expected <= part.survival_upper + ROUNDING).all()
        if rule in VERIFIED:
            found = estimate_acceptance(lm, draft, text, samples=2000, **options)
            gap = (found.survival - expected).abs()
            assert (gap <= 4 * found.survival_error + ROUNDING).all()


@firsts
def test_where_nothing_is_proposed_nothing_survives(first_token):
    text = torch.tensor([0, 1, 2])  # no token occurs twice, nor does 3 occur
    joint = exact_joint(RecurrentModel(VOCAB), text, HORIZON)
    draft = LookupDraft(text, VOCAB, HORIZON, min_ngram=2)
    for rule in RULES:
        for law in ({}, {"top_k": 2}, {"proposal": "argmax"}):
            found = implied_acceptance(joint, draft, rule=rule, first_token=first_token, **law)
            told = float(first_token == "target")
            assert found.survival.tolist() == [told, 0.0, 0.0]


def test_gradients_reach_every_parameter_of_a_markov_mixture():
    draft = random_form("markov_mixture", 3, 2, 2, seed=7, batch=(3,))
    joint = JointDistribution(random_joint(3, 3, 0))
    parameters = [draft.weights.log(), draft.logits, draft.left, draft.right, draft.gate]

    def earned(scores, *others):
        made = MarkovMixture(scores.softmax(-1), *others)
        return implied_acceptance(joint, made, rule="block").survival.sum()

    leaves = [part.clone().requires_grad_() for part in parameters]
    assert torch.autograd.gradcheck(earned, leaves, eps=1e-7, atol=1e-6)


def test_an_unknown_proposal_is_refused():
    joint, draft = target(), random_form("cp", VOCAB, HORIZON, 1, 0)
    tree = truncated_joint(RecurrentModel(VOCAB), CONTEXT, HORIZON, mass=0.5)
    for call in (
        lambda: implied_acceptance(joint, draft, proposal="best"),
        lambda: implied_acceptance(tree, draft, proposal="best"),
        lambda: estimate_acceptance(RecurrentModel(VOCAB), draft, CONTEXT, proposal="best"),
    ):
        with pytest.raises(ValueError, match="unknown proposal 'best': expected one of sampled"):
            call()
