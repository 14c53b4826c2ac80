"""The command line as its users call it, without a process of its own."""

from __future__ import annotations

import pytest

from cpmtp.cli import main


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, what was printed and what was complained of."""
    monkeypatch.setattr("sys.argv", ["cpmtp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err
