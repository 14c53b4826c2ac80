"""Which model it is and how far it reads: fingerprints of weights and vocabulary, positions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# What architectures call the number of their positions.
_WINDOWS = [
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_target_positions",
]


def weights_fingerprint(model: Any, *, rounded: bool) -> str:
    """SHA-256 over the weights' names, shapes and values (hexadecimal).

    Parameters
    ----------
    model : torch.nn.Module
    rounded : bool
        Values in bfloat16, so that one checkpoint loaded in single precision or in bfloat16 has one
        fingerprint; else types and bytes as they were loaded.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        weight = weight.detach().cpu()
        kind = "" if rounded else f"{weight.dtype} "
        digest.update(f"{name} {kind}{tuple(weight.shape)}".encode())
        if rounded and weight.is_floating_point():
            weight = weight.to(torch.bfloat16)
        raw = weight.contiguous().flatten().view(torch.uint8)  # bytes (size,)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary (hexadecimal)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def positions_of(model: Any) -> int | None:
    """Tokens the model has positions for; None where nothing limits them."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _WINDOWS)
    window = next((n for n in named if isinstance(n, int) and n > 0), None)
    for name, module in model.named_modules():
        # Some tables of positions begin after the padding token's.
        padding = getattr(module, "padding_idx", None)
        if "position_embeddings" in name and padding is not None and window is not None:
            window = min(window, module.num_embeddings - padding - 1)
    return window
