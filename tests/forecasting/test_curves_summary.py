"""The summary of the grid of learning curves, on curves with a known answer."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

DOCUMENTS = ["a", "a", "b", "c"]
CALLS = np.array([[10.0, 8.0, 12.0, 9.0], [5.0, 5.0, 6.0, 4.0]])  # of two candidates
TOKENS = 20.0


@pytest.fixture(scope="module")
def summary(root):
    path = root / "data" / "studies" / "curves_summary.py"
    spec = importlib.util.spec_from_file_location("curves_summary", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def rows(calls=CALLS, budget=32, seed=0, second_share=0.5, seconds=(1.0, 4.0)) -> pd.DataFrame:
    """A line per candidate: `cp 1` and `recurrent`."""
    lines = []
    for name, each, spent in zip(("cp 1", "recurrent"), calls, seconds, strict=True):
        survived = np.stack([each, second_share * each], 1)
        line = {"name": name, "budget": budget, "seed": seed, "documents": DOCUMENTS}
        line |= {"calls_per_text": each.tolist(), "survived_per_text": survived.tolist()}
        line |= {"tokens_per_text": TOKENS, "training_seconds": spent, "learning_rate": 0.01}
        lines.append(line | {"parameters": 7, "draft_milliseconds": 0.1 * spent})
    return pd.DataFrame(lines)


def test_a_level_and_a_paired_gain_are_quotients_of_sums_over_documents(summary):
    table = rows()
    one, two = summary.levels(table, summary.cells_of(table))
    values = 4 * TOKENS / CALLS.sum(1)
    assert one["tokens_per_call"] == pytest.approx(values[0]) and one["gain"] == 0
    assert two["gain"] == pytest.approx(values[1] - values[0])
    assert two["survival_2"] == pytest.approx(0.5)
    # The residuals of documents a, b, c by hand.
    residuals = []
    for calls, value in zip(CALLS, values, strict=True):
        each = np.array([calls[:2].sum(), calls[2], calls[3]])
        tokens = np.array([2 * TOKENS, TOKENS, TOKENS])
        residuals.append((tokens - value * each) / each.mean())
    for line, prefix, left in (
        (two, "tokens_per_call", residuals[1]),
        (two, "gain", residuals[1] - residuals[0]),
    ):
        half = stats.t.ppf(0.975, 2) * left.std(ddof=1) / math.sqrt(3)
        ends = [line[f"{prefix}_low"], line[f"{prefix}_high"]]
        assert ends == pytest.approx([line[prefix] - half, line[prefix] + half])


def test_seeds_are_averaged_and_their_scatter_is_told(summary):
    table = pd.concat([rows(), rows(calls=CALLS / 2, seed=1)])
    one = summary.levels(table, summary.cells_of(table))[0]
    single = 4 * TOKENS / CALLS[0].sum()
    assert one["seeds"] == 2 and one["tokens_per_call"] == pytest.approx(1.5 * single)
    assert one["between_seeds"] == pytest.approx(single)


def test_the_interval_of_a_paired_difference_covers_it(summary):
    """Documents with calls of their own, shared by both candidates: 95 % of 400 intervals, less
    four binomial errors; unpaired ones would be several times as wide.
    """
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        calls = 10 + 3 * rng.standard_normal(30)
        documents = np.arange(30)
        drawn = [2.0 * calls + more + rng.standard_normal(30) for more in (0.0, 1.0)]
        one, two = (summary.Mean.ratio(tokens, calls, documents) for tokens in drawn)
        low, high = (two - one).interval()
        covered += low <= 0.1 <= high
        widths.append(high - low)
    assert covered >= 400 * 0.95 - 4 * math.sqrt(400 * 0.95 * 0.05)
    assert np.mean(widths) == pytest.approx(2 * 2.045 * math.sqrt(2 / 30) / 10, rel=0.05)


def test_between_budgets_seconds_are_read_along_their_logarithm(summary):
    table = pd.concat([rows(), rows(calls=CALLS / 2, budget=64, seconds=(4.0, 16.0))])
    cells = summary.cells_of(table)
    seconds = {("cp 1", 32): 1.0, ("cp 1", 64): 4.0, ("recurrent", 32): 4.0}
    seconds["recurrent", 64] = 16.0
    first = 4 * TOKENS / CALLS[0].sum()
    found = summary.at_seconds(cells, seconds, 2.0)
    assert set(found) == {"cp 1"} and found["cp 1"].value == pytest.approx(1.5 * first)
    later = summary.at_seconds(cells, seconds, 100.0)
    assert later["cp 1"].value == pytest.approx(2 * first) and len(later) == 2


def test_what_the_interval_does_not_tell_apart_is_a_tie(summary):
    table = rows(calls=np.stack([CALLS[0], CALLS[0] * [1.01, 0.99, 0.985, 1.01]]))
    lines = summary.winners(table, summary.cells_of(table))
    assert {line["best"]: line["tied"] for line in lines if line["equal"] == "positions"} == {
        "recurrent": "cp 1"
    }
    clear = rows()
    line = summary.winners(clear, summary.cells_of(clear))[0]
    assert line["best"] == "recurrent" and line["tied"] == "" and line["lead_low"] > 0


def test_of_drafts_only_those_that_earn_more_than_all_faster_ones_are_left(summary):
    slower_and_worse = rows(calls=CALLS[::-1])
    lines = summary.winners(slower_and_worse, summary.cells_of(slower_and_worse))
    assert [x["best"] for x in lines if x["equal"] == "draft milliseconds"] == ["cp 1"]


def test_the_first_position_of_a_rank_is_less_that_of_rank_one(summary):
    others = [rows(second_share=0.25).iloc[:1].assign(name=n) for n in ("cp 8", "cp 8, wide")]
    table = pd.concat([rows().iloc[:1], *others])
    (line,) = summary.first_position(summary.cells_of(table))
    assert line["difference"] == pytest.approx(-0.25) and line["candidate"] == "cp 8"
