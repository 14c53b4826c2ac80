"""The command line: what it is made of, and how bad input ends."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from cpmtp.commands.export import export
from cpmtp.commands.forecast import forecast
from cpmtp.commands.generate import generate
from cpmtp.commands.latency import latency
from cpmtp.commands.models import models
from cpmtp.commands.report import compare, report
from cpmtp.commands.study import study
from cpmtp.commands.train import train_base_model, train_one_head
from cpmtp.commands.validate import validate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which rank does a multi-token prediction head need, and what will it buy?",
)

# typer brings its own copy of click from some version on; this is the base class in either.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


_INTERRUPTED = 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main() -> None:
    """Entry point: bad input is one line and exit status 2, an interruption status 130."""
    # A file's name may hold bytes that are no text: they are shown by their numbers.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False) or 0
        # Some versions of typer make a status of an interruption.
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status)
    except ValueError as error:
        _stop(" ".join(str(error).split()))
    except _UsageError as error:
        _stop(getattr(error, "format_message", lambda: str(error))())
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            print(
                f"cpmtp: {error.strerror}; what could be written is kept, the same command goes "
                "on from there",
                file=sys.stderr,
            )
            sys.exit(1)
        _stop(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except (KeyboardInterrupt, typer.Abort):
        print(
            "cpmtp: interrupted; what is finished is kept, the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(_INTERRUPTED)


def _stop(message: str) -> None:
    print(f"cpmtp: {message}", file=sys.stderr)
    sys.exit(2)


def _show_version(value: bool | None) -> None:
    if value:
        from cpmtp import __version__

        print(f"cpmtp {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., None]] = {
    "study": study,
    "forecast": forecast,
    "latency": latency,
    "report": report,
    "compare": compare,
    "export": export,
    "train-base": train_base_model,
    "train-head": train_one_head,
    "generate": generate,
    "validate": validate,
    "models": models,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


if __name__ == "__main__":
    main()
