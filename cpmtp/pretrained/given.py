"""A transformers model given as it is, in the place of a language model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from cpmtp.pretrained.adapter import HuggingFaceLanguageModel


@lru_cache(maxsize=2)
def wrapped(model: Any, tokenizer: Any = None) -> HuggingFaceLanguageModel:
    """The model behind the `LanguageModel` protocol; what was tried of the last two stays known.

    The model is put into evaluation, without gradients.
    """
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    folder = Path(name).name if Path(name).is_dir() else ""
    return HuggingFaceLanguageModel(model, tokenizer, name=folder or name)
