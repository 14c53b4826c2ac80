"""How far long work has come, for whoever watches: in a terminal and in a notebook."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

from tqdm import tqdm


def progress_bar(total: float, unit: str, *, shown: bool | None = None, **options: Any) -> tqdm:
    """A bar of text, in a notebook one output that changes; nothing where nobody watches.

    Parameters
    ----------
    total, unit
        How much there is to do, in what.
    shown : bool, optional
        Default: in a terminal and in a notebook. Widgets are not used: they need packages of their
        own there, and a warning is shown instead of a bar where these are missing. Nor is the error
        stream: a stored notebook keeps every state of the bar that is written there.
    options
        Of ``tqdm``.
    """
    watched = sys.stderr.isatty() or in_notebook() if shown is None else shown
    kind = _NotebookBar if in_notebook() else tqdm
    return kind(total=total, unit=unit, disable=not watched, **options)


class _NotebookBar(tqdm):
    """A bar as one output of a cell."""

    def __init__(self, **options: Any):
        self._shown: Any = None
        super().__init__(**{"file": io.StringIO(), "ncols": 100, "ascii": True} | options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar as it is now in the place where it was."""
        text = {"text/plain": str(self) if msg is None else msg}
        if self._shown is None:
            show = import_module("IPython.display").display
            self._shown = show(text, raw=True, display_id=True)
        else:
            self._shown.update(text, raw=True)
        return True


def in_notebook() -> bool:
    """Whether cells of a notebook are run here."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
