"""Documents that every Python carries: its library's code and prose, and installed packages."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from contextlib import suppress
from pathlib import Path

from cpmtp.corpora.documents import Document, unit_hash
from cpmtp.corpora.files import read_document

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
    documents = []
    for name, path in found.items():
        # A file that only looks like a source is nobody's fault here.
        with suppress(ValueError):
            if unit_hash(f"kept {name}") < share:
                documents.append(read_document(path, name=name))
    return [d for d in documents if d.text.strip()]


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
