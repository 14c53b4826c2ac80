"""A study's folder: one run at a time, one study for good, damaged parts set aside."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout

from cpmtp.study.plan import StudyUnit, study_cells
from cpmtp.study.settings import StudySettings
from cpmtp.study.table import SCHEMA_VERSION, read_part, write_part
from cpmtp.whole_files import remove_partials, write_parquet, write_text

_PACKAGES = ("cpmtp", "torch", "transformers", "tensorly", "numpy", "scipy", "pandas", "pyarrow")


@dataclass(frozen=True)
class StudyFolder:
    """Where a study's parts, manifest and table are."""

    path: Path
    settings: StudySettings

    @classmethod
    @contextmanager
    def opened(cls, path: Path, settings: StudySettings, identity: dict) -> Iterator[StudyFolder]:
        """The folder, held by this run alone.

        Raises
        ------
        ValueError
            If it holds another study, what is there is no study's folder, or another run is using
            it.
        """
        manifest = _manifest(settings, identity)
        file = path / "manifest.json"
        if path.exists() and not path.is_dir():
            raise ValueError(f"{str(path)!r} is a file: choose a folder for --out")
        if file.exists():
            _refuse_other_study(_read_manifest(file), manifest, path)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            # Somebody may have begun another study here since.
            if file.exists():
                _refuse_other_study(_read_manifest(file), manifest, path)
            else:
                write_text(file, json.dumps(manifest, indent=2) + "\n")
            remove_partials(path)
            remove_partials(path / "parts")
            yield cls(path, settings)

    def read(self, unit: StudyUnit) -> pa.Table | None:
        """The rows of a finished context; a damaged file is moved to `parts/damaged` and counts as
        not there.
        """
        path = self._part(unit)
        if not path.exists():
            return None
        try:
            table = read_part(
                path, self.settings, len(study_cells(self.settings, unit.trees, unit.context))
            )
            if (
                table.column("context")[0].as_py() != unit.context
                or table.column("model")[0].as_py() != unit.model
            ):
                raise ValueError("it holds another context")
            return table
        except ValueError:
            aside = path.parent / "damaged"
            aside.mkdir(exist_ok=True)
            number = sum(1 for _ in aside.iterdir())
            os.replace(path, aside / f"{path.name}.{number}")
            return None

    def write(self, unit: StudyUnit, table: pa.Table) -> None:
        """Keep a context's rows."""
        write_part(self._part(unit), table)

    def write_table(self, table: pa.Table) -> None:
        """The whole study's."""
        write_parquet(self.path / "table.parquet", table)

    def _part(self, unit: StudyUnit) -> Path:
        return self.path / "parts" / f"{unit.key}.parquet"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone: a lock of the operating system's, which ends with the
    process, however that ends.
    """
    holder = folder / ".holder"
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        who = holder.read_text("utf-8") if holder.exists() else "another process"
        raise ValueError(
            f"{str(folder)!r} is in use by {who}: wait for it, or choose another --out"
        ) from None
    with held:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield


def _manifest(settings: StudySettings, identity: dict) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": json.loads(json.dumps(asdict(settings))),
        **identity,
        "versions": {name: _version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
    }


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}): choose another --out") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{str(path)!r} is no study's manifest: choose another --out")
    return manifest


def _refuse_other_study(there: dict, new: dict, folder: Path) -> None:
    # What an earlier version did not know yet was as it is by default.
    later = ("text_field", "cheapest", "acceptance_contexts")
    known = {f.name: f.default for f in fields(StudySettings) if f.name in later}
    old = known | there.get("settings", {})
    different = [
        f"{f.name} ({old.get(f.name)} there, {new['settings'][f.name]} now)"
        for f in fields(StudySettings)
        if old.get(f.name) != new["settings"][f.name]
    ]
    if there.get("schema_version") != new["schema_version"]:
        different.append(
            f"schema_version ({there.get('schema_version')} there, {new['schema_version']} now)"
        )
    for what, word in (("models", "the model"), ("corpora", "the texts of domain")):
        before = there.get(what) or {}
        different += [
            f"{word} {name!r} itself"
            for name in new[what]
            if name in before and before[name] != new[what][name]
        ]
    before, now = (sorted(m.get("corpora") or {}) for m in (there, new))
    if before != now and not different:
        different.append(f"domains ({before} there, {now} now)")
    if different:
        raise ValueError(
            f"{str(folder)!r} holds another study; it differs in {', '.join(different)}: choose "
            "another --out"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
