"""New models: tokenizers trained on texts, and weights drawn at random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"
_ALPHABET = "\t\n" + "".join(chr(c) for c in range(32, 127))


@contextlib.contextmanager
def locally_seeded(seed: int) -> Iterator[None]:
    """What is drawn on the CPU within depends on `seed` alone; the caller's generators go on as if
    nothing had been drawn.

    Examples
    --------
    >>> with locally_seeded(0):
    ...     first = torch.rand(1)
    >>> with locally_seeded(0):
    ...     bool(first == torch.rand(1))
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def train_character_tokenizer(texts: list[str], merges: int = 5) -> PreTrainedTokenizerFast:
    """Printable ASCII, newline and tab, plus the most frequent `merges` byte-pair merges within a
    line.

    Every other character becomes one replacement token (U+FFFD), so that text length is kept and
    the loss counted.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=REPLACEMENT))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=2 + len(_ALPHABET) + merges,
        special_tokens=[END_OF_TEXT, REPLACEMENT],
        initial_alphabet=list(_ALPHABET),
        limit_alphabet=len(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ("".join(c if c in _ALPHABET else " " for c in t) for t in texts), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        unk_token=REPLACEMENT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def train_byte_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding; 257 tokens are the bytes and the end of a text, without a
    merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def new_llama(vocab_size: int, *, width: int, layers: int, window: int, seed: int):
    """A randomly initialised Llama with grouped-query attention (heads of 32, three queries per
    key).
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(width // 96, 1),
        max_position_embeddings=window,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    with locally_seeded(seed):
        return AutoModelForCausalLM.from_config(config)
