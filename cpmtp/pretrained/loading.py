"""Where models come from: folders in Hugging Face format, hub ids, what comes with the package."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from cpmtp.pretrained.adapter import HuggingFaceLanguageModel
from cpmtp.pretrained.trials import first_line

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# transformers builds a model under global settings: two threads must not do so at once.
_LOADING = threading.Lock()


def load_language_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HuggingFaceLanguageModel:
    """Load an embedded model by name, a local folder, or a model of the Hugging Face hub.

    Parameters
    ----------
    name : str or path
        ``"code"`` or ``"prose"``, a folder in Hugging Face format, or a hub id such as ``"gpt2"``.
    device : str
        Where the forward pass runs.
    dtype : torch.dtype
        In what precision it runs; everything after the logits is float64.

    Raises
    ------
    ValueError
        If there is no such model or device, the folder holds none or other weights, or the hub
        cannot be reached.
    """
    device = usable_device(device)
    source, local = _locate(name)
    # Nothing is ever unpickled and no code of a model's own is run.
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        with _LOADING, _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:
        raise ValueError(
            f"the model {str(name)!r} could not be loaded: {first_line(error)}"
        ) from error
    _refuse_other_weights(str(name), found)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception:  # a model without a tokenizer still takes token ids
        tokenizer = None
    return HuggingFaceLanguageModel(
        model.to(device), tokenizer, name=Path(name).name if local else str(name)
    )


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


def embedded_models() -> dict[str, Path]:
    """Names and folders of the models that come with cpmtp."""
    return {
        folder.name: folder
        for folder in sorted(_embedded_root().iterdir())
        if (folder / "config.json").is_file()
    }


def embedded_heads(model: str) -> dict[str, Path]:
    """Names and folders of the trained heads that come with an embedded model: ``baseline`` (rank
    1), ``recommended``.
    """
    folder = _embedded_root("heads") / model
    found = sorted(folder.iterdir()) if model in embedded_models() and folder.is_dir() else []
    return {head.name: head for head in found if (head / "config.json").is_file()}


def _embedded_root(kind: str = "models") -> Path:
    installed = Path(__file__).parents[1] / "_data" / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / "data" / kind


def _locate(given: str | Path) -> tuple[str, bool]:
    """Where a model is, and whether that is on this machine."""
    name, embedded = str(given), embedded_models()
    if name in embedded:
        return str(embedded[name]), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the folder {name!r} holds no model: expected config.json and *.safetensors in it"
            )
        return str(folder), True
    if isinstance(given, Path) or _is_path(name):
        file = ", it is a file" if folder.is_file() else ""
        raise ValueError(
            f"no folder {name}{file}: expected a folder in Hugging Face format, a hub id "
            f"(OWNER/NAME), or {' or '.join(embedded)}"
        )
    if isinstance(
        try_to_load_from_cache(name, "config.json") if _HUB_ID.fullmatch(name) else None, str
    ):
        return name, False
    _ask_hub(name)
    return name, False


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a place on this machine: a hub's id has one slash at most
    and begins with a letter, a digit or an underscore.
    """
    return (
        name.startswith((".", "~", "/"))
        or name.endswith((".gguf", "/"))
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
def _quiet():
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
