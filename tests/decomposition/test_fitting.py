"""What every fit promises, whatever its method."""

import math

import pytest
import torch

from cpmtp.decomposition.fitting import METHODS, fit
from cpmtp.divergence import divergences
from cpmtp.joint_distribution import JointDistribution


def random_joint(vocab: int, horizon: int, seed: int = 0) -> JointDistribution:
    values = torch.rand((vocab,) * horizon, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    return JointDistribution(values / values.sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("horizon", [2, 3, 4])
def test_every_method_gives_a_distribution_whose_objective_is_what_it_says(method, horizon):
    joint = random_joint(6, horizon)
    result = fit(joint, 3, method)
    assert result.status in ("ok", "not_converged")
    assert result.distribution.to_tensor().sum().item() == pytest.approx(1, abs=1e-9)
    measured = divergences(joint, result.distribution)
    expected = measured.kl_nats if method in ("em", "gradient") else measured.relative_frobenius
    assert result.objective == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_fit_and_more_restarts_never_a_worse_one(method):
    joint = random_joint(6, 3)
    first, again, more = fit(joint, 3, method), fit(joint, 3, method), fit(joint, 3, method, restarts=3)
    assert torch.equal(first.distribution.to_tensor(), again.distribution.to_tensor())
    assert more.objective <= first.objective + 1e-12
    assert more.restart_objectives.shape == (3,)


@pytest.mark.parametrize("method", METHODS)
def test_an_anchored_fit_holds_one_distribution_per_first_token(method):
    joint = random_joint(5, 3)
    result = fit(joint, 2, method, anchored=True)
    assert result.distribution.batch_shape == (5,)
    assert result.distribution.horizon == 2
    assert isinstance(result.objective, float)
    if method in ("em", "gradient"):
        assert divergences(joint, result.distribution).kl_nats == pytest.approx(result.objective, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2, "method": "svd"}, "expected one of"),
        ({"rank": 2, "restarts": 0}, "restarts 0"),
        ({"rank": 2, "anchored": True}, "at least 3"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit(random_joint(4, 2), **arguments)


@pytest.mark.parametrize("method", ["als", "hals"])
def test_a_fit_that_fails_gives_the_product_of_the_marginals_and_says_why(method, monkeypatch):
    import numpy as np

    from cpmtp.decomposition import als

    def singular(*_):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(als, "_decompose", singular)
    joint = random_joint(4, 3)
    result = fit(joint, 3, method)
    assert result.status == "failed"
    assert "Singular matrix" in result.message
    assert result.objective == math.inf
    first, second, third = joint.marginals()
    assert torch.allclose(result.distribution.to_tensor(), first[:, None, None] * second[:, None] * third)
