"""Bits per byte, the compressor beside it, and lines that are Python."""

from __future__ import annotations

import math
import shutil
import subprocess

import pytest
import torch
from rounding import FORWARD
from samples import random_llama_folder

from cpmtp.corpora import Document
from cpmtp.pretrained import load_language_model
from cpmtp.training.base_evaluation import accepted_line_share, bits_per_byte, xz_bits_per_byte

TEXT = "def f(x):\n    return x\n" * 8


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = random_llama_folder(tmp_path_factory.mktemp("model"), window=32)
    return load_language_model(folder, dtype=torch.float64)


def test_bits_per_byte_is_the_chain_rule_over_every_token(lm):
    ids = torch.cat([torch.tensor([0]), lm.encode_document(TEXT)])
    assert len(ids) > 3 * 32
    nats = 0.0
    for scored in range(1, len(ids)):
        context = ids[max(0, scored + 1 - 32) : scored]
        nats -= lm.next_token_log_probs(context[None])[0, ids[scored]].item()
    expected = nats / math.log(2) / len(TEXT.encode())
    assert bits_per_byte(lm.model, lm.tokenizer, [Document("a", TEXT)], stride=1) == pytest.approx(
        expected, rel=FORWARD
    )


@pytest.mark.parametrize("stride", [1, 7, 16, 31])
def test_every_token_is_scored_once_whatever_the_stride(lm, stride):
    class Uniform:
        """Every token costs the same, so that the sum counts tokens."""

        config, device = lm.model.config, torch.device("cpu")

        def eval(self):
            return self

        def __call__(self, input_ids, use_cache):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, lm.vocab_size)})

    tokens = len(lm.encode_document(TEXT))
    expected = tokens * math.log2(lm.vocab_size) / len(TEXT)
    assert bits_per_byte(
        Uniform(), lm.tokenizer, [Document("a", TEXT)], stride=stride
    ) == pytest.approx(expected)


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
def test_the_compressor_is_xz(tmp_path):
    (tmp_path / "a").write_text(TEXT)
    size = len(
        subprocess.run(["xz", "-9e", "-c", tmp_path / "a"], capture_output=True, check=True).stdout
    )
    assert xz_bits_per_byte([Document("a", TEXT)]) == pytest.approx(8 * size / len(TEXT), rel=0.02)


def test_lines_of_python_are_accepted_and_broken_ones_are_not():
    assert accepted_line_share("x = 1\n\n    return f(x)\n") == 1
    assert accepted_line_share("x = 'open\ny = 2\n") == 0.5
    assert accepted_line_share("f(\n") == 0
    assert accepted_line_share("") == 0
