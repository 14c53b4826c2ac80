"""The losses of a head: equal to their naive versions, and to what the exact joint says of the same
draft.
"""

from __future__ import annotations

import pytest
import torch
from reference import brute_force_survival
from rounding import rounding

from cpmtp.drafts.protocol import as_draft
from cpmtp.heads import losses as head_objectives
from cpmtp.heads.cp_head import CPHead
from cpmtp.heads.evaluation import head_draft
from cpmtp.heads.losses import head_loss
from cpmtp.joint_distribution import JointDistribution, exact_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.training.new_models import new_llama

SHAPES = [
    {},
    {"anchored": True, "blocks": 1},
    {"anchored": True},
    {"form": "markov", "rank": 1, "transition_rank": 2, "anchored": True},
    {"form": "markov_mixture", "transition_rank": 2},
    {"form": "recurrent", "rank": 1, "anchored": True},
    {"form": "recurrent", "rank": 1},
    {"form": "recurrent", "rank": 1, "anchored": True, "vocabulary": (0, 1, 3, 4)},
    {"form": "markov_mixture", "transition_rank": 2, "anchored": True, "vocabulary": (0, 1, 3, 4)},
    {"rank": 3, "anchored": True, "vocabulary": (0, 1, 3, 4)},
]
WHOLE = [shape for shape in SHAPES if "vocabulary" not in shape]
# Logits add 96 products, of absolute values that come to ten or less; of two tokens and of the
# target's own, in single precision.
NATS = 3 * 10 * rounding(torch.float32, 96)


@pytest.fixture(scope="module")
def lm() -> HuggingFaceLanguageModel:
    model = new_llama(5, width=96, layers=1, window=64, seed=0)
    generator = torch.Generator().manual_seed(1)
    # Its own unembedding, large enough to be far from uniform.
    model.lm_head.weight = torch.nn.Parameter(0.15 * torch.randn(5, 96, generator=generator))
    return HuggingFaceLanguageModel(model)


def a_head(lm, *, horizon=3, rank=2, **shape) -> CPHead:
    torch.manual_seed(1)
    head = CPHead(hidden_size=96, vocab_size=5, horizon=horizon, rank=rank, **shape).attach(lm)
    for parameter in head.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape)
    return head


def a_window(lm, rows=2, length=12):
    tokens = lm.sample_tokens(rows, length, seed=3)
    return lm.hidden_states(tokens), tokens


def dense(draft) -> JointDistribution:
    """All probabilities, of an anchored draft with an axis for the first token."""
    if isinstance(draft, JointDistribution):
        return draft
    return JointDistribution(draft.to_tensor(), draft.horizon)


def drafts(lm, head, tokens):
    """At every position that has a whole horizon after it: the head's law of all tokens given the
    context.
    """
    for row in tokens:
        for t in range(1, len(row) - head.horizon + 1):
            yield row[:t], row[t : t + head.horizon], head_draft(lm, head, row[:t])


