"""What other tests rest on: allowances that rounding keeps to, counts that tell laws apart."""

from __future__ import annotations

import math

import pytest
import torch
from chances import assert_share
from rounding import kl_rounding, rounding
from unchecked import unchecked

from cpmtp.sampling_law import entropy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_product_and_a_sum_keep_to_their_allowance_in_any_order(dtype, size):
    generator = torch.Generator().manual_seed(size)
    terms = (torch.rand(size, generator=generator, dtype=torch.float64) - 0.4).to(dtype)
    exact, absolute = math.fsum(terms.tolist()), math.fsum(terms.abs().tolist())
    for order in (terms, terms.flip(0), terms.sort().values, terms.abs().sort().indices):
        numbers = order if order.dtype == dtype else terms[order]
        one_by_one = torch.zeros((), dtype=dtype)
        for number in numbers:
            one_by_one = one_by_one + number
        for total in (one_by_one, numbers.sum()):
            assert abs(total.item() - exact) <= rounding(dtype, size) * absolute
    factors = 1 + terms / size
    assert factors.prod().item() == pytest.approx(
        math.prod(factors.tolist()), rel=rounding(dtype, size) + rounding(torch.float64, size)
    )


def test_a_divergence_keeps_to_its_allowance_and_the_allowance_is_no_more_than_it_need_be():
    generator = torch.Generator().manual_seed(0)
    for entries in (4, 64, 4096):
        p, q = torch.rand(2, entries, generator=generator, dtype=torch.float64) ** 4
        p, q = p / p.sum(), q / q.sum()
        terms = [a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
        exact = math.fsum(terms)
        found = (torch.special.xlogy(p, p).sum() - torch.special.xlogy(p, q).sum()).item()
        assert abs(found - exact) <= kl_rounding(entries, exact) < 1e-8


def test_allowances_that_allow_everything_are_refused():
    with pytest.raises(ValueError, match="nothing is left"):
        rounding(torch.bfloat16, 256)


def test_a_share_passes_where_it_lies_and_tells_the_test_that_has_too_few_runs():
    assert_share(950, 1000, 0.95, wrong=0.85)
    for hits in (900, 990):
        with pytest.raises(AssertionError, match="gives"):
            assert_share(hits, 1000, 0.95, wrong=0.85)
    with pytest.raises(AssertionError, match=r"100 runs let a share of 0\.9 pass"):
        assert_share(95, 100, 0.95, wrong=0.9)


def test_signatures_are_checked_while_tests_run_but_for_calls_that_ask_for_none():
    certain = torch.tensor([0, 1])  # whole numbers where floating ones are promised
    with pytest.raises(TypeError):
        entropy(certain)
    assert unchecked(entropy, certain) == 0
