"""The house rules: who may import whom, style, types, and what importing the package costs."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

import cpmtp
from cpmtp.language_model import MarkovLanguageModel

BASIS = [
    "whole_files",
    "resampling",
    "sampling_law",
    "language_model",
    "tree_attention",
    "pretrained",
    "corpora",
]
BASIS += ["joint_distribution", "prefix_tree", "latency"]
FLOORS = [[name] for name in [*BASIS, "drafts", "acceptance", "decomposition"]]
FLOORS += [
    ["study", "heads"],
    ["training", "decoding"],
    ["forecasting"],
    ["ranking"],
    ["report"],
    ["validation"],
]
FLOORS += [["commands"], ["cli"]]
NARROWER = {
    "ranking": {"latency", "resampling"},
    "report": {"whole_files", "ranking", "latency"},
}


def allowed(name: str) -> set[str]:
    """Rooms that ``name`` may import: those on the floors below, or the few it is held to."""
    floor = next(k for k, rooms in enumerate(FLOORS) if name in rooms)
    return NARROWER.get(name, {room for rooms in FLOORS[:floor] for room in rooms})


TOUCHED_BY = {
    "tensorly": {"decomposition/als.py", "drafts/cp_distribution.py"},
    "matplotlib": {"report/plots/study.py"},
}


def _files(root):
    return sorted((root / "cpmtp").rglob("*.py"))


def _imports(tree: ast.AST):
    """Modules and names of modules imported anywhere but under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imports(node)


def _module(root, path) -> str:
    """``cpmtp.drafts.divergence`` of its file; a package is its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _edges(root) -> dict[str, set[str]]:
    """Every module with the modules of the package that it imports."""
    modules = {_module(root, path): path for path in _files(root)}
    edges = {}
    for name, path in modules.items():
        used = set(_imports(ast.parse(path.read_text())))
        used = {other if other in modules else other.rpartition(".")[0] for other in used}
        edges[name] = (used & modules.keys()) - {name, "cpmtp"}
    return edges


def _offences(edges: dict[str, set[str]]) -> list[str]:
    """Imports between rooms that the table forbids."""
    rooms = {name: name.split(".")[1] for name in edges if name != "cpmtp"}
    return [
        f"{name} imports {used}"
        for name in sorted(rooms)
        for used in sorted(edges[name])
        if rooms[used] != rooms[name] and rooms[used] not in allowed(rooms[name])
    ]


def test_imports_between_rooms_climb_one_way(root):
    assert not _offences(_edges(root))


def _circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves through others."""
    reached = {name: set(used) for name, used in edges.items()}
    for _ in edges:
        reached = {
            name: used.union(*(reached[other] for other in used)) for name, used in reached.items()
        }
    return sorted(name for name, used in reached.items() if name in used)


def test_no_files_import_each_other_in_a_circle(root):
    assert not _circles(_edges(root))


def _entries(folder) -> list:
    return [path for path in folder.iterdir() if path.name != "__pycache__"]


def test_no_file_is_long_and_no_folder_is_full(root):
    files = [*_files(root), *(root / "tests").rglob("*.py")]
    long = {path: count for path in files if (count := len(path.read_text().splitlines())) > 400}
    full = {
        folder: count
        for folder in {path.parent for path in _files(root)}
        if (count := len(_entries(folder))) > (26 if folder == root / "cpmtp" else 12)
    }
    assert not long and not full


def test_the_face_loads_what_it_names_and_nothing_else_imports_it(root):
    for path in _files(root):
        if path.name != "__init__.py" and path.parent != root / "cpmtp" / "commands":
            assert (
                not re.search(r"^(import cpmtp$|from cpmtp import)", path.read_text(), re.MULTILINE)
                or path.stem == "cli"
            )


@pytest.mark.parametrize("library", sorted(TOUCHED_BY))
def test_a_library_is_touched_in_one_place(root, library):
    users = {p.relative_to(root / "cpmtp").as_posix() for p in _files(root) if _uses(p, library)}
    assert users <= TOUCHED_BY[library]


def _uses(path, library: str) -> bool:
    return any(m.split(".")[0] == library for m in _imports(ast.parse(path.read_text())))


def test_every_public_name_is_there_and_no_function_has_the_name_of_its_module():
    for name in cpmtp.__all__:
        value = getattr(cpmtp, name)
        assert value is not None
        if name in cpmtp._HOME:
            assert cpmtp._HOME[name].split(".")[-1] != name


def test_importing_the_package_loads_nothing_heavy():
    heavy = "('transformers', 'matplotlib', 'pandas', 'pyarrow', 'scipy.stats')"
    code = f"import sys, cpmtp; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_prints_nothing(root):
    for path in _files(root):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        may = path.name == "cli.py" or "commands" in path.parent.parts
        assert may or not any(getattr(c.func, "id", "") == "print" for c in calls), path


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_lint_and_format_are_clean(root, command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_are_clean(root):
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _modules():
    return [m.name for m in pkgutil.walk_packages(cpmtp.__path__, "cpmtp.")]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0


def test_every_reference_is_in_the_bibliography(root):
    known = set(re.findall(r"@\w+\{(\w+),", (root / "docs" / "references.bib").read_text("utf-8")))
    for path in _files(root):
        for lines in re.findall(r"References\n\s+-+\n\s+([\w, ]+)\n", path.read_text("utf-8")):
            assert set(re.split(r",\s*", lines.strip())) <= known, path


def test_shapes_and_types_are_checked_while_the_tests_run():
    with pytest.raises(TypeCheckError):
        MarkovLanguageModel("not a tensor", 3)
    with pytest.raises(TypeCheckError):
        MarkovLanguageModel(torch.ones(2) / 2, torch.ones(3, 3) / 3)
