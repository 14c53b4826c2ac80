"""Text in: documents from the standard library, from files and from folders.

A document is the unit of every train/held-out split and the cluster of every interval: two windows
of one file are not independent.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import inspect
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("code", "prose")

# Mapping tables, generated files and test fixtures: bytes without the structure of code.
_LEFT_OUT = {
    "encodings",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "__pycache__",
}
_SHORTEST_DOCSTRING_FILE = 200


@dataclass(frozen=True)
class Document:
    r"""One file's text.

    Attributes
    ----------
    name : str
        Where it came from; unique within a corpus.
    text : str
        Its text, newlines as ``\\n``.
    replaced_bytes : int
        Bytes that were not UTF-8, each shown as U+FFFD in `text`.
    """

    name: str
    text: str
    replaced_bytes: int = 0


def standard_library_documents(domain: str) -> list[Document]:
    """Documents that every CPython carries.

    Parameters
    ----------
    domain : {"code", "prose"}
        ``code`` is the library's sources, tests and codec tables left out; ``prose`` is every
        docstring in them, joined per file, and the language reference's topics in
        ``pydoc_data.topics``.

    Raises
    ------
    ValueError
        If `domain` is neither, or this interpreter ships no sources.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: expected one of {', '.join(DOMAINS)}")
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        read_document(path, name=path.relative_to(root).as_posix())
        for path in _library_sources(root)
    ]
    if not sources:
        raise ValueError(
            f"this interpreter ships no library sources under {root}: use a full CPython"
        )
    return sources if domain == "code" else _prose(sources)


def _library_sources(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]


def installed_code_documents(most_bytes: int) -> list[Document]:
    """Python sources of the standard library and of every installed package, named ``PACKAGE/…``;
    for `split_packages`.

    Parameters
    ----------
    most_bytes : int
        Where there is more, packages give the same share of their files, chosen by a hash of the
        names.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found = {
        f"python/{path.relative_to(library).as_posix()}": path for path in _library_sources(library)
    }
    for root in sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}):
        sources = (
            p
            for p in sorted(root.rglob("*.py"))
            if not _LEFT_OUT.intersection(p.relative_to(root).parts[1:])
        )
        found |= {path.relative_to(root).as_posix(): path for path in sources}
    share = most_bytes / max(sum(path.stat().st_size for path in found.values()), 1)
    documents = [
        read_document(path, name=name)
        for name, path in found.items()
        if _unit_hash(f"kept {name}") < share
    ]
    return [d for d in documents if d.text.strip()]


def split_packages(
    documents: list[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Split by package, the first part of a document's name, into (training, held out): none stands
    on both sides.

    Packages are held out in the order of a hash until they make up `fraction` of the text; too
    large ones are passed over.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        package = document.name.partition("/")[0]
        sizes[package] = sizes.get(package, 0) + len(document.text)
    wanted = fraction * sum(sizes.values())
    chosen: set[str] = set()
    for package in sorted(sizes, key=_unit_hash):
        if sum(sizes[c] for c in chosen) < wanted and sizes[package] <= 2 * wanted:
            chosen.add(package)
    sides = [(d, d.name.partition("/")[0] in chosen) for d in documents]
    return [d for d, out in sides if not out], [d for d, out in sides if out]


def _prose(sources: list[Document]) -> list[Document]:
    from pydoc_data.topics import topics

    documents = [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]
    for source in sources:
        text = "\n\n".join(_docstrings(source.text))
        if len(text) >= _SHORTEST_DOCSTRING_FILE:
            documents.append(Document(source.name, text + "\n"))
    return documents


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # lib2to3 and friends ship Python 2 files on purpose
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds)
    ]
    return [inspect.cleandoc(text) for text in found if text]


def split_held_out(
    documents: list[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Split by document into (training, held out).

    The side is a hash of the document's name, so that it depends neither on order nor on what else
    is there.
    """
    held_out = [d for d in documents if _unit_hash(d.name) < fraction]
    names = {d.name for d in held_out}
    return [d for d in documents if d.name not in names], held_out


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def read_document(path: str | Path, name: str | None = None) -> Document:
    """Read one file as UTF-8; each undecodable byte becomes U+FFFD and is counted."""
    raw = Path(path).read_bytes().replace(b"\r\n", b"\n")
    text = raw.decode("utf-8", errors="replace")
    replaced = text.count("\ufffd") - raw.count("\ufffd".encode())
    return Document(name or str(path), text, max(replaced, 0))


def read_documents(patterns: list[str] | list[Path]) -> list[Document]:
    """Read files, folders (every regular file below, hidden ones left out) and glob patterns.

    Raises
    ------
    ValueError
        If a pattern matches nothing, or everything it matches is empty.
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
    documents = [read_document(path) for path in dict.fromkeys(paths)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(
            f"the corpus is empty: {len(paths)} file(s) found, none holds text; give a file with "
            "text"
        )
    return documents


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


def corpus_hash(documents: list[Document]) -> str:
    """SHA-256 over names and texts, in order (hexadecimal)."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()
