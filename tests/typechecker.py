"""The check of types and shapes that pytest installs on every function of the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from beartype import BeartypeConf, beartype

# An integer may stand where a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def unchecked(function: Callable) -> Callable:
    """The function as a user meets it: without the tests' check its own refusals are seen."""
    return inspect.unwrap(function)
