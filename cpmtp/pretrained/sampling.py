"""Text drawn from a model itself."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.language_model import draw_tokens


@torch.no_grad()
def sampled_tokens(
    lm: Any, count: int, length: int, *, seed: int, temperature: float
) -> Int[Tensor, "count length"]:
    """Sequences drawn from a `HuggingFaceLanguageModel`, with its own cache where that is exact."""
    if lm.max_context is not None and length > lm.max_context:
        raise ValueError(
            f"{length} tokens exceed the model's {lm.max_context} positions: ask for fewer"
        )
    cached = lm.grows_up_to(length + 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = lm.with_start(torch.empty(count, 0, dtype=torch.long))
    cache, last, drawn = None, tokens, []
    for _ in range(length):
        if cached:
            logits, cache = lm.step(last, cache)
            scores = logits[:, -1]  # (count, vocab)
        else:
            scores = lm.next_token_log_probs(tokens)  # (count, vocab)
        scores = scores / max(temperature, 1e-6)
        exact = torch.promote_types(scores.dtype, torch.float32)
        probs = scores.to(exact).log_softmax(-1).exp().cpu()  # (count, vocab)
        last = draw_tokens(probs.double(), generator)  # (count, 1)
        tokens = torch.cat([tokens, last], 1)
        drawn.append(last)
    return torch.cat(drawn, 1)  # (count, length)
