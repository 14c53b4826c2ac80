"""Files are written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from cpmtp.whole_files import (
    remove_partials,
    write_parquet,
    write_tensors,
    write_text,
    write_whole,
)


@pytest.mark.parametrize("there", [True, False])
def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, there):
    path = tmp_path / "a.txt"
    if there:
        write_text(path, "before")

    def half(partial):
        partial.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half)
    assert [p.read_text() for p in tmp_path.iterdir()] == (["before"] if there else [])


KILLED = """
import os, signal, sys
from pathlib import Path
from cpmtp.whole_files import write_whole
def half(partial):
    partial.write_text("hal")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), half)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_what_a_killed_writer_left_is_no_file_of_that_name_and_can_be_removed(tmp_path, root):
    path = write_text(tmp_path / "a.txt", "before")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, path], env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_contents_are_on_the_disk_before_the_name_is_unless_told_otherwise(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("forced"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("named"), replace(old, new)))
    write_text(tmp_path / "a.txt", "text")
    write_parquet(tmp_path / "b.parquet", pd.DataFrame({"a": [1]}), forced=False)
    assert done == ["forced", "named", "named"]


def test_each_kind_is_read_back_and_its_folder_is_made(tmp_path):
    folder = tmp_path / "new" / "folder"
    table, tensors = pd.DataFrame({"a": [1.5], "b": ["é"]}), {"w": torch.arange(3)}
    assert write_text(folder / "t.txt", "é\n").read_bytes() == "é\n".encode()
    pd.testing.assert_frame_equal(
        pd.read_parquet(write_parquet(folder / "p.parquet", table)), table
    )
    with safe_open(write_tensors(folder / "s", tensors, {"key": "k"}), "pt") as file:
        assert file.metadata() == {"key": "k"} and torch.equal(file.get_tensor("w"), tensors["w"])


def test_a_name_that_is_no_text_is_written_by_its_numbers(tmp_path):
    path = write_text(tmp_path / "a.txt", "größe caf\udce9.txt")
    assert path.read_text("utf-8") == r"größe caf\udce9.txt"
