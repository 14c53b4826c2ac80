"""How far long work has come, for whoever watches: in a terminal and in a notebook."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: float, unit: str, *, shown: bool | None = None, **options: Any) -> tqdm:
    """A bar of text; nothing where nobody watches.

    Parameters
    ----------
    total, unit
        How much there is to do, in what.
    shown : bool, optional
        Default: in a terminal and in a notebook. Widgets are not used: they need packages of their
        own there, and a warning is shown instead of a bar where these are missing.
    options
        Of ``tqdm``.
    """
    watched = sys.stderr.isatty() or in_notebook() if shown is None else shown
    return tqdm(total=total, unit=unit, disable=not watched, **options)


def in_notebook() -> bool:
    """Whether cells of a notebook are run here."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
