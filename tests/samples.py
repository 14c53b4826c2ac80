"""Samples that several tests use: language models as a user would write them, joints and drafts
without a model behind them, a study's table and manifest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cpmtp.drafts.cp_distribution import CPDistribution, normalised_cp
from cpmtp.joint_distribution import JointDistribution
from cpmtp.language_model import separated_hmm
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import TIMING_COLUMNS

RANKS = (1, 2, 4, 8)
MANIFEST = {
    "settings": {
        "contexts": 64,
        "context_length": 8,
        "corpus": ['<script>alert(1)</script>"quoted".txt'],
        "temperature": 1.0,
        "horizons": [3],
        "ranks": [1, 2, 4, 8],
        "methods": ["em", "als"],
        "restarts": 1,
        "seed": 0,
    },
    "versions": {"cpmtp": "0"},
    "models": {"m": {"vocab_size": 6, "sha256": None}},
}


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
    """A user's LSTM, in double precision: the size of a batch changes the last digits alone."""

    def __init__(self, vocab_size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size = vocab_size
        self.embedding = torch.nn.Embedding(vocab_size + 1, 12)
        self.lstm = torch.nn.LSTM(12, 16, batch_first=True)
        self.out = torch.nn.Linear(16, vocab_size)
        self.to(dtype)

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


def peaked_joint(
    vocab: int, horizon: int, seed: int = 0, batch: tuple[int, ...] = (), *, power: int = 8
) -> JointDistribution:
    """Joints of independent random entries; the higher the power, the fewer hold most mass."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, *(vocab,) * horizon)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) ** power
    return JointDistribution(
        values / values.sum(dim=tuple(range(-horizon, 0)), keepdim=True), horizon
    )


def random_cp(batch, vocab, horizon, rank, seed=0, dtype=torch.float64) -> CPDistribution:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*batch, rank, generator=generator, dtype=dtype)
    factors = [
        torch.rand(*batch, vocab, rank, generator=generator, dtype=dtype) ** 3
        for _ in range(horizon)
    ]
    return normalised_cp(weights, factors)


def random_draft(
    vocab: int, horizon: int, rank: int, seed: int, batch: tuple[int, ...] = ()
) -> CPDistribution:
    generator = torch.Generator().manual_seed(seed)

    def simplex(*shape, dim):
        return (
            torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)
            .mul(1.5)
            .softmax(dim)
        )

    return CPDistribution(
        simplex(rank, dim=-1), [simplex(vocab, rank, dim=-2) for _ in range(horizon)]
    )


def random_joint(vocab: int, horizon: int, seed: int, zeros: float = 0.0) -> torch.Tensor:
    """A joint with a share of zero entries."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand((vocab,) * horizon, generator=generator, dtype=torch.float64) ** 3
    probs[torch.rand(probs.shape, generator=generator) < zeros] = 0
    probs.view(-1)[0] += 1e-3
    return probs / probs.sum()


def tiny_study(**changes) -> StudySettings:
    """Settings of a study that takes a second; any of them changed."""
    usual = {
        "models": ("samples:bigram",),
        "horizons": (2,),
        "ranks": (1, 2),
        "methods": ("em",),
        "contexts": 4,
        "context_length": 4,
    }
    return StudySettings(**usual | changes)


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    """What of a study's table the same settings give again."""
    return table.drop(columns=list(TIMING_COLUMNS))


def study_table(gain, contexts=64, documents=32, noise=0.05, seed=0, horizon=3) -> pd.DataFrame:
    """A study's table in which rank r reaches ``horizon - gain(r)`` tokens per call plus what is
    common to a context.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for context in range(contexts):
        common = noise * generator.standard_normal()
        for rank in RANKS:
            for method, loss in (("em", 0.0), ("als", 0.1)):
                value = (
                    horizon - gain(rank) - loss + common + 0.1 * noise * generator.standard_normal()
                )
                rows.append(
                    {
                        "model": "m",
                        "domain": "d",
                        "document": str(context % documents),
                        "context": context,
                        "horizon": horizon,
                        "rank": rank,
                        "method": method,
                        "status": "ok",
                        "message": "",
                        "tokens_per_call_block_target": value,
                        "survival_block_target_1": 1.0,
                        "survival_block_target_2": value / horizon,
                        "kl_nats": gain(rank),
                        "total_variation": 0.1,
                        "relative_frobenius": 0.1,
                        "fit_seconds": 1.0,
                    }
                )
    return pd.DataFrame(rows)


def with_trees(
    table: pd.DataFrame, horizons=(3,), width: float = 0.08, kept_mass: float = 0.97
) -> pd.DataFrame:
    """The same table with truncated joints at some horizons: every figure a lower bound with an
    upper one `width` above it.
    """
    tree, column = table["horizon"].isin(horizons), "tokens_per_call_block_target"
    kept = np.where(table["context"] % 2 == 0, kept_mass, kept_mass - 0.02)
    return table.assign(
        joint=np.where(tree, "tree", "dense"),
        kept_mass=np.where(tree, kept, 1.0),
        tokens_per_call_upper_block_target=table[column] + width * tree,
        kl_nats=table["kl_nats"].where(~tree),
    )


def with_samples(table: pd.DataFrame, horizons=(3,), width: float = 0.1) -> pd.DataFrame:
    """The same table with estimates at some horizons, intervals `width` wide around them."""
    column, found = "tokens_per_call_block_target", with_trees(table, horizons, width=0.0)
    sampled = table["horizon"].isin(horizons)
    ends = {
        column.replace("call", f"call_{end}"): table[column] + sign * width / 2 * sampled
        for end, sign in (("lower", -1), ("upper", 1))
    }
    return found.assign(computed=np.where(sampled, "sampled", "complete"), **ends)
