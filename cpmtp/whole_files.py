"""Files that are written whole or not at all: a reader finds the old one or the new one, never half
of it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object], *, forced: bool = True) -> Path:
    """What `write` puts into a temporary file appears under `path` when it is complete.

    Parameters
    ----------
    path : Path
        Its folder is made where it is missing; a file of that name is replaced.
    write : callable
        Called with the temporary file, which lies in the same folder.
    forced : bool
        Whether the contents are on the disk before the name is: a power cut may otherwise leave an
        empty file.

    Returns
    -------
    Path
        `path`.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_whole(folder / "a.txt", lambda to: to.write_text("whole")).read_text()
    'whole'
    >>> len(list(folder.iterdir()))
    1
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        if forced:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def require_folder(folder: str | Path) -> Path:
    """A folder that is there or can be made, before work is spent on what goes into it.

    Raises
    ------
    ValueError
        If it is a file, or would lie in one.
    """
    folder = Path(folder)
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{str(path)!r} is a file: choose another folder (out, --out)")
            break
    return folder


def require_file(path: str | Path) -> Path:
    """A file that is there or can be made, in the same way."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name a file (out, --out)")
    require_folder(path.parent)
    return path


def write_text(path: Path, text: str) -> Path:
    """A text file, UTF-8; bytes of a file's name that are no text are shown by their numbers."""
    raw = text.encode("utf-8", "backslashreplace")
    return write_whole(path, lambda partial: partial.write_bytes(raw))


def write_parquet(
    path: Path, table: pa.Table | pd.DataFrame, *, forced: bool = True, **options: Any
) -> Path:
    """A table as Parquet; `options` are those of `pyarrow.parquet.write_table`."""
    whole = table if isinstance(table, pa.Table) else pa.Table.from_pandas(table)
    return write_whole(path, lambda to: pq.write_table(whole, to, **options), forced=forced)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    """Tensors as a safetensors file."""
    return write_whole(path, lambda partial: save_file(dict(tensors), partial, metadata))


def remove_partials(folder: Path, name: str = "*") -> None:
    """What killed writers of files of this name left behind; for whoever alone writes them."""
    for left in folder.glob(f".{name}.*.partial"):
        left.unlink(missing_ok=True)
