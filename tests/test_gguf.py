"""GGUF files are read as the model they hold, converted once, and refused in one line where they
cannot be read.
"""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
import torch
from command_line import run

from cpmtp.pretrained import load_language_model

pytest.importorskip("gguf")

from tiny_gguf import TOKENS, write_tiny_gguf

CONTEXT = torch.tensor([[0, 2, 3, 4]])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny_gguf(path)


def test_a_gguf_file_is_the_model_that_was_written(written):
    path, tensors = written
    lm = load_language_model(path)
    assert lm.name == "tiny" and lm.vocab_size == len(TOKENS) and lm.max_context == 64
    weights = lm.model.state_dict()
    for ours, theirs in {
        "embed_tokens": "token_embd",
        "layers.1.mlp.up_proj": "blk.1.ffn_up",
    }.items():
        expected = torch.from_numpy(tensors[f"{theirs}.weight"])
        torch.testing.assert_close(weights[f"model.{ours}.weight"], expected, atol=0, rtol=0)
    packed = torch.from_numpy(tensors["blk.0.ffn_down.weight"])
    unpacked = weights["model.layers.0.mlp.down_proj.weight"]
    # Eight bits of the largest of 32 entries: half a step, and the step is kept in half precision.
    step = packed.abs().max() / 127
    assert 0 < (unpacked - packed).abs().max() <= 0.5 * step * (1 + 2**-9)
    assert lm.encode_document("abcd").tolist() == [TOKENS.index("abc"), TOKENS.index("d")]
    assert lm.decode(torch.tensor([3, 2])) == "ba"
    assert lm.shares_prefixes


def test_what_is_converted_once_is_the_same_model_without_a_word_of_its_packing(
    written, tmp_path, monkeypatch, capsys
):
    path, _ = written
    folder = tmp_path / "converted"
    said = run(monkeypatch, capsys, "models", "--convert", path, "--out", folder)
    assert said[0] == 0 and str(folder) in said[1]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    again, lm = load_language_model(folder), load_language_model(path)
    assert again.exact_fingerprint == lm.exact_fingerprint
    assert again.tokenizer_fingerprint == lm.tokenizer_fingerprint
    assert torch.equal(again.next_token_log_probs(CONTEXT), lm.next_token_log_probs(CONTEXT))
    assert not list(tmp_path.glob(".*"))
    refused = run(monkeypatch, capsys, "models", "--convert", path, "--out", folder)
    assert refused[0] == 2 and "is there already" in refused[2]


@pytest.mark.parametrize("name", ["bfloat16", torch.float64])
def test_the_precision_is_the_one_asked_for(written, name):
    lm = load_language_model(written[0], dtype=name)
    assert str(lm.model.dtype) == f"torch.{name}".replace("torch.torch.", "torch.")


def damaged(path, kind: str, tmp_path):
    """A file that is not what its name says, or ends early."""
    whole = path.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "short": whole[:40], "other": b"PK\3\4" + whole}
    made = tmp_path / f"{kind}.gguf"
    made.write_bytes(broken[kind])
    return made


@pytest.mark.parametrize(
    ("kind", "reason"), [("cut", "could not be loaded"), ("short", ""), ("other", "no GGUF file")]
)
def test_a_damaged_file_is_refused_in_one_line(
    written, kind, reason, tmp_path, monkeypatch, capsys
):
    file = damaged(written[0], kind, tmp_path)
    status, _, said = run(monkeypatch, capsys, "generate", "--model", file)
    assert status == 2 and reason in said and f"{kind}.gguf" in said
    assert len(said.strip().splitlines()) == 1


def test_without_the_package_it_is_named(written, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a)
    )
    status, _, said = run(monkeypatch, capsys, "generate", "--model", written[0])
    assert status == 2 and "pip install 'cpmtp[gguf]'" in said
    assert len(said.strip().splitlines()) == 1


BAD = [
    (("generate", "--model", "code", "--dtype", "int4"), "unknown dtype 'int4': expected one of"),
    (("train-head", "--model", "code", "--dtype", "half"), "unknown dtype 'half'"),
    (("models", "--check", "code", "--dtype", "q4"), "unknown dtype 'q4'"),
    (("generate", "--model", "missing.gguf"), "no file missing.gguf: expected"),
    (("models", "--convert", "code"), "each needs the other"),
    (("models", "--convert", "a", "--check", "b", "--out", "c"), "give one of them"),
    (("study", "--model", "code", "--top-k", "105"), "top_k 105 over a vocabulary of 104 tokens"),
    (
        ("generate", "--model", "code", "--top-k", "105"),
        "top_k 105 over a vocabulary of 104 tokens",
    ),
    (("study", "--model", "code", "--dtype", "float8"), "unknown dtype 'float8'"),
]
if not torch.cuda.is_available():
    BAD += [
        ((command, "--model", "code", "--device", "cuda"), "device 'cuda' cannot be used here")
        for command in ("generate", "train-head", "study")
    ]


@pytest.mark.parametrize(("arguments", "reason"), BAD)
def test_what_a_model_cannot_be_loaded_with_is_refused_in_one_line(
    arguments, reason, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    status, _, said = run(monkeypatch, capsys, *arguments)
    assert status == 2 and reason in said and len(said.strip().splitlines()) == 1


def test_a_folder_of_gguf_files_says_which_path_to_give(written):
    with pytest.raises(ValueError, match=r"it holds tiny\.gguf: give that file's path"):
        load_language_model(written[0].parent)


def test_a_files_header_is_read_once_and_everything_is_as_before_afterwards(written, monkeypatch):
    gguf = importlib.import_module("gguf")
    read, before = [], (gguf.GGUFReader, gguf.get_tensor_name_map)

    class Reader(gguf.GGUFReader):
        def __init__(self, path, *more):
            read.append(str(path))
            super().__init__(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    load_language_model(written[0])
    assert read == [str(written[0])]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Reader, before[1])
