"""Decoding behind transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.decoding.speculative import speculative_generate
from cpmtp.heads.draft_head import DraftHead
from cpmtp.joint_distribution.given import takes_what_is_given

# What is kept to: the law, the length, the endings, the padding.
_KEPT = {"max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
_KEPT |= {"eos_token_id", "pad_token_id", "num_return_sequences", "stop_strings"}
# What says how a text is computed, or speaks to ways of decoding that are refused by other names.
_WITHOUT_EFFECT = {"bos_token_id", "decoder_start_token_id", "is_assistant", "renormalize_logits"}
_WITHOUT_EFFECT |= {"use_cache", "cache_implementation", "cache_config", "max_cache_len"}
_WITHOUT_EFFECT |= {"compile_config", "disable_compile", "continuous_batching_config", "low_memory"}
_WITHOUT_EFFECT |= {
    "prefill_chunk_size",
    "early_stopping",
    "length_penalty",
    "num_assistant_tokens",
}
_WITHOUT_EFFECT |= {"num_assistant_tokens_schedule", "assistant_confidence_threshold"}
_WITHOUT_EFFECT |= {"assistant_lookbehind", "target_lookbehind", "transformers_version"}
# The value at which an option that is not kept to would change nothing; others: none, zero, empty.
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "typical_p": 1, "repetition_penalty": 1}
_NEUTRAL |= {"encoder_repetition_penalty": 1, "guidance_scale": 1}
_PROCESSORS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
_PROCESSORS |= {"LogitNormalization"}
_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria"}
# What transformers itself hands over beside the token ids, made from them.
_HANDED_OVER = {"position_ids", "logits_to_keep", "cache", "past_key_values", "cache_params"}
_HANDED_OVER |= {"use_cache", "cache_position", "synced_gpus"}


@takes_what_is_given
def custom_generate(
    lm: Any,
    draft: DraftHead | Callable | None,
    *,
    rule: str = "block",
    seed: int = 0,
    stop_strings: str | Sequence[str] = (),
    streamer: Any = None,
) -> Callable[..., Tensor]:
    """For transformers:
    ``model.generate(ids, custom_generate=custom_generate(lm, head), do_sample=True)``.

    Kept to: temperature, top-k, top-p, the number of new tokens, end-of-text tokens (one or a
    list), padding on the left with its attention mask, several sequences per prompt. Stop strings
    and a streamer are given here (``generate`` keeps its own to itself: after the prompt nothing
    would reach that streamer). Any other option that would change the text, and any processor or
    criterion of the caller's, is refused by its name in one line.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
        Around the model whose ``generate`` is called.
    draft, rule, seed, stop_strings
        As for `speculative_generate`.
    streamer : transformers.generation.streamers.BaseStreamer, optional
        Gets the prompt and then every cycle's tokens as they are there; of one text alone.
    """

    def decode(
        model,
        input_ids: Int[Tensor, "batch time"],
        *,
        generation_config,
        logits_processor=(),
        stopping_criteria=(),
        **others,
    ) -> Tensor:
        config = generation_config
        if model is not getattr(lm, "model", model):
            raise ValueError(
                "the drafts are made for another model than this one: make custom_generate of the "
                "model whose generate is called"
            )
        mask = others.pop("attention_mask", None)
        _refuse(_unkept(config, logits_processor, stopping_criteria, others))
        stops = [stop_strings] if isinstance(stop_strings, str) else [*stop_strings]
        for criterion in stopping_criteria:
            stops += getattr(criterion, "stop_strings", ())
        sampled = bool(config.do_sample)
        prompts = _unpadded(input_ids, mask)
        if streamer is not None:
            if len(prompts) > 1:
                raise ValueError(f"a streamer for {len(prompts)} texts: it writes one, give one")
            streamer.put(prompts[0])
        out = speculative_generate(
            lm,
            draft,
            prompts,
            max_new_tokens=config.max_length - input_ids.shape[1],
            rule=rule,
            temperature=(1.0 if config.temperature is None else config.temperature)
            if sampled
            else 0.0,
            top_k=(config.top_k or None) if sampled else None,
            top_p=config.top_p if sampled else None,
            seed=seed,
            eos_token_id=config.eos_token_id,
            stop_strings=stops,
            callback=None if streamer is None else lambda _, tokens: streamer.put(tokens),
        )
        if streamer is not None:
            streamer.end()
        rows = [
            torch.cat([ids, new]) for ids, new in zip(input_ids.cpu(), out.token_ids, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(  # (batch, longest)
            rows, batch_first=True, padding_value=_padding(config)
        ).to(input_ids.device)

    return decode


def _unkept(config, processors, criteria, others: dict[str, Any]) -> list[str]:
    """What was asked for and would be left undone, in words."""
    options = config.to_dict()
    found = [
        f"{name}={value!r}"
        for name, value in options.items()
        if not (name.startswith("_") or name in _KEPT | _WITHOUT_EFFECT)
        and not _is_neutral(name, value)
    ]
    found += [type(p).__name__ for p in processors if type(p).__name__ not in _PROCESSORS]
    # A time limit stands in the options and among the criteria: it is named once.
    found += [
        type(c).__name__
        for c in criteria
        if type(c).__name__ not in _CRITERIA | ({"MaxTimeCriteria"} if found else set())
    ]
    return found + [
        name for name, value in others.items() if name not in _HANDED_OVER and value is not None
    ]


def _is_neutral(name: str, value: Any) -> bool:
    if name == "max_time":
        return value is None
    # 1 and True are equal, and no option here means both.
    return not value or value == _NEUTRAL.get(name)


def _refuse(found: list[str]) -> None:
    if found:
        raise ValueError(
            f"decoding with drafts does not keep to {', '.join(found)}: leave it out, or call "
            "generate without custom_generate"
        )


def _unpadded(input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows without the padding on their left, (time,) each."""
    rows = input_ids.cpu()
    if mask is None:
        return list(rows)
    kept = mask.cpu().bool()
    if kept.shape != rows.shape or bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise ValueError(
            "attention_mask: expected one number per token, zeros on the left alone (padding); pad "
            "on the left, with tokenizer.padding_side = 'left'"
        )
    return [row[known] for row, known in zip(rows, kept, strict=True)]


def _padding(config) -> int:
    """What rows that ended early are filled with."""
    eos = config.eos_token_id
    first = eos[0] if isinstance(eos, list | tuple) and eos else eos
    fill = config.pad_token_id if config.pad_token_id is not None else (first or 0)
    return int(fill)
