"""Left and right factors shared by contexts: what holds between a population and single fits."""

from itertools import pairwise

import pytest
import torch
from rounding import kl_rounding
from samples import RecurrentModel, peaked_joint

from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.forms import markov
from cpmtp.decomposition.forms.population import fit_population
from cpmtp.drafts.divergence import divergences
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.prefix_tree import complete_joint, truncated_joint

CLOSE = {"tolerance": 1e-8, "max_iterations": 2000}
TOKENS = (0, 1, 2, 3)


def dense(horizon: int = 3, vocab: int = 5, tokens=TOKENS) -> list[JointDistribution]:
    lm = RecurrentModel(vocab)
    return [exact_joint(lm, torch.tensor([token, 1]), horizon) for token in tokens]


def trees(horizon: int = 3, vocab: int = 5, tokens=TOKENS) -> list:
    lm = RecurrentModel(vocab)
    return [truncated_joint(lm, torch.tensor([token, 1]), horizon, mass=1.0) for token in tokens]


def planted(seed: int, contexts: int, *, gated: bool, rank: int = 1) -> list[JointDistribution]:
    """Joints of one left and one right factor, everything else of their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = normal(2, 5, 2), 1.5 * normal(2, 2, 5)
    found = []
    for _ in range(contexts):
        gate = normal(2, 2) if gated else None
        weights, logits = normal(rank).softmax(-1), 1.5 * normal(3, rank, 5)
        table = MarkovMixture(weights, logits, left, right, gate).to_tensor()
        found.append(JointDistribution(table / table.sum(), 3))
    return found


@pytest.mark.parametrize("gated", [False, True])
def test_planted_factors_serve_contexts_that_were_not_fitted(gated):
    joints = planted(1, 24, gated=gated)
    population = fit_population(joints[:16], 1, 2, gated=gated, **CLOSE)
    assert population.objective <= 1e-4
    for joint in joints[16:]:
        found = population.refit(joint, **CLOSE)
        assert divergences(joint, found.distribution).kl_nats <= 1e-3
        # Factors of nobody's do not serve: what is free in a context does not make up for them.
        alone = fit(joint, 1)
        assert alone.objective > 10 * found.objective


def test_a_planted_mixture_is_near():
    joints = planted(3, 8, gated=False, rank=2)
    population = fit_population(joints, 2, 2, gated=False, restarts=2, tolerance=1e-6)
    chain = fit_population(joints, 1, 2, gated=False, **CLOSE)
    assert population.form == "markov_mixture"
    assert population.objective <= 0.2 * chain.objective


@pytest.mark.parametrize("make", [dense, trees])
@pytest.mark.parametrize("anchored", [False, True])
def test_a_population_of_one_context_is_its_own_fit(make, anchored):
    (joint,) = make(tokens=(0,))
    population = fit_population([joint], 1, 2, gated=False, anchored=anchored, **CLOSE)
    own = fit(joint, 1, form="markov", transition_rank=2, anchored=anchored, **CLOSE)
    assert population.objective == pytest.approx(own.objective, abs=1e-9)
    assert population.fits[0].objective == pytest.approx(own.objective, abs=1e-9)


@pytest.mark.parametrize("make", [dense, trees])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_contexts_bound_the_population_and_refits_do_not_lose(make, gated, anchored):
    joints = make()
    population = fit_population(joints, 1, 1, gated=gated, anchored=anchored, **CLOSE)
    allowed = kl_rounding(5**3)
    trace = population.trace
    assert all(b <= a + allowed for a, b in pairwise(trace))
    mean = sum(one.objective for one in population.fits) / len(joints)
    assert population.objective == pytest.approx(mean, abs=1e-7)
    for joint, one in zip(joints, population.fits, strict=True):
        again = population.refit(joint, **CLOSE)
        # Both are ends of descents on a convex function; a tolerance of 1e-8 stops them here.
        assert again.objective <= one.objective + 1e-6
        assert again.distribution.transition_rank == 1
        if not gated or anchored:
            # Gates of an anchored context's first tokens are in its own fit, too.
            asked = {"form": "markov", "transition_rank": 1, "anchored": anchored}
            own = fit(joint, 1, gated=gated, restarts=4, **asked, **CLOSE)
            assert one.objective >= own.objective - 1e-3
    cp = fit_population(joints, 1, 0, anchored=anchored)
    assert population.objective <= cp.objective + allowed


def test_trees_of_everything_and_joints_have_one_population():
    asked = {"anchored": True, "gated": True, **CLOSE}
    joint, tree = fit_population(dense(), 1, 2, **asked), fit_population(trees(), 1, 2, **asked)
    assert tree.objective == pytest.approx(joint.objective, abs=1e-4)
    assert tree.left.shape == joint.left.shape and tree.right.shape == joint.right.shape


def test_a_transition_rank_of_zero_is_cp():
    joints = dense()
    population = fit_population(joints, 2, 0)
    singles = [fit(joint, 2).objective for joint in joints]
    assert [one.objective for one in population.fits] == singles
    assert population.form == "cp" and population.shared_numbers == 0
    assert population.refit(joints[0]).objective == singles[0]


def test_more_contexts_cost_each_of_them():
    joints = dense(tokens=range(5))
    mean = [
        sum(
            one.objective
            for one in fit_population(joints[:count], 1, 1, gated=False, **CLOSE).fits[:2]
        )
        for count in (2, 5)
    ]
    assert mean[1] >= mean[0] - 1e-6


def test_members_in_parts_are_fitted_as_all_at_once(monkeypatch):
    joints = [peaked_joint(4, 3, power=3), *dense(vocab=4, tokens=(0, 1))]
    asked = {"anchored": True, "max_iterations": 20}
    whole = fit_population(joints, 1, 2, **asked)
    monkeypatch.setattr(markov, "_AT_ONCE", 40)
    parts = fit_population(joints, 1, 2, **asked)
    assert parts.objective == pytest.approx(whole.objective, abs=1e-9)


def test_tokens_that_no_context_has_have_no_factors():
    lm = RecurrentModel(9)
    joints = [complete_joint(lm, torch.tensor([token]), 3, top_k=2) for token in (0, 1)]
    population = fit_population(joints, 1, 2, gated=False)
    there = torch.cat([joint.prefixes(3).flatten() for joint in joints]).unique()
    missing = [token for token in range(9) if token not in there.tolist()]
    assert missing and not bool(population.left[:, missing].any())
    assert not bool(population.right[..., missing].any())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: fit_population([]), "at least one context"),
        (lambda: fit_population([dense()[0], trees()[0]]), "expected one kind"),
        (lambda: fit_population(dense(), form="hmm"), "expected cp, markov or"),
        (lambda: fit_population(dense(), 2, 4, form="markov"), "exactly 1 for 'markov'"),
        (lambda: fit_population(dense(), 1, 4, form="cp"), "expected 0 for 'cp'"),
        (lambda: fit_population(dense(), method="acceptance"), "expected em, gradient"),
        (lambda: fit_population(dense(2), anchored=True), "at least 3 tokens"),
    ],
)
def test_what_means_nothing_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        asked()
