"""How good a base model is: bits per byte beside a compressor's, and whether what it writes reads
like code.
"""

from __future__ import annotations

import io
import lzma
import math
import tokenize

import torch

from cpmtp.corpora import Document


@torch.no_grad()
def bits_per_byte(
    model, tokenizer, documents: list[Document], *, stride: int | None = None
) -> float:
    """Cross-entropy of the documents under the model, in bits per UTF-8 byte.

    Every token is scored once, in windows of the model's maximal context that overlap by all but
    `stride` (default: half), so that all but a document's first tokens see at least
    `window - stride` tokens of context.
    """
    model.eval()
    window = model.config.max_position_embeddings
    stride = stride or window // 2
    nats = 0.0
    for document in documents:
        ids = [
            tokenizer.eos_token_id,
            *tokenizer(document.text, add_special_tokens=False).input_ids,
        ]
        sequence = torch.tensor(ids, device=model.device)
        scored = 1
        while scored < len(sequence):
            begin = max(0, min(scored + stride, len(sequence)) - window)
            end = min(begin + window, len(sequence))
            log_probs = (
                model(input_ids=sequence[None, begin:end], use_cache=False)
                .logits[0]
                .log_softmax(-1)
            )
            targets = sequence[scored:end]
            nats -= (
                log_probs[scored - begin - 1 : end - begin - 1]
                .gather(1, targets[:, None])
                .sum()
                .item()
            )
            scored = end
    return nats / math.log(2) / sum(len(d.text.encode()) for d in documents)


def xz_bits_per_byte(documents: list[Document]) -> float:
    """What ``xz -9e`` needs for the documents, one after another, in bits per byte."""
    data = "".join(d.text for d in documents).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def accepted_line_share(text: str) -> float:
    """Share of the lines with something on them that Python's `tokenize` accepts when each stands
    alone.

    Lines inside a string or a bracket that closes elsewhere are refused, so that real code does not
    reach one either.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sum(map(_is_accepted, lines)) / max(len(lines), 1)


def _is_accepted(line: str) -> bool:
    try:
        return all(
            t.type != tokenize.ERRORTOKEN
            for t in tokenize.generate_tokens(io.StringIO(line + "\n").readline)
        )
    except (tokenize.TokenError, SyntaxError):
        return False
