"""Laws that every form obeys, and where one form is another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from random_drafts import FORMS, WIDTH, random_draft, random_form
from reference_drafts import naive_tensor
from rounding import rounding
from scipy.stats import chi2
from unchecked import unchecked

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.joint_distribution import exact_joint
from cpmtp.language_model import MarkovLanguageModel
from cpmtp.sampling_law import SamplingLaw

# Products of at most 4 times as many factors as these tests have tokens, each a quotient of sums of
# six exponentials, and exponents that add three products; logarithms and back again.
ROUNDING = 64 * rounding(torch.float64, 64)
LAWS = [SamplingLaw(), SamplingLaw(0.7), SamplingLaw(0.0), SamplingLaw(top_k=2, top_p=0.9)]
forms = pytest.mark.parametrize("form", FORMS)
supports = pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some tokens"])


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=ROUNDING)


@forms
@pytest.mark.parametrize(
    ("vocab", "horizon", "rank"), [(1, 1, 1), (4, 1, 3), (3, 2, 1), (3, 3, 2), (2, 4, 3)]
)
def test_the_tensor_is_the_definition_and_sums_to_one(form, vocab, horizon, rank):
    draft = random_form(form, vocab, horizon, rank, seed=vocab + rank)
    close(draft.to_tensor(), naive_tensor(draft))
    assert draft.to_tensor().sum().item() == pytest.approx(1)


@forms
@supports
def test_log_probabilities_and_marginals_read_the_tensor(form, some):
    draft = random_form(form, 4, 3, 2, seed=1, batch=(2,), some=some)
    table = draft.to_tensor()
    tokens = torch.cartesian_prod(*[torch.arange(4)] * 3).expand(2, -1, -1)
    close(draft.log_prob(tokens).exp(), table.flatten(1))
    close(draft[1].log_prob(tokens[1]).exp(), table[1].flatten())
    for length in (1, 2):
        expected = table.flatten(1 + length).sum(-1)
        close(draft.prefix_probs(length), expected)
        close(draft.marginal(length).to_tensor(), expected)
        close(
            draft.log_prob(tokens[..., :length]).exp(),
            expected.flatten(1).repeat_interleave(4 ** (3 - length), 1),
        )


@forms
@supports
@pytest.mark.parametrize("own", [False, True])
def test_conditioning_obeys_the_chain_rule(form, some, own):
    draft = random_form(form, 4, 4, 2, seed=2, batch=(3,), some=some, own=own)
    first = draft.sample(1, seed=0)[:, 0, :2]  # a prefix that has mass
    for length in (0, 1, 2):
        prefix = first[:, :length]
        rest, mass = draft.condition(prefix), draft.log_prob(prefix).exp()
        assert type(rest) is type(draft) and rest.horizon == 4 - length
        table = torch.stack([t[tuple(p)] for t, p in zip(draft.to_tensor(), prefix, strict=True)])
        close(mass[:, *[None] * (4 - length)] * rest.to_tensor(), table)
        close(rest.prefix_probs(1), draft.next_token_probs(prefix))
        assert repr(rest).startswith(type(draft).__name__) and len(repr(rest)) < 120


@forms
def test_after_an_impossible_prefix_the_components_keep_their_prior(form):
    draft = random_form(form, 3, 3, 2, seed=3)
    never = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    if form == "markov_mixture":
        logits = draft.logits.clone()
        logits[0, :, 0] = -torch.inf
        draft = MarkovMixture(draft.weights, logits, draft.left, draft.right, draft.gate)
        after = draft.condition(torch.tensor([0]))
        close(after.weights, draft.weights)  # and the token before still counts
        bias = (draft.left[0, 0] * draft.gate[0]) @ draft.right[0]
        close(after.logits[0], draft.logits[1] + bias)
    else:
        factors = [draft.factors[0] * never[:, None], *draft.factors[1:]]
        factors[0] = factors[0] / factors[0].sum(0)
        others = (draft.transitions,) if form == "hmm" else ()
        draft = type(draft)(draft.weights, *others, factors)
        moved = draft.weights @ draft.transitions[0] if form == "hmm" else draft.weights
        close(draft.condition(torch.tensor([0])).weights, moved)
    table = torch.cat(list(next(draft.prefix_tables(never / 2, anchored=False)).pieces(1)), -2)
    told = torch.stack([draft.following(torch.tensor([[x]]), told=True)[0] for x in range(3)])
    close(table, told * (never / 2)[:, None])


def g_statistic(draft, law: torch.Tensor) -> float:
    """Of 20,000 samples under a law, and never a token where it has no mass."""
    tokens = draft.sample(20_000, seed=1)
    assert torch.equal(tokens, draft.sample(20_000, seed=1))
    where = (tokens * law.shape[-1] ** torch.arange(law.ndim - 1, -1, -1)).sum(-1)
    counts = torch.bincount(where, minlength=law.numel()).double()
    assert (law.flatten()[counts > 0] > 0).all()
    expected = law.flatten() * 20_000
    return 2 * torch.special.xlogy(counts, counts / expected).nansum().item()


@forms
@supports
def test_samples_follow_the_log_probabilities_and_no_other_draft(form, some):
    draft = random_form(form, 4, 3, 2, seed=4, some=some)
    law = draft.to_tensor()
    bound = chi2.ppf(0.999, int((law > 0).sum()) - 1)
    assert g_statistic(draft, law) < bound
    # One tenth of a share of another draft over the same tokens would be seen.
    other = replace(draft, weights=draft.weights.flip(0))
    mixed = 0.9 * law + 0.1 * other.to_tensor()
    assert g_statistic(draft, mixed) > bound


@forms
def test_samples_of_a_batch_come_from_their_own_entry(form):
    draft = random_form(form, 4, 3, 2, seed=5, batch=(2,), some=True)
    tokens = draft.sample(50, seed=0)
    assert tokens.shape == (2, 50, 3)
    assert torch.isfinite(draft.log_prob(tokens)).all()


@forms
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_support_is_a_mask(form, batch):
    draft = random_form(form, 6, 3, 2, seed=6, batch=batch, some=True)
    masked = draft.without_support()
    assert masked.support is None and draft.vocab_size == masked.vocab_size == 6
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (*batch, 40, 3), generator=generator)
    assert torch.equal(draft.to_tensor(), masked.to_tensor())
    inside = torch.zeros(*batch, 6, 6, 6, dtype=torch.bool)
    for entry in itertools.product(*map(range, batch)):
        ids = [[t for t in part[entry].tolist() if t < 6] for part in draft.support.ids]
        inside[(*entry, *torch.meshgrid(*map(torch.tensor, ids), indexing="ij"))] = True
    assert torch.equal(draft.to_tensor() > 0, inside)
    for length in (1, 2, 3):
        close(
            draft.log_prob(tokens[..., :length]).exp(), masked.log_prob(tokens[..., :length]).exp()
        )
    prefix = tokens[..., 0, :1]
    close(draft.condition(prefix).to_tensor(), masked.condition(prefix).to_tensor())
    close(draft.next_token_probs(prefix), masked.next_token_probs(prefix))
    close(draft.posterior_after_first(), masked.posterior_after_first())
    counted = sum(int(part) for part in draft.support.sizes)
    assert draft.free_numbers < masked.free_numbers and counted == 9


@forms
@supports
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_children_are_read_without_a_table_as_with_one(form, some, law):
    draft = random_form(form, 6, 3, 2, seed=7, some=some)
    everything = torch.arange(6)
    for prefixes in (
        torch.zeros(1, 0, dtype=torch.long),
        everything[:, None],
        torch.cartesian_prod(everything, everything),
    ):
        row = torch.arange(len(prefixes)).repeat_interleave(6).flip(0)
        tokens = everything.repeat(len(prefixes))
        for told in (True, False):
            dense = law.process(draft.following(prefixes, told=told))
            found = draft.child_probs(prefixes, row, tokens, law=law, told=told)
            close(found, dense[row, tokens])
    assert draft.proposes(everything[:, None], told=True).all()


@forms
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_tables_are_the_joint_in_any_pieces_and_by_any_row(form, anchored, own):
    vocab, batch = 3, (2,)
    lead = (*batch, vocab) if anchored else batch
    draft = random_form(form, vocab, 4 - anchored, 2, seed=8, batch=lead, own=own)
    first = torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.6, 0.4]], dtype=torch.float64)
    whole = draft.to_tensor()
    if anchored:
        whole = first[..., None, None, None] * whole
    else:
        own_first = draft.prefix_probs(1)
        whole = (first / own_first)[..., None, None, None] * whole
    for length, table in enumerate(draft.prefix_tables(first, anchored=anchored), 2):
        expected = whole.flatten(1 + length).sum(-1) if length < 4 else whole
        expected = expected.reshape(*lead, -1, vocab)
        for size in (1, 2, 100):
            close(torch.cat(list(table.pieces(size)), -2), expected)
        rows = expected.flatten(1, -2)
        for number in range(rows.shape[1]):
            prefix = torch.tensor([number, rows.shape[1] - 1 - number])
            close(table.row(prefix, 1).squeeze(-2), rows[torch.arange(2), prefix])


def test_without_a_transition_a_markov_mixture_is_a_cp_distribution():
    numbers = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    none = torch.zeros(1, 4, 0, dtype=torch.float64)
    draft = MarkovMixture(weights, numbers, none, none.mT, torch.zeros(2, 0, dtype=torch.float64))
    same = CPDistribution(weights, numbers.softmax(-1).mT.unbind(0))
    assert (draft.to_tensor() - same.to_tensor()).abs().max() <= 1e-12
    prefix = torch.tensor([2])
    rest = (draft.condition(prefix).to_tensor(), same.condition(prefix).to_tensor())
    assert (rest[0] - rest[1]).abs().max() <= 1e-12
    assert draft.free_numbers == same.free_numbers == 1 + 3 * 2 * 3
    assert draft.shared_numbers == 0 and draft.serial_steps() == same.serial_steps() == 1
    # A gate of zeros takes the transition away, and a gate of ones does not.
    full = random_form("markov_mixture", 4, 3, 2, seed=9)
    off = MarkovMixture(weights, numbers, full.left, full.right, torch.zeros_like(full.gate))
    on = MarkovMixture(weights, numbers, full.left, full.right)
    assert (off.to_tensor() - same.to_tensor()).abs().max() <= 1e-12
    assert (on.to_tensor() - same.to_tensor()).abs().max() > 1e-3


def test_a_hidden_state_that_never_changes_makes_a_cp_distribution():
    cp = random_draft(3, 4, 2, 0)
    still = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    close(HMMDistribution(cp.weights, still, cp.factors).to_tensor(), cp.to_tensor())


def by_the_middle_state(hmm: HMMDistribution) -> CPDistribution:
    """The CP distribution of the same rank over three tokens."""
    into, out = hmm.transitions
    middle = hmm.weights @ into
    first = hmm.factors[0] @ (hmm.weights[:, None] * into / middle)  # given the state after it
    return CPDistribution(middle, [first, hmm.factors[1], hmm.factors[2] @ out.T])


def test_over_three_tokens_a_hidden_markov_draft_is_a_cp_distribution_of_its_rank():
    hmm = random_form("hmm", 5, 3, 3, seed=1)
    close(by_the_middle_state(hmm).to_tensor(), hmm.to_tensor())
    # Over four it is none: the unfolding {1, 3} | {2, 4} of a CP distribution has its rank.
    longer = random_form("hmm", 5, 4, 2, seed=1)
    unfolded = longer.to_tensor().permute(0, 2, 1, 3).reshape(25, 25)
    of_cp = random_draft(5, 4, 2, 1).to_tensor().permute(0, 2, 1, 3).reshape(25, 25)
    assert torch.linalg.matrix_rank(of_cp) == 2 < torch.linalg.matrix_rank(unfolded)


def test_one_component_of_full_transition_rank_is_a_markov_chain():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(-1)
    chain = MarkovLanguageModel(table[0], table[1:])
    one = torch.ones(1, dtype=torch.float64)
    logits = torch.stack([table[0].log(), *torch.zeros(2, 4, dtype=torch.float64)])[:, None]
    draft = MarkovMixture(
        one, logits, torch.eye(4, dtype=torch.float64)[None], table[1:].log()[None]
    )
    joint = exact_joint(chain, torch.zeros(0, dtype=torch.long), 3)
    close(draft.to_tensor(), joint.probs)


def test_what_a_bias_makes_all_but_impossible_is_still_exact():
    # Component 0 emits token 0 alone, which the bias disfavours by 2,000 nats.
    logits = torch.zeros(2, 2, 3, dtype=torch.float64)
    logits[1, 0, 1:] = -torch.inf
    left = torch.full((1, 3, 1), 2000.0, dtype=torch.float64)
    right = torch.tensor([[[-1.0, 0.0, 0.0]]], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    draft = MarkovMixture(half, logits, left, right)
    expected = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) / 3
    close(draft.to_tensor(), expected.expand(3, 3))
    close(draft.following(torch.tensor([[0]]), told=True)[0], 3 * expected)
    close(draft.log_prob(torch.tensor([[1, 0], [1, 2]])).exp(), expected[[0, 2]])
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    longer = MarkovMixture(half, torch.cat([logits, logits[1:]]), left, right)
    close(longer.to_tensor(), naive_tensor(longer))
    (table,) = itertools.islice(longer.prefix_tables(third, anchored=False), 1)
    close(table.grown().sum(-1), (expected.expand(3, 3)).flatten())


def test_free_and_shared_numbers_are_those_of_the_study():
    # V = 104 and two modelled tokens after a known one.
    assert random_form("cp", 104, 2, 2, 0).free_numbers == 413
    one = torch.ones(1, dtype=torch.float64)
    logits, left = torch.zeros(2, 1, 104), torch.zeros(1, 104, 64)
    shared = MarkovMixture(one, logits, left, left.mT)
    gated = MarkovMixture(one, logits, left, left.mT, torch.full((1, 64), 0.5))
    assert (shared.free_numbers, gated.free_numbers) == (206, 270)
    assert shared.shared_numbers == gated.shared_numbers == 2 * 64 * 104
    assert gated.serial_steps() == 2 and gated.serial_steps(SamplingLaw(0.5)) == 2
    own = random_form("markov_mixture", 6, 3, 2, 0, batch=(4,), own=True)
    assert own.shared_numbers == 0
    assert own.free_numbers == 1 + 3 * 2 * 5 + 2 * WIDTH * (6 + 6 - WIDTH)
    assert random_form("hmm", 5, 3, 2, 0).free_numbers == 1 + 3 * 2 * 4 + 2 * 2


half, none = torch.full((2, 1), 0.5), torch.zeros(1, 2, 0)
flat, one = torch.zeros(2, 1, 2), torch.ones(1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: unchecked(MarkovMixture, one, flat[:, :, :1], none, none.mT),
            "logits has shape (2, 1, 1)",
        ),
        (lambda: MarkovMixture(one, flat, none.expand(3, 2, 0), none.mT), "left has shape"),
        (lambda: MarkovMixture(2 * one, flat, none, none.mT), "must sum to 1"),
        (lambda: MarkovMixture(one, flat - torch.inf, none, none.mT), "a finite logit"),
        (lambda: MarkovMixture(one, flat / 0, none, none.mT), "a finite logit"),
        (lambda: MarkovMixture(one, flat, none, none.mT)[0], "no batch axes"),
        (lambda: HMMDistribution(one, torch.ones(2, 1, 1), [half] * 2), "expected (1, 1, 1)"),
        (lambda: HMMDistribution(one, torch.zeros(1, 1, 1), [half] * 2), "must sum to 1"),
        (lambda: HMMDistribution(one, torch.ones(1, 1, 1), [half] * 2)[0], "no batch axes"),
        (
            lambda: MarkovMixture(
                one, flat, torch.full((1, 2, 1), torch.nan), torch.zeros(1, 1, 2)
            ),
            "left has an entry",
        ),
    ],
)
def test_bad_input_says_what_was_expected(make, said):
    with pytest.raises((ValueError, IndexError)) as error:
        make()
    assert said in str(error.value)
