"""What a run says of itself."""

from __future__ import annotations

import json

import pytest
import torch
from samples import random_draft

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.language_model import separated_hmm


def test_how_long_rows_wait_for_the_slowest_is_said(tmp_path):
    """And the rate of the cycles in which none has ended."""
    lm, file = separated_hmm(2, 4), tmp_path / "log.jsonl"
    draft = random_draft(lm.vocab_size, 2, 2, seed=1)
    prompts = [torch.tensor([row]) for row in range(3)]
    out = speculative_generate(
        lm, lambda text: draft, prompts, max_new_tokens=40, seed=1, eos_token_id=2, monitor=file
    )
    cycles = [json.loads(line) for line in file.read_text().splitlines()]
    running = [len(cycle["accepted"]) for cycle in cycles]
    assert 0 < running.count(3) < len(running)
    assert out.stats.running_share == pytest.approx(sum(running) / (3 * len(running)))
    full = [cycle for cycle in cycles if len(cycle["accepted"]) == 3]
    tokens = sum(sum(cycle["accepted"]) + 3 for cycle in full)
    seconds = sum(sum(cycle["seconds"].values()) for cycle in full)
    assert out.stats.full_tokens_per_second == pytest.approx(tokens / seconds)
