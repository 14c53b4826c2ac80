"""What fits of every form promise."""

import pytest
import torch
from planted_forms import hidden_markov, joints, markov_mixture
from rounding import kl_rounding
from samples import peaked_joint

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition import restarts
from cpmtp.decomposition.fitting import fit, fit_path
from cpmtp.decomposition.forms import solving
from cpmtp.drafts.divergence import divergences
from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.joint_distribution import JointDistribution

FORMS = {
    "markov": {"rank": 1, "transition_rank": 2},
    "markov_mixture": {"rank": 2, "transition_rank": 1},
    "hmm": {"rank": 2},
}
METHODS = ("em", "gradient", "acceptance")
FEW = {"max_iterations": 8}


def objective_of(method: str, joint, draft) -> float:
    if method == "acceptance":
        return -implied_acceptance(joint, draft).tokens_per_call
    return divergences(joint, draft).kl_nats


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_the_objective_is_what_it_says_never_rises_and_never_above_cp(form, method, anchored):
    joint = peaked_joint(4, 5 if form == "hmm" and anchored else 4, power=4)
    found = fit(joint, method=method, form=form, anchored=anchored, **FORMS[form], **FEW)
    allowed = 4 * kl_rounding(joint.probs.numel())
    assert found.objective == pytest.approx(
        objective_of(method, joint, found.distribution), abs=allowed
    )
    assert all(b <= a + allowed for a, b in zip(found.trace, found.trace[1:], strict=False))
    cp = fit(joint, FORMS[form]["rank"], method, anchored=anchored, **FEW)
    assert found.objective <= cp.objective + allowed
    assert found.distribution.batch_shape == ((4,) if anchored else ())


@pytest.mark.parametrize("method", METHODS)
def test_a_mixture_is_never_above_its_chain_nor_a_rank_above_a_smaller_one(method):
    joint = peaked_joint(4, 3, power=4)
    chain = fit(joint, 1, method, form="markov", transition_rank=1, **FEW)
    path = fit_path(joint, [1, 2, 3], method, form="markov_mixture", transition_rank=1, **FEW)
    values = [one.objective for one in path]
    allowed = 4 * kl_rounding(joint.probs.numel())
    assert values == sorted(values, reverse=True)
    assert all(value <= chain.objective + allowed for value in values)
    assert [one.distribution.rank for one in path] == [1, 2, 3]


def test_the_full_chain_of_a_joint_is_its_neighbours_conditionals():
    joint = peaked_joint(5, 4, batch=(2,), power=6)
    found = fit(joint, 1, form="markov", transition_rank="full")
    pairs = joint.probs.sum(-1).sum(-1), joint.probs.sum((-4, -1)), joint.probs.sum((-4, -3))
    chain = pairs[0]
    for pair in pairs[1:]:
        chain = chain.unsqueeze(-1) * (pair / pair.sum(-1, keepdim=True)).reshape(
            2, *(1,) * (chain.ndim - 2), 5, 5
        )
    allowed = kl_rounding(joint.probs.numel())
    assert (found.distribution.to_tensor() - chain).abs().max() <= allowed
    assert found.status == ("ok", "ok")


def test_what_never_follows_stays_impossible():
    ring = torch.eye(4, dtype=torch.float64).roll(1, 1)
    probs = torch.einsum("u,uv,vw->uvw", torch.full((4,), 0.25, dtype=torch.float64), ring, ring)
    probs[3] = 0.0
    joint = JointDistribution(probs / probs.sum())
    for form, sizes in FORMS.items():
        found = fit(joint, form=form, **sizes)
        assert not found.distribution.to_tensor().isnan().any()
        # Token 3 is never first, and token 0 never second: no form gives them anything.
        assert float(found.distribution.prefix_probs(1)[3]) <= 1e-12
    full = fit(joint, 1, form="markov", transition_rank="full")
    assert full.objective <= kl_rounding(64)


def test_up_to_three_tokens_a_hidden_markov_fit_is_the_cp_fit():
    joint = peaked_joint(5, 3, power=4)
    found, cp = fit(joint, 3, form="hmm"), fit(joint, 3)
    assert isinstance(found.distribution, HMMDistribution)
    assert found.objective == cp.objective
    difference = found.distribution.to_tensor() - cp.distribution.to_tensor()
    assert difference.abs().max() <= kl_rounding(125)


def test_first_tokens_share_left_and_right_factors_and_a_gate_helps():
    joint = peaked_joint(5, 3, batch=(2,), power=4)
    asked = {"form": "markov", "transition_rank": 2, "anchored": True, "method": "gradient"}
    plain, gated = fit(joint, 1, **asked), fit(joint, 1, gated=True, **asked)
    left = gated.distribution.left
    assert left.shape == (2, 5, 1, 5, 2)
    assert torch.equal(left, left[:, :1].expand_as(left))
    assert not torch.equal(left[0], left[1])
    assert bool((gated.objective < plain.objective - 1e-3).all())
    assert bool((plain.distribution.gate == 1).all())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_given_transitions_stay_as_they_are(anchored, gated):
    joint = peaked_joint(4, 3, power=4)
    positions = 2 if anchored else 3
    other = markov_mixture(1, 4, positions, 1, 2)
    found = fit(
        joint,
        2,
        form="markov_mixture",
        transitions=(other.left, other.right),
        gated=gated,
        anchored=anchored,
    )
    assert torch.equal(found.distribution.left, other.left)
    assert torch.equal(found.distribution.right, other.right)
    assert bool((found.distribution.gate == 1).all()) != gated
    allowed = kl_rounding(64)
    assert found.objective == pytest.approx(
        divergences(joint, found.distribution).kl_nats, abs=allowed
    )
    if gated:  # a gate of zeros is a CP distribution
        assert found.objective <= fit(joint, 2, anchored=anchored).objective + allowed


