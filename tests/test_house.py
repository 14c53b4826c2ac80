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

import cpmtp

TYPES = {"language_model", "joint_distribution", "prefix_tree", "cp_distribution", "sampling_law"}
EXACT = TYPES | {"corpora", "divergence", "verification", "acceptance", "decomposition"}
ALLOWED = {
    "pretrained": {"language_model", "tree_attention"},
    "joint_distribution": {"language_model", "sampling_law"},
    "prefix_tree": {"language_model", "sampling_law", "joint_distribution"},
    "divergence": {"joint_distribution", "prefix_tree", "cp_distribution"},
    "draft_law": TYPES - {"prefix_tree"},
    "truncated_acceptance": TYPES | {"draft_law"},
    "sampled_acceptance": TYPES | {"draft_law"},
    "acceptance_rules": TYPES - {"language_model", "prefix_tree"},
    "acceptance": TYPES | {"verification", "truncated_acceptance", "acceptance_rules"},
    "decomposition": TYPES - {"language_model", "sampling_law"} | {"divergence", "acceptance"},
    "study_plan": EXACT | {"pretrained"},
    "study_table": {"study_plan"},
    "study_unit": EXACT | {"study_plan", "study_table"},
    "study_folder": {"study_plan", "study_table"},
    "study_workers": {"study_plan", "study_unit"},
    "study": {"study_plan", "study_table", "study_unit", "study_folder", "study_workers"},
    "rank_selection": {"latency", "cluster_bootstrap", "rank_criteria"},
    "training": EXACT | {"pretrained", "muon", "base_evaluation", "checkpoints"} - {"decomposition"},
    "cp_head": {"cp_distribution"},
    "head_objectives": {"cp_head"},
    "head_evaluation": EXACT | {"cp_head", "head_objectives"},
    "cycle_forecast": {"sampling_law", "cp_head"},
    "generation_target": {"language_model"},
    "drift": {"generation_stats"},
    "speculative_decoding": TYPES
    | {"cp_head", "verification", "generation_target", "generation_stats"} - {"joint_distribution", "prefix_tree"},
    "head_training": {"language_model", "cp_head", "head_objectives", "muon", "checkpoints"},
    "base_evaluation": {"corpora"},
    "validation": EXACT
    | {"pretrained", "training", "cp_head", "head_objectives", "head_training", "head_evaluation", "cycle_forecast", "latency"}
    | {"speculative_decoding", "sampled_acceptance", "checkpoints", "plots", "report", "report_sections"},
    "pilot": {"latency"},
    "report": {"plots", "rank_selection", "latency", "report_sections"},
    "report_sections": {"plots", "rank_selection", "rank_criteria", "latency", "pilot", "study_summary"},
}
TOUCHED_BY = {"tensorly": {"decomposition/als.py", "cp_distribution.py"}, "matplotlib": {"plots.py"}}


def _files(root):
    return sorted((root / "cpmtp").rglob("*.py"))


def _imports(tree: ast.AST):
    """Modules imported anywhere but under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imports(node)


def test_imports_climb_one_way(root):
    offences = []
    for path in _files(root):
        name = path.relative_to(root / "cpmtp").parts[0].removesuffix(".py")
        if name in ("__init__", "cli"):
            continue
        used = {m.split(".")[1] for m in _imports(ast.parse(path.read_text())) if m.startswith("cpmtp.")} - {name}
        beyond = used - ALLOWED.get(name, set()) - _alongside(name)
        offences += [f"{name} imports {other}" for other in sorted(beyond)]
    assert not offences


def _alongside(name: str) -> set[str]:
    """Parts split off a module of the table stand where that module stands."""
    return SPLIT_OFF.get(name, set())


SPLIT_OFF: dict[str, set[str]] = {}


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
        assert path.name == "cli.py" or not any(getattr(c.func, "id", "") == "print" for c in calls), path


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_lint_and_format_are_clean(root, command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=root, capture_output=True, text=True)
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
