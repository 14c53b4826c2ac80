"""Options by the names that other libraries have for them: whoever gives one is told its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from cpmtp.resampling import SEEDS

Called = TypeVar("Called", bound=Callable[..., Any])

# What other libraries call an option; the name that the function called has is meant.
_HABITS = dict.fromkeys(SEEDS, ("seed",)) | {
    "n_components": ("rank", "ranks"),
    "num_components": ("rank", "ranks"),
    "n_iter_max": ("max_iterations", "steps"),
    "max_iter": ("max_iterations", "steps"),
    "n_iter": ("max_iterations", "steps"),
    "epochs": ("steps",),
    "max_steps": ("steps",),
    "tol": ("tolerance",),
    "n_init": ("restarts",),
    "n_restarts": ("restarts",),
    "init": ("restarts", "start"),
    "lr": ("learning_rate",),
    "batch_size": ("rows", "batches"),
    "model": ("lm", "models"),
    "prompt": ("token_ids", "context"),
    "input_ids": ("token_ids", "context", "tokens"),
    "inputs": ("token_ids", "context", "tokens"),
    "n": ("horizon", "horizons"),
    "num_tokens": ("max_new_tokens", "horizon"),
    "max_tokens": ("max_new_tokens",),
    "max_length": ("max_new_tokens", "length"),
    "seq_length": ("length", "context_length"),
    "num_samples": ("samples",),
    "n_samples": ("samples",),
    "stop": ("stop_strings",),
    "eos": ("eos_token_id",),
    "eos_token_ids": ("eos_token_id",),
    "top_n": ("top_k",),
    "nucleus": ("top_p",),
    "out_dir": ("out",),
    "output_dir": ("out",),
    "n_jobs": ("workers",),
    "num_workers": ("workers",),
    "verbose": ("progress",),
}


def refuse_habits(what: str, given: Collection[str], names: Collection[str]) -> None:
    """Refuse options by the names that other libraries have for them.

    Raises
    ------
    ValueError
        Saying what `what` calls it, or that it has nothing of the kind.

    Examples
    --------
    >>> refuse_habits("fit", {"verbose": True}, ("joint", "rank"))
    Traceback (most recent call last):
    ...
    ValueError: fit has no option 'verbose' and nothing like it: leave it out
    """
    for name in given:
        if name in _HABITS and name not in names:
            here = known_name(name, names)
            said = f": it is called {here} here" if here else " and nothing like it: leave it out"
            raise ValueError(f"{what} has no option {name!r}{said}")


def refuse_unknown(what: str, given: Collection[str], names: Collection[str]) -> None:
    """Refuse every option that is none, and say which there are.

    Raises
    ------
    ValueError
        Naming the first of them.
    """
    refuse_habits(what, given, names)
    for name in given:
        if name not in names:
            raise ValueError(f"{what} has no option {name!r}: expected one of {', '.join(names)}")


def knows_habits(called: Called) -> Called:
    """A class or function that tells what its options are called here.

    Examples
    --------
    >>> @knows_habits
    ... def drawn(count, seed=0):
    ...     return count
    >>> drawn(3, random_state=1)
    Traceback (most recent call last):
    ...
    ValueError: drawn has no option 'random_state': it is called seed here
    """
    made = called.__init__ if inspect.isclass(called) else called
    names = inspect.signature(called).parameters

    @functools.wraps(made)
    def telling(*arguments: Any, **options: Any) -> Any:
        refuse_habits(called.__name__, options, names)
        return made(*arguments, **options)

    if not inspect.isclass(called):
        return telling  # type: ignore[return-value]
    called.__init__ = telling  # type: ignore[method-assign]
    return called


def known_name(name: str, names: Collection[str]) -> str:
    """What an option of another library's is called among these; empty where nothing is known."""
    return next((here for here in _HABITS.get(name, ()) if here in names), "")
