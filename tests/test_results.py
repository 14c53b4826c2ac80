"""What the page of results says stands or falls with the stored tables, sentence by sentence."""

from __future__ import annotations

import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

FACTS = {"rank", "horizon", "budget", "context", "seed", "seeds", "parameters", "learning_rate"}
FACTS |= {"value", "temperature", "schema_version", "contexts", "documents"}


@pytest.fixture(scope="module")
def results(root):
    """The modules that make the page."""
    sys.path.insert(0, str(root / "docs"))
    import make_results
    import page
    import paper

    yield make_results, page, paper
    sys.path.remove(str(root / "docs"))


@pytest.fixture(scope="module")
def base(results):
    make_results, *_ = results
    studies = make_results.STUDIES
    return {section: sentences(results, studies, section) for section in make_results.SECTIONS}


def sentences(results, studies, section) -> list:
    """A section's sentences; what the tables refute stands there as refuted."""
    page = results[1]

    class Told(page.Page):
        def add(self, text, *sources, holds=True):
            super().add(text if bool(holds) else "refuted", *sources)

    made = Told(studies)
    section(made)
    return list(made.sentences)


def scaled(table: pd.DataFrame) -> pd.DataFrame:
    """Every measured number times a factor of its own row and column."""
    chance = np.random.default_rng(0)
    changed = {
        name: table[name] * chance.uniform(0.7, 0.99, len(table))
        for name in table
        if name not in FACTS and pd.api.types.is_float_dtype(table[name])
    }
    return table.assign(**changed)


def fewer(table: pd.DataFrame) -> pd.DataFrame:
    """Without some contexts, or some of what was held equal, and by fewer contexts or seeds."""
    if "contexts" in table:
        table = table.assign(contexts=table["contexts"] - 1)
    if "context" in table:
        return table[table["context"] % 3 > 0]
    if "seeds" in table and "budget" in table:
        last = table["budget"].max()
        return table.assign(budget=table["budget"].where(table["budget"] < last, last + 1))
    if "left_out" in table:
        last = table["group"].iloc[-1]
        return table[table["group"] != last].assign(inside=lambda rows: rows.index % 2 > 0)
    if "equal" in table:
        return table.assign(best=table["second"].fillna(table["best"]) + ", other")
    return table


def with_changed(studies, folder, source: str, change):
    """A copy of the stored tables in which one is changed."""
    copied = shutil.copytree(
        studies, folder, ignore=shutil.ignore_patterns("*.py", "parts", "rows", "samples")
    )
    path = copied / (source if "." in source else f"{source}/table.parquet")
    if path.suffix == ".csv":
        change(pd.read_csv(path)).to_csv(path, index=False)
    else:
        change(pd.read_parquet(path)).to_parquet(path)
    return copied


SOURCES = (
    *("reference", "methods", "anchored/table.parquet", "forms/summary.csv"),
    *("curves/levels.csv", "curves/first_position.csv", "curves/winners.csv"),
    *("head/waterfall.parquet", "head/decoding.parquet", "backtest/backtest.parquet"),
    *("real_model/heads_longer.csv", "real_model/decoding_time.csv", "waterfall/summary.csv"),
    *("curves/longer.csv", "vocabulary/axis.csv", "learning_rank/learning_rank.csv"),
    *("bounds/proposals.csv", "bounds/population.csv", "bounds/real/population.csv"),
    *("backtest/choices.parquet", "curves/curves.parquet"),
    *(f"end_to_end/{name}/measured.parquet" for name in ("code", "prose", "smollm2")),
)


@pytest.mark.parametrize("source", SOURCES)
def test_changed_tables_change_every_sentence_made_of_them_or_refute_it(
    results, base, source, tmp_path
):
    still = None
    for change in (scaled, fewer):
        studies = with_changed(results[0].STUDIES, tmp_path / change.__name__, source, change)
        unchanged = set()
        for section, told in base.items():
            if not any(source in sentence.sources for sentence in told):
                continue
            found = {sentence.text for sentence in sentences(results, studies, section)}
            for sentence in told:
                if source in sentence.sources:
                    unchanged |= {sentence.text} & found
                else:
                    assert sentence.text in found, f"made of {source}, which it does not name"
        still = unchanged if still is None else still & unchanged
    assert not still


def test_the_sources_are_all_tables_that_the_page_is_made_of(base):
    named = {source for told in base.values() for sentence in told for source in sentence.sources}
    assert named == set(SOURCES)


def test_what_names_no_table_holds_no_measured_number(base, results):
    for told in base.values():
        for sentence in told:
            if not sentence.sources and not sentence.text.startswith("!["):
                assert not re.search(r"\d\.\d\d|\d%", sentence.text), sentence.text
    assert not re.search(r"\d\.\d\d|\d%", results[2].LIMITS)


def test_a_sentence_that_does_not_hold_stops_the_page(results, tmp_path):
    page = results[1]
    with pytest.raises(page.Refuted, match="no longer true: it rises"):
        page.Page(tmp_path).say("it rises", "a.csv", holds=False)
