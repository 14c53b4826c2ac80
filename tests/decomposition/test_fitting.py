"""What every fit promises, whatever its method."""

import pytest
import torch
from rounding import FITTED, kl_rounding, rounding
from samples import peaked_joint

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.restarts import METHODS
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution


def random_joint(vocab: int, horizon: int, seed: int = 0) -> JointDistribution:
    return peaked_joint(vocab, horizon, seed, power=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("horizon", [2, 3, 4])
def test_every_method_gives_a_distribution_whose_objective_is_what_it_says(method, horizon):
    joint = random_joint(6, horizon)
    result = fit(joint, 3, method)
    assert result.status in ("ok", "not_converged")
    allowed = kl_rounding(joint.probs.numel())
    assert result.distribution.to_tensor().sum().item() == pytest.approx(1, abs=allowed)
    assert result.objective == pytest.approx(
        objective_of(method, joint, result.distribution), abs=allowed
    )


def objective_of(method: str, joint: JointDistribution, draft) -> float:
    if method == "acceptance":
        return -implied_acceptance(joint, draft).tokens_per_call
    measured = divergences(joint, draft)
    return measured.kl_nats if method in ("em", "gradient") else measured.relative_frobenius


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_fit_and_more_restarts_never_a_worse_one(method):
    joint = random_joint(6, 3)
    first, again, more = (
        fit(joint, 3, method),
        fit(joint, 3, method),
        fit(joint, 3, method, restarts=3),
    )
    assert torch.equal(first.distribution.to_tensor(), again.distribution.to_tensor())
    assert more.objective <= first.objective + FITTED
    assert more.restart_objectives.shape == (3,)


@pytest.mark.parametrize("method", METHODS)
def test_an_anchored_fit_holds_one_distribution_per_first_token(method):
    joint = random_joint(5, 3)
    result = fit(joint, 2, method, anchored=True)
    assert result.distribution.batch_shape == (5,)
    assert result.distribution.horizon == 2
    assert isinstance(result.objective, float)
    if method in ("em", "gradient", "acceptance"):
        assert objective_of(method, joint, result.distribution) == pytest.approx(
            result.objective, abs=2 * kl_rounding(joint.probs.numel())
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2, "method": "svd"}, "expected one of"),
        ({"rank": 2, "restarts": 0}, "restarts 0"),
        ({"rank": 2, "anchored": True}, "at least 3"),
        ({"rank": 2, "method": "acceptance", "rule": "greedy"}, "token, block or coupling"),
        ({"rank": 2, "method": "acceptance", "first_token": "both"}, "'target' or 'draft'"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit(random_joint(4, 2), **arguments)


def test_an_anchored_draft_cannot_be_asked_for_the_first_token():
    with pytest.raises(ValueError, match="anchored"):
        fit(random_joint(4, 3), 2, "acceptance", anchored=True, first_token="draft")


@pytest.mark.parametrize("method", ["em", "gradient", "als", "acceptance"])
@pytest.mark.parametrize("anchored", [False, True])
def test_a_joint_is_fitted_the_same_whatever_else_is_in_its_batch(method, anchored):
    joints = [random_joint(5, 3, seed) for seed in range(3)]
    together = fit(
        JointDistribution(torch.stack([j.probs for j in joints]), 3),
        3,
        method,
        restarts=2,
        anchored=anchored,
    )
    for place, joint in enumerate(joints):
        alone = fit(joint, 3, method, restarts=2, anchored=anchored)
        torch.testing.assert_close(
            together.distribution[place].to_tensor(),
            alone.distribution.to_tensor(),
            rtol=0,
            atol=FITTED,
        )
        assert together.objective[place].item() == pytest.approx(alone.objective, abs=FITTED)
        assert together.status[place] == alone.status
        torch.testing.assert_close(
            # Cosines of components, which move along flat directions more than their law does.
            together.restart_match_scores[place],
            alone.restart_match_scores,
            rtol=0,
            atol=1e-6,
        )


def test_where_the_target_gives_the_only_token_there_is_nothing_to_climb():
    joint = random_joint(5, 1)
    found = fit(joint, 2, "acceptance")
    assert found.objective == -1.0 and found.status == "ok"
    drafted = fit(joint, 2, "acceptance", first_token="draft")
    assert drafted.objective == pytest.approx(-2.0, abs=1e-6)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("first_token", ["target", "draft"])
def test_maximising_tokens_per_call_never_ends_below_its_em_start(rule, first_token):
    for seed in range(3):
        joint = random_joint(6, 3, seed)
        start = fit(joint, 2, "em", seed=seed, max_iterations=600)
        found = fit(
            joint,
            2,
            "acceptance",
            seed=seed,
            rule=rule,
            first_token=first_token,
            max_iterations=300,
        )
        before = implied_acceptance(
            joint, start.distribution, rule=rule, first_token=first_token
        ).tokens_per_call
        assert -found.objective >= before - 3 * rounding(torch.float64, 4 * 6**3)
