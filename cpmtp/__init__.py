"""Which draft head a language model needs, what it will earn, and what it buys.

Public names are loaded when they are first used, so that ``import cpmtp`` costs hardly more than
``import torch``. They are listed once, in the stub beside this file.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_LISTED = re.compile(r"^from (cpmtp[\w.]*) import \w+ as (\w+)$", re.MULTILINE)
_HOME = {
    name: module
    for module, name in _LISTED.findall(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
}
__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'cpmtp' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
