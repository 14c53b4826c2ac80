"""What a tokenizer makes of a text: a prompt that goes on, a document that is cut into windows."""

from __future__ import annotations

from typing import Any


def prompt_ids(tokenizer: Any, text: str, ends: tuple[int, ...]) -> list[int]:
    """Ids of a text to go on from, with the special tokens the tokenizer puts before it.

    An end-of-text token that the tokenizer puts after it is left out: the text goes on.
    """
    ids = tokenizer.encode(text)
    bare = tokenizer.encode(text, add_special_tokens=False)
    while bare and ids[-1] in ends and ids[-len(bare) :] != bare:
        ids = ids[:-1]
    return ids


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens; one that is spelled out in the text is text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def end_tokens_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: the generation configuration's, or else the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        named = getattr(tokenizer, "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    return tuple(int(token) for token in several if token is not None)
