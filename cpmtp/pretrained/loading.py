"""Where models come from: folders in Hugging Face format, GGUF files, hub ids, what comes with the
package.
"""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from cpmtp.pretrained.adapter import HuggingFaceLanguageModel
from cpmtp.pretrained.gguf import (
    SUFFIX,
    check_gguf,
    gguf_options,
    is_gguf,
    unpacking,
    without_quantization,
)
from cpmtp.pretrained.trials import first_line

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# transformers builds a model under global settings: two threads must not do so at once.
_LOADING = threading.Lock()
DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_language_model(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> HuggingFaceLanguageModel:
    """Load an embedded model by name, a local folder, a GGUF file, or a model of the Hugging Face
    hub.

    Parameters
    ----------
    name : str or path
        ``"code"`` or ``"prose"``, a folder in Hugging Face format, a file that ends in ``.gguf``
        (needs the extra `gguf`; its weights are unpacked), or a hub id such as ``"gpt2"``.
    device : str
        Where the forward pass runs.
    dtype : str or torch.dtype
        In what precision it runs: float32, bfloat16, float16 or float64; everything after the
        logits is float64.

    Raises
    ------
    ValueError
        If there is no such model, device or precision, the file or folder holds none or other
        weights, or the hub cannot be reached.
    """
    device, dtype = usable_device(device), usable_dtype(dtype)
    source = _locate(name)
    with _LOADING, quiet(), unpacking() if source.gguf else contextlib.nullcontext():
        model, tokenizer = _model_of(source, str(name), dtype), _tokenizer_of(source)
    return HuggingFaceLanguageModel(model.to(device), tokenizer, name=source.name)


def _model_of(source: _Source, name: str, dtype: torch.dtype) -> Any:
    options = gguf_options(source.gguf) if source.gguf else {"use_safetensors": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source.place, dtype=dtype, output_loading_info=True, **source.options, **options
        )
    except Exception as error:
        raise ValueError(f"the model {name!r} could not be loaded: {first_line(error)}") from error
    _refuse_other_weights(name, found)
    return without_quantization(model) if source.gguf else model


def _tokenizer_of(source: _Source) -> Any:
    """None for a model without one, which still takes token ids."""
    options = {"gguf_file": source.gguf.name} if source.gguf else {}
    try:
        return AutoTokenizer.from_pretrained(source.place, **source.options, **options)
    except Exception:
        return None


def _refuse_other_weights(name: str, found: dict) -> None:
    """Refuse a checkpoint that is not this architecture's: absent weights would be random ones."""
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, found.get(f"{what}_keys") or ()))
        if keys:
            raise ValueError(
                f"the model {name!r} could not be loaded: {len(keys)} {what} weights in its "
                f"checkpoint ({keys[0]}{', …' if len(keys) > 1 else ''}): expected all of this "
                "architecture's and no others"
            )


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name, after it has held a number.

    Raises
    ------
    ValueError
        If there is no such kind of device, or none of it on this machine.

    Examples
    --------
    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda or cuda:NUMBER") from None
    try:
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({first_line(error)}): take cpu"
        ) from None
    return found


def usable_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The precision of that name.

    Raises
    ------
    ValueError
        If a forward pass cannot run in it.

    Examples
    --------
    >>> usable_dtype("bfloat16")
    torch.bfloat16
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def embedded_models() -> dict[str, Path]:
    """Names and folders of the models that come with cpmtp."""
    return {
        folder.name: folder
        for folder in sorted(_embedded_root().iterdir())
        if (folder / "config.json").is_file()
    }


def embedded_heads(model: str) -> dict[str, Path]:
    """Names and folders of the trained heads that come with an embedded model: ``baseline`` (rank
    1), ``recommended`` and ``recurrent``.
    """
    folder = _embedded_root("heads") / model
    found = sorted(folder.iterdir()) if model in embedded_models() and folder.is_dir() else []
    return {head.name: head for head in found if (head / "config.json").is_file()}


def _embedded_root(kind: str = "models") -> Path:
    installed = Path(__file__).parents[1] / "_data" / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / "data" / kind


@dataclass(frozen=True)
class _Source:
    """Where a model is.

    Attributes
    ----------
    place : str
        Folder or hub id.
    local : bool
        Whether that is on this machine.
    name : str
        For tables and reports.
    gguf : Path, optional
        The file of the folder that holds it.
    """

    place: str
    local: bool
    name: str
    gguf: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For loaders: nothing is ever unpickled and no code of a model's own is run."""
        return {"local_files_only": self.local, "trust_remote_code": False}

    @classmethod
    def of_folder(cls, folder: Path) -> _Source:
        return cls(str(folder), True, folder.name)


def _locate(given: str | Path) -> _Source:
    """Where a model is."""
    name, embedded = str(given), embedded_models()
    if name in embedded:
        return _Source.of_folder(embedded[name])
    path = Path(name).expanduser()
    if is_gguf(path) and path.is_file():
        check_gguf(path)
        return _Source(str(path.parent), True, path.stem, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"the folder {name!r} holds no model: expected config.json and *.safetensors in it"
                f"{_files_in(path)}"
            )
        return _Source.of_folder(path)
    if isinstance(given, Path) or _is_path(name):
        file = ", it is a file" if path.is_file() else ""
        kind = "file" if is_gguf(path) else "folder"
        raise ValueError(
            f"no {kind} {name}{file}: expected a folder in Hugging Face format, a GGUF file, a hub "
            f"id (OWNER/NAME), or {' or '.join(embedded)}"
        )
    known = try_to_load_from_cache(name, "config.json") if _HUB_ID.fullmatch(name) else None
    if not isinstance(known, str):
        _ask_hub(name)
    return _Source(name, False, name)


def _files_in(folder: Path) -> str:
    """What to do about a folder of GGUF files; empty where there are none."""
    found = sorted(file.name for file in folder.iterdir() if is_gguf(file))
    return f"; it holds {found[0]}: give that file's path" if found else ""


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a place on this machine: a hub's id has one slash at most
    and begins with a letter, a digit or an underscore.
    """
    return (
        name.startswith((".", "~", "/"))
        or name.lower().endswith((SUFFIX, "/"))
        or ("\\" in name or name.count("/") > 1)
    )


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
            f"did not give it: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def quiet():
    """Without transformers' own progress bar and reports: the caller has words of its own."""
    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()
