"""Hugging Face causal language models and the embedded ones."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
)
from transformers.utils import logging as hf_logging

from cpmtp.language_model import draw_tokens
from cpmtp.tree_attention import attend_in_tree, lay_out_tree

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LOGITS_AT_ONCE = 1 << 24  # entries of one pass's logits
_TREE_ATTENTION = "cpmtp_tree"
# What some architectures ask of their attention beyond softmax over all they see.
_ATTENTION_VARIANTS = ("softcap", "s_aux", "sliding_window", "position_bias", "alibi")
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class HuggingFaceLanguageModel:
    """A causal language model of transformers behind the `LanguageModel` protocol.

    Continuations of one context are evaluated with the context's key/value cache shared, never
    copied per branch: they stand in one row as a tree of tokens, and each token attends to the
    context and its own branch. A model whose attention cannot be replaced so, or that keeps no
    key/value cache, is found out by a small trial and evaluated by full forward passes instead,
    with the same result.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed by `encode` and `decode` only.
    name : str
        For tables and reports.
    batch_tokens : int
        Tokens per forward pass; bounds the working set: their activations, and their logits twice,
        of which there are never more than 2**24 at once.
    """

    def __init__(self, model, tokenizer=None, *, name: str = "model", batch_tokens: int = 1536):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.batch_tokens = batch_tokens
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.max_context: int | None = _window(model.config)
        self._context_cache: tuple[tuple[int, ...], Cache, Tensor] | None = None
        arguments = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in arguments
        # What the key/value cache is called changed from one release of transformers to the next.
        self.cache_name = next(
            (name for name in _CACHE_NAMES if name in arguments), _CACHE_NAMES[0]
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def unembedding(self) -> Float[Tensor, "vocab d"]:
        """The matrix that turns last hidden states into logits."""
        return self.model.get_output_embeddings().weight

    @property
    def embedding(self) -> Float[Tensor, "vocab d"]:
        """The matrix of token embeddings."""
        return self.model.get_input_embeddings().weight

    @torch.no_grad()
    def hidden_states(self, token_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d"]:
        """What the unembedding reads at every position; one full forward pass."""
        return self.model.base_model(
            input_ids=token_ids.to(self.device), use_cache=False
        ).last_hidden_state

    def unembed(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of hidden states, in the forward pass's precision."""
        out = self.model.get_output_embeddings()
        return out(hidden.to(out.weight.dtype))

    def encode(self, text: str) -> Int[Tensor, " time"]:
        """Token ids of a text, with the special tokens the tokenizer adds by itself."""
        return torch.tensor(self._tokenizer().encode(text), dtype=torch.long)

    def encode_document(self, text: str) -> Int[Tensor, " time"]:
        """Token ids of a text without special tokens: what windows are cut from."""
        return torch.tensor(
            self._tokenizer().encode(text, add_special_tokens=False), dtype=torch.long
        )

    def decode(self, token_ids: Int[Tensor, " time"]) -> str:
        """The text of token ids."""
        return self._tokenizer().decode(token_ids.tolist())

    def count_replacements(self, token_ids: Int[Tensor, "..."]) -> int:
        """How many characters the vocabulary did not have and the replacement token stands for."""
        unknown = self._tokenizer().unk_token_id
        return 0 if unknown is None else int((token_ids == unknown).sum())

    @torch.inference_mode()
    def next_token_log_probs(
        self, token_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities (nats, float32 or the forward pass's dtype if wider) after each row;
        one full forward pass.
        """
        token_ids = self._with_start(token_ids)
        rows = max(
            min(self.batch_tokens // token_ids.shape[1], _LOGITS_AT_ONCE // self.vocab_size), 1
        )
        return torch.cat(
            [self._log_probs(self._forward(part, keep=1))[:, -1] for part in token_ids.split(rows)]
        )

    @torch.inference_mode()
    def sequence_log_probs(self, token_ids: Int[Tensor, " time"]) -> Float[Tensor, " later"]:
        """Log-probability (nats) of each token after the first, given those before it; one forward
        pass.
        """
        laws = self._log_probs(self._forward(token_ids[None, :-1], keep=0))[0]
        return laws.gather(-1, token_ids[1:, None]).squeeze(-1)

    @torch.inference_mode()
    def continuation_log_probs(
        self, context: Int[Tensor, " time"], continuations: Int[Tensor, "count length"]
    ) -> Float[Tensor, "count vocab"]:
        """Log-probabilities (nats) of the token after `context` and each continuation; see the
        class.
        """
        context = self._with_start(context[None])[0]
        if not self.shares_prefixes:
            return self.next_token_log_probs(
                torch.cat([context.expand(len(continuations), -1), continuations], 1)
            )
        return self._shared_prefix_log_probs(context, continuations)

    @torch.no_grad()
    def sample_tokens(
        self, count: int, length: int, *, seed: int = 0, temperature: float = 1.0
    ) -> Int[Tensor, "count length"]:
        """Sequences drawn from the model itself, starting as a document does; the start token is
        not among them.

        Raises
        ------
        ValueError
            If the model has no start-of-text token, or `length` exceeds its window.
        """
        if self.max_context is not None and length > self.max_context:
            raise ValueError(
                f"{length} tokens exceed the model's {self.max_context} positions: ask for fewer"
            )
        generator = torch.Generator().manual_seed(seed)
        tokens = self._with_start(torch.empty(count, 0, dtype=torch.long))
        cache, last, drawn = None, tokens, []
        for _ in range(length):
            if self.shares_prefixes:
                inputs = {"input_ids": last.to(self.device), self.cache_name: cache}
                out = self.model(**inputs, use_cache=True)
                cache, logits = out[self.cache_name], out.logits[:, -1]
            else:
                logits = self._forward(tokens, keep=1)[:, -1]
            law = self._log_probs(logits / max(temperature, 1e-6)).exp()
            last = draw_tokens(law.double().cpu(), generator)
            tokens = torch.cat([tokens, last], 1)
            drawn.append(last)
        return torch.cat(drawn, 1)

    @cached_property
    def shares_prefixes(self) -> bool:
        """Whether the shared-prefix path gives what full forward passes give (tried on a handful of
        tokens).
        """
        kinds = getattr(self.model.config, "layer_types", None)
        # Under a custom mask a sliding window would silently be dropped, and a short trial would
        # not show it.
        sliding = (
            any(k != "full_attention" for k in kinds)
            if kinds
            else getattr(self.model.config, "sliding_window", None)
        )
        if sliding:
            return False
        generator = torch.Generator().manual_seed(0)
        context = torch.randint(self.vocab_size, (3,), generator=generator)
        continuations = torch.randint(self.vocab_size, (4, 2), generator=generator)
        continuations[1::2, 0] = continuations[::2, 0]
        expected = self.next_token_log_probs(torch.cat([context.expand(4, -1), continuations], 1))
        try:
            found = self._shared_prefix_log_probs(context, continuations)
        except (
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ):
            return False
        finally:
            self._context_cache = None
        tolerance = (
            1e-3 if found.dtype == torch.float32 and self.model.dtype == torch.float32 else 0.1
        )
        return bool(torch.allclose(found.exp(), expected.exp(), atol=tolerance))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weights' names, types and bytes (hexadecimal)."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(
                weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the tokenizer's vocabulary (hexadecimal); empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return hashlib.sha256(
            json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        ).hexdigest()

    def _shared_prefix_log_probs(self, context: Tensor, continuations: Tensor) -> Tensor:
        cache, log_probs = self._context(context)
        if continuations.shape[1] == 0:
            return log_probs.expand(len(continuations), -1)
        found = torch.empty(len(continuations), self.vocab_size, dtype=log_probs.dtype)
        with self._tree_attention():
            size = self._tokens_at_once
            for part, rows in zip(continuations.split(size), found.split(size), strict=True):
                rows.copy_(self._tree_log_probs(cache, len(context), part))
        return found

    def _tree_log_probs(self, cache: Cache, seen: int, continuations: Tensor) -> Tensor:
        tree = lay_out_tree(continuations)
        count = len(continuations)
        out = self.model(
            input_ids=tree.token_ids[None].to(self.device),
            position_ids=(seen + tree.depths)[None].to(self.device),
            # A 4-D mask is handed to the attention as it is: here it carries the tree.
            attention_mask=tree.lineage[None, None].to(self.device),
            use_cache=True,
            **{
                self.cache_name: DynamicCache(
                    [(layer.keys, layer.values) for layer in cache.layers]
                )
            },
            **({"logits_to_keep": count} if self._keeps_logits else {}),
        )
        return self._log_probs(out.logits[0, -count:])

    @contextlib.contextmanager
    def _tree_attention(self):
        usual = self.model.config._attn_implementation
        self.model.set_attn_implementation(_TREE_ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)

    @property
    def _tokens_at_once(self) -> int:
        """Tokens per forward pass: fewer over a large vocabulary, whose logits would outgrow
        everything else.
        """
        return min(self.batch_tokens, max(_LOGITS_AT_ONCE // self.vocab_size, 1))

    def _context(self, context: Tensor) -> tuple[Cache, Tensor]:
        # A joint asks for one context again and again, chunk by chunk: the last one is kept.
        key = tuple(context.tolist())
        if self._context_cache is None or self._context_cache[0] != key:
            out = self.model(input_ids=context[None].to(self.device), use_cache=True)
            self._context_cache = (key, out[self.cache_name], self._log_probs(out.logits[:, -1]))
        return self._context_cache[1:]

    def _forward(self, token_ids: Tensor, keep: int) -> Tensor:
        extra = {"logits_to_keep": keep} if self._keeps_logits else {}
        return self.model(input_ids=token_ids.to(self.device), use_cache=False, **extra).logits

    @staticmethod
    def _log_probs(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()

    def _with_start(self, token_ids: Tensor) -> Tensor:
        if token_ids.shape[1]:
            return token_ids
        start = self.model.config.bos_token_id
        if start is None:
            raise ValueError(
                f"{self.name} has no start-of-text token: give a context of at least one token"
            )
        return torch.full((len(token_ids), 1), start, dtype=torch.long)

    def _tokenizer(self):
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} came without a tokenizer: give token ids instead of text"
            )
        return self.tokenizer


def load_language_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HuggingFaceLanguageModel:
    """Load an embedded model by name, a local folder, or a model of the Hugging Face hub.

    Parameters
    ----------
    name : str or path
        ``"code"`` or ``"prose"``, a folder in Hugging Face format, or a hub id such as ``"gpt2"``.
    device : str
        Where the forward pass runs.
    dtype : torch.dtype
        In what precision it runs; everything after the logits is float64.

    Raises
    ------
    ValueError
        If there is no such model, the folder holds none, or the hub cannot be reached.
    """
    source, local = _locate(str(name))
    # Nothing is ever unpickled and no code of a model's own is run.
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **options
            )
    except Exception as error:
        raise ValueError(
            f"the model {str(name)!r} could not be loaded: {_first_line(error)}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception:  # a model without a tokenizer still takes token ids
        tokenizer = None
    return HuggingFaceLanguageModel(
        model.to(device), tokenizer, name=Path(name).name if local else str(name)
    )


def embedded_models() -> dict[str, Path]:
    """Names and folders of the models that come with cpmtp."""
    return {
        folder.name: folder
        for folder in sorted(_embedded_root().iterdir())
        if (folder / "config.json").is_file()
    }


def embedded_heads(model: str) -> dict[str, Path]:
    """Names and folders of the trained heads that come with an embedded model: ``baseline`` (rank
    1), ``recommended``.
    """
    folder = _embedded_root("heads") / model
    found = sorted(folder.iterdir()) if model in embedded_models() and folder.is_dir() else []
    return {head.name: head for head in found if (head / "config.json").is_file()}


def _embedded_root(kind: str = "models") -> Path:
    installed = Path(__file__).parent / "_data" / kind
    return installed if installed.is_dir() else Path(__file__).parent.parent / "data" / kind


def _locate(name: str) -> tuple[str, bool]:
    """Where a model is, and whether that is on this machine."""
    embedded = embedded_models()
    if name in embedded:
        return str(embedded[name]), True
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(
                f"the folder {name!r} holds no model: expected config.json and *.safetensors in it"
            )
        return name, True
    if isinstance(
        try_to_load_from_cache(name, "config.json") if _HUB_ID.fullmatch(name) else None, str
    ):
        return name, False
    _ask_hub(name)
    return name, False


def _ask_hub(name: str) -> None:
    # One question with a time limit; loading would ask again and again for half a minute before it
    # gave up.
    try:
        if not _HUB_ID.fullmatch(name):
            raise ValueError("not a hub id either (expected NAME or OWNER/NAME)")
        HfApi().model_info(name, timeout=10)
    except Exception as error:
        raise ValueError(
            f"unknown model {name!r}: no embedded model ({', '.join(embedded_models())}), no "
            "folder, and the Hugging Face hub "
            f"did not give it: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet():
    """Without transformers' own progress bar: loading is not a long step and the caller may have a
    bar of its own.
    """
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _window(config) -> int | None:
    for field in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(getattr(config, field, None), int):
            return getattr(config, field)
    return None


def _tree_attention_forward(module, query, key, value, attention_mask, scaling=None, **options):
    """`attend_in_tree` behind the interface of transformers' attention functions."""
    unknown = [name for name in _ATTENTION_VARIANTS if options.get(name) is not None]
    if unknown or attention_mask is None or attention_mask.is_floating_point():
        raise NotImplementedError(
            f"attention over a tree of tokens knows no {', '.join(unknown) or 'such mask'}"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_in_tree(query, key, value, attention_mask[0, 0], scaling), None


AttentionInterface.register(_TREE_ATTENTION, _tree_attention_forward)
