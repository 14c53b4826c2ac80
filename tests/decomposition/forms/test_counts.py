"""Expected counts and their divergences against the joint written out."""

import pytest
import torch
from rounding import kl_rounding

from cpmtp.decomposition.forms import likelihood
from cpmtp.decomposition.forms.chains import Chains, chain_counts, surprise
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.forms.hmm import Hidden, hidden_counts
from cpmtp.decomposition.forms.likelihood import HalvedTargets

EVERYTHING = ("weights", "logits", "gate", "left", "right")


def groups_of(vocab: int, positions: int, groups: int, members: int) -> Groups:
    generator = torch.Generator().manual_seed(vocab + positions)
    shape = (groups, members, *(vocab,) * positions)
    probs = torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    mass = torch.rand(groups, members, generator=generator, dtype=torch.float64)
    flat = probs.flatten(2)
    probs = (flat / flat.sum(-1, keepdim=True)).reshape(shape)
    return Groups(probs, mass / mass.sum(1, keepdim=True))


def chains_for(groups: Groups, runs: int, rank: int, width: int) -> Chains:
    generator = torch.Generator().manual_seed(rank)
    members, positions, vocab = groups.mass.shape[1], groups.positions, groups.vocab

    def normal(*shape):
        return torch.randn(runs, *shape, generator=generator, dtype=torch.float64)

    return Chains(
        normal(members, rank),
        normal(members, positions, rank, vocab),
        normal(members, positions - 1, width),
        normal(positions - 1, vocab, width),
        normal(positions - 1, width, vocab),
    )


def written_out(groups: Groups, owner: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """``KL(P || Q)`` of every run, members by their masses."""
    probs = groups.probs[owner]
    terms = (probs * (probs.log() - model.log())).flatten(2).sum(2)
    return (groups.mass[owner] * terms).sum(1)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("positions", [1, 2, 3, 4, 5])
def test_a_divergence_and_its_gradient_are_those_of_the_table(positions, rank, members):
    groups, owner = groups_of(4, positions, 2, members), torch.tensor([0, 1, 1])
    chains = chains_for(groups, 3, rank, 2)
    counts = chain_counts(groups, owner, chains)
    vectors = chains.packed(EVERYTHING).requires_grad_()
    value = written_out(groups, owner, chains.unpacked(vectors, EVERYTHING).dense())
    (slope,) = torch.autograd.grad(value.sum(), vectors)

    allowed = kl_rounding(groups.probs[0].numel(), 20.0)
    assert (counts.kl - value).abs().max() <= allowed
    found = surprise(counts, chains)[1].packed(EVERYTHING)
    assert (found - slope).abs().max() <= 100 * allowed


@pytest.mark.parametrize("positions", [2, 4, 5])
def test_hidden_counts_are_probabilities_of_states_and_moves(positions):
    groups, owner = groups_of(4, positions, 2, 1), torch.tensor([0, 1, 1])
    vocab, rank = 4, 3
    generator = torch.Generator().manual_seed(0)
    shapes = [(rank,), (positions - 1, rank, rank), (positions, rank, vocab)]
    hidden = Hidden(
        *(torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    )
    rows = vocab ** (positions // 2)
    targets = HalvedTargets(groups.probs.reshape(2, 1, rows, -1), groups.negative_entropy)
    counts = hidden_counts(targets, owner, hidden)
    value = written_out(groups, owner, hidden.dense())
    allowed = kl_rounding(vocab**positions, 20.0)
    assert (counts.kl - value).abs().max() <= allowed
    for part in (counts.weights, counts.transitions.flatten(2), counts.factors.flatten(2)):
        assert (part.sum(-1) - 1).abs().max() <= allowed


def test_blocks_of_any_size_give_the_same(monkeypatch):
    groups, owner = groups_of(4, 4, 2, 2), torch.tensor([0, 1, 1])
    chains = chains_for(groups, 3, 2, 2)
    whole = chain_counts(groups, owner, chains)
    for block in (1, 40, 700):
        monkeypatch.setattr(likelihood, "_BLOCK", block)
        parts = chain_counts(groups, owner, chains)
        assert (parts.kl - whole.kl).abs().max() <= kl_rounding(512, 20.0)
        assert (parts.pairs - whole.pairs).abs().max() <= kl_rounding(512, 20.0)
