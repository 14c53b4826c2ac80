"""Verification keeps the target's law, exactly; lossy variants do not and are caught."""

from __future__ import annotations

import pytest
import torch
from reference import brute_force_survival, emitted_law
from rounding import rounding
from samples import random_draft, random_joint
from unchecked import unchecked

from cpmtp.acceptance.verification import VERIFIED, residual_law, verify
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution

CASES = [
    (v, n, seed)
    for v, n, count in (
        (2, 1, 20),
        (5, 1, 20),
        (2, 2, 40),
        (3, 2, 40),
        (2, 3, 30),
        (4, 2, 20),
        (5, 2, 10),
        (3, 3, 10),
        (2, 4, 15),
    )
    for seed in range(count)
]


def allowed(target: torch.Tensor) -> float:
    """What is emitted adds, for every text, products of some sixteen numbers over all paths."""
    return rounding(torch.float64, 16 * target.numel())


@pytest.mark.parametrize("rule", VERIFIED)
def test_what_is_emitted_follows_the_targets_law_exactly(rule):
    assert len(CASES) >= 200
    for vocab, n, seed in CASES:
        target = random_joint(vocab, n + 1, seed, zeros=0.3 * (seed % 2))
        draft = random_joint(vocab, n, seed + 1000, zeros=0.3 * (seed % 3 == 0))
        worst = (emitted_law(target, draft, rule)[0] - target).abs().max().item()
        assert worst <= allowed(target)


@pytest.mark.slow
@pytest.mark.parametrize("rule", VERIFIED)
def test_long_blocks_keep_the_law_too(rule):
    for vocab, n, count in ((3, 4, 20), (4, 3, 20), (5, 3, 10), (4, 4, 3), (5, 4, 1)):
        for seed in range(count):
            target, draft = (
                random_joint(vocab, n + 1, seed, zeros=0.2),
                random_joint(vocab, n, seed + 1, zeros=0.2),
            )
            found = emitted_law(target, draft, rule)[0]
            assert (found - target).abs().max() <= allowed(target)


@pytest.mark.parametrize("rule", VERIFIED)
def test_accepted_lengths_have_the_survival_that_is_implied(rule):
    for vocab, n, seed in CASES[::3]:
        target, draft = (
            random_joint(vocab, n + 1, seed),
            random_joint(vocab, n, seed + 1000, zeros=0.2),
        )
        _, lengths = emitted_law(target, draft, rule)
        reached = 1 - lengths.cumsum(0)[:-1]
        torch.testing.assert_close(
            reached, brute_force_survival(target.sum(-1), draft, rule), atol=allowed(target), rtol=0
        )


@pytest.mark.parametrize("rule", VERIFIED)
def test_a_draft_that_is_the_target_is_accepted_whole(rule):
    p = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True)
    outcome = verify(p, p[:, :2], torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]), rule)
    torch.testing.assert_close(
        outcome.accepted_length_probs[:, -1], torch.ones(4, dtype=torch.float64)
    )


def _with(monkeypatch, change):
    """`verify` as a careless author would write it."""

    def lossy(p, q, path, rule):
        return change(p, q, path, verify(p, q, path, rule), rule)

    monkeypatch.setattr("reference.verify", lossy)


def _correction_from_the_target(p, q, path, outcome, rule):
    # Also what comes out when the correction is discarded and the next call begins with a token of
    # the target's.
    return type(outcome)(outcome.accepted_length_probs, p)


def _draft_law_at_another_temperature(p, q, path, outcome, rule):
    cooler = q**2 / (q**2).sum(-1, keepdim=True)
    return verify(p, cooler, path, rule)


def _acceptance_on_the_product(p, q, path, outcome, rule):
    at = path.unsqueeze(-1)
    ratios = (p[:-1].gather(-1, at) / q.gather(-1, at)).squeeze(-1).cumprod(0).clamp_max(1)
    reached = torch.cat([torch.ones_like(ratios[:1]), ratios.cummin(0).values])
    stopped = torch.cat([reached[:-1] - reached[1:], reached[-1:]])
    return type(outcome)(stopped, torch.cat([residual_law(p[:-1], q), p[-1:]]))


def _greedy_match(p, q, path, outcome, rule):
    matches = (p[:-1].argmax(-1) == path).cumprod(0).sum()
    stopped = torch.nn.functional.one_hot(matches, len(path) + 1).double()
    return type(outcome)(stopped, torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).double())


@pytest.mark.parametrize("rule", VERIFIED)
@pytest.mark.parametrize(
    "change",
    [
        _correction_from_the_target,
        _draft_law_at_another_temperature,
        _acceptance_on_the_product,
        _greedy_match,
    ],
)
def test_a_lossy_variant_breaks_the_law(monkeypatch, change, rule):
    _with(monkeypatch, change)
    errors = [
        (
            emitted_law(random_joint(3, 3, seed), random_joint(3, 2, seed + 50), rule)[0]
            - random_joint(3, 3, seed)
        )
        .abs()
        .max()
        for seed in range(3)
    ]
    assert min(errors) > 1e-3


@pytest.mark.parametrize("rule", VERIFIED)
def test_a_mixture_verified_as_the_product_of_its_marginals_breaks_the_law(monkeypatch, rule):
    target, mixture = random_joint(3, 3, 0), random_draft(3, 2, rank=2, seed=0)
    marginals = torch.stack(JointDistribution(mixture.to_tensor()).marginals())
    found = emitted_law(target, mixture.to_tensor(), rule)[0]
    assert (found - target).abs().max() <= allowed(target)
    _with(monkeypatch, lambda p, q, path, outcome, rule: verify(p, marginals, path, rule))
    assert (emitted_law(target, mixture.to_tensor(), rule)[0] - target).abs().max() > 1e-3


@pytest.mark.parametrize("rule", VERIFIED)
def test_verifying_against_the_sampled_component_keeps_the_law_but_its_block_tokens_give_it_away(
    rule,
):
    target, mixture = random_joint(3, 3, 0), random_draft(3, 2, rank=3, seed=0)
    law, earned = torch.zeros_like(target), torch.zeros((), dtype=torch.float64)
    for a, weight in enumerate(mixture.weights):
        component = CPDistribution(
            torch.ones(1, dtype=torch.float64), [f[:, a : a + 1] for f in mixture.factors]
        )
        emitted, lengths = emitted_law(target, component.to_tensor(), rule)
        law += weight * emitted
        earned += weight * (lengths * torch.arange(3)).sum()
    assert (law - target).abs().max() <= 3 * allowed(target)
    if rule == "block":
        known = (emitted_law(target, mixture.to_tensor(), rule)[1] * torch.arange(3)).sum()
        # Both are exact: nothing but the rule makes the difference.
        assert earned < known - 0.01


def test_a_residual_with_nothing_left_is_the_target():
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(residual_law(p, p), p)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p, q, x: verify(p, q, x, "greedy"), "unknown rule 'greedy'"),
        (lambda p, q, x: verify(q, q, x, "token"), "expected 3 and 2"),
        (lambda p, q, x: unchecked(verify, p, q[..., :1], x, "block"), "one vocabulary"),
    ],
)
def test_bad_input_is_refused(call, said):
    p = torch.full((3, 2), 0.5)
    with pytest.raises(ValueError) as error:
        call(p, p[:2], torch.tensor([0, 1]))
    assert said in str(error.value)
