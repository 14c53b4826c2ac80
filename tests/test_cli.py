"""The command line: one line and exit status 2 for bad input, an answer for good."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess

import pytest
from command_line import process, run, words
from samples import random_llama_folder

SMALL = words("--model samples:bigram --contexts 2 --context-length 4 --methods em --workers 1")


def test_a_study_ends_with_rank_table_and_report(monkeypatch, capsys, tmp_path):
    status, out, err = run(
        monkeypatch, capsys, "study", *SMALL, "--ranks", "1,2", "--out", tmp_path / "s"
    )
    assert status == 0, err
    assert re.search(
        r"no recommendation, fastest so far: horizon 3 with rank (at least )?\d+, the fastest in",
        out,
    )  # two contexts carry none
    assert re.search(
        r"horizon 3: ceiling saturates at rank (at least )?\d+, \d\.\d\d tokens per call", out
    )
    assert (tmp_path / "s" / "table.parquet").is_file() and (
        tmp_path / "s" / "report.html"
    ).is_file()
    assert str(tmp_path / "s" / "report.html") in out
    status, out, _ = run(
        monkeypatch, capsys, "report", tmp_path / "s", "--out", tmp_path / "again.html"
    )
    assert status == 0
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "s" / "report.html").read_bytes()


def test_a_measured_latency_in_the_folder_is_used_by_the_study_as_by_the_report(
    monkeypatch, capsys, tmp_path
):
    (tmp_path / "latency.json").write_text('{"plain_step": 0.01, "base": 0.02}')
    arguments = ("study", *SMALL, "--ranks", "1,2", "--out", tmp_path)
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 0, err
    assert "calls     measured as 20 + 0 n + 0 n r ms, a plain step 10 ms" in out


def test_a_study_of_truncated_joints_says_so(monkeypatch, capsys, tmp_path):
    arguments = ("study", *SMALL, "--ranks", "1,2", "--max-gigabytes", "0.000005")
    status, out, err = run(monkeypatch, capsys, *arguments, "--out", tmp_path)
    assert status == 0, err
    assert "Horizon 3 is truncated: its joints hold" in out
    assert re.search(r"r=1: \d\.\d\d to \d\.\d\d \[", out)
    assert "truncated" in (tmp_path / "report.html").read_text("utf-8")
    options = ("--width", "0.0001", "--samples", "100", "--out", tmp_path / "sampled")
    status, out, err = run(monkeypatch, capsys, *arguments, *options)
    assert status == 0, err
    assert "(estimated, 95 % interval" in out and "is truncated" not in out
    assert re.search(r"r=1: \d\.\d\d \[", out)


def test_a_models_folder_and_a_corpus_are_enough(monkeypatch, capsys, tmp_path):
    folder = random_llama_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    arguments = (
        "--model",
        folder,
        "--corpus",
        tmp_path / "text.txt",
        "--horizons",
        2,
        "--ranks",
        "1,2",
        "--contexts",
        2,
    )
    status, out, err = run(
        monkeypatch,
        capsys,
        "study",
        *arguments,
        "--methods",
        "em",
        "--context-length",
        16,
        "--workers",
        1,
        "--out",
        tmp_path / "s",
    )
    assert status == 0, err
    assert "contexts from corpus (2 contexts" in out and "intervals speak of it alone" in out


def test_bytes_that_are_no_utf8_are_counted_and_told(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"abc\xff\xfedef" * 20)
    model = (
        "--model",
        "samples:characters",
        "--domain",
        f"odd={tmp_path / 'text.txt'}",
        "--ranks",
        "1,2",
        "--horizons",
        2,
    )
    status, out, err = run(
        monkeypatch, capsys, "study", *SMALL[2:], *model, "--out", tmp_path / "s"
    )
    assert status == 0, err
    assert "domain odd: 1 documents, 40 bytes that were not UTF-8 replaced" in out
    assert "bits per byte" in out and re.search(r"r=1: \d\.\d\d \[\d\.\d\d, \d\.\d\d\]", out)


def test_files_that_are_no_text_and_names_that_are_none_do_not_stop_a_study(
    monkeypatch, capsys, tmp_path
):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    try:
        with open(path, "w") as file:
            file.write("words " * 20)
    except OSError:
        pytest.skip("this system allows no such name")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    arguments = ("--model", "samples:characters", "--ranks", "1,2", "--horizons", 2)
    corpus = ("--corpus", os.fsdecode(path), "--corpus", tmp_path / "picture.png")
    out = tmp_path / "out"
    status, shown, err = run(
        monkeypatch, capsys, "study", *SMALL[2:], *arguments, *corpus, "--out", out
    )
    assert status == 0, err
    assert "domain corpus: 1 documents, 1 files that hold no text skipped" in shown
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert "picture.png: zero bytes" in manifest["corpora"]["corpus"]["skipped"][0]
    assert "caf" in (out / "report.html").read_text("utf-8")


def test_a_quiet_study_says_nothing(monkeypatch, capsys, tmp_path):
    assert run(
        monkeypatch, capsys, "study", *SMALL, "--ranks", "1,2", "--quiet", "--out", tmp_path / "s"
    ) == (0, "", "")


def test_a_quiet_study_of_a_real_model_with_workers_says_nothing_either(tmp_path, root):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    command = process("study --quiet --workers 2")
    command += ["--model", random_llama_folder(tmp_path / "m"), "--corpus", tmp_path / "text.txt"]
    command += ["--contexts", "2", "--context-length", "8", "--horizons", "2", "--ranks", "1,2"]
    done = subprocess.run(
        [*command, "--methods", "em", "--out", tmp_path / "s"],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(monkeypatch, capsys, tmp_path):
    from cpmtp.study.settings import StudySettings

    status, out, _ = run(monkeypatch, capsys, "study", *SMALL, "--dry-run", "--out", tmp_path / "s")
    assert status == 0
    cells = 2 * len(StudySettings().ranks)  # contexts times ranks, one method
    assert re.search(rf"cells +{cells}\b", out) and "memory" in out and "time" in out
    assert not (tmp_path / "s").exists() and "truncated" not in out
    wide = ("study", "--model", "samples:wide", "--horizons", "2,3", "--dry-run")
    out = run(monkeypatch, capsys, *wide)[1]
    assert "truncated       samples:wide, horizon 3: tokens per call will be lower" in out
    assert "or estimates where these are more than 0.05 apart" in out
    assert "horizon 2:" not in out


def test_the_options_defaults_are_the_settings_own(monkeypatch, capsys):
    from cpmtp.commands.study import _USUAL, study
    from cpmtp.commands.train import train_one_head
    from cpmtp.decomposition.restarts import METHODS
    from cpmtp.study.settings import StudySettings
    from cpmtp.training.heads import HeadTrainingSettings

    def defaults(command):
        return {name: p.default for name, p in inspect.signature(command).parameters.items()}

    given, settings = defaults(study), StudySettings()
    # --minutes has defaults of its own; without it they are the settings'
    given |= {name: _USUAL[name] for name in _USUAL if given.get(name) is None}
    for name in ("horizons", "ranks", "methods", "temperatures"):
        assert given[name] == ",".join(map(str, getattr(settings, name))), name
    for name in ("contexts", "context_length", "restarts", "seed", "width", "samples", "cheapest"):
        assert given[name] == getattr(settings, name), name
    assert tuple(given["model"]) == settings.models
    assert given["max_gigabytes"] * 1e9 == settings.max_bytes
    assert given["anchored"] is None
    given, settings = defaults(train_one_head), HeadTrainingSettings()
    for name in ("horizon", "rank", "anchored", "objective", "steps", "seconds", "seed"):
        assert given[name] == getattr(settings, name), name
    shown = " ".join(run(monkeypatch, capsys, "study", "--help")[1].split())
    assert ", ".join(METHODS) in shown
    assert "Default: yes, as those of trained heads, with --minutes both; no where a" in shown


def test_help_shows_what_an_option_takes_and_cuts_no_summary(monkeypatch, capsys):
    from cpmtp.cli import _COMMANDS

    _, out, _ = run(monkeypatch, capsys, "--help")
    commands = out.split("Commands:")[1]
    assert "…" not in commands and "..." not in commands
    for command in _COMMANDS:
        _, out, _ = run(monkeypatch, capsys, command, "--help")
        assert "list[" not in out and "…" not in out, command


def test_the_version_and_help_are_shown(monkeypatch, capsys):
    assert re.fullmatch(r"cpmtp \d+\.\d+\.\d+\n", run(monkeypatch, capsys, "--version")[1])
    for command in ("study", "report", "train-base", "models"):
        status, out, _ = run(monkeypatch, capsys, command, "--help")
        assert status == 0 and "Example: cpmtp" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("study", *SMALL, "--ranks", "0"), "rank 0"),
        (("study", *SMALL, "--ranks", "two"), "expected integers separated by commas"),
        (("study", *SMALL, "--horizons", "0"), "horizon 0"),
        (("study", *SMALL, "--horizons", "20"), "truncated_joint"),
        (("study", *SMALL, "--methods", "magic"), "unknown method 'magic'"),
        (("study", *SMALL, "--contexts", "none"), "--contexts"),
        (("study", *SMALL, "--contexts", "0"), "contexts 0"),
        (("study", *SMALL, "--workers", "0"), "--workers 0"),
        (("study", *SMALL, "--temperature", "-1"), "temperature"),
        (("study", *SMALL, "--corpus", "nowhere.txt"), "no such file"),
        (("study", *SMALL, "--unknown"), "--unknown"),
        (("study", "--model", "no/such-model"), "unknown model"),
        (("study", "--model", "samples:broken", "--context-length", "4"), "NaN"),
        (("report", "nowhere"), "no finished study"),
        (("train-base", "poetry"), "code, prose"),
        (("train-base", "code", "--steps", "0"), "--steps 0"),
        (("unknown-command",), "unknown-command"),
    ],
)
def test_bad_input_is_one_line_and_status_two(monkeypatch, capsys, tmp_path, arguments, said):
    out = () if arguments[0] in ("report", "unknown-command") else ("--out", tmp_path / "s")
    status, shown, err = run(monkeypatch, capsys, *arguments, *out)
    assert status == 2
    assert shown == "" and len(err.strip().splitlines()) == 1 and said in err
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize("address", ["foo", "tcp://foo", "foo:bar", "tcp://:8786", "http://a:1"])
def test_a_scheduler_without_an_address_is_refused_at_once(monkeypatch, capsys, tmp_path, address):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", lambda *_, **__: pytest.fail("it was waited for"))
    status, shown, err = run(
        monkeypatch, capsys, "study", *SMALL[:-2], "--dask", address, "--out", tmp_path / "s"
    )
    assert (status, shown) == (2, "") and len(err.splitlines()) == 1
    assert f"--dask {address!r} is no scheduler's address: expected tcp://HOST:PORT" in err
    assert not (tmp_path / "s").exists()


def test_a_scheduler_that_does_not_answer_is_one_line(monkeypatch, capsys, tmp_path):
    distributed = pytest.importorskip("distributed")

    class Strange(Exception):
        """Of a kind that no other library knows."""

    def no_client(*_, **__):
        raise Strange("no luck")

    monkeypatch.setattr(distributed, "Client", no_client)
    status, shown, err = run(
        monkeypatch, capsys, "study", *SMALL[:-2], "--dask", "tcp://[::1]:87", "--out", tmp_path
    )
    assert (status, shown) == (2, "") and len(err.splitlines()) == 1
    assert "no scheduler answers there (no luck)" in err


def test_an_empty_corpus_and_a_folder_without_a_model_are_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "nothing").mkdir()
    status, _, err = run(
        monkeypatch,
        capsys,
        "study",
        *SMALL,
        "--corpus",
        tmp_path / "empty.txt",
        "--out",
        tmp_path / "s",
    )
    assert status == 2 and "the corpus is empty" in err
    status, _, err = run(
        monkeypatch, capsys, "study", "--model", tmp_path / "nothing", "--out", tmp_path / "s"
    )
    assert status == 2 and "holds no model" in err


def test_failed_cells_are_counted_and_the_status_is_one(monkeypatch, capsys, tmp_path):
    import cpmtp.study.rows

    real = cpmtp.study.rows.fit

    def fails_at_two(joint, rank, method, **options):
        if rank == 2:
            raise RuntimeError("no luck")
        return real(joint, rank, method, **options)

    def no_path(*_, **__):
        raise RuntimeError("a path that fails at one rank")

    monkeypatch.setattr("cpmtp.study.rows.fit", fails_at_two)
    monkeypatch.setattr("cpmtp.study.rows.fit_path", no_path)
    status, out, err = run(
        monkeypatch, capsys, "study", *SMALL, "--ranks", "1,2,4", "--out", tmp_path / "s"
    )
    assert status == 1
    assert "2 of 6 cells failed" in err and "report" in out
    quiet = ("study", *SMALL, "--ranks", "1,2", "--quiet", "--out", tmp_path / "q")
    assert run(monkeypatch, capsys, *quiet) == (1, "", "")
