"""The most probable tokens after many prefixes, reduced where the model computes its logits."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor

from cpmtp.joint_distribution import next_token_log_probs, prefixes_at_once
from cpmtp.language_model import LanguageModel, LogitsLanguageModel
from cpmtp.sampling_law import KeptTokens, SamplingLaw


def next_tokens(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    prefixes: Int[Tensor, "count length"],
    law: SamplingLaw,
    most: int,
) -> KeptTokens:
    """The most probable tokens after `context` and each prefix, on the CPU.

    A model that hands out its logits piece by piece has each piece reduced on its own device: no
    table of prefixes by vocabulary is made, nor moved.

    Parameters
    ----------
    most : int
        Most tokens of each prefix; of those that the law leaves, the most probable.
    """
    pieces = [law.kept_tokens(logits, most) for logits in _logits(lm, context, prefixes)]
    return KeptTokens.joined(pieces, lm.vocab_size)


def _logits(lm: LanguageModel, context: Tensor, prefixes: Tensor) -> Iterator[Tensor]:
    """Logits (some, vocab) of the prefixes in order."""
    if isinstance(lm, LogitsLanguageModel):
        yield from lm.continuation_logits(context, prefixes)
        return
    for part in prefixes.split(prefixes_at_once(lm.vocab_size)):
        yield next_token_log_probs(lm, context, part)
