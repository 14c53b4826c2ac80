"""A complete joint is the dense one under the same law, all but 1e-9 of it, over any vocabulary."""

from __future__ import annotations

import pytest
import torch
from rounding import rounding
from samples import BrokenModel, RecurrentModel

from cpmtp.joint_distribution import exact_joint
from cpmtp.prefix_tree import complete_joint, truncated_joint
from cpmtp.pretrained import HuggingFaceLanguageModel
from cpmtp.sampling_law import SamplingLaw
from cpmtp.training.new_models import new_llama

CONTEXT = torch.tensor([1, 0, 2])
LAWS = [
    {"top_k": 3},
    {"top_k": 4, "temperature": 0.5},
    {"top_k": 5, "top_p": 0.8},
    {"top_p": 0.7},
    {"temperature": 0.0},
    {},
]


def as_dense(tree) -> torch.Tensor:
    """The tree's sequences in a tensor of all."""
    joint = torch.zeros((tree.vocab_size,) * tree.horizon, dtype=torch.float64)
    joint[tuple(tree.prefixes(tree.horizon).T)] = tree.levels[-1].probs
    return joint


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_it_is_the_dense_joint_under_the_same_law(law, horizon):
    lm = RecurrentModel(7)
    tree = complete_joint(lm, CONTEXT, horizon, **law)
    dense = exact_joint(lm, CONTEXT, horizon, **law).probs
    torch.testing.assert_close(as_dense(tree), dense, atol=1e-9, rtol=0)
    assert tree.is_complete and tree.mass[-1] >= 1 - 1e-9 and tree.law == SamplingLaw(**law)
    one_by_one = [tuple(path) for path in tree.prefixes(horizon).tolist()]
    assert tuple(tree.greedy_path.tolist()) in one_by_one


@pytest.mark.parametrize("law", LAWS[:3])
def test_a_truncated_joint_that_keeps_everything_is_the_complete_one(law):
    lm = RecurrentModel(7)
    whole = truncated_joint(lm, CONTEXT, 3, mass=1.0, **law)
    torch.testing.assert_close(
        as_dense(whole), as_dense(complete_joint(lm, CONTEXT, 3, **law)), atol=1e-9, rtol=0
    )
    assert whole.is_complete
    assert not truncated_joint(lm, CONTEXT, 3, mass=0.5, **law).is_complete


def test_prefixes_that_nobody_will_miss_are_not_expanded():
    lm = RecurrentModel(7)
    sharp = complete_joint(lm, CONTEXT, 4, top_k=6, temperature=0.1)
    assert sharp.is_complete and sharp.expanded_nodes < 1 + 6 + 36 + 216
    dense = exact_joint(lm, CONTEXT, 4, top_k=6, temperature=0.1).probs
    assert (as_dense(sharp) - dense).abs().sum() <= 1e-9
    for length, level in enumerate(sharp.levels, 1):
        assert len(level.parent_entropies) == len(level.parents.unique())
        assert len(sharp.expanded_prefixes(length - 1)) == len(level.parent_entropies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_logits_reduced_where_they_are_made_are_those_of_full_passes(dtype):
    # Over 3,001 tokens groups of entries are looked at; in half precision many logits tie.
    model = new_llama(3001, width=32, layers=2, window=64, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    lm = HuggingFaceLanguageModel(model.to(dtype), name="random")
    tree = complete_joint(lm, CONTEXT, 3, top_k=6)
    assert lm.shares_prefixes
    for length, level in enumerate(tree.levels, 1):
        parents = tree.expanded_prefixes(length - 1)
        rows = torch.cat([CONTEXT.expand(len(parents), -1), parents], 1)
        laws = tree.law.process_log_probs(lm.next_token_log_probs(rows).double()).exp()
        where = torch.cat([torch.zeros(1).long(), (level.parents.diff() != 0).cumsum(0)])
        found = torch.zeros_like(laws).index_put((where, level.tokens), level.conditionals)
        gaps = 0.5 * (found - laws).abs().sum(1)
        if dtype == torch.float32:
            assert gaps.max() <= lm.trials.outcomes["tree", None].allowed
            continue
        # A logit of half precision may come out next to the other one: then ties differ, too.
        assert gaps.median() <= 0.05 and len(level) > 0.9 * 6**length


@pytest.mark.parametrize(("vocab", "top_k"), [(7000, 16), (6411, 50), (3000, 5), (300, 20), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_a_law_keeps_are_those_it_gives_mass(vocab, top_k, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(20, vocab, generator=generator)).to(dtype)
    logits[:, ::3] = -torch.inf
    for law in (SamplingLaw(0.7, top_k), SamplingLaw(0.0), SamplingLaw(1.3)):
        kept = law.kept_tokens(logits, vocab)
        expected = law.process_log_probs(logits.double().log_softmax(-1)).exp()
        wide = torch.zeros(20, vocab + 1, dtype=torch.float64)
        found = wide.scatter(1, kept.tokens, kept.probs)[:, :-1]
        allowed = rounding(torch.float64, vocab)
        torch.testing.assert_close(found, expected, atol=allowed, rtol=0)
        rises = kept.tokens.diff(dim=1) > 0
        assert bool((rises | (kept.tokens[:, 1:] == vocab)).all())
        few = law.kept_tokens(logits, 3)
        best = expected.sort(1, descending=True).values[:, : few.probs.shape[1]]
        torch.testing.assert_close(
            few.probs.sort(1, descending=True).values, best, atol=allowed, rtol=0
        )
        torch.testing.assert_close(few.entropies, kept.entropies)


@pytest.mark.parametrize("law", [{"top_k": 2}, {}])
def test_broken_weights_are_refused(law):
    with pytest.raises(ValueError, match="NaN or infinite"):
        complete_joint(BrokenModel(), CONTEXT, 2, **law)


def test_what_may_not_fit_is_refused_before_it_is_computed():
    asked = []
    with pytest.raises(ValueError, match=r"lower top_k or the horizon, or use truncated_joint"):
        complete_joint(
            RecurrentModel(40), CONTEXT, 4, top_k=30, max_bytes=10**6, progress=asked.append
        )
    assert asked == [1, 30]
    with pytest.raises(ValueError, match="top_k 41 over a vocabulary of 40 tokens"):
        complete_joint(RecurrentModel(40), CONTEXT, 2, top_k=41)
    with pytest.raises(ValueError, match="horizon 0: expected at least 1"):
        complete_joint(RecurrentModel(40), CONTEXT, 0, top_k=4)
