"""Documents: the unit of every train/held-out split and the cluster of every interval.

Two windows of one document are not independent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    r"""One text.

    Attributes
    ----------
    name : str
        Where it came from; unique within a corpus.
    text : str
        Its text, newlines as ``\n``.
    replaced_bytes : int
        Bytes that were not UTF-8, each shown as U+FFFD in `text`.
    """

    name: str
    text: str
    replaced_bytes: int = 0


def split_held_out(
    documents: list[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Split by document into (training, held out).

    The side is a hash of the document's name, so that it depends neither on order nor on what else
    is there.
    """
    held_out = [d for d in documents if unit_hash(d.name) < fraction]
    names = {d.name for d in held_out}
    return [d for d in documents if d.name not in names], held_out


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


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
    for package in sorted(sizes, key=unit_hash):
        if sum(sizes[c] for c in chosen) < wanted and sizes[package] <= 2 * wanted:
            chosen.add(package)
    sides = [(d, d.name.partition("/")[0] in chosen) for d in documents]
    return [d for d, out in sides if not out], [d for d, out in sides if out]


def corpus_hash(documents: list[Document]) -> str:
    """SHA-256 over names and texts, in order (hexadecimal)."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()
