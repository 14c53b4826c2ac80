"""Shapes and types in signatures are checked while the tests run; shared fixtures."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker per core: threads of their own would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without ``with``: the hook must still be there when the tests import the package.
install_import_hook("cpmtp", "typechecker.checked")


ROOT = Path(importlib.util.find_spec("cpmtp").origin).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of a real pretrained model that is no part of the project."""
    folder = ROOT.parent / "shared" / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the pretrained stories260K model is not beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_bfloat16_units():
    """Heads are trained in single precision on every processor, unless a test asks otherwise."""
    from cpmtp.training import head_settings  # under the import hook, which is installed by now

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head_settings, "has_bfloat16_units", lambda device: False)
        yield
