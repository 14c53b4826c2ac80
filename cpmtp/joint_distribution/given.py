"""What people give: text or lists for token ids, a transformers model, a tensor for a joint."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.joint_distribution.dense import JointDistribution
from cpmtp.joint_distribution.habits import known_name, refuse_habits
from cpmtp.language_model import LanguageModel
from cpmtp.language_model import sample_sequences as _sampled

Answer = TypeVar("Answer")

_WHOLE = ("rank", "horizon", "seed", "restarts", "max_new_tokens")


def takes_what_is_given(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """A function whose arguments are read by their names before it is called.

    ``lm`` may be a transformers model, alone or in a pair with its tokenizer; ``context`` and
    ``token_ids`` a text, a list, an array or one row of a batch; ``joint`` a tensor or an array. An
    option by the name that another library has for it is a ValueError that says the name here.

    Examples
    --------
    >>> @takes_what_is_given
    ... def length(lm, context, seed=0):
    ...     return len(context)
    >>> length(None, [3, 1, 2])
    3
    >>> length(None, [3], random_state=1)
    Traceback (most recent call last):
    ...
    ValueError: length has no option 'random_state': it is called seed here
    """
    names = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in names.values())

    @functools.wraps(function)
    def reading(*arguments: Any, **options: Any) -> Answer:
        # What may be a field of some settings is for the function to refuse.
        told = [name for name in options if known_name(name, names)] if open_ended else options
        refuse_habits(function.__name__, told, names)
        given = dict(zip(names, arguments, strict=False))
        lm = given["lm"] = as_language_model(given.get("lm", options.get("lm")))
        read = {
            name: value if _is_as_meant(name, value, names) else _read(name, value, lm)
            for name, value in [*given.items(), *options.items()]
        }
        places = [read[name] for name in list(names)[: len(arguments)]]
        places += arguments[len(places) :]
        return function(*places, **{name: read[name] for name in options})

    return reading


sample_sequences = takes_what_is_given(_sampled)


def as_language_model(given: Any) -> Any:
    """A model of transformers, alone or paired with its tokenizer, as a `LanguageModel`; whatever
    is one stays as it is.
    """
    if given is None or isinstance(given, LanguageModel):
        return given
    model, *others = given if isinstance(given, tuple | list) and given else (given,)
    if len(others) > 1 or not hasattr(model, "get_output_embeddings"):
        if isinstance(given, str):
            raise ValueError(f"the name {given!r} for a model: give load_language_model({given!r})")
        raise ValueError(
            f"a {type(given).__name__} for a language model: expected vocab_size and "
            "next_token_log_probs, a causal model of transformers, or that and its tokenizer"
        )
    # Loading transformers takes seconds; whoever has a model of it has loaded it.
    from cpmtp.pretrained.given import wrapped

    return wrapped(model, others[0] if others else None)


def as_token_ids(given: Any, lm: Any = None, *, what: str = "context") -> Int[Tensor, " time"]:
    """One row of token ids from a tensor, an array, a list, what a tokenizer returns, or a text.

    Raises
    ------
    ValueError
        If it is none, or several rows.

    Examples
    --------
    >>> as_token_ids([[3, 1]])
    tensor([3, 1])
    """
    if isinstance(given, str):
        if not hasattr(lm, "encode"):
            raise ValueError(f"a text for {what}: this model has no encode(text); give token ids")
        return lm.encode(given)
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):
        given = given["input_ids"]
    ids = _as_tensor(given, what)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]  # (time,)
    if not ids.numel() and ids.ndim == 1:
        return ids.long()
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise ValueError(
            f"{what} of shape {tuple(ids.shape)} and {ids.dtype}: expected one row of token ids"
        )
    return ids.long()


def as_prompts(given: Any, lm: Any = None) -> list[Int[Tensor, " time"]] | Int[Tensor, " time"]:
    """One prompt or a list of several: texts, lists, arrays, a batch of equal rows.

    Examples
    --------
    >>> as_prompts([[3, 1], [2]])
    [tensor([3, 1]), tensor([2])]
    """
    what = "token_ids"
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):
        mask, given = given.get("attention_mask"), given["input_ids"]
        if mask is not None and not bool(_as_tensor(mask, "attention_mask").all()):
            raise ValueError(
                "token_ids with padding (attention_mask holds zeros): give a list of prompts, "
                "each without its padding"
            )
    if isinstance(given, str) or not isinstance(given, Sequence | Tensor | np.ndarray):
        return as_token_ids(given, lm, what=what)
    if isinstance(given, Tensor | np.ndarray):
        rows = _as_tensor(given, what)
        return as_token_ids(rows, lm, what=what) if rows.ndim < 2 else _rows(rows, lm)
    one = all(isinstance(token, int | np.integer) for token in given)
    return as_token_ids(given, lm, what=what) if given and one else _rows(given, lm)


def as_windows(given: Any, lm: Any = None) -> Int[Tensor, "rows length"]:
    """Rows of equally many token ids from a tensor, an array, lists or what a tokenizer returns.

    Raises
    ------
    ValueError
        If it is none, or an id is outside the model's vocabulary.

    Examples
    --------
    >>> as_windows([[3, 1], [2, 0]])
    tensor([[3, 1],
            [2, 0]])
    """
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):
        given = given["input_ids"]
    if not isinstance(given, Tensor):
        given = _as_tensor(given, "tokens")
    if given.ndim != 2 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"tokens of shape {tuple(given.shape)} and {given.dtype}: expected rows of equally "
            "many token ids"
        )
    low, high = (int(given.min()), int(given.max())) if given.numel() else (0, 0)
    if lm is not None and not 0 <= low <= high < lm.vocab_size:
        raise ValueError(f"tokens must be in [0, {lm.vocab_size}): got {low} to {high}")
    return given.long()


def _rows(given: Any, lm: Any) -> list[Tensor]:
    return [as_token_ids(row, lm, what="token_ids") for row in given]


def as_joint(given: Any) -> Any:
    """A tensor or an array as the joint whose axes are all tokens'; anything else as it is."""
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, JointDistribution) and given.probs.requires_grad:
        return JointDistribution(given.probs.detach(), given.horizon)
    if not isinstance(given, Tensor):
        return given
    if not given.is_floating_point() or not given.ndim:
        raise ValueError(
            f"a joint of shape {tuple(given.shape)} and {given.dtype}: expected probabilities, one "
            "axis per token"
        )
    return JointDistribution(given.detach())


