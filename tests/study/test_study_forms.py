"""Forms and transition ranks as axes of a study: cells, columns, choices by form, the report."""

import pandas as pd
import pytest
from samples import bigram

import cpmtp
from cpmtp.ranking.forms import COSTS, form_summary
from cpmtp.ranking.parts import best_fits, reference_form, table_parts
from cpmtp.report.document import write_report
from cpmtp.report.learned import form_sections
from cpmtp.study.plan import study_cells
from cpmtp.study.rows import numbers_of
from cpmtp.study.running import read_study, run_study
from cpmtp.study.settings import StudySettings

VOCAB = bigram().vocab_size
ALL = StudySettings(
    models=("samples:bigram",),
    ranks=(1, 2),
    methods=("em", "als"),
    forms=("cp", "markov", "markov_mixture", "hmm"),
    transition_ranks=(1, 2),
    contexts=2,
    context_length=4,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    return run_study(ALL, folder, workers=1), folder


def test_every_form_has_the_cells_that_mean_something():
    cells = study_cells(ALL)
    assert len(cells) == len(set(cells))
    found = {(cell.form, cell.transition_rank, cell.rank, cell.method) for cell in cells}
    assert found == {
        *(("cp", 0, rank, method) for rank in (1, 2) for method in ("em", "als")),
        *(("markov", k, 1, "em") for k in (1, 2)),
        *(("markov_mixture", k, 2, "em") for k in (1, 2)),
        *(("hmm", 0, rank, "em") for rank in (1, 2)),
    }
    only_cp = study_cells(StudySettings())
    assert {(cell.form, cell.transition_rank) for cell in only_cp} == {("cp", 0)}


def test_rows_say_what_a_draft_takes(study):
    table, _ = study
    assert (table["status"] != "failed").all()
    assert len(table) == 2 * len(study_cells(ALL))
    one = table.drop_duplicates(["form", "transition_rank", "rank"])
    one = one.set_index(["form", "transition_rank", "rank"])
    # Two tokens after the first: U of V - 1 free logits each, gates of the one transition, weights.
    each = 2 * (VOCAB - 1)
    expected = {("cp", 0, 1): each, ("cp", 0, 2): 2 * each + 1, ("hmm", 0, 2): 2 * each + 3}
    expected |= {("markov", 1, 1): each + 1, ("markov", 2, 1): each + 2}
    expected |= {("markov_mixture", 2, 2): 2 * each + 3}
    for key, free in expected.items():
        assert one.loc[key, "free_numbers"] == free
    assert one.loc[("markov", 2, 1), "shared_numbers"] == 2 * VOCAB * 2
    assert one.loc[("cp", 0, 2), "shared_numbers"] == 0
    assert (
        one.loc[("markov", 1, 1), "serial_steps"] == 2
        and one.loc[("cp", 0, 2)]["serial_steps"] == 1
    )
    assert one.loc[("markov", 1, 1), "gated"] and not one.loc[("cp", 0, 1), "gated"]


def test_rows_say_what_one_token_of_memory_can_do(study):
    table, _ = study
    assert table["beyond_one_token_nats"].ge(0).all()
    # Told the first of three tokens, the one before is all there is.
    allowed = 1e-9
    assert table["beyond_one_token_nats_anchored"].abs().max() <= allowed
    assert (table["markov_tokens_per_call_anchored"] - 3).abs().max() <= allowed
    # A Markov draft of a context's own never earns more than the chain that has everything.
    chains = table[table["form"] == "markov"]
    assert chains["tokens_per_call_block_target"].le(3 + allowed).all()


def test_a_choice_is_made_form_by_form(study):
    table, _ = study
    with pytest.raises(ValueError, match="several forms"):
        cpmtp.select_rank(table)
    parts = [name for name, _ in table_parts(table)]
    assert len(parts) == len(set(parts)) == 6
    for _, part in table_parts(table):
        assert set(cpmtp.select_rank(part).rank) == {3}
    assert set(reference_form(table)["form"]) == {"cp"}
    others = table[table["form"] != "cp"]
    assert set(reference_form(others)["form"]) == {"markov"}
    assert set(reference_form(others)["transition_rank"]) == {1}
    best = best_fits(table)
    assert len(best) == 2 * 8 and table.loc[best.index, "best"].all()


def test_forms_stand_side_by_side_at_equal_costs(study):
    table, _ = study
    found = form_summary(table)
    assert len(found) == 8 and set(found["contexts"]) == {2}
    means = (
        best_fits(table)
        .groupby(["form", "transition_rank", "rank"])["tokens_per_call_block_target"]
        .mean()
    )
    for _, row in found.iterrows():
        key = row["form"], row["transition_rank"], row["rank"]
        assert row["tokens_per_call"] == pytest.approx(means[key])
        for cost in COSTS:
            as_cheap = found[found[cost] <= row[cost]]
            assert row[f"best_at_{cost}"] == (
                row["tokens_per_call"] >= as_cheap["tokens_per_call"].max()
            )
    cheapest = found[(found["form"] == "cp") & (found["rank"] == 1)].iloc[0]
    assert cheapest["gain"] == 0
    assert found["gain"].to_numpy() == pytest.approx(
        (found["tokens_per_call"] - cheapest["tokens_per_call"]).to_numpy()
    )
    assert found.groupby(["form", "transition_rank"])["saturated"].sum().eq(1).all()


def test_the_report_has_one_table_of_forms(study, tmp_path):
    table, folder = study
    sections = list(form_sections(table))
    assert len(sections) == 1 and len(sections[0].blocks[-1].rows) == 8
    text = write_report(*read_study(folder), tmp_path / "report.md").read_text()
    assert "Forms:" in text and "markov, transition rank 2" in text
    assert not list(form_sections(table[table["form"] == "cp"]))


def test_a_table_without_forms_is_of_cp(study, tmp_path):
    table, folder = study
    old = table[table["form"] == "cp"].drop(
        columns=["form", "transition_rank", "gated", "free_numbers", "serial_steps"]
    )
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text())
    old.to_parquet(tmp_path / "table.parquet")
    found, _ = read_study(tmp_path)
    assert set(found["form"]) == {"cp"} and set(found["transition_rank"]) == {0}
    assert not found["gated"].any() and found["serial_steps"].eq(1).all()
    assert list(found.columns) == list(table.columns)


def test_numbers_count_what_first_tokens_share_once():
    lm = bigram()
    joint = cpmtp.exact_joint(lm, [1, 2], 3)
    tree = cpmtp.truncated_joint(lm, [1, 2], 3, mass=1.0)
    asked = {"form": "markov", "transition_rank": 2, "anchored": True, "gated": True}
    dense, sparse = (numbers_of(cpmtp.fit(one, 1, **asked).distribution) for one in (joint, tree))
    assert dense == sparse == (2 * (VOCAB - 1) + 2, 2 * VOCAB * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": ("tree",)}, "form 'tree': expected one of cp"),
        ({"transition_ranks": (0,)}, "transition_rank 0: expected an integer of at least 1"),
        ({"forms": ("hmm",), "methods": ("als",)}, "all but cp need one of the methods em"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StudySettings(**options)


def test_failed_fits_do_not_hide_the_others(study):
    table, _ = study
    broken = table.copy()
    broken.loc[broken["form"] == "hmm", "status"] = "failed"
    found = form_summary(broken)
    assert set(found["form"]) == {"cp", "markov", "markov_mixture"}
    nothing = pd.DataFrame(broken).assign(status="failed")
    assert not list(form_sections(nothing))
