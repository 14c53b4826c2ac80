"""Calls as users make them: without the checks of types and shapes that are on while tests run."""

from __future__ import annotations

import inspect
from typing import Any


def unchecked(called: Any, *arguments: Any, **options: Any) -> Any:
    """What a function returns or a class makes of arguments that its signature does not allow."""
    if not inspect.isclass(called):
        return inspect.unwrap(called)(*arguments, **options)
    made = called.__new__(called)
    inspect.unwrap(called.__init__)(made, *arguments, **options)
    return made
