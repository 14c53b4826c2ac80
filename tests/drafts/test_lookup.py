"""Prompt lookup: what is proposed, and that it is a draft like any other."""

from __future__ import annotations

import itertools

import pytest
import torch

from cpmtp.drafts.lookup import LookupDraft, looked_up
from cpmtp.sampling_law import SamplingLaw

TEXT = [1, 2, 3, 0, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("text", "length", "options", "found"),
    [
        ([1, 2, 3, 1, 2], 2, {}, [3, 1]),
        ([1, 2, 3, 1, 2], 9, {}, [3, 1, 2]),  # up to the end of the text
        ([1, 2, 3, 0, 2, 1, 2], 2, {}, [3, 0]),  # the longer match, though another is later
        ([1, 2, 3, 0, 2, 1, 2], 2, {"max_ngram": 1}, [1, 2]),
        ([1, 2, 0, 1, 2, 3, 1, 2], 1, {}, [3]),  # of equally long ones the latest
        ([1, 2, 3], 2, {}, []),
        ([1, 2, 3, 2], 2, {"min_ngram": 2}, []),
        ([1, 1], 2, {}, [1]),  # occurrences may overlap
        ([1], 2, {}, []),
        ([], 2, {}, []),
    ],
)
def test_the_longest_and_then_the_latest_match_decides(text, length, options, found):
    assert looked_up(torch.tensor(text, dtype=torch.long), length, **options).tolist() == found


def test_conditionals_follow_the_path_and_say_nothing_beside_it():
    draft = LookupDraft(torch.tensor(TEXT), vocab_size=4, horizon=3)
    for told in (True, False):
        # Told 3 the text ends as before with 1, 2, 3: then 0, 2. Told 0, with 0: then 2, 3.
        path = {True: {3: [3, 0, 2], 0: [0, 2, 3]}, False: {3: [3, 0, 2]}}[told]
        for length in (1, 2):
            prefixes = torch.tensor(list(itertools.product(range(4), repeat=length)))
            found = draft.following(prefixes, told=told)
            proposes = draft.proposes(prefixes, told=told)
            for prefix, row, says in zip(prefixes.tolist(), found, proposes, strict=True):
                if prefix[0] in path and path[prefix[0]][:length] == prefix:
                    assert says and row.nonzero()[:, 0].tolist() == [path[prefix[0]][length]]
                    assert row.sum() == 1
                elif not told or prefix[0] in path:
                    assert not says and (row == 0).all()
            everything = torch.arange(4).repeat(len(prefixes))
            row = torch.arange(len(prefixes)).repeat_interleave(4)
            for law in (SamplingLaw(), SamplingLaw(0.5, top_k=2)):
                read = draft.child_probs(prefixes, row, everything, law=law, told=told)
                assert torch.equal(read.reshape(-1, 4), found)


@pytest.mark.parametrize("told", [True, False])
def test_tables_are_the_products_of_the_conditionals(told):
    draft = LookupDraft(torch.tensor(TEXT), vocab_size=4, horizon=3)
    first = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    everything = torch.arange(4)[:, None]
    nothing = torch.zeros(1, 0, dtype=torch.long)
    joint = first if told else draft.following(nothing, told=False)[0]
    tables = draft.prefix_tables(first if told else None, anchored=False)
    if not told:
        assert torch.equal(torch.cat(list(next(tables).pieces(1)))[0], joint)
    prefixes = everything
    for table in tables:
        expected = joint.flatten()[:, None] * draft.following(prefixes, told=told)
        for size in (1, 3, 100):
            assert torch.equal(torch.cat(list(table.pieces(size))), expected)
        for number in range(len(prefixes)):
            assert torch.equal(table.row(torch.tensor(number), 0)[0], expected[number])
        joint = expected
        prefixes = torch.tensor(list(itertools.product(*[range(4)] * (prefixes.shape[1] + 1))))


def test_it_costs_and_learns_nothing():
    draft = LookupDraft(torch.tensor(TEXT), vocab_size=4, horizon=3)
    assert (draft.free_numbers, draft.shared_numbers, draft.serial_steps(SamplingLaw(0.5))) == (
        0,
        0,
        1,
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LookupDraft(torch.tensor([0]), 4, 0), "expected at least 1"),
        (lambda: LookupDraft(torch.tensor([0]), 4, 2, max_ngram=1, min_ngram=2), "no fewer"),
        (lambda: LookupDraft(torch.tensor([4]), 4, 2), "[0, 4)"),
        (lambda: LookupDraft(torch.tensor([0]), 4, 2)[0], "no batch axes"),
    ],
)
def test_bad_input_says_what_was_expected(make, said):
    with pytest.raises((ValueError, IndexError)) as error:
        make()
    assert said in str(error.value)
