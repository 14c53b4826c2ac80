"""The cheapest way that is narrow enough: complete, certified or sampled, and no more work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from samples import tiny_study

from cpmtp.language_model import separated_hmm
from cpmtp.prefix_tree import complete_joint, pruned
from cpmtp.study.effort.trees import context_tree, most_nodes
from cpmtp.study.plan import open_language_model, plan_study
from cpmtp.study.running import run_study

CHEAPEST = tiny_study(
    models=("samples:recurrent",),
    horizons=(3,),
    ranks=(1, 2),
    anchored=(False, True),
    contexts=2,
    top_k=3,
    max_bytes=8,
    width=0.1,
    cheapest=True,
)


def tokens(table, end):
    return table[f"tokens_per_call_{end}block_target"]


def test_pruning_leaves_out_the_least_probable_and_no_more_than_allowed():
    tree = complete_joint(separated_hmm(3, 8), torch.tensor([0]), 3)
    for unkept in (0.0, 0.01, 0.1, 0.5):
        small = pruned(tree, unkept)
        probs = tree.levels[-1].probs.sort().values
        wanted = int((probs.cumsum(0) > unkept).sum())
        assert len(small.levels[-1]) in (wanted, wanted + 1)  # the greedy path may be one more
        assert float(small.mass[-1]) >= 1 - unkept - 1e-12
        assert bool(small.keeps(small.greedy_path[None]).all())
        # what is left says of itself what it says in the whole tree
        assert small.expanded_nodes == sum(
            len(small.expanded_prefixes(length)) for length in range(3)
        )
    single = pruned(tree, 0.999999)
    assert bool(single.keeps(single.greedy_path[None]).all())


def test_bounds_are_as_narrow_as_wanted_from_fewer_sequences_and_hold_the_exact_value():
    cheap = run_study(CHEAPEST, workers=1)
    exact = run_study(replace(CHEAPEST, cheapest=False), workers=1)
    assert set(cheap["computed"]) == {"certified"} and set(exact["computed"]) == {"complete"}
    assert (cheap["joint"] == "tree").all() and (cheap["kept_mass"] < 1).all()
    assert (tokens(cheap, "upper_") - tokens(cheap, "lower_") <= CHEAPEST.width).all()
    # the best fit to everything earns no more than the best to a part and what is left out
    best = exact["method"] == "acceptance"
    assert (tokens(exact, "")[best] <= tokens(cheap, "upper_")[best] + 1e-3).all()
    assert (tokens(exact, "")[best] >= tokens(cheap, "lower_")[best] - 1e-3).all()


def test_a_width_that_no_tree_leaves_room_for_takes_all_there_is():
    table = run_study(replace(CHEAPEST, width=1e-12), workers=1)
    assert set(table["computed"]) == {"complete"}


def test_where_bounds_would_cost_more_than_texts_texts_are_taken_and_only_as_many_as_needed(
    monkeypatch,
):
    from cpmtp.acceptance.paths import SampledPaths

    drawn, real = [], SampledPaths.drawn
    monkeypatch.setattr(
        SampledPaths, "drawn", lambda *a, **k: drawn.append(k["samples"]) or real(*a, **k)
    )
    settings = replace(CHEAPEST, top_k=None, tree_nodes=4, samples=5000, contexts=1)
    wide = run_study(replace(settings, width=0.2), workers=1)
    assert set(wide["computed"]) == {"sampled"} and drawn[0] == 250
    drawn.clear()
    narrow = run_study(replace(settings, width=0.03), workers=1)
    assert drawn[0] == 250 and 250 < drawn[1] <= 5000
    widths = [tokens(t, "upper_") - tokens(t, "lower_") for t in (wide, narrow)]
    assert widths[0].max() <= 0.2 * 1.1 and widths[1].max() <= max(0.03 * 1.2, 0.03)
    assert most_nodes(settings, 3) == 4


@pytest.mark.parametrize("width", [0.02, 0.3])
def test_a_tree_is_no_larger_than_its_width_asks_for(width):
    settings = replace(CHEAPEST, width=width, top_k=4)
    unit = plan_study(settings)[0][0]
    lm, ids = open_language_model(unit.model), torch.tensor(unit.token_ids)
    tree = context_tree(settings, lm, ids, 3, settings.law(1.0))
    missing = float((1 - tree.mass).sum())
    assert missing <= width
    least = tree.levels[-1].probs.min()
    assert missing + 2 * float(least) > 0.9 * width or tree.is_complete
