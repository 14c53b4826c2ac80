"""A tree laid flat attends exactly as its branches would one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding

from cpmtp import tree_attention
from cpmtp.tree_attention import attend_in_tree, lay_out_tree


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=20))
def test_every_continuation_can_be_read_back_from_its_last_token(rows):
    continuations = torch.tensor(rows)
    tree = lay_out_tree(continuations)
    last = tree.lineage[-len(rows) :]
    torch.testing.assert_close(tree.token_ids[last], continuations)
    assert tree.depths[last].equal(torch.arange(3).expand(len(rows), -1))


def test_sorted_continuations_lay_out_each_shared_beginning_once():
    tree = lay_out_tree(torch.cartesian_prod(*[torch.arange(4)] * 3))
    assert len(tree.token_ids) == 4 + 16 + 64


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("block, at_once", [(1, 1), (3, 1 << 21), (32, 1), (32, 1 << 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tree_attention_is_attention_along_each_branch(groups, block, at_once, dtype, monkeypatch):
    monkeypatch.setattr(tree_attention, "_LEAST_BLOCK", block)
    monkeypatch.setattr(tree_attention, "_KEYS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    tree = lay_out_tree(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 3], [6, 2, 3]]))
    tokens, seen = len(tree.token_ids), 5
    query = torch.randn(1, 6, tokens, 8, generator=generator, dtype=dtype)
    key, value = (
        torch.randn(1, groups, seen + tokens, 8, generator=generator, dtype=dtype) for _ in range(2)
    )
    found = attend_in_tree(query, key, value, tree.attention_mask(seen), 0.5)
    for token in range(tokens):
        own = tree.lineage[token][tree.lineage[token] >= 0] + seen
        sees = torch.cat([torch.arange(seen), own])
        k, v = (part[0, :, sees].repeat_interleave(6 // groups, 0) for part in (key, value))
        law = (0.5 * query[0, :, token, None] * k).sum(-1).softmax(-1)
        # Scores of at most 16 add eight products, and means as many values as are seen, at most 4.
        torch.testing.assert_close(
            found[0, token],
            (law[..., None] * v).sum(1),
            atol=4 * rounding(dtype, 16 * (8 + 4) + 8),
            rtol=0,
        )
