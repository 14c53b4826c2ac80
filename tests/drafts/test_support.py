"""Laws of a support: where the ids are, and that it is nothing but a mask."""

from __future__ import annotations

import pytest
import torch
from unchecked import unchecked

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.drafts.support import Support

RAGGED = Support(
    (torch.tensor([[0, 2, 5], [1, 6, 6]]), torch.tensor([[3, 6], [2, 4]])), vocab_size=6
)


def test_every_id_is_found_at_its_place_and_nothing_else_is():
    for support in (RAGGED, Support.of(torch.tensor([1, 4]), vocab_size=6, positions=2)):
        batch = support.batch_shape
        everything = torch.arange(6).expand(*batch, 6)
        for position in range(2):
            place, there = support.find(position, everything)
            wanted = (everything.unsqueeze(-1) == support.ids[position].unsqueeze(-2)).any(-1)
            assert torch.equal(there, wanted)
            assert torch.equal(support.tokens(position, place)[there], everything[there])


def test_what_is_scattered_is_read_again_and_lies_nowhere_else():
    values = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    wide = RAGGED.scatter(0, values, fill=-1.0)
    assert wide.shape == (2, 4, 6)
    for entry, ids in enumerate(([0, 2, 5], [1])):
        assert torch.equal(wide[entry][:, ids], values[entry, :, : len(ids)])
        others = [t for t in range(6) if t not in ids]
        assert (wide[entry][:, others] == -1).all()


def test_what_a_batch_shares_is_not_copied():
    ids = torch.arange(0, 50, 5)
    support = Support.of(ids, vocab_size=50, positions=3, batch_shape=(1000,))
    assert support.is_shared and support.sizes == (10, 10, 10)
    assert all(part.data_ptr() == ids.data_ptr() for part in support.ids)
    assert not RAGGED.is_shared


def test_positions_and_entries_are_selected():
    assert RAGGED[0].ids[1].tolist() == [3, 6]
    assert RAGGED.part(1).sizes == (2,)
    assert RAGGED.filled(1).tolist() == [[True, False], [True, True]]


def test_all_shapes_of_ids_are_taken():
    one, two = torch.tensor([0, 3]), torch.tensor([[0, 3], [1, 2]])
    assert Support.of(one, vocab_size=4, positions=2).ids[1].tolist() == [0, 3]
    assert Support.of(two, vocab_size=4, positions=2).ids[1].tolist() == [1, 2]
    batched = Support.of(torch.stack([two, two]), vocab_size=4, positions=2, batch_shape=(2,))
    assert batched.ids[0].tolist() == [[0, 3], [0, 3]]
    ragged = Support.of([one, torch.arange(4)], vocab_size=4, positions=2, batch_shape=(3,))
    assert ragged.sizes == (2, 4) and ragged.batch_shape == (3,)


half = torch.full((2, 1), 0.5)
one = torch.ones(1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Support((), 4), "at least one position"),
        (lambda: Support((torch.tensor([2, 1]),), 4), "do not ascend"),
        (lambda: Support((torch.tensor([1, 1]),), 4), "do not ascend"),
        (lambda: Support((torch.tensor([1, 4, 2]),), 4), "do not ascend"),
        (lambda: Support((torch.tensor([4, 4]),), 4), "has no ids"),
        (lambda: Support((torch.tensor([1, 5]),), 4), "expected [0, 4)"),
        (lambda: Support((torch.tensor([-1, 2]),), 4), "expected [0, 4)"),
        (lambda: unchecked(Support, (torch.tensor([0.5]),), 4), "integer ids"),
        (
            lambda: Support.of(torch.zeros(3, 2, 2, dtype=torch.long), vocab_size=4, positions=2),
            "expected (size,)",
        ),
        (
            lambda: Support.of(
                torch.zeros(3, 2, 1, dtype=torch.long),
                vocab_size=4,
                positions=2,
                batch_shape=(2,),
            ),
            "expected (size,)",
        ),
        (lambda: Support.of([torch.tensor([1])], vocab_size=4, positions=2), "expected 2"),
        (
            lambda: CPDistribution(
                one, [half], Support.of(torch.tensor([1, 2]), vocab_size=4, positions=2)
            ),
            "support of 2 positions",
        ),
        (
            lambda: CPDistribution(
                one, [half], Support.of(torch.tensor([0, 1, 2]), vocab_size=4, positions=1)
            ),
            "expected (3, 1)",
        ),
        (
            lambda: CPDistribution(
                one, [half], Support.of(torch.tensor([1, 4]), vocab_size=4, positions=1)
            ),
            "where the support only fills up",
        ),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_was_expected(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert said in str(error.value)


def test_a_markov_mixture_takes_plain_ids_as_its_support():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    left = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    weights, gate = torch.tensor([0.25, 0.75], dtype=torch.float64), torch.ones(2, 3).double()
    ids = torch.tensor([1, 2, 5, 8])
    plain = MarkovMixture(weights, logits, left, right, gate, support=ids)
    given = Support.of(ids, vocab_size=9, positions=3)
    wanted = MarkovMixture(weights, logits, left, right, gate, support=given).to_tensor()
    assert plain.vocab_size == 9 and torch.equal(plain.to_tensor(), wanted)
