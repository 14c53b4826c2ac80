"""A model written once as a clean folder: what takes seconds to unpack is read at once from then
on.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from cpmtp.pretrained.adapter import HuggingFaceLanguageModel
from cpmtp.pretrained.loading import quiet


def save_language_model(lm: HuggingFaceLanguageModel, folder: str | Path) -> Path:
    """Write weights, configuration and tokenizer as a folder in Hugging Face format.

    The folder appears when it is complete. Loaded again in the same precision it is the same model.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
    folder : path
        Must not be there yet.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    ValueError
        If there is something of that name.
    """
    target = Path(folder).expanduser()
    check_new_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with quiet():
            lm.model.save_pretrained(partial)
            if lm.tokenizer is not None:
                lm.tokenizer.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_new_folder(folder: Path) -> None:
    """Refuse a place that is taken.

    Raises
    ------
    ValueError
        Saying what to do.
    """
    if folder.exists():
        raise ValueError(f"{str(folder)!r} is there already: name a folder that is not")
