"""Files in: text as UTF-8 or by its byte-order mark, one document a line of JSON, gzip of these."""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpmtp.corpora.documents import Document

_LINES_OF_JSON = (".jsonl", ".ndjson")
_GZIP = b"\x1f\x8b"
# Longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# A text of one byte per letter in another alphabet, or no text at all: where more of it than this
# is no UTF-8 or no character that texts have.
_STRANGE_SHARE = 0.3
_CONTROLS = frozenset(range(32)) - set(b"\t\n\r\f\v\b\x1b")


@dataclass(frozen=True)
class Corpus:
    """What files and folders gave.

    Attributes
    ----------
    documents : tuple of Document
    skipped : tuple of str
        Files that hold no text, each with the reason.
    """

    documents: tuple[Document, ...]
    skipped: tuple[str, ...] = ()


class _NoText(Exception):
    """A file holds something else; the message says what."""


def read_document(path: str | Path, name: str | None = None) -> Document:
    r"""Read one file of text as one document.

    A byte-order mark says how it is written, without one it is UTF-8; each undecodable byte becomes
    U+FFFD and is counted. Newlines of any system become ``\n``.

    Raises
    ------
    ValueError
        If the file holds no text.
    """
    name = name or _name(path)
    try:
        return _text(name, Path(path).read_bytes())
    except _NoText as reason:
        raise ValueError(f"{name!r} is no text: {reason}") from None


def read_documents(
    patterns: list[str] | list[Path] | list[str | Path], *, field: str = "text"
) -> list[Document]:
    """The documents of `read_corpus`."""
    return list(read_corpus(patterns, field=field).documents)


def read_corpus(
    patterns: list[str] | list[Path] | list[str | Path], *, field: str = "text"
) -> Corpus:
    """Read files, folders (every regular file below, hidden ones left out) and glob patterns.

    A file is one document; of a file of JSON lines (``.jsonl``, ``.ndjson``) every line is one: a
    string, or the `field` of an object. Files packed by gzip are read as what is in them. Files
    that hold no text are skipped and listed.

    Raises
    ------
    ValueError
        If a pattern matches nothing, everything it matches is empty or no text, or a line of JSON
        is none or lacks the field.
    """
    paths: list[Path] = []
    for pattern in patterns:
        found = _expand(str(pattern))
        if not found:
            raise ValueError(
                f"corpus {str(pattern)!r}: no such file, folder or match; name at least one text "
                "file"
            )
        paths.extend(found)
    documents: list[Document] = []
    skipped: list[str] = []
    for path in dict.fromkeys(paths):
        try:
            documents += [d for d in _documents(path, field) if d.text.strip()]
        except _NoText as reason:
            skipped.append(f"{_name(path)}: {reason}")
    if not documents:
        others = f" ({'; '.join(skipped[:3])}{'; …' if len(skipped) > 3 else ''})"
        raise ValueError(
            f"the corpus is empty: {len(paths)} file(s) found, none holds text"
            f"{others if skipped else ''}; give a file with text"
        )
    return Corpus(tuple(documents), tuple(skipped))


def _documents(path: Path, field: str) -> Iterator[Document]:
    raw, name = path.read_bytes(), path.name.lower()
    if raw.startswith(_GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise _NoText(f"packed by gzip and damaged ({error})") from None
        name = name.removesuffix(".gz")
    whole = _text(_name(path), raw)
    if not name.endswith(_LINES_OF_JSON):
        yield whole
        return
    for number, line in enumerate(whole.text.split("\n"), start=1):
        if line.strip():
            yield _line_of_json(f"{whole.name}:{number}", line, field)


def _line_of_json(name: str, line: str, field: str) -> Document:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}: no line of JSON ({error}): mend or remove it") from None
    text = value.get(field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        there = f"fields {', '.join(map(str, value))}" if isinstance(value, dict) else "no object"
        raise ValueError(
            f"{name}: no text in the field {field!r} ({there}): name the field that holds the "
            "text (text_field, --text-field)"
        )
    # Half of a pair of UTF-16 is legal in JSON and no character.
    kept = text.encode("utf-8", "replace").decode()
    return Document(name, _unified(kept))


def _text(name: str, raw: bytes) -> Document:
    """The document that these bytes are."""
    mark, encoding = next((m for m in _MARKS if raw.startswith(m[0])), (b"", "utf-8"))
    raw = raw[len(mark) :]
    if not mark and b"\0" in raw:
        raise _NoText("zero bytes: binary, or UTF-16 without its mark")
    text = raw.decode(encoding, "replace")
    own = raw.count("\ufffd".encode(encoding))
    replaced = max(text.count("\ufffd") - own, 0)
    controls = sum(raw.count(code) for code in _CONTROLS) if encoding == "utf-8" else 0
    if (strange := replaced + controls) > _STRANGE_SHARE * len(text):
        raise _NoText(f"{strange:,} of {len(text):,} characters are not those of a UTF-8 text")
    return Document(name, _unified(text), replaced)


def _unified(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _name(path: str | Path) -> str:
    """A file's name as text; bytes that are none are shown by their numbers."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        files = (p for p in sorted(path.rglob("*")) if p.is_file())
        return [
            p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
    if path.is_file():
        return [path]
    return [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
