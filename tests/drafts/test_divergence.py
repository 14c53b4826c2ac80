"""Laws of the divergences, held against plain sums over the whole joint."""

import math

import pytest
import torch
from random_drafts import FORMS, random_form
from rounding import kl_rounding, rounding

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution


def random_simplex(*shape: int, seed: int, dim: int = -1) -> torch.Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values / values.sum(dim, keepdim=True)


def random_joint(
    vocab: int, horizon: int, seed: int, batch: tuple[int, ...] = ()
) -> JointDistribution:
    return JointDistribution(
        random_simplex(*batch, vocab**horizon, seed=seed).reshape(*batch, *(vocab,) * horizon),
        horizon,
    )


def random_cp(
    vocab: int, horizon: int, rank: int, seed: int, batch: tuple[int, ...] = ()
) -> CPDistribution:
    factors = [
        random_simplex(*batch, vocab, rank, seed=seed + 1 + i, dim=-2) for i in range(horizon)
    ]
    return CPDistribution(random_simplex(*batch, rank, seed=seed), tuple(factors))


def naive(p: torch.Tensor, q: torch.Tensor) -> list[float]:
    pairs = list(zip(p.flatten().tolist(), q.flatten().tolist(), strict=True))
    kl = sum(a * (math.log(a / b) if b > 0 else math.inf) for a, b in pairs if a > 0)
    frobenius = math.sqrt(sum((a - b) ** 2 for a, b in pairs) / sum(a * a for a, _ in pairs))
    hellinger = math.sqrt(0.5 * sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in pairs))
    return [kl, 0.5 * sum(abs(a - b) for a, b in pairs), frobenius, hellinger]


def as_list(result) -> list[float]:
    return [result.kl_nats, result.total_variation, result.relative_frobenius, result.hellinger]


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_divergences_equal_plain_sums(horizon):
    joint, draft = random_joint(5, horizon, seed=1), random_cp(5, horizon, 3, seed=2)
    assert as_list(divergences(joint, draft)) == pytest.approx(
        naive(joint.probs, draft.to_tensor()), abs=2 * kl_rounding(5**horizon)
    )


def test_a_dense_draft_is_compared_as_it_is():
    joint, draft = random_joint(4, 3, seed=1), random_joint(4, 3, seed=2)
    assert as_list(divergences(joint, draft)) == pytest.approx(
        naive(joint.probs, draft.probs), abs=2 * kl_rounding(4**3)
    )


def test_an_anchored_draft_takes_the_first_token_from_the_target():
    joint, draft = random_joint(4, 3, seed=1), random_cp(4, 2, 2, seed=3, batch=(4,))
    whole = joint.prefix_probs(1)[:, None, None] * draft.to_tensor()
    assert as_list(divergences(joint, draft)) == pytest.approx(
        naive(joint.probs, whole), abs=2 * kl_rounding(4**3)
    )
    dense = JointDistribution(draft.to_tensor(), 2)
    assert as_list(divergences(joint, dense)) == pytest.approx(
        naive(joint.probs, whole), abs=2 * kl_rounding(4**3)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", [False, True])
def test_every_form_is_compared_as_its_tensor(form, some):
    joint, draft = random_joint(4, 3, seed=1), random_form(form, 4, 3, 2, seed=2, some=some)
    assert as_list(divergences(joint, draft)) == pytest.approx(
        naive(joint.probs, draft.to_tensor()), abs=2 * kl_rounding(4**3)
    )


@pytest.mark.parametrize("anchored", [False, True])
def test_a_batch_gives_what_its_entries_give_alone(anchored):
    joint = random_joint(4, 3, seed=1, batch=(2, 3))
    draft = (
        random_cp(4, 2, 2, seed=3, batch=(2, 3, 4))
        if anchored
        else random_cp(4, 3, 2, seed=3, batch=(2, 3))
    )
    together = torch.stack(as_list(divergences(joint, draft)), -1)
    for i in range(2):
        for j in range(3):
            alone = as_list(divergences(JointDistribution(joint.probs[i, j]), draft[i, j]))
            assert together[i, j].tolist() == pytest.approx(alone, abs=2 * kl_rounding(4**3))


def test_the_target_itself_is_at_distance_zero():
    draft = random_cp(5, 3, 2, seed=4)
    found = divergences(JointDistribution(draft.to_tensor()), draft)
    # Products of three and their sum of two, in another order, are all that differs.
    allowed = 2 * rounding(torch.float64, 2 + 3)
    assert found.kl_nats <= 2 * kl_rounding(5**3)
    assert max(found.total_variation, found.relative_frobenius, found.hellinger) <= allowed


def test_zeros_never_give_nan():
    target = torch.tensor([[0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)
    same_support = JointDistribution(torch.tensor([[0.25, 0.0], [0.75, 0.0]], dtype=torch.float64))
    excluding = JointDistribution(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    joint = JointDistribution(target)
    assert as_list(divergences(joint, same_support)) == pytest.approx(
        naive(target, same_support.probs)
    )
    assert divergences(joint, excluding).kl_nats == math.inf
    assert divergences(joint, excluding).total_variation == 0.5


def test_total_variation_lies_between_its_hellinger_bounds_and_below_pinsker():
    for seed in range(20):
        result = divergences(random_joint(5, 2, seed=seed), random_cp(5, 2, 2, seed=100 + seed))
        assert result.hellinger**2 <= result.total_variation <= math.sqrt(2) * result.hellinger
        assert result.total_variation <= math.sqrt(result.kl_nats / 2)


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        (random_cp(5, 3, 2, seed=0), "vocabular"),
        (random_cp(4, 2, 2, seed=0), "horizon"),
        (random_cp(4, 4, 2, seed=0), "horizon"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_in_words(draft, words):
    with pytest.raises(ValueError, match=words):
        divergences(random_joint(4, 3, seed=0), draft)