def _read(name: str, value: Any, lm: Any) -> Any:
    if name == "lm":
        return lm
    if name == "context":
        return as_token_ids(value, lm)
    if name in _WHOLE:
        return _whole_number(name, value)
    if name == "token_ids":
        return as_prompts(value, lm)
    if name == "tokens":
        return as_windows(value, lm)
    if name == "draft" and _is_of_transformers(value):
        return as_language_model(value)
    return as_joint(value) if name == "joint" else value


def _is_as_meant(name: str, value: Any, names: Mapping[str, inspect.Parameter]) -> bool:
    """Whether an argument is none where the function has none by default, or a number where this
    function calls one so.
    """
    if name not in names:
        return False
    number = name == "context" and names[name].annotation == "int"
    return number or (value is None and names[name].default is None)


def _is_of_transformers(given: Any) -> bool:
    """Whether it is a model of transformers, alone or paired with its tokenizer."""
    model = given[0] if isinstance(given, tuple) and given else given
    return hasattr(model, "get_output_embeddings")


def _whole_number(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} {value!r}: expected an integer")
    return int(value)


def _as_tensor(given: Any, what: str) -> Tensor:
    if isinstance(given, Tensor):
        return given.cpu()
    try:
        return torch.as_tensor(np.asarray(given) if len(given) else np.zeros(0, np.int64))
    except (TypeError, ValueError):
        raise ValueError(
            f"{what} is a {type(given).__name__}: expected token ids, "
            + ("rows of equally many" if what == "tokens" else "one row of them, or a text")
        ) from None
