"""Decoding behind transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.heads.draft_head import DraftHead


def custom_generate(
    lm: Any, draft: DraftHead, *, rule: str = "block", seed: int = 0
) -> Callable[..., Tensor]:
    """For transformers:
    ``model.generate(ids, custom_generate=custom_generate(lm, head), do_sample=True)``.

    Temperature, top-k, top-p, the number of new tokens and the end-of-text token are read from the
    generation config; beams and a repetition penalty are a ValueError; other logits processors and
    stopping criteria are not applied.
    """

    def decode(model, input_ids, *, generation_config, **unused) -> Tensor:
        config = generation_config
        if (config.num_beams or 1) > 1 or (config.repetition_penalty or 1.0) != 1.0:
            raise ValueError(
                "self-speculative decoding knows no beams and no repetition penalty: leave them out"
            )
        eos = config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        out = speculative_generate(
            lm,
            draft,
            list(input_ids.cpu()),
            max_new_tokens=config.max_length - input_ids.shape[1],
            rule=rule,
            temperature=(1.0 if config.temperature is None else config.temperature)
            if config.do_sample
            else 0.0,
            top_k=(config.top_k or None) if config.do_sample else None,
            top_p=config.top_p if config.do_sample else None,
            seed=seed,
            eos_token_id=None if eos is None else int(eos),
        )
        fill = config.pad_token_id if config.pad_token_id is not None else (eos or 0)
        return torch.nn.utils.rnn.pad_sequence(
            out.sequences, batch_first=True, padding_value=int(fill)
        ).to(input_ids.device)

    return decode
