"""Chains whose logits an unembedding can make, against dense tables and autograd."""

from __future__ import annotations

import pytest
import torch
from samples import RecurrentModel

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.trees.readout import fit_readout
from cpmtp.drafts.divergence import divergences
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.prefix_tree import complete_joint

VOCAB, WIDTH = 7, 3


def _given(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((VOCAB, WIDTH), (1, VOCAB, 2), (1, 2, VOCAB))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _joints(horizon: int = 3):
    lm, context = RecurrentModel(VOCAB), torch.tensor([1, 0, 2])
    return complete_joint(lm, context, horizon), exact_joint(lm, context, horizon).probs


def _reference(probs, unembedding, left, right) -> float:
    """What follows each first token, by autograd over all vectors at once; mean divergence."""
    first = probs.sum((1, 2))  # (vocab,)
    later = probs / first[:, None, None]  # (vocab, vocab, vocab)
    vectors = torch.zeros(2, VOCAB, unembedding.shape[1], dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([vectors], max_iter=500, line_search_fn="strong_wolfe")

    def divergence():
        logits = vectors @ unembedding.mT  # (2, first token, vocab)
        start = logits[0].log_softmax(-1)
        table = (logits[1][:, None] + left[0] @ right[0]).log_softmax(-1)
        log_q = start[:, :, None] + table
        return (first * (later * (later.log() - log_q)).sum((1, 2))).sum()

    def closure():
        optimiser.zero_grad()
        loss = divergence()
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(divergence().detach())


@pytest.mark.parametrize("with_transitions", [False, True])
def test_the_divergence_is_that_of_autograd(with_transitions):
    """Dense, over the whole vocabulary."""
    unembedding, left, right = _given()
    if not with_transitions:
        left, right = 0 * left, 0 * right
    tree, probs = _joints()
    given = (left, right) if with_transitions else None
    _, kl = fit_readout(tree, unembedding, transitions=given, passes=60, least_mass=0.0)
    assert kl == pytest.approx(_reference(probs, unembedding, left, right), rel=1e-5)


def test_an_unembedding_as_wide_as_the_vocabulary_takes_nothing_away():
    """Then any logits are products; and those of the library's own fit are as good."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(VOCAB, VOCAB + 2, generator=generator, dtype=torch.float64)
    tree, _ = _joints()
    given = tuple(_given()[1:])
    how = {"transitions": given, "passes": 80, "least_mass": 0.0}
    of_wide, of_any = (fit_readout(tree, matrix, **how)[1] for matrix in (wide, None))
    own = fit(tree, 1, form="markov", transitions=given, anchored=True)
    assert of_wide == pytest.approx(of_any, rel=1e-4)
    assert own.objective == pytest.approx(of_any, rel=1e-3)


def test_a_narrow_unembedding_costs_divergence_and_the_draft_says_so():
    """The divergence returned is the draft's, and a wider one costs less."""
    tree, probs = _joints()
    joint = JointDistribution(probs, 3)
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    drafts = [fit_readout(tree, matrix[:, :d], passes=60, least_mass=0.0) for d in (1, 3, 6)]
    values = [kl for _, kl in drafts]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 1e-3
    for draft, kl in drafts:
        earned = implied_acceptance(tree, draft)
        assert 1.0 < earned.tokens_per_call_lower <= 3.0
        assert kl == pytest.approx(float(divergences(joint, draft).kl_nats), abs=1e-9)