@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_likelihood_is_the_mean_negative_log_probability_of_what_came(lm, shape):
    head = a_head(lm, **shape)
    hidden, tokens = a_window(lm)
    found = []
    for _, path, draft in drafts(lm, head, tokens):
        joint = draft if isinstance(draft, JointDistribution) else dense(draft)
        found.append(-joint.probs[tuple(path)].log())
    loss = head_loss(head, hidden, tokens, lm.unembed, objective="likelihood").loss
    assert loss.item() == pytest.approx(torch.stack(found).mean().item(), abs=NATS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distillation_is_the_divergence_from_the_targets_own_conditionals(lm, shape):
    head = a_head(lm, **shape)
    hidden, tokens = a_window(lm)
    found = []
    for context, path, draft in drafts(lm, head, tokens):
        for k in range(1, head.horizon):
            p = lm.next_token_log_probs(torch.cat([context, path[:k]])[None])[0].double().exp()
            known = as_draft(draft)[path[0].item()] if head.anchored else as_draft(draft)
            prefix = path[int(head.anchored) : k][None]
            q = known.following(prefix, told=not head.anchored)[0]
            # Only what can be drafted counts, and only after what can be.
            if head.vocabulary is not None and not torch.isin(path[1:k], head.kept).all():
                continue
            found.append((p * (p.log() - q.log()))[head.kept].sum())
    expected = torch.stack(found).sum() / (len(tokens) * (tokens.shape[1] - head.horizon))
    loss = head_loss(head, hidden, tokens, lm.unembed, objective="distillation").loss
    assert loss.item() == pytest.approx(expected.item(), abs=NATS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_survival_is_unbiased_for_the_exact_block_survival(lm, shape):
    head, context = a_head(lm, **shape), torch.tensor([1, 2, 3, 4, 0, 1])
    joint = exact_joint(lm, context, horizon=3)
    drafted = dense(head_draft(lm, head, context)).probs  # (vocab, vocab, vocab)
    if head.anchored:
        drafted = joint.prefix_probs(1)[:, None, None] * drafted
    exact = brute_force_survival(joint.probs, drafted, "block", "target")
    # Every continuation of the context, weighted by its probability, seen at the context's last
    # position alone.
    total = torch.zeros(3, dtype=torch.float64)
    paths = torch.cartesian_prod(*[torch.arange(5)] * 3)
    for path in paths:
        tokens = torch.cat([context, path])[None]
        last, hidden = tokens[:, -4:], lm.hidden_states(tokens)[:, -4:]
        survival = head_loss(head, hidden, last, lm.unembed).survival
        total += joint.probs[tuple(path)] * survival.double()
    assert (total - exact).abs().max() <= NATS


@pytest.mark.parametrize("objective", head_objectives.OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_give_the_gradients_of_the_whole(lm, shape, objective, monkeypatch):
    hidden, tokens = a_window(lm)
    weight = lm.unembedding.double()
    gradients = []
    for size in (1 << 22, 128):
        monkeypatch.setattr(head_objectives, "_LOGITS_AT_ONCE", size)
        head = a_head(lm, **shape).double()
        loss = head_loss(
            head, hidden.double(), tokens, lambda h: h @ weight.T, objective=objective, balance=0.0
        ).loss
        loss.backward()
        gradients.append([p.grad for p in head.parameters() if p.requires_grad])
    # Chunks are added up in single precision, whatever the head's: the sum of twenty positions.
    allowed = rounding(torch.float32, 20)
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, atol=allowed * whole.abs().max().item(), rtol=0)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])


@pytest.mark.parametrize("objective", head_objectives.OBJECTIVES)
def test_gradients_agree_with_finite_differences(lm, objective):
    head = a_head(lm, anchored=True).double()
    head.attach_weights(lm.unembedding.double(), lm.embedding.double())
    hidden, tokens = a_window(lm, rows=1, length=6)
    hidden = hidden.double()

    def loss(maps):
        with torch.no_grad():
            head.maps.copy_(maps)
        return head_loss(
            head, hidden, tokens, lambda h: lm.unembed(h.float()).double(), objective=objective
        ).loss

    loss(head.maps.detach().clone()).backward()
    step = torch.zeros_like(head.maps).flatten()
    generator = torch.Generator().manual_seed(0)
    start, length = head.maps.detach().clone(), 1e-4
    for index in torch.randint(len(step), (6,), generator=generator):
        step.zero_()[index] = length
        with torch.no_grad():
            ends = loss(start + step.view_as(start)), loss(start - step.view_as(start))
            slope = (ends[0] - ends[1]).item() / (2 * length)
        # Differences over two steps are off by a sixth of the third derivative times its square.
        assert head.maps.grad.flatten()[index].item() == pytest.approx(slope, abs=100 * length**2)


def test_balance_is_zero_for_equal_weights_and_positive_otherwise(lm):
    hidden, tokens = a_window(lm)
    torch.manual_seed(0)
    head = CPHead(hidden_size=96, vocab_size=5, horizon=3, rank=2).attach(lm)

    def cost():
        losses = [
            head_loss(head, hidden, tokens, lm.unembed, balance=b).loss.item() for b in (0.0, 1.0)
        ]
        return losses[1] - losses[0]

    # Two losses of some five nats, rounded a few times after what they share.
    assert cost() == pytest.approx(0, abs=2 * 5 * rounding(torch.float32, 8))
    head.mixture.bias.data[0] = 5.0
    assert cost() > 0.5


def test_an_unknown_objective_and_a_short_window_are_refused(lm):
    hidden, tokens = a_window(lm, length=4)
    with pytest.raises(ValueError, match="unknown objective"):
        head_loss(a_head(lm), hidden, tokens, lm.unembed, objective="luck")
    with pytest.raises(ValueError, match="windows of 3 tokens"):
        head_loss(a_head(lm), hidden[:, :3], tokens[:, :3], lm.unembed)
