"""What may pass is tried again and never stored as a result; threads share what they use."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pandas as pd
import pytest
import torch
from samples import CharacterTable, random_llama_folder

import cpmtp.study.quality
import cpmtp.study.rows
from cpmtp.study.plan import plan_study
from cpmtp.study.running import run_study
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import TIMING_COLUMNS

TINY = StudySettings(
    models=("samples:bigram",),
    horizons=(3,),
    ranks=(1, 2),
    methods=("em", "als"),
    contexts=3,
    context_length=4,
)


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=list(TIMING_COLUMNS))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return run_study(TINY, tmp_path_factory.mktemp("whole"), workers=1)


class FailsFirst:
    """What `name` does in the rows of a study, but for the first few calls."""

    def __init__(self, monkeypatch, name: str, error: Exception, times: int):
        home = next(m for m in (cpmtp.study.rows, cpmtp.study.quality) if hasattr(m, name))
        self.real, self.error, self.left = getattr(home, name), error, times
        monkeypatch.setattr(home, name, self)

    def __call__(self, *arguments, **options):
        if self.left > 0:
            self.left -= 1
            raise self.error
        return self.real(*arguments, **options)


PASSING = [
    ("open_language_model", ValueError("the model 'm' could not be loaded")),
    ("open_language_model", NotImplementedError("Cannot copy out of meta tensor; no data!")),
    ("_context_nats", RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    ("exact_joint", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")),
    ("fit_path", MemoryError()),
    ("fit", MemoryError()),
    ("divergences", MemoryError()),
    ("open_language_model", OSError("Stale file handle")),
]


@pytest.mark.parametrize(("name", "error"), PASSING)
def test_what_passes_leaves_no_trace(table, tmp_path, monkeypatch, name, error):
    FailsFirst(monkeypatch, name, error, 2)
    found = run_study(TINY, tmp_path, workers=1)
    pd.testing.assert_frame_equal(without_times(found), without_times(table))


def test_texts_that_could_not_be_drawn_for_want_of_memory_are_drawn_again(tmp_path, monkeypatch):
    settings = replace(
        TINY, methods=("em",), contexts=1, max_bytes=8, tree_nodes=4, width=1e-3, samples=50
    )
    whole = run_study(settings, workers=1)
    assert set(whole["computed"]) == {"sampled"}
    FailsFirst(monkeypatch, "sampled_acceptance", MemoryError(), 2)
    pd.testing.assert_frame_equal(
        without_times(run_study(settings, tmp_path, workers=1)), without_times(whole)
    )


def test_what_does_not_pass_is_a_failed_row_and_no_part(table, tmp_path, monkeypatch):
    failing = FailsFirst(monkeypatch, "fit_path", MemoryError("no luck"), 10**9)
    found = run_study(TINY, tmp_path, workers=1)
    em = found["method"] == "em"
    assert (found[em]["status"] == "failed").all() and (found[~em]["status"] == "ok").all()
    assert found[em]["message"].str.contains("tried again by the next run: MemoryError").all()
    assert not list((tmp_path / "parts").glob("[0-9]*.parquet"))
    failing.left = 0
    again = run_study(TINY, tmp_path, workers=1)
    pd.testing.assert_frame_equal(without_times(again), without_times(table))
    assert len(list((tmp_path / "parts").glob("[0-9]*.parquet"))) == 3


def test_what_is_wrong_for_good_is_tried_once_and_kept(tmp_path, monkeypatch):
    FailsFirst(monkeypatch, "_context_nats", ValueError("no such law"), 1)
    found = run_study(TINY, tmp_path, workers=1)
    failed = found["status"] == "failed"
    assert set(found[failed]["message"]) == {"ValueError: no such law"} and failed.sum() == 4
    assert len(list((tmp_path / "parts").glob("[0-9]*.parquet"))) == 3


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A study of a model of transformers, and its table as one thread finds it."""
    folder = random_llama_folder(tmp_path_factory.mktemp("model") / "m")
    settings = replace(TINY, models=(str(folder),), horizons=(2,), anchored=(False,), contexts=6)
    return settings, run_study(settings, tmp_path_factory.mktemp("alone"), workers=1)


def test_two_threads_give_the_same_table(real, tmp_path):
    settings, expected = real
    with ThreadPoolExecutor(2) as executor:
        found = run_study(settings, tmp_path, executor)
    pd.testing.assert_frame_equal(without_times(found), without_times(expected))


def test_a_dask_worker_of_two_threads_that_fails_to_load_once_gives_the_same_table(
    real, tmp_path, monkeypatch
):
    distributed = pytest.importorskip("distributed")
    settings, expected = real
    options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=False, **options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        FailsFirst(monkeypatch, "open_language_model", OSError("not there yet"), 3)
        found = run_study(settings, tmp_path, client.get_executor(pure=False))
    pd.testing.assert_frame_equal(without_times(found), without_times(expected))


class Holes(CharacterTable):
    """Letters only: whatever else a text holds is no token."""

    def encode_document(self, text):
        return super().encode_document("".join(filter(str.isalpha, text)))


def holes() -> Holes:
    return Holes()


def test_a_document_that_tokenizes_to_nothing_is_no_context(tmp_path, monkeypatch):
    monkeypatch.setattr("samples.characters", holes)
    for name, text in (("a", "1 2 3"), ("b", "word upon word"), ("c", "4"), ("d", "more words")):
        (tmp_path / f"{name}.txt").write_text(text)
    settings = replace(TINY, models=("samples:characters",), corpus=(tmp_path,), contexts=4)
    units, identity = plan_study(settings)
    assert [unit.document[-5] for unit in units] in (["b", "d"] * 2, ["d", "b"] * 2)
    assert all(unit.token_ids for unit in units) and identity["corpora"]["corpus"]["documents"] == 4
    with pytest.raises(ValueError, match="no document of domain 'corpus' has a token of model"):
        plan_study(replace(settings, corpus=(tmp_path / "a.txt",)))


def test_a_token_outside_the_vocabulary_is_named_in_the_row(tmp_path, monkeypatch):
    table = CharacterTable()
    table.encode_document = lambda text: torch.tensor([1, 2, 9 if "x" in text else 3])
    monkeypatch.setattr("samples.characters", lambda: table)
    cpmtp.study.models.opened_language_model.cache_clear()
    for name in "abx":
        (tmp_path / f"{name}.txt").write_text(name)
    settings = replace(TINY, models=("samples:characters",), corpus=(tmp_path,), ranks=(1,))
    found = run_study(settings, tmp_path / "out", workers=1)
    cpmtp.study.models.opened_language_model.cache_clear()
    failed = found[found["status"] == "failed"]
    assert len(failed) == 2 and failed["document"].str.endswith("x.txt").all()
    assert failed["message"].str.contains(r"context tokens must be in \[0, 6\): got 1 to 9").all()
