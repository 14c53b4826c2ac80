"""The study of what makes a rank learn: a variant changes what it names, and nothing else."""

from __future__ import annotations

import importlib
import sys

import pytest

from cpmtp.heads.draft_head import DraftHead
from cpmtp.training import heads as head_training
from cpmtp.training.heads import HeadTrainingSettings
from cpmtp.training.muon import OWN


@pytest.fixture(scope="module")
def study(root):
    sys.path.insert(0, str(root / "data" / "studies"))
    try:
        yield importlib.import_module("learning_rank")
    finally:
        sys.path.pop(0)


def groups_of(study, **changes):
    head = DraftHead(hidden_size=8, vocab_size=5, rank=3, anchored=True, blocks=1)
    settings = HeadTrainingSettings(rank=3, learning_rate=0.5, precision="float32")
    usual = head_training._optimisers
    found = study.optimisers(study.Variant(3, **changes), usual, head, settings)
    return head, [group for optimiser in found for group in optimiser.param_groups]


@pytest.mark.parametrize(
    ("changes", "shares", "rate"),
    [
        ({}, [OWN, OWN, OWN], 0.5),
        ({"own": 0.2}, [0.2, 0.2, 0.2], 0.5),
        ({"first": 0.1}, [0.1, OWN, OWN], 0.5),
        ({"mixture": 10.0}, [OWN, OWN, OWN], 5.0),
    ],
    ids=str,
)
def test_a_variant_changes_the_rates_it_names_and_every_parameter_is_trained_once(
    study, changes, shares, rate
):
    head, groups = groups_of(study, **changes)
    named = {id(p): name for name, p in head.named_parameters()}
    trained = [named[id(p)] for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(named.values())
    rates = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates["mixture.weight"] == rates["mixture.bias"] == rate
    assert rates["norm.weight"] == 0.5 and rates["maps"] == 1.0
    assert next(group for group in groups if group["params"][0] is head.maps)["own"] == shares
