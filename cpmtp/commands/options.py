"""Reading of options: lists, pairs, sizes, and where work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

# Of every command that loads a model.
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:NUMBER.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Precision of the model: float32, bfloat16, float16 or float64."),
]
# Of commands that have so many minutes.
QuickDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Precision of the model: float32, bfloat16, float16 or float64. Default: bfloat16 "
        "where the device has units for it, but not of embedded models; else float32.",
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Only the k most probable tokens are sampled from.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Only the most probable tokens of this mass are sampled from."),
]

# A host's name or number (an IPv6 one in brackets) and a port, with the kind of connection before.
_ADDRESS = re.compile(r"((tcp|tls|ucx|ws|wss)://)?([\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


def quick_dtype(names: Sequence[str], device: str) -> str:
    """The precision for models in a hurry: that of the device's fastest matrix products. Embedded
    models are faster in float32, and what a factory gives has a precision of its own.

    Examples
    --------
    >>> quick_dtype(["code"], "cpu"), quick_dtype(["package:factory"], "cpu")
    ('float32', 'float32')
    """
    from cpmtp.pretrained import embedded_models
    from cpmtp.pretrained.loading import usable_device
    from cpmtp.training.head_settings import quick_precision

    small = any(name in embedded_models() or ":" in name for name in names)
    return "float32" if small else quick_precision(usable_device(device).type)


def integers(option: str, text: str) -> tuple[int, ...]:
    """Integers of a comma-separated option."""
    return numbers(option, text, int, "integers", "1,2,4")


def numbers(option: str, text: str, kind: type, what: str, example: str) -> tuple:
    """Numbers of a comma-separated option; ValueError with an example otherwise."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: expected {what} separated by commas, such as {example}"
        ) from None


def pair(option: str, text: str) -> tuple[str, str]:
    """Name and path of ``NAME=PATH``."""
    name, found, path = text.partition("=")
    if not found:
        raise ValueError(f"{option} {text!r}: expected NAME=PATH, such as law=contracts/*.txt")
    return name, path


def anchored_choices(text: str | None) -> tuple[bool, ...] | None:
    """The settings that ``no``, ``yes`` and ``both`` stand for; None leaves it to the study."""
    if text is None:
        return None
    choices = {"no": (False,), "yes": (True,), "both": (False, True)}
    if text not in choices:
        raise ValueError(f"--anchored {text!r}: expected no, yes or both")
    return choices[text]


def gigabytes_in_bytes(gigabytes: float) -> int:
    """Bytes of a number of gigabytes, at least one."""
    if not (0 < gigabytes < float("inf")):
        raise ValueError(f"--max-gigabytes {gigabytes}: expected a number above 0")
    return max(int(gigabytes * 1e9), 1)


@contextmanager
def executor_at(address: str | None, workers: int | None):
    """Dask's executor, or none."""
    if address is None:
        yield None
        return
    if not _ADDRESS.fullmatch(address):
        raise ValueError(
            f"--dask {address!r} is no scheduler's address: expected tcp://HOST:PORT, such as "
            "tcp://10.0.0.5:8786"
        )
    if workers is not None:
        raise ValueError(
            "--workers counts local processes and --dask computes elsewhere: give one of them"
        )
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            "--dask needs the package distributed: pip install 'cpmtp[distributed]'"
        ) from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except Exception as error:  # each kind of connection has errors of its own
        raise ValueError(f"--dask {address!r}: no scheduler answers there ({error})") from error
    with client:
        # A context whose rows depend on nothing but itself may be computed twice; its first answer
        # counts.
        yield client.get_executor(pure=False)


def load_head(name: str | Path, model: str, device: str):
    """The head in a folder, or one that comes with an embedded model."""
    from cpmtp.heads.draft_head import DraftHead
    from cpmtp.pretrained import embedded_heads

    known = embedded_heads(model)
    folder = known.get(str(name), Path(name))
    if not (folder / "config.json").is_file():
        others = f"; {model} comes with {', '.join(known)}" if known else ""
        raise ValueError(
            f"the folder {str(name)!r} holds no head: expected config.json and model.safetensors "
            f"in it{others}"
        )
    return DraftHead.from_pretrained(folder).to(device)