def test_a_draft_with_given_transitions_is_found_again():
    true = markov_mixture(0, 5, 3, 2, 2)
    joint = joints([true])
    found = fit(
        joint,
        2,
        "gradient",
        form="markov_mixture",
        transitions=(true.left, true.right),
        tolerance=1e-8,
    )
    assert float(found.objective) <= 1e-5


def test_large_joints_are_begun_on_their_noticeable_tokens(monkeypatch):
    joint = peaked_joint(8, 3, power=12)
    asked = {"form": "markov_mixture", "transition_rank": 2, "max_iterations": 20}
    for module in (restarts, solving):
        monkeypatch.setattr(module, "CORE_FROM", 1)
    monkeypatch.setattr(restarts, "_LOST_PER_NAT", 2e-2)
    for anchored in (False, True):
        found = fit(joint, 2, anchored=anchored, **asked)
        assert found.objective == pytest.approx(
            divergences(joint, found.distribution).kl_nats, abs=kl_rounding(512)
        )
        assert found.objective < fit(joint, 2, anchored=anchored).objective


@pytest.mark.parametrize(
    ("form", "plant", "sizes"),
    [
        ("markov_mixture", markov_mixture(3, 4, 3, 3, 3), {"rank": 2, "transition_rank": 1}),
        ("hmm", hidden_markov(3, 3, 4, 3), {"rank": 2}),
    ],
)
def test_the_end_is_flat_and_as_low_as_a_search_by_autograd(form, plant, sizes):
    joint = joints([plant])
    effort = {"restarts": 2, "tolerance": 1e-11, "max_iterations": 500}
    found = fit(joint, method="gradient", form=form, **sizes, **effort)
    draft = found.distribution
    if isinstance(draft, MarkovMixture):
        parts = [draft.weights.log(), draft.logits, draft.left, draft.right]
    else:
        factors = torch.stack([factor.mT for factor in draft.factors], 1)  # (1, positions, …)
        parts = [draft.weights.log(), draft.transitions.log(), factors.log()]
    parts = [part.clamp_min(-60.0).requires_grad_() for part in parts]
    slopes = torch.autograd.grad(divergence(joint, parts), parts)
    assert max(float(slope.abs().max()) for slope in slopes) <= 1e-4
    lowest = searched(joint, parts)
    assert float(found.objective) <= lowest + 1e-4
    # Expectation-maximisation comes as low, if more slowly.
    by_em = fit(joint, form=form, max_iterations=80, **sizes)
    assert float(by_em.objective) <= lowest + 1e-3


def divergence(joint: JointDistribution, parts: list[torch.Tensor]) -> torch.Tensor:
    """Of a Markov mixture's parts (weights, logits, left, right), or a hidden Markov
    distribution's (weights, transitions, factors), written out.
    """
    weights = parts[0].softmax(-1)
    if len(parts) == 4:
        (_, logits, left, right), first = parts, parts[1][0, 0].softmax(-1)
        model = torch.einsum("a,au->ua", weights[0], first)
        for i in range(1, joint.horizon):
            table = (logits[0, i].unsqueeze(-2) + left[0, i - 1] @ right[0, i - 1]).softmax(-1)
            model = torch.einsum("...ua,auv->...uva", model, table)
    else:
        moves, factors = parts[1].softmax(-1)[0], parts[2].softmax(-1)[0]
        model = torch.einsum("z,zv->vz", weights[0], factors[0])
        for i in range(1, joint.horizon):
            model = torch.einsum("...y,yz,zv->...vz", model, moves[i - 1], factors[i])
    model = model.sum(-1)
    return (joint.probs[0] * (joint.probs[0].log() - model.log())).sum()


def searched(joint: JointDistribution, like: list[torch.Tensor]) -> float:
    """The least divergence that L-BFGS on the table finds from three random starts."""
    best = torch.inf
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.randn(part.shape, generator=generator, dtype=torch.float64).requires_grad_()
            for part in like
        ]
        search = torch.optim.LBFGS(parts, max_iter=150, line_search_fn="strong_wolfe")

        def closure(parts=parts, search=search):
            search.zero_grad()
            value = divergence(joint, parts)
            value.backward()
            return value

        search.step(closure)
        best = min(best, divergence(joint, parts).item())
    return best


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"form": "tree"}, "expected one of cp, markov"),
        ({"form": "markov", "rank": 2, "transition_rank": 1}, "rank 2 for form 'markov'"),
        ({"form": "markov_mixture"}, "at least 1, or 'full'"),
        ({"form": "markov_mixture", "transition_rank": "half"}, "at least 1, or 'full'"),
        ({"form": "markov", "transition_rank": 1, "gated": True}, "gates say nothing"),
        ({"form": "hmm", "transition_rank": 1}, "it has none"),
        ({"transition_rank": 1}, "it has none"),
        ({"form": "hmm", "method": "als"}, "method 'als' for form 'hmm'"),
        ({"form": "hmm", "method": "gradient", "load_balancing": 1.0}, "only 'cp' has it"),
        (
            {"form": "markov", "transitions": (torch.ones(1, 4, 2), torch.ones(1, 2, 3))},
            "transitions of shapes",
        ),
    ],
)
def test_what_means_nothing_is_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit(peaked_joint(4, 3), **({"rank": 1} | arguments))
