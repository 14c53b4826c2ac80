"""Left and right factors from text: what they are is known where they were planted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cpmtp.decomposition.descent.text_factors import TextPairs, scaled, text_factors

VOCAB, WIDTH, POSITIONS = 12, 2, 240


def _planted(seed: int = 0, strength: float = 1.5) -> TextPairs:
    """Positions whose corrections are those of a matrix of low rank, over supports of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows, size = 4, 6
    left = strength * torch.randn(VOCAB, WIDTH, generator=generator)
    right = torch.randn(VOCAB, WIDTH, generator=generator)
    before = torch.rand(POSITIONS, VOCAB, generator=generator).topk(rows).indices
    after = torch.rand(POSITIONS, VOCAB, generator=generator).topk(size).indices.sort().values
    logits = torch.randn(POSITIONS, 1, size, generator=generator) + left[before] @ right[after].mT
    mass = torch.rand(POSITIONS, rows, 1, generator=generator)
    probs = (mass / mass.sum(1, keepdim=True)) * logits.softmax(-1)
    return TextPairs(before, after, probs)


def _divergence(pairs: TextPairs, logits, left, right) -> torch.Tensor:
    """Mean over positions, written out."""
    probs = pairs.probs.double()
    bias = left[pairs.before] @ right[pairs.after].mT
    log_q = (logits[:, None] + bias).log_softmax(-1)
    conditional = probs / probs.sum(-1, keepdim=True)
    return (torch.special.xlogy(probs, conditional) - probs * log_q).sum() / len(pairs)


def _best_logits(pairs: TextPairs, left, right) -> torch.Tensor:
    """Of every position, by autograd."""
    logits = pairs.probs.double().sum(1).log().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = _divergence(pairs, logits, left, right)
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach()


def test_planted_factors_explain_positions_that_were_not_seen():
    """What is stored is judged where everything else is free; without it much is missed."""
    pairs = _planted()
    seen, unseen = pairs[: POSITIONS // 2], pairs[POSITIONS // 2 :]
    left, right, trace = text_factors(seen, VOCAB, WIDTH, steps=250, batch=60)
    left, right = left[0], right[0].mT
    nothing = torch.zeros_like(left)
    found, without = (
        _divergence(unseen, _best_logits(unseen, part, right), part, right)
        for part in (left, nothing)
    )
    assert float(found) < 0.03 * float(without)
    assert float(trace[-20:].mean()) < 0.03 * float(trace[0])


def test_where_the_descent_ends_there_is_no_slope_left():
    """By autograd in double precision, with the best logits of every position."""
    pairs = _planted(seed=1, strength=3.0)
    slopes = []
    for steps in (1, 300):
        left, right, _ = text_factors(pairs, VOCAB, 1, steps=steps, batch=POSITIONS, rate=0.1)
        parts = [part.requires_grad_() for part in (left[0], right[0].mT.clone())]
        logits = _best_logits(pairs, *(part.detach() for part in parts))
        found = torch.autograd.grad(_divergence(pairs, logits, *parts), parts)
        slopes.append(max(float(part.abs().max()) for part in found))
    assert slopes[1] < 0.01 * slopes[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_scaling_never_raises_the_divergence_and_ends_at_the_best_logits(seed):
    """Against autograd, from a poor start."""
    pairs = _planted(seed)[:5]
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    right = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    probs, bias = pairs.probs.double(), left[pairs.before] @ right[pairs.after].mT
    logits = torch.randn(probs.shape[0], probs.shape[2], generator=generator, dtype=torch.float64)
    values = []
    for _ in range(400):
        values.append(float(_divergence(pairs, logits, left, right)))
        logits = scaled(logits, bias, probs, 1)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    best = float(_divergence(pairs, _best_logits(pairs, left, right), left, right))
    assert values[-1] == pytest.approx(best, abs=1e-6)


def test_pairs_hold_every_row_over_its_positions_support():
    """Against tables filled entry by entry."""
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(7, VOCAB, generator=generator).topk(3).indices
    after = torch.rand(7, 3, VOCAB, generator=generator).topk(4).indices
    mass, share = (torch.rand(*shape, generator=generator) for shape in ((7, 3), (7, 3, 4)))
    pairs = TextPairs.of(before, mass, after, share)
    for place in range(7):
        assert pairs.probs[place].sum() == pytest.approx(1.0, abs=1e-6)
        table = torch.zeros(3, VOCAB)
        for row in range(3):
            whole = share[place, row] / share[place, row].sum() * mass[place, row]
            table[row, after[place, row]] = whole / mass[place].sum()
        filled = torch.zeros(3, VOCAB).index_add_(1, pairs.after[place], pairs.probs[place])
        assert torch.allclose(filled, table, atol=1e-6)


def test_the_same_seed_gives_the_same_factors_and_unseen_tokens_have_none():
    """Tokens that no position has are zero on both sides."""
    pairs = _planted()
    first, second = (text_factors(pairs, VOCAB + 3, 2, steps=5, batch=16) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not first[0][:, VOCAB:].any() and not first[1][..., VOCAB:].any()
    assert first[0][:, :VOCAB].any()
