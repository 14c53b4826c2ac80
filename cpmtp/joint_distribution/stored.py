"""Objects made of tensors in files and on devices: drafts, fits."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpmtp.whole_files import write_tensors

Some = TypeVar("Some", bound="Stored")


class Stored:
    """A dataclass of tensors that can be saved, loaded and moved; also inside one another."""

    _kinds: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        Stored._kinds[cls.__name__] = cls

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file, whole or not at all; returns its path."""
        tensors: dict[str, Tensor] = {}
        described = _described(self, "", tensors)
        return write_tensors(Path(path), tensors, {"cpmtp": json.dumps(described)})

    @classmethod
    def load(cls: type[Some], path: str | Path) -> Some:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file is none, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("cpmtp", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{str(path)!r} holds no {cls.__name__}: {said}") from None
        kind = described.get("kind") if isinstance(described, dict) else None
        if kind not in Stored._kinds or not issubclass(Stored._kinds[kind], cls):
            raise ValueError(f"{str(path)!r} holds {kind or 'no draft'}: expected {cls.__name__}")
        return _made(described, tensors)

    def to(self: Some, *place: Any, **options: Any) -> Some:
        """The same on another device or in another precision, as ``Tensor.to``; token ids and
        counts stay whole numbers.
        """
        return _moved(self, torch.empty(0).to(*place, **options), _asks_for_dtype(place, options))


def _asks_for_dtype(place: tuple, options: dict) -> bool:
    return "dtype" in options or any(isinstance(p, torch.dtype | Tensor) for p in place)


def _moved(value: Any, like: Tensor, dtype: bool) -> Any:
    if isinstance(value, Tensor):
        exact = like.dtype if dtype and value.is_floating_point() else value.dtype
        return value.to(like.device, exact)
    if isinstance(value, tuple | list):
        return tuple(_moved(part, like, dtype) for part in value)
    if isinstance(value, Stored) and is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        return type(value)(**{name: _moved(part, like, dtype) for name, part in parts.items()})
    return value


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can say of a value; its tensors are put aside under names."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, tuple | list):
        return {"items": [_described(v, f"{name}.{k}", tensors) for k, v in enumerate(value)]}
    if isinstance(value, Stored) and is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        described = {k: _described(v, f"{name}.{k}", tensors) for k, v in parts.items()}
        return {"kind": type(value).__name__, "fields": described}
    if value is None or isinstance(value, str | int | float):
        return {"value": value}
    raise ValueError(f"a {type(value).__name__} cannot be saved: expected tensors and numbers")


def _made(described: dict, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in described:
        return tensors[described["tensor"]]
    if "items" in described:
        return tuple(_made(part, tensors) for part in described["items"])
    if "kind" in described:
        parts = {k: _made(v, tensors) for k, v in described["fields"].items()}
        if described["kind"] not in Stored._kinds:
            raise ValueError(f"a {described['kind']} inside: import its class from cpmtp first")
        return Stored._kinds[described["kind"]](**parts)
    return described["value"]
