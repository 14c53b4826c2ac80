"""Training state on disk: written whole or not at all, and never unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpmtp.whole_files import write_tensors


def save_checkpoint(
    path: Path,
    weights: Mapping[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    metadata: Mapping[str, str],
) -> None:
    """Weights, optimiser states and metadata as one safetensors file; a file of the same name is
    replaced at once.
    """
    tensors = {f"model.{name}": weight.contiguous() for name, weight in weights.items()}
    for o, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {
                f"optimiser.{o}.{index}.{name}": torch.as_tensor(value)
                for name, value in state.items()
            }
    write_tensors(path, tensors, dict(metadata))


def load_checkpoint(
    path: Path, key: str, optimisers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata; the optimisers take their states.

    Raises
    ------
    ValueError
        If the file is damaged, or its metadata's ``key`` is another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"the checkpoint {path} is damaged ({error}): delete it to begin again"
        ) from error
    if metadata["key"] != key:
        raise ValueError(
            f"{path} was made with other settings, another model or corpus; choose another folder "
            "or delete it"
        )
    for o, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        for name in (n for n in tensors if n.startswith(f"optimiser.{o}.")):
            _, _, index, field = name.split(".")
            state.setdefault(int(index), {})[field] = tensors[name]
        optimiser.load_state_dict(
            {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
        )
    return {
        k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")
    }, metadata
