"""Two studies side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from chances import assert_share
from scipy import stats

from cpmtp.ranking.comparison import compare_studies
from cpmtp.study.running import run_study
from cpmtp.study.settings import StudySettings


def table(values, *, model="m", domain="d", text="t") -> pd.DataFrame:
    """One row per context and rank; `values` has a row per context, two contexts a document."""
    contexts, ranks = values.shape
    context = np.repeat(np.arange(contexts), ranks)
    return pd.DataFrame(
        {
            "model": model,
            "domain": domain,
            "document": [f"document {c // 2}" for c in context],
            "context": context,
            "context_text": [f"{text} {c}" if text else "" for c in context],
            "temperature": 1.0,
            "anchored": False,
            "horizon": 2,
            "rank": np.tile(np.arange(1, ranks + 1), contexts),
            "status": "ok",
            "tokens_per_call_block_target": values.ravel(),
        }
    )


VALUES = np.random.default_rng(0).uniform(1, 2, (40, 2))


def test_shared_contexts_are_paired_and_the_interval_is_of_their_differences():
    found = compare_studies(table(VALUES), table(VALUES + 0.1, model="other"))
    assert found["paired"].all() and (found["shared_contexts"] == 40).all()
    np.testing.assert_allclose(found["difference"], 0.1)
    np.testing.assert_allclose(found["difference_low"], 0.1)
    assert found["compared"].iloc[0] == "m against other, d"


def test_contexts_that_differ_are_compared_by_their_means_with_a_wider_interval():
    found = compare_studies(table(VALUES), table(VALUES + 0.1, text="another"))
    assert not found["paired"].any()
    assert (found["difference_high"] - found["difference_low"] > 0.1).all()
    np.testing.assert_allclose(found["difference"], 0.1)


def test_contexts_without_a_text_are_not_taken_for_the_same():
    assert not compare_studies(table(VALUES, text=""), table(VALUES, text=""))["paired"].any()


def test_only_shared_contexts_count_where_there_are_any():
    found = compare_studies(table(VALUES), table(VALUES[:10] + 0.1))
    assert (found["shared_contexts"] == 10).all()
    np.testing.assert_allclose(found["first"], VALUES[:10].mean(0))


def test_the_interval_of_a_true_difference_holds_it_as_often_as_it_says():
    documents, ranks = 20, 1200
    generator = np.random.default_rng(1)
    first = generator.normal(2, 0.3, (2 * documents, ranks))
    # Contexts of a document differ from the first study alike: only documents say anything new.
    difference = generator.normal(0.05, 0.1, (documents, ranks)).repeat(2, axis=0)
    found = compare_studies(table(first), table(first + difference))
    held = (found["difference_low"] <= 0.05) & (found["difference_high"] >= 0.05)
    assert_share(
        int(held.sum()),
        ranks,
        percentile_coverage(0.95, documents),
        wrong=percentile_coverage(0.9, documents),
    )


def percentile_coverage(level: float, documents: int) -> float:
    """What a percentile interval of a mean of normal numbers covers: it is as wide as the normal
    one with the variance of the sample, and the mean's t has one degree of freedom less.
    """
    width = stats.norm.ppf(0.5 + level / 2) * np.sqrt((documents - 1) / documents)
    return float(1 - 2 * stats.t.sf(width, documents - 1))


def test_studies_with_nothing_in_common_are_refused():
    two = pd.concat([table(VALUES), table(VALUES, model="n")])
    with pytest.raises(ValueError, match="in common"):
        compare_studies(two, table(VALUES, model="other"))
    with pytest.raises(ValueError, match="no column tokens_per_call_best_target"):
        compare_studies(two, two, rule="best")


def test_two_real_studies_are_compared_from_the_command_line(tmp_path, monkeypatch, capsys):
    from cpmtp.cli import main

    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    settings = StudySettings(
        models=("tiny_models:characters",),
        domains={"letters": tmp_path / "a.txt"},
        horizons=(2,),
        ranks=(1, 2),
        methods=("em",),
    )
    small = replace(settings, contexts=3, context_length=4)
    run_study(small, tmp_path / "one", workers=1)
    run_study(replace(small, methods=("em", "hals")), tmp_path / "two", workers=1)
    arguments = [
        "cpmtp",
        "compare",
        str(tmp_path / "one"),
        str(tmp_path / "two"),
        "--out",
        str(tmp_path / "c.csv"),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr().out
    assert (
        not stopped.value.code and "3 shared contexts, paired" in shown and "95 % interval" in shown
    )
    assert len(pd.read_csv(tmp_path / "c.csv")) == 2


def test_two_kinds_of_draft_and_two_temperatures_are_named_in_words():
    plain, told = table(VALUES), table(VALUES + 0.1).assign(anchored=True)
    found = compare_studies(plain, told)
    assert found["compared"].iloc[0] == "unanchored drafts against anchored drafts, m, d"
    cooler = compare_studies(plain, plain.assign(temperature=0.5))
    assert cooler["compared"].iloc[0] == "temperature 1.0 against temperature 0.5, m, d"


def test_lower_bounds_are_told_from_exact_figures():
    exact = table(VALUES)
    assert not compare_studies(exact, exact)["truncated"].any()
    assert compare_studies(exact.assign(joint="dense"), exact.assign(joint="tree"))[
        "truncated"
    ].all()


def test_a_fresh_study_is_compared_with_a_stored_one_of_an_earlier_version(
    root, tmp_path, monkeypatch, capsys
):
    from cpmtp.cli import main

    stored = root / "data" / "studies" / "reference"
    fresh = replace(
        StudySettings(models=("code",), horizons=(3,), ranks=(1,), methods=("em",)), contexts=2
    )
    run_study(fresh, tmp_path / "fresh", workers=1)
    monkeypatch.setattr("sys.argv", ["cpmtp", "compare", str(tmp_path / "fresh"), str(stored)])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown, err = capsys.readouterr()
    assert not stopped.value.code, err
    assert "code" in shown and "horizon 3" in shown and "rank    1" in shown
