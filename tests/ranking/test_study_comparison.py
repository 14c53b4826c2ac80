"""Two studies side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

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


def means_of_documents(values: np.ndarray) -> np.ndarray:
    """Of the first rank; contexts 2k and 2k + 1 are of one document."""
    return values[:, 0].reshape(-1, 2).mean(1)


@pytest.mark.parametrize("paired", [True, False])
def test_an_interval_is_as_wide_as_the_spread_of_documents_makes_it(paired):
    """Normal documents: 1.96 standard errors to each side. 1.64 would be a 90 % interval; contexts
    for clusters would make it narrower by a third.
    """
    generator, ratios = np.random.default_rng(1), []
    for seed in range(12):
        documents = generator.normal(2, 0.3, (2, 40, 2)).repeat(2, axis=1)
        first, second = documents + generator.normal(0, 0.1, (2, 80, 2))
        text = "t" if paired else "another"
        row = compare_studies(table(first), table(second, text=text), seed=seed).iloc[0]
        spreads = [means_of_documents(second - first)]
        if not paired:
            spreads = [means_of_documents(first), means_of_documents(second)]
        error = np.sqrt(sum(spread.var() / 40 for spread in spreads))
        ratios.append((row["difference_high"] - row["difference_low"]) / 2 / error)
    assert np.mean(ratios) == pytest.approx(1.96, rel=0.025)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_of_a_true_difference_holds_it_as_often_as_it_says(paired):
    generator, held = np.random.default_rng(1), []
    for seed in range(40):
        first, own = generator.normal(2, 0.3, (80, 20)), generator.normal(2.05, 0.3, (80, 20))
        second = first + generator.normal(0.05, 0.1, (80, 20)) if paired else own
        text = "t" if paired else "another"
        found = compare_studies(table(first), table(second, text=text), seed=seed)
        held.append((found["difference_low"] <= 0.05) & (found["difference_high"] >= 0.05))
    # 40 documents: 94 % where 95 % are meant, and 800 intervals tell that to 2.5 %.
    assert 0.915 <= np.mean(held) <= 0.965


def test_a_skewed_differences_interval_reaches_further_where_the_tail_is():
    generator = np.random.default_rng(2)
    skewed = generator.exponential(0.3, (80, 2))
    found = compare_studies(
        table(VALUES.repeat(2, axis=0)), table(VALUES.repeat(2, axis=0) + skewed)
    )
    above = found["difference_high"] - found["difference"]
    assert (above > 1.1 * (found["difference"] - found["difference_low"])).all()


def test_a_single_context_has_no_interval():
    found = compare_studies(table(VALUES[:1]), table(VALUES[:1] + 0.1))
    assert found[["difference_low", "difference_high"]].isna().all(axis=None)


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
        models=("samples:characters",),
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
    estimates = compare_studies(exact, exact.assign(joint="tree", computed="sampled"))
    assert estimates["sampled"].all() and not estimates["truncated"].any()


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
