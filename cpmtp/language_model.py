"""What a language model must offer, and two model classes whose joints are known in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.sampling_law import ratio


@runtime_checkable
class LanguageModel(Protocol):
    """The least a language model must offer; everything up to the study works with it.

    Attributes
    ----------
    vocab_size : int
        Number of token ids.
    """

    vocab_size: int

    def next_token_log_probs(
        self, token_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities (nats) of the token that follows each row; ``-inf`` is legal."""
        ...


@runtime_checkable
class PrefixSharingLanguageModel(LanguageModel, Protocol):
    """A language model that evaluates many continuations of one context faster than one after
    another.
    """

    max_context: int

    def continuation_log_probs(
        self, context: Int[Tensor, " time"], continuations: Int[Tensor, "count length"]
    ) -> Float[Tensor, "count vocab"]:
        """Log-probabilities (nats) of the token after `context` followed by each continuation.

        Continuations that share all but their last token should be neighbours: they are evaluated
        together.
        """
        ...


@runtime_checkable
class LogitsLanguageModel(PrefixSharingLanguageModel, Protocol):
    """A language model that hands out logits as it computes them, so that they can be reduced there
    and need not be kept.
    """

    def continuation_logits(
        self, context: Int[Tensor, " time"], continuations: Int[Tensor, "count length"]
    ) -> Iterator[Float[Tensor, "some vocab"]]:
        """Logits of the token after `context` and each continuation, in pieces and in order, on
        whatever device and in whatever precision they are.
        """
        ...


