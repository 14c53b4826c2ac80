"""The study: tidy, resumable, the same whatever happened on the way."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pandas as pd
import pytest
import torch
from command_line import process
from rounding import kl_rounding, rounding
from samples import tiny_study, without_times

from cpmtp.decomposition.fitting import fit_path
from cpmtp.joint_distribution import exact_joint
from cpmtp.ranking.parts import best_fits
from cpmtp.report.document import write_report
from cpmtp.study.effort.estimate import estimate_study
from cpmtp.study.plan import open_language_model, plan_study
from cpmtp.study.running import read_study, run_study
from cpmtp.study.table import KEY_COLUMNS, SCHEMA_VERSION, TIMING_COLUMNS, column_descriptions

TINY = tiny_study(horizons=(2, 3), ranks=(1, 2, 4), methods=("als", "em"), contexts=3)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return run_study(TINY, tmp_path_factory.mktemp("study"), workers=1)


def test_there_is_one_row_per_cell(table):
    assert len(table) == 3 * 2 * 3 * 2 == estimate_study(TINY).cells
    assert not table.duplicated(list(KEY_COLUMNS)).any()
    assert list(table.columns) == list(column_descriptions(3))
    assert (table["status"] != "failed").all()


def test_the_best_method_of_every_cell_is_marked(table, tmp_path):
    cells = table.groupby(["context", "horizon", "rank"])
    assert (cells["best"].sum() == 1).all()
    marked = table[table["best"]].set_index(["context", "horizon", "rank"])
    column = "tokens_per_call_block_target"
    pd.testing.assert_series_equal(marked[column].sort_index(), cells[column].max())
    pd.testing.assert_frame_equal(table[table["best"]], best_fits(table))
    again = run_study(TINY, tmp_path, workers=1)  # from the stored parts as from the first run
    pd.testing.assert_series_equal(run_study(TINY, tmp_path, workers=1)["best"], again["best"])


def test_a_failed_fit_is_never_the_best(tmp_path, monkeypatch):
    import cpmtp.study.rows

    def fails(joint, ranks, method, **_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(cpmtp.study.rows, "fit", fails)
    monkeypatch.setattr(cpmtp.study.rows, "fit_path", fails)
    assert not run_study(replace(TINY, contexts=1), tmp_path, workers=1)["best"].any()


@pytest.mark.parametrize("name", ["reference", "methods"])
def test_a_table_of_an_earlier_version_is_read_with_this_versions_columns(root, name):
    stored, manifest = read_study(root / "data" / "studies" / name)
    assert stored["schema_version"].unique() == [1] and manifest["schema_version"] == 1
    assert list(stored.columns) == list(column_descriptions(3))
    pd.testing.assert_frame_equal(stored[stored["best"]], best_fits(stored))
    assert not stored["anchored"].any() and set(stored["joint"]) == {"dense"}
    for column in ("tokens_per_call_block_target", "tokens_per_call_coupling_draft"):
        upper = stored[column.replace("call_", "call_upper_")]
        pd.testing.assert_series_equal(upper, stored[column], check_names=False)


def test_a_table_without_the_mark_gets_it_when_it_is_read(table, tmp_path):
    found = run_study(TINY, tmp_path, workers=1)
    found.drop(columns="best").to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(read_study(tmp_path)[0], found)
    assert found["schema_version"].unique() == [SCHEMA_VERSION]


def test_numbers_in_the_table_keep_their_laws(table):
    em = table[table["method"] == "em"]
    # Three survivals, each a sum over at most 6 ** 3 texts of products of six conditionals.
    allowed = 3 * rounding(torch.float64, 6**3 + 6 * 2 * 6**2)
    assert (
        table["tokens_per_call_token_target"] <= table["tokens_per_call_block_target"] + allowed
    ).all()
    assert (
        table["tokens_per_call_block_target"] <= table["tokens_per_call_coupling_target"] + allowed
    ).all()
    assert (table["tokens_per_call_coupling_target"] <= table["horizon"] + allowed).all()
    assert (table["survival_block_target_1"] - 1).abs().max() <= allowed
    rank_one = em[em["rank"] == 1]
    assert (
        rank_one["kl_nats"] - rank_one["total_correlation_nats"]
    ).abs().max() <= 4 * kl_rounding(6**3)
    assert (table["kl_nats"] >= 0).all()


def test_a_shorter_horizons_rows_do_not_depend_on_the_longer(table, tmp_path):
    short = run_study(replace(TINY, horizons=(2,)), tmp_path, workers=1)
    columns = [c for c in short if c not in (*TIMING_COLUMNS, "iterations")]
    expected = table[table["horizon"] == 2][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(short[columns], expected, rtol=1e-9)


def test_the_table_does_not_depend_on_where_units_ran(table, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        threaded = run_study(TINY, tmp_path / "threads", pool)
    pd.testing.assert_frame_equal(without_times(threaded), without_times(table))


def test_local_processes_give_the_same_table(table, tmp_path, monkeypatch, root):
    monkeypatch.setenv("PYTHONPATH", str(root / "tests"))
    spawned = run_study(TINY, tmp_path, workers=2)
    pd.testing.assert_frame_equal(without_times(spawned), without_times(table))


def test_what_is_finished_is_not_computed_again(tmp_path, monkeypatch):
    first = run_study(TINY, tmp_path, workers=1)
    monkeypatch.setattr(
        "cpmtp.study.workers.study_unit_rows", lambda *_: pytest.fail("computed again")
    )
    pd.testing.assert_frame_equal(run_study(TINY, tmp_path, workers=1), first)


def test_a_folder_holds_one_study_and_says_what_differs(tmp_path):
    run_study(replace(TINY, ranks=(1,), methods=("em",)), tmp_path, workers=1)
    with pytest.raises(ValueError, match=r"ranks \(\[1\] there, \[2\] now\)"):
        run_study(replace(TINY, ranks=(2,), methods=("em",)), tmp_path, workers=1)


def test_the_manifest_names_versions_settings_and_models(tmp_path):
    run_study(replace(TINY, ranks=(1,), methods=("em",)), tmp_path, workers=1)
    _, manifest = read_study(tmp_path)
    assert manifest["settings"]["ranks"] == [1]
    assert manifest["versions"]["torch"]
    assert manifest["models"]["samples:bigram"]["vocab_size"] == 6


def test_contexts_are_cut_from_a_corpus_document_by_document(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    settings = replace(TINY, models=("samples:characters",), corpus=(str(tmp_path),), contexts=5)
    units, identity = plan_study(settings)
    assert len({u.document for u in units}) == 3
    assert all(len(set(u.token_ids)) == 1 and len(u.token_ids) == 4 for u in units)
    assert identity["corpora"]["corpus"]["sha256"]


def test_temperatures_and_anchored_drafts_are_axes_of_the_table(table, tmp_path):
    settings = replace(TINY, methods=("em",), temperatures=(1.0, 0.5), anchored=(False, True))
    found = run_study(settings, tmp_path, workers=1)
    assert len(found) == 3 * 2 * (3 + 2 * 3) == estimate_study(settings).cells
    assert not found.duplicated(list(KEY_COLUMNS)).any()
    assert set(found[found["anchored"]]["horizon"]) == {3}
    keys = ["context", "horizon", "rank"]
    # What was there without the axes is there with them: the same contexts, seeds and numbers.
    alone = table[table["method"] == "em"].set_index(keys)["tokens_per_call_block_target"]
    plain = found[~found["anchored"] & (found["temperature"] == 1)].set_index(keys)[
        "tokens_per_call_block_target"
    ]
    pd.testing.assert_series_equal(plain, alone.loc[plain.index])
    told = found[found["anchored"] & (found["temperature"] == 1)].set_index(keys)[
        "tokens_per_call_block_target"
    ]
    assert (told > plain.loc[told.index]).mean() > 0.5
    assert found[found["anchored"]]["tokens_per_call_block_draft"].isna().all()
    cooler = found.groupby("temperature")["joint_entropy_nats"].mean()
    assert cooler[0.5] < cooler[1.0]


def test_a_joint_that_is_too_large_becomes_a_tree_with_bounds(tmp_path):
    methods = ("em", "als", "gradient")
    settings = replace(TINY, methods=methods, max_bytes=8 * 8 * 6**2, tree_nodes=15, width=3)
    found = run_study(settings, tmp_path, workers=1)
    assert found.groupby("horizon")["joint"].unique().map(list).to_dict() == {
        2: ["dense"],
        3: ["tree"],
    }
    tree = found[found["joint"] == "tree"]
    assert (
        set(tree["method"]) == {"em", "gradient"}
        and set(tree["computed"]) == {"certified"}
        and (tree["status"] == "ok").all()
        and (tree["kept_mass"] < 1).all()
        and tree["kl_floor_nats"].isna().all()
    )
    assert (tree["tokens_per_call_block_target"] < tree["tokens_per_call_upper_block_target"]).all()
    assert read_study(tmp_path)[1]["models"]["samples:bigram"]["truncated_horizons"] == [3]
    assert len(found) == estimate_study(settings).cells
    write_report(*read_study(tmp_path), tmp_path / "report.html")


def test_a_served_distribution_is_studied_whole_on_trees_and_alike_on_dense_joints(tmp_path):
    methods = ("em", "acceptance", "als")
    served = replace(TINY, methods=methods, top_k=2, temperatures=(0.7,), horizons=(3,), restarts=2)
    dense = run_study(served, tmp_path / "dense", workers=1)
    trees = replace(served, max_bytes=8, tree_nodes=4)
    found = run_study(trees, tmp_path / "trees", workers=1)
    assert set(dense["joint"]) == {"dense"} and set(found["joint"]) == {"complete"}
    assert set(found["computed"]) == {"complete"} and (found["top_k"] == 2).all()
    assert (found["kept_mass"] > 1 - 1e-9).all() and found["top_p"].isna().all()
    keys = ["model", "context", "rank", "method", "anchored"]
    both = found.merge(dense, on=keys, suffixes=("", "_dense"))
    assert len(both) == len(found) == len(dense[dense["method"] != "als"])
    exact = both[(both["rank"] == 1) & (both["method"] == "em")]  # one answer, from any start
    for name in ("tokens_per_call_block_target", "tokens_per_call_token_target", "kl_nats"):
        assert (exact[name] - exact[f"{name}_dense"]).abs().max() < 1e-6
    settings = read_study(tmp_path / "trees")[1]["settings"]
    assert settings["top_k"] == 2 and settings["top_p"] is None
    assert len(found) == estimate_study(trees).cells
    report = write_report(*read_study(tmp_path / "trees"), tmp_path / "report.html")
    assert "truncated" not in report.read_text("utf-8")


def test_domains_stand_side_by_side_with_their_bits_per_byte(tmp_path):
    import samples

    for name, letters in (("one", "abcdef"), ("two", "aaab")):
        (tmp_path / f"{name}.txt").write_text(letters * 30)
    domains = {"one": tmp_path / "one.txt", "two": tmp_path / "two.txt"}
    settings = replace(
        TINY,
        models=("samples:characters",),
        domains=domains,
        methods=("em",),
        ranks=(1,),
        contexts=2,
    )
    found = run_study(settings, tmp_path / "out", workers=1)
    assert found.groupby("domain")["context"].nunique().to_dict() == {"one": 2, "two": 2}
    lm = samples.characters()
    for domain in domains:
        units = [u for u in plan_study(settings)[0] if u.domain == domain]
        nats = 0.0
        for unit in units:
            laws = lm.next_token_log_probs(torch.tensor(unit.token_ids[:-1])[:, None])
            nats -= laws.gather(1, torch.tensor(unit.token_ids[1:])[:, None]).sum().item()
        expected = nats / math.log(2) / (2 * 3)
        assert found[found["domain"] == domain]["domain_bits_per_byte"].unique() == pytest.approx(
            expected
        )


def test_a_fit_that_breaks_is_a_row_with_a_message_and_costs_no_other_rank(tmp_path, monkeypatch):
    def fails_at_two(joint, rank, method, **_):
        if rank == 2:
            raise RuntimeError("no luck")
        return real(joint, rank, method, **_)

    def breaks(joint, ranks, method, **_):
        raise RuntimeError("a path that fails at one rank")

    import cpmtp.study.rows

    real = cpmtp.study.rows.fit
    monkeypatch.setattr("cpmtp.study.rows.fit", fails_at_two)
    monkeypatch.setattr("cpmtp.study.rows.fit_path", breaks)
    settings = replace(TINY, methods=("em", "acceptance"), contexts=1)
    table = run_study(settings, tmp_path, workers=1)
    failed = table[table["rank"] == 2]
    assert (failed["status"] == "failed").all() and failed["message"].str.contains("no luck").all()
    assert (table[table["rank"] != 2]["status"] != "failed").all()


def test_rows_are_the_fits_along_the_ranks_in_the_order_of_the_settings(tmp_path):
    settings = replace(
        TINY,
        horizons=(3,),
        ranks=(4, 1, 2),
        methods=("acceptance", "em", "als"),
        anchored=(False, True),
        contexts=1,
    )
    table = run_study(settings, tmp_path, workers=1)
    cells = [(row.rank, row.method, row.anchored) for row in table.itertuples()]
    assert cells == [
        (rank, method, anchored)
        for rank in (4, 1, 2)
        for method in ("acceptance", "em", "als")
        for anchored in (False, True)
    ]
    unit = plan_study(settings)[0][0]
    lm = open_language_model(unit.model)
    joint = exact_joint(lm, torch.tensor(unit.token_ids), 3)
    for anchored in (False, True):
        rows = table[table["anchored"] == anchored].set_index(["method", "rank"])
        seed = unit.seed(settings.seed) % 2**31
        em = fit_path(joint, [1, 2, 4], seed=seed, anchored=anchored)
        climbed = fit_path(joint, [1, 2, 4], "acceptance", seed=seed, anchored=anchored, starts=em)
        for rank, near, found in zip((1, 2, 4), em, climbed, strict=True):
            assert rows.loc[("em", rank), "objective"] == near.objective
            assert rows.loc[("acceptance", rank), "objective"] == found.objective
        best = rows["tokens_per_call_block_target"].unstack("method")
        assert (best["acceptance"] >= best["em"] - 1e-9).all()
        assert best["acceptance"].is_monotonic_increasing


def test_no_fit_goes_below_the_floor_of_its_rank(table, tmp_path):
    assert (table["kl_nats"] >= table["kl_floor_nats"] - 1e-9).all()
    one = table[(table["rank"] == 1) & (table["method"] == "em")]
    assert (one["kl_nats"] - one["kl_floor_nats"]).abs().max() < 1e-9
    both = replace(TINY, horizons=(3,), methods=("em",), anchored=(False, True), contexts=2)
    found = run_study(both, tmp_path, workers=1)
    told = found[found["anchored"]]
    assert (told["kl_nats"] >= told["kl_floor_nats"] - 1e-9).all()
    one = told[told["rank"] == 1]
    assert (one["kl_nats"] - one["kl_floor_nats"]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": (0,)}, "rank 0: expected an integer of at least 1"),
        ({"ranks": (-3,)}, "rank -3"),
        ({"ranks": ()}, "ranks is empty"),
        ({"ranks": (2, 2)}, "holds one twice"),
        ({"horizons": (0,)}, "horizon 0: expected"),
        ({"horizons": (1,)}, "at least 2"),
        ({"methods": ("magic",)}, "unknown method 'magic'"),
        ({"contexts": 0}, "contexts 0"),
        ({"context_length": 0}, "context_length 0"),
        ({"restarts": 0}, "restarts 0"),
        ({"temperatures": (-1.0,)}, "temperature -1.0"),
        ({"models": ()}, "models is empty"),
    ],
)
def test_bad_settings_are_refused_at_once(change, said):
    with pytest.raises(ValueError) as error:
        replace(TINY, **change)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ("samples:broken",)}, "NaN"),
        ({"models": ("samples:not_a_model",)}, "expected vocab_size and next_token_log_probs"),
        ({"models": ("samples:nothing_there",)}, "nothing_there"),
        ({"models": ("no_such_module:factory",)}, "no_such_module"),
        ({"models": ("no/such-model",)}, "unknown model 'no/such-model'"),
        ({"horizons": (30,)}, "truncated_joint"),
        ({"corpus": ("nowhere/*.txt",)}, "no such file"),
        ({"corpus": (__file__,)}, "encode_document"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_work(change, said, tmp_path):
    with pytest.raises(ValueError) as error:
        run_study(replace(TINY, **change), tmp_path / "out", workers=1)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_study_killed_half_way_finishes_with_the_same_table(tmp_path, root):
    command = process(
        "study --model samples:hidden_markov --contexts 8 --context-length 4 --ranks 1,2,4,8 "
        "--methods als,em --workers 1"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "tests"), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "--out", tmp_path / "killed"], cwd=root, env=environment)
    parts = tmp_path / "killed" / "parts"
    deadline = time.monotonic() + 240
    while len(list(parts.glob("[0-9]*.parquet"))) < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(list(parts.glob("[0-9]*.parquet"))) < 8
    for folder in ("killed", "whole"):
        done = subprocess.run(
            [*command, "--out", tmp_path / folder], cwd=root, env=environment, capture_output=True
        )
        # 1: least squares above the true rank is singular, and said to be
        assert done.returncode in (0, 1)
    killed, whole = (read_study(tmp_path / folder)[0] for folder in ("killed", "whole"))
    pd.testing.assert_frame_equal(without_times(killed), without_times(whole))
