"""The command line as its users call it, with and without a process of its own."""

from __future__ import annotations

import sys

import pytest

from cpmtp.cli import main


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, what was printed and what was complained of."""
    monkeypatch.setattr("sys.argv", ["cpmtp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def words(line: str) -> list[str]:
    """Arguments as they are typed, none with a space in it."""
    return line.split()


def process(line: str, *more: object) -> list[str]:
    """What starts the command line in a process of its own."""
    return [sys.executable, "-m", "cpmtp.cli", *words(line), *map(str, more)]
