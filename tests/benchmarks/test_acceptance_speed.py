"""Profiles of every form: anchored, three tokens over 100, rank 4, transition rank 16.

Run with ``OMP_NUM_THREADS=2 pytest tests/benchmarks/test_acceptance_speed.py -n 0 --benchmark-only``.
"""

from __future__ import annotations

import pytest
import random_forms
import torch
from samples import peaked_joint

from cpmtp.acceptance.implied import acceptance_profiles

VOCAB = 100


@pytest.mark.parametrize("form", random_forms.FORMS)
@pytest.mark.parametrize("anchored", [True, False])
def test_profiles_of_a_form(benchmark, monkeypatch, form, anchored):
    monkeypatch.setattr(random_forms, "WIDTH", 16)
    lead = (VOCAB,) if anchored else ()
    draft = random_forms.random_form(form, VOCAB, 3 - anchored, 4, 0, lead)
    joint = peaked_joint(VOCAB, 3)
    found = benchmark(acceptance_profiles, joint, draft, ("block",))["block"].survival
    assert torch.isfinite(found).all()