@runtime_checkable
class HiddenStateLanguageModel(LanguageModel, Protocol):
    """A language model whose logits are made of hidden states: what a head reads and drafts from.

    Attributes
    ----------
    name : str
        For tables and messages.
    max_context : int, optional
        Positions it has; None: no limit.
    """

    name: str
    max_context: int | None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def hidden_states(self, token_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
        """What the logits after every position are made of."""
        ...

    def unembed(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """The logits of hidden states."""
        ...


@runtime_checkable
class TextLanguageModel(LanguageModel, Protocol):
    """A language model that reads and writes text."""

    def encode_document(self, text: str) -> Int[Tensor, " time"]:
        """Token ids of a text, without a start-of-text token."""
        ...

    def decode(self, token_ids: Int[Tensor, " time"]) -> str:
        """The text of token ids."""
        ...


def writes_text(lm: LanguageModel | None) -> bool:
    """Whether the model makes text of token ids: one that came without its tokenizer does not."""
    return hasattr(lm, "decode") and getattr(lm, "tokenizer", lm) is not None


def sample_sequences(
    lm: LanguageModel, count: int, length: int, *, seed: int = 0
) -> Int[Tensor, "count length"]:
    """Sequences drawn from a language model, starting from an empty context.

    A model may offer a faster `sample_tokens(count, length, seed=…)` of its own, which is used
    then.
    """
    own = getattr(lm, "sample_tokens", None)
    if own is not None:
        return own(count, length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(count, 0, dtype=torch.long)
    for _ in range(length):
        law = lm.next_token_log_probs(tokens).double().exp()
        tokens = torch.cat([tokens, draw_tokens(law, generator)], 1)  # (count, time + 1)
    return tokens


def draw_tokens(
    probs: Float[Tensor, "count vocab"], generator: torch.Generator
) -> Int[Tensor, "count 1"]:
    """One token per row.

    Raises
    ------
    ValueError
        If a row is no law: a model's weights are broken.
    """
    if not bool(torch.isfinite(probs).all()):
        raise ValueError(
            "the model returned NaN or infinite logits: check its weights and the context"
        )
    return torch.multinomial(probs, 1, generator=generator)


@dataclass(frozen=True)
class MarkovLanguageModel:
    """A Markov chain over tokens: the next token depends on the last one only.

    Attributes
    ----------
    initial : (vocab,) tensor
        Probabilities of the first token of an empty context.
    transition : (vocab, vocab) tensor
        ``transition[i, j]`` is the probability of j after i; rows sum to one.

    Examples
    --------
    >>> transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> chain = MarkovLanguageModel(torch.tensor([0.5, 0.5]), transition)
    >>> chain.next_token_log_probs(torch.tensor([[0, 1]])).exp()
    tensor([[0.2000, 0.8000]])
    """

    initial: Float[Tensor, " vocab"]
    transition: Float[Tensor, "vocab vocab"]

    def __repr__(self) -> str:
        return f"MarkovLanguageModel(vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.initial.shape[-1]

    def next_token_log_probs(
        self, token_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities (nats) of the token that follows each row."""
        if token_ids.shape[1] == 0:
            return self.initial.log().expand(len(token_ids), -1)
        return self.transition[token_ids[:, -1]].log()


@dataclass(frozen=True)
class HiddenMarkovLanguageModel:
    """A hidden-Markov model with s states.

    The joint of its next three tokens has rank s for a vocabulary of at least s tokens and
    full-rank transition and emission matrices: the state that emits the middle token separates the
    three.

    Attributes
    ----------
    initial : (states,) tensor
    transition : (states, states) tensor
        ``transition[i, j]`` is the probability of state j after i.
    emission : (states, vocab) tensor
        Probabilities of the tokens in each state.

    References
    ----------
    allman2009identifiability

    Examples
    --------
    >>> lm = separated_hmm(states=2, vocab_size=4)
    >>> lm.next_token_log_probs(torch.zeros(1, 0, dtype=torch.long)).exp().sum()
    tensor(1., dtype=torch.float64)
    """

    initial: Float[Tensor, " states"]
    transition: Float[Tensor, "states states"]
    emission: Float[Tensor, "states vocab"]

    def __repr__(self) -> str:
        states = len(self.initial)
        return f"HiddenMarkovLanguageModel({states=}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.emission.shape[1]

    def next_token_log_probs(
        self, token_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities (nats) of the token that follows each row."""
        state = self.initial.expand(len(token_ids), -1)  # (batch, states)
        for t in range(token_ids.shape[1]):
            seen = state * self.emission[:, token_ids[:, t]].T  # (batch, states)
            state = (seen / seen.sum(1, keepdim=True)) @ self.transition  # (batch, states)
        return (state @ self.emission).log()


def separated_hmm(
    states: int, vocab_size: int, *, own: float = 0.8, stay: float = 0.5, seed: int = 0
) -> HiddenMarkovLanguageModel:
    """A hidden-Markov model whose states are easy to tell apart; float64.

    Each state gives probability `own` to a block of tokens of its own and the rest to all others,
    unevenly within both; it keeps itself with probability `stay`, and moves to the others unevenly.

    Raises
    ------
    ValueError
        If there are more states than tokens.
    """
    if not 1 <= states <= vocab_size:
        raise ValueError(
            f"{states} states over {vocab_size} tokens: need at least one state and one token of "
            "its own each"
        )
    generator = torch.Generator().manual_seed(seed)

    def uneven(rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=generator, dtype=torch.float64) + 0.5

    owner = torch.arange(vocab_size) * states // vocab_size
    mine = owner == torch.arange(states)[:, None]  # (states, vocab)
    emission = _mix(uneven(states, vocab_size), mine, own)
    transition = _mix(uneven(states, states), torch.eye(states, dtype=torch.bool), stay)
    initial = uneven(1, states)[0]
    return HiddenMarkovLanguageModel(initial / initial.sum(), transition, emission)


def _mix(scores: Tensor, chosen: Tensor, share: float) -> Tensor:
    inside = torch.where(chosen, scores, 0.0)
    outside = torch.where(chosen, 0.0, scores)
    total_outside = outside.sum(1, keepdim=True)  # (rows, 1)
    inside = inside / inside.sum(1, keepdim=True)
    mixed = share * inside + (1 - share) * ratio(outside, total_outside, otherwise=0.0)
    return torch.where(total_outside > 0, mixed, inside)
