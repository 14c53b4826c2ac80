"""Cells whose tokens per call are estimated: where a certified interval would be too wide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from samples import tiny_study, without_times

from cpmtp.acceptance.implied import implied_acceptance
from cpmtp.acceptance.paths import SampledPaths
from cpmtp.decomposition.fitting import fit_path
from cpmtp.joint_distribution import exact_joint
from cpmtp.prefix_tree import truncated_joint
from cpmtp.report.document import Report, write_report
from cpmtp.report.subject import ReportExtras
from cpmtp.study.effort.estimate import estimate_study
from cpmtp.study.plan import open_language_model, plan_study
from cpmtp.study.running import read_study, run_study

# Dense joints are small enough to check against, but the study is told to do without.
SAMPLED = tiny_study(
    models=("samples:recurrent",),
    horizons=(3, 4),
    ranks=(1, 2),
    anchored=(False, True),
    temperatures=(0.7,),
    contexts=3,
    max_bytes=8,
    tree_nodes=6,
    width=0.001,
    samples=1500,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        draws, real = [], SampledPaths.drawn
        patch.setattr(SampledPaths, "drawn", lambda *a, **k: draws.append(a) or real(*a, **k))
        run_study(SAMPLED, made, workers=1)
    assert len(draws) == SAMPLED.contexts  # all fits and horizons of a context share its texts
    return made


def _exact(unit) -> dict[tuple, tuple[float, float]]:
    """Of each cell of a unit, tokens per call of its fit against the dense joint: the fit read as
    it is, and wrongly put through the target's law once more.
    """
    lm, ids = open_language_model(unit.model), torch.tensor(unit.token_ids)
    found = {}
    for n in SAMPLED.horizons:
        tree = truncated_joint(lm, ids, n, mass=0.95, max_nodes=6, temperature=0.7)
        joint = exact_joint(lm, ids, n, temperature=0.7)
        for anchored in (False, True):
            options = {"seed": unit.seed(0) % 2**31, "anchored": anchored}
            fits = fit_path(tree, SAMPLED.ranks, "em", **options)
            for rank, fitted in zip(SAMPLED.ranks, fits, strict=True):
                for rule in ("token", "block"):
                    for first in ("target",) if anchored else ("target", "draft"):
                        named = {"rule": rule, "first_token": first}
                        found[n, rank, anchored, rule, first] = tuple(
                            implied_acceptance(joint, fitted, **named, **law).tokens_per_call
                            for law in ({}, {"temperature": 0.7})
                        )
    return found


def test_estimates_are_those_of_the_fits_against_the_whole_joint_read_as_they_are(folder):
    table = read_study(folder)[0].set_index(["context", "horizon", "rank", "anchored"])
    errors, wrong, inside = [], [], []
    for unit in plan_study(SAMPLED)[0]:
        for (n, rank, anchored, rule, first), (exact, twice) in _exact(unit).items():
            row, name = table.loc[(unit.context, n, rank, anchored)], f"{rule}_{first}"
            estimate = row[f"tokens_per_call_{name}"]
            low, high = (row[f"tokens_per_call_{end}_{name}"] for end in ("lower", "upper"))
            assert low < estimate < high
            errors.append((estimate - exact) / (high - low))
            wrong.append((estimate - twice) / (high - low))
            inside.append(low <= exact <= high)
            survival = [row[f"survival_{name}_{k}"] for k in range(1, n + 1)]
            assert sum(survival) + (first == "draft") == pytest.approx(estimate)
    # An interval is about four standard errors wide.
    assert np.abs(errors).max() < 1 and np.abs(wrong).max() > 3
    assert np.mean(inside) > 0.8  # of three contexts' texts: far from independent


def test_sampled_cells_say_so_and_know_nothing_else(folder):
    table = read_study(folder)[0]
    assert set(table["joint"]) == {"tree"} and set(table["computed"]) == {"sampled"}
    assert (table["status"] == "ok").all() and (table["kept_mass"] < 1).all()
    assert table["kl_nats"].isna().all()
    coupling = [name for name in table if "coupling" in name]
    assert len(coupling) == 3 * 2 + 2 * 4 and table[coupling].isna().all(axis=None)
    told = table.loc[table["anchored"], [name for name in table if name.endswith("block_draft")]]
    assert told.isna().all(axis=None)
    assert len(table) == estimate_study(SAMPLED).cells
    more = replace(SAMPLED, samples=10**6)
    assert estimate_study(more).seconds > estimate_study(SAMPLED).seconds


def test_the_same_seed_gives_the_same_estimates_whatever_else_is_studied(folder):
    table = read_study(folder)[0]
    mine = table[table["horizon"] == 3].reset_index(drop=True)
    again = run_study(replace(SAMPLED, horizons=(3,)), workers=1)
    again, mine = without_times(again), without_times(mine)
    pd.testing.assert_frame_equal(mine[list(again)], again, check_exact=True)


def test_narrow_bounds_are_kept_and_estimates_lie_between_wide_ones(folder):
    table = read_study(folder)[0]
    certified = run_study(replace(SAMPLED, width=4.0), workers=1)
    assert set(certified["computed"]) == {"certified"}
    for rule in ("token", "block"):
        lower, upper = (
            certified[f"tokens_per_call_{end}_{rule}_target"] for end in ("lower", "upper")
        )
        assert lower.equals(certified[f"tokens_per_call_{rule}_target"])
        estimate = table[f"tokens_per_call_{rule}_target"]
        assert (lower < estimate).all() and (estimate < upper).all()


def test_the_report_calls_them_estimates_and_nothing_a_bound(folder):
    page = write_report(*read_study(folder), folder / "report.md").read_text("utf-8")
    assert "ertified" not in page and "lower bound" not in page and "truncated" not in page
    report = Report.of(*read_study(folder), ReportExtras())
    assert "estimated, of 3 of 3 contexts, from texts" in page
    first_screen = page[: page.index("How to read this")]
    assert "is sampled: its figures are estimates" in first_screen
    for text in (page, report.summary):
        assert "(estimated, 95 % interval" in text and "is sampled" in text
    for text in (first_screen, report.summary):
        assert "is exact" not in text and "are exact" not in text
    assert "| Estimated | samples:recurrent: horizon 3, 3 contexts" in page
    assert "Ceilings, estimated from sampled texts (95 % band)" in page
    assert "mean over contexts, estimated" in page and "any verification could reach" not in page
