"""A causal language model of transformers behind the package's protocols."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from cpmtp.pretrained.identity import (
    positions_of,
    weights_fingerprint,
)
from cpmtp.pretrained.parts import head_only, in_float32, trunk_name, with_tree_attention
from cpmtp.pretrained.sampling import sampled_tokens
from cpmtp.pretrained.text import TextReader
from cpmtp.pretrained.trials import (
    FAILURES,
    Trials,
    fits_twice,
    growth_gap,
    hidden_gap,
    later_tokens_gap,
    tree_gap,
    trial_ids,
)
from cpmtp.tree_attention import TokenTree, lay_out_tree

_LOGITS_AT_ONCE = 1 << 25  # bytes of logits
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class HuggingFaceLanguageModel(TextReader):
    """A causal language model of transformers behind the `LanguageModel` protocol.

    Continuations of one context are evaluated with the context's key/value cache shared, never
    copied per branch: they stand in one row as a tree of tokens, and each token attends to the
    context and its own branch. What this takes for granted is tried against full forward passes
    when it is first used; a model that fails is evaluated by full passes, with the same result. A
    model that looks at later tokens is refused.

    Nothing of the model is switched during a call: several threads may use one model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed by `encode` and `decode` only.
    name : str
        For tables and reports.
    batch_tokens : int
        Tokens per forward pass; bounds the working set: their activations, and their logits twice,
        of which there are never more than 32 MB at once.

    Raises
    ------
    ValueError
        If the model has no output embeddings.
    """

    def __init__(self, model, tokenizer=None, *, name: str = "model", batch_tokens: int = 1536):
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{name}: a {type(model).__name__} has no output embeddings: expected a causal "
                "language model"
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.batch_tokens = batch_tokens
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.max_context: int | None = positions_of(model)
        arguments = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in arguments
        # What the key/value cache is called changed from one release of transformers to the next.
        self.cache_name = next((n for n in _CACHE_NAMES if n in arguments), _CACHE_NAMES[0])
        self._context_cache: tuple[tuple[int, ...], Cache, Tensor] | None = None
        self._lock = threading.Lock()
        self.trials = Trials(self)

    def __repr__(self) -> str:
        window = "" if self.max_context is None else f", window {self.max_context:,}"
        return (
            f"HuggingFaceLanguageModel({self.name!r}: {type(self.model).__name__}, vocabulary "
            f"{self.vocab_size:,}{window}, {self.model.dtype} on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def text_config(self) -> Any:
        """The configuration of the part that reads and writes text."""
        return self.model.config.get_text_config()

    @property
    def unembedding(self) -> Float[Tensor, "vocab d"]:
        """The matrix that last hidden states are multiplied with, scaled where the model scales."""
        weight = self.model.get_output_embeddings().weight
        return weight if self._logit_scale == 1 else weight * self._logit_scale

    @cached_property
    def _logit_scale(self) -> float:
        """What the model multiplies its logits with; 1 where it does more to them, or nothing."""
        try:
            hidden, logits = (part.float() for part in self._hidden_and_logits())
            raw = hidden @ self.model.get_output_embeddings().weight.float().mT  # (1, time, vocab)
            scale = float((raw * logits).sum() / raw.square().sum())
            off = float((scale * raw - logits).abs().max() / logits.abs().max())
        except FAILURES:
            return 1.0
        return round(scale, 9) if off < 1e-2 and abs(scale - 1) > 1e-2 else 1.0

    @property
    def embedding(self) -> Float[Tensor, "vocab d"]:
        """The matrix of token embeddings."""
        return self.model.get_input_embeddings().weight

    @torch.no_grad()
    def hidden_states(self, token_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
        """What the model's logits are made of at every position; one full forward pass.

        Raises
        ------
        ValueError
            If the logits cannot be computed from these, or the model looks at later tokens.
        """
        self.require_hidden_states()
        return self.trunk(input_ids=token_ids.to(self.device), use_cache=False).last_hidden_state

    @cached_property
    def trunk(self) -> Any:
        """The part of the model that turns token ids into last hidden states."""
        return getattr(self.model, trunk_name(self.model))

    def unembed(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """The model's own logits of hidden states, in the forward pass's precision."""
        out = self.model.get_output_embeddings()
        hidden = hidden.to(out.weight.dtype)
        if self._head_is_a_matrix:
            return out(hidden)
        rows = hidden.reshape(1, -1, hidden.shape[-1])  # (1, all, d)
        logits = self._head_only(inputs_embeds=rows, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    @cached_property
    def _head_only(self) -> Any:
        return head_only(self.model)

    @cached_property
    def _head_is_a_matrix(self) -> bool:
        """Whether the logits are what the output embeddings make of hidden states, bit by bit."""
        hidden, logits = self._hidden_and_logits()
        out = self.model.get_output_embeddings()
        return torch.equal(out(hidden.to(out.weight.dtype)), logits)

    @torch.no_grad()
    def _hidden_and_logits(self) -> tuple[Tensor, Tensor]:
        ids = trial_ids(self.vocab_size, 7, 0)[None].to(self.device)  # (1, time)
        hidden = self.trunk(input_ids=ids, use_cache=False).last_hidden_state  # (1, time, d)
        return hidden, self.model(input_ids=ids, use_cache=False).logits

    def require_hidden_states(self) -> None:
        """Refuse a model whose logits cannot be had from its last hidden states.

        Raises
        ------
        ValueError
            Saying so; decoding without a head works all the same.
        """
        self.require_causal()
        if not self.trials.passes("hidden states", 1, hidden_gap):
            raise ValueError(
                f"{self.name}: the logits of a {type(self.model).__name__} cannot be computed from "
                f"its last hidden states ({self.trials.said('hidden states')}): heads need that; "
                "decode without one"
            )

    def require_causal(self) -> None:
        """Refuse a model that looks at later tokens.

        Raises
        ------
        ValueError
            With the total variation that later tokens make.
        """
        if not self.trials.passes("causal", 1, later_tokens_gap):
            raise ValueError(
                f"{self.name}: a {type(self.model).__name__} looks at later tokens: they change "
                f"what it says before them ({self.trials.said('causal')}); expected a causal "
                "language model"
            )

    @torch.inference_mode()
    def full_logits(
        self, token_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits after every token by one full forward pass without a cache: the reference."""
        return self._forward(token_ids, keep=0)

    @torch.inference_mode()
    def next_token_log_probs(
        self, token_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities (nats, float32 or the forward pass's dtype if wider) after each row.

        One full forward pass.
        """
        pieces = self._full_pass_logits(self.with_start(token_ids))
        return torch.cat([self._log_probs(logits) for logits in pieces])

    @torch.inference_mode()
    def sequence_log_probs(self, token_ids: Int[Tensor, " time"]) -> Float[Tensor, " later"]:
        """Log-probability (nats) of each token after the first, given those before it; one pass."""
        log_probs = self._log_probs(self.full_logits(token_ids[None, :-1]))[0]  # (later, vocab)
        return log_probs.gather(-1, token_ids[1:, None]).squeeze(-1)

    @torch.inference_mode()
    def continuation_log_probs(
        self, context: Int[Tensor, " time"], continuations: Int[Tensor, "count length"]
    ) -> Float[Tensor, "count vocab"]:
        """Log-probabilities (nats) of the token after `context` and each continuation."""
        pieces = self.continuation_logits(context, continuations)
        found = [self._log_probs(logits) for logits in pieces]
        return torch.cat(found or [torch.empty(0, self.vocab_size)])  # (count, vocab)

    @torch.inference_mode()
    def continuation_logits(
        self, context: Int[Tensor, " time"], continuations: Int[Tensor, "count length"]
    ) -> Iterator[Float[Tensor, "some vocab"]]:
        """Logits of the token after `context` and each continuation, as the model computes them.

        In pieces and in order, on the model's device: what is not kept of a piece takes no room.
        """
        self.require_causal()
        context = self.with_start(context[None])[0]  # (time,)
        if self.shares_prefixes_up_to(len(context) + continuations.shape[1]):
            yield from self._shared_prefix_logits(context, continuations)
            return
        rows = [context.expand(len(continuations), -1), continuations]
        yield from self._full_pass_logits(torch.cat(rows, 1))

    def sample_tokens(
        self, count: int, length: int, *, seed: int = 0, temperature: float = 1.0
    ) -> Int[Tensor, "count length"]:
        """Sequences drawn from the model itself, starting as a document does.

        The start token is not among them.

        Raises
        ------
        ValueError
            If the model has no start-of-text token, or `length` exceeds its window.
        """
        return sampled_tokens(self, count, length, seed=seed, temperature=temperature)

    def step(
        self, token_ids: Int[Tensor, "batch time"], cache: Any = None, **inputs
    ) -> tuple[Float[Tensor, "batch kept vocab"], Any]:
        """Logits after some more tokens and the cache that knows them; None: a new one."""
        named = {"input_ids": token_ids.to(self.device), self.cache_name: cache} | inputs
        out = self.model(**named, use_cache=True)
        return out.logits, out[self.cache_name]

    @property
    def shares_prefixes(self) -> bool:
        """Whether the shared-prefix path gives what full forward passes give, at any length."""
        return self.shares_prefixes_up_to(self.max_context or 1 << 30)

    def shares_prefixes_up_to(self, length: int) -> bool:
        """The same for texts of at most `length` tokens; tried when it is first asked."""
        return self.trials.passes("tree", length, tree_gap)

    def grows_up_to(self, length: int) -> bool:
        """Whether the model's own cache, fed token by token, gives what full passes give."""
        return self.trials.passes("growth", length, growth_gap)

    @property
    def twin(self) -> HuggingFaceLanguageModel:
        """The model in single precision where that fits into memory beside it, else itself."""
        if self.model.dtype in (torch.float32, torch.float64) or not fits_twice(self.model):
            return self
        return HuggingFaceLanguageModel(in_float32(self.model), name=self.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights rounded to bfloat16: one for all precisions they are loaded in."""
        return weights_fingerprint(self.model, rounded=True)

    @cached_property
    def exact_fingerprint(self) -> str:
        """SHA-256 over the weights as they were loaded: what heads of earlier versions carry."""
        return weights_fingerprint(self.model, rounded=False)

    def _full_pass_logits(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Logits (some, vocab) after each row, by full forward passes."""
        rows = min(self.batch_tokens // token_ids.shape[1], self._logits_at_once)
        for part in token_ids.split(max(rows, 1)):
            yield self._forward(part, keep=1)[:, -1]

    def _shared_prefix_logits(self, context: Tensor, continuations: Tensor) -> Iterator[Tensor]:
        """The same after a shared context and each continuation."""
        cache, logits = self._context(context)
        if continuations.shape[1] == 0:
            yield logits.expand(len(continuations), -1)  # (count, vocab)
            return
        if not self.trials.passes("hidden states", 1, hidden_gap):
            for part in continuations.split(min(self.batch_tokens, self._logits_at_once)):
                tree = lay_out_tree(part)
                keep = self._only_last(len(part), len(tree.token_ids))
                out = self._tree_pass(self._tree_view, cache, len(context), tree, **keep)
                yield out.logits[0, -len(part) :]  # (some, vocab)
            return
        # One pass of the trunk serves many pieces of logits.
        trunk = getattr(self._tree_view, trunk_name(self.model))
        for part in continuations.split(self.batch_tokens):
            out = self._tree_pass(trunk, cache, len(context), lay_out_tree(part))
            last = out.last_hidden_state[0, -len(part) :]  # (some, d)
            yield from map(self.unembed, last.split(self._logits_at_once))

    def _tree_pass(self, view: Any, cache: Cache, seen: int, tree: TokenTree, **options) -> Any:
        """What a view of the model, or its trunk, gives for a tree after `seen` tokens."""
        grown = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        return view(
            input_ids=tree.token_ids[None].to(self.device),
            position_ids=(seen + tree.depths)[None].to(self.device),
            # A 4-D mask is handed to the attention as it is: here it carries the tree.
            attention_mask=tree.attention_mask(seen).to(self.device),
            use_cache=True,
            **{self.cache_name: grown},
            **options,
        )

    @property
    def _tree_view(self) -> Any:
        with self._lock:
            return self._made_tree_view

    @cached_property
    def _made_tree_view(self) -> Any:
        return with_tree_attention(self.model)

    @property
    def _logits_at_once(self) -> int:
        """Tokens whose logits are held at once: few over a large vocabulary."""
        return max(_LOGITS_AT_ONCE // (self.vocab_size * self.model.dtype.itemsize), 1)

    def _context(self, context: Tensor) -> tuple[Cache, Tensor]:
        # A joint asks for one context again and again, chunk by chunk: the last one is kept.
        key, kept = tuple(context.tolist()), self._context_cache
        if kept is None or kept[0] != key:
            # (1, 1 or time, vocab)
            logits, cache = self.step(context[None], **self._only_last(1, len(context)))
            kept = (key, cache, logits[:, -1])
            self._context_cache = kept
        return kept[1:]

    def _forward(self, token_ids: Tensor, keep: int) -> Tensor:
        extra = self._only_last(keep, token_ids.shape[1]) if keep else {}
        return self.model(input_ids=token_ids.to(self.device), use_cache=False, **extra).logits

    def _only_last(self, count: int, length: int) -> dict[str, Tensor]:
        """Arguments that ask for logits of the last positions alone, where the model takes them."""
        if not self._keeps_logits:
            return {}
        # As a number they would be a view, and a product with a view copies the unembedding.
        return {"logits_to_keep": torch.arange(length - count, length, device=self.device)}

    @staticmethod
    def _log_probs(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()

    def with_start(self, token_ids: Tensor) -> Tensor:
        """Rows of tokens as the model needs them: a start-of-text token where there is none."""
        if token_ids.shape[1]:
            return token_ids
        start = getattr(self.text_config, "bos_token_id", None)
        if start is None:
            raise ValueError(
                f"{self.name} has no start-of-text token to begin with: give a context of at least "
                "one token, or texts to take contexts from (--corpus)"
            )
        return torch.full((len(token_ids), 1), start, dtype=torch.long)
