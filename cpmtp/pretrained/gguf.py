"""GGUF files: what one is checked for before it is read, and how transformers is asked for it."""

from __future__ import annotations

import contextlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import transformers

_MAGIC = b"GGUF"
SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its ending.

    Examples
    --------
    >>> is_gguf(Path("model.Q4_K_M.gguf")), is_gguf(Path("model"))
    (True, False)
    """
    return path.suffix.lower() == SUFFIX


def check_gguf(path: Path) -> None:
    """Refuse a file that cannot be read as GGUF, before anything of it is loaded.

    Raises
    ------
    ValueError
        If the package `gguf` is missing, or the file does not begin as GGUF files do.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{path.name} is a GGUF file, and reading it needs the package gguf: "
            "pip install 'cpmtp[gguf]'"
        )
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(
            f"the model {str(path)!r} could not be loaded: it is no GGUF file (it begins with "
            f"{magic!r}, expected {_MAGIC!r})"
        )


def gguf_options(path: Path) -> dict[str, Any]:
    """What transformers' loaders need to read this file, weights unpacked into plain matrices."""
    options: dict[str, Any] = {"gguf_file": path.name}
    # Releases that can leave weights in their blocks do so unless they are told otherwise.
    packing = getattr(transformers, "GgufConfig", None)
    if packing is not None:
        options["quantization_config"] = packing(dequantize=True)
    return options


@contextlib.contextmanager
def unpacking():
    """While a file is unpacked: no bar, which transformers shows whatever is asked of it, nor a
    hidden one, whose lock a worker that is stopped would leave behind; and the file's header is
    read once, and the names of tensors made once, where transformers would do so for every part of
    a model.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as unpacked

    shown, made = unpacked.tqdm, (gguf.GGUFReader, gguf.get_tensor_name_map)
    unpacked.tqdm = lambda items, **_: items
    gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, made)
    try:
        yield
    finally:
        unpacked.tqdm = shown
        gguf.GGUFReader, gguf.get_tensor_name_map = made


def without_quantization(model: Any) -> Any:
    """The model with a configuration that says what its weights are now: plain matrices.

    What is left of the file's packing would keep a saved copy from being loaded again.
    """
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    return model
