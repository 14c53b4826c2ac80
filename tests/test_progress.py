"""Bars in a notebook: one output that changes, whatever watches it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from cpmtp.joint_distribution.progress import in_notebook, progress_bar


class ZMQInteractiveShell:
    """What a notebook's kernel calls its shell."""


@pytest.fixture
def outputs(monkeypatch):
    """The outputs of a cell, as a stored notebook has them."""
    found: list[str] = []

    class Handle:
        """What `display` hands back to change an output."""

        def update(self, data, raw):
            assert raw
            found[-1] = data["text/plain"]

    def display(data, raw, display_id):
        assert raw and display_id
        found.append(data["text/plain"])
        return Handle()

    package, module = ModuleType("IPython"), ModuleType("IPython.display")
    monkeypatch.setattr(package, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr(module, "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return found


def test_a_bar_in_a_notebook_is_one_output_with_its_last_state(outputs, capsys):
    assert in_notebook()
    with progress_bar(50, "step", mininterval=0) as bar:
        for _ in range(50):
            bar.update()
            bar.set_postfix_str("loss 1")
    assert len(outputs) == 1 and "50/50" in outputs[0] and "loss 1" in outputs[0]
    assert capsys.readouterr() == ("", "")
    progress_bar(50, "step", shown=False).close()
    assert len(outputs) == 1


def test_without_a_notebook_and_a_terminal_nobody_watches(capsys):
    assert not in_notebook()
    with progress_bar(3, "step") as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")
