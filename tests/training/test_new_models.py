"""New models: the same seed gives the same weights, and tokenizers keep the text."""

from __future__ import annotations

import torch

from cpmtp.training.new_models import (
    REPLACEMENT,
    new_llama,
    train_byte_tokenizer,
    train_character_tokenizer,
)

TEXT = "def add(a, b):\n\treturn a + b\n" * 20


def test_a_seed_gives_its_weights_and_leaves_the_callers_generator_as_it_is():
    def weights(seed):
        model = new_llama(7, width=96, layers=1, window=16, seed=seed)
        return torch.cat([weight.flatten() for weight in model.parameters()])

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(0), first) and not torch.equal(weights(1), first)


def test_a_character_tokenizer_keeps_the_length_of_a_text_it_does_not_know():
    tokenizer = train_character_tokenizer([TEXT], merges=3)
    assert len(tokenizer) == 2 + 97 + 3
    ids = tokenizer("aéb\u4e2d\n").input_ids
    assert tokenizer.decode(ids) == f"a{REPLACEMENT}b{REPLACEMENT}\n"
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert len(tokenizer(TEXT).input_ids) < len(TEXT)


def test_a_byte_tokenizer_keeps_every_text():
    bytes_alone, merged = (train_byte_tokenizer([TEXT], size) for size in (257, 270))
    for tokenizer in (bytes_alone, merged):
        assert tokenizer.decode(tokenizer("aéb\u4e2d\n").input_ids) == "aéb\u4e2d\n"
    assert len(bytes_alone("é").input_ids) == 2 and len(merged) == 270
