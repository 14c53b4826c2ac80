"""Language models as a user would write them, and files of small ones."""

from __future__ import annotations

from pathlib import Path

import torch

from cpmtp.language_model import separated_hmm


class BigramTable:
    """The least a user must write: two names."""

    def __init__(self, vocab_size: int = 6, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self._table = (
            torch.randn(vocab_size + 1, vocab_size, generator=generator).mul(2).log_softmax(-1)
        )

    def next_token_log_probs(self, token_ids):
        last = (
            token_ids[:, -1]
            if token_ids.shape[1]
            else torch.full((len(token_ids),), self.vocab_size)
        )
        return self._table[last]


class RecurrentModel(torch.nn.Module):
    """A user's LSTM."""

    def __init__(self, vocab_size: int = 8, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size = vocab_size
        self.embedding = torch.nn.Embedding(vocab_size + 1, 12)
        self.lstm = torch.nn.LSTM(12, 16, batch_first=True)
        self.out = torch.nn.Linear(16, vocab_size)

    @torch.no_grad()
    def next_token_log_probs(self, token_ids):
        start = torch.full((len(token_ids), 1), self.vocab_size)
        hidden, _ = self.lstm(self.embedding(torch.cat([start, token_ids], 1)))
        return (3 * self.out(hidden[:, -1])).log_softmax(-1)


class BrokenModel(BigramTable):
    """Its weights are not numbers."""

    def next_token_log_probs(self, token_ids):
        return torch.full((len(token_ids), self.vocab_size), float("nan"))


class CharacterTable(BigramTable):
    """A table that reads text, so that a corpus can be cut into contexts."""

    def encode_document(self, text):
        return torch.tensor([ord(c) % self.vocab_size for c in text])

    def decode(self, token_ids):
        return "".join(chr(97 + i) for i in token_ids.tolist())


def bigram() -> BigramTable:
    return BigramTable()


def recurrent() -> RecurrentModel:
    return RecurrentModel()


def broken() -> BrokenModel:
    return BrokenModel()


def characters() -> CharacterTable:
    return CharacterTable()


def hidden_markov():
    return separated_hmm(3, 8)


def not_a_model() -> int:
    return 7


def random_llama_folder(folder: Path, *, vocab_merges: int = 0, window: int = 64) -> Path:
    """A random character Llama in Hugging Face format."""
    from cpmtp.training.new_models import new_llama, train_character_tokenizer

    tokenizer = train_character_tokenizer(["def add(a, b):\n    return a + b\n" * 20], vocab_merges)
    new_llama(len(tokenizer), width=96, layers=1, window=window, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class WideTable(CharacterTable):
    """More tokens than a dense joint of three has room for."""

    def __init__(self):
        super().__init__(vocab_size=500)


def wide() -> WideTable:
    return WideTable()


def needs_an_argument(size) -> BigramTable:
    return BigramTable(size)


def raises() -> BigramTable:
    raise OSError("no such file of weights")
