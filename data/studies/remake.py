"""Which stored studies are of other code or settings than today's, and making them again.

Run from the checkout: python data/studies/remake.py lists them; with names it makes those again,
with `--all-stale` all that are stale. A study made by it keeps `made.json`: its command and a hash
of that command and of the modules whose results it holds. A folder without one was made by code
that is not on record, and counts as stale; its table is brought to today's columns when it is read.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_EXACT = ("sampling_law.py", "language_model.py", "joint_distribution", "drafts", "acceptance")
_FITS = (*_EXACT, "decomposition")
_HEADS = (*_EXACT, "heads", "training", "forecasting/cycles.py")


@dataclass(frozen=True)
class Stored:
    """A stored study.

    Attributes
    ----------
    name : str
        Its folder.
    command : str
        What makes it, from the checkout.
    modules : tuple of str
        Files and folders of the package whose results it holds.
    files : tuple of str
        What is kept of it. Where that is said it is made in `NAME.new`, where it goes on if it was
        stopped, and takes the old one's place when it is done: a study refuses the folder of
        another.
    """

    name: str
    command: str
    modules: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of the command and the modules' text as it is now."""
        found = hashlib.sha256(self.command.encode())
        for module in self.modules:
            place = ROOT / "cpmtp" / module
            for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
                found.update(file.read_bytes())
        return found.hexdigest()

    @property
    def why_stale(self) -> str:
        """Empty, or why it is to be made again."""
        record = HERE / self.name / "made.json"
        if not record.is_file():
            return "made by code that is not on record"
        told = json.loads(record.read_text("utf-8"))
        if told["command"] != self.command:
            return "made by another command"
        return "" if told["sha256"] == self.digest else "the code has changed since"

    def make(self) -> None:
        """Run its command and keep a record of it."""
        before = self.digest
        subprocess.run(shlex.split(self.command), cwd=ROOT, check=True)
        new = HERE / f"{self.name}.new"
        for file in self.files:
            (new / file).replace(HERE / self.name / file)
        if self.files:
            shutil.rmtree(new)
        told = {"command": self.command, "modules": self.modules, "sha256": before}
        text = json.dumps(told, indent=1) + "\n"
        (HERE / self.name / "made.json").write_text(text, encoding="utf-8")


def _study(name: str, options: str) -> Stored:
    out = f"--no-probe --workers 1 --out data/studies/{name}.new"
    files = ("manifest.json", "table.parquet")
    return Stored(name, f"cpmtp study {options} {out}", (*_FITS, "study"), files)


STUDIES = (
    _study(
        "reference",
        "--horizons 2,3 --ranks 1,2,4,8,16,32,64 --methods em --contexts 64 --anchored no",
    ),
    _study(
        "methods",
        "--horizons 2,3 --ranks 1,2,4,8,16,32 --methods als,hals,mu,em,gradient,acceptance "
        "--contexts 12 --anchored no",
    ),
    Stored("anchored", "python data/studies/anchored.py data/studies/anchored", _FITS),
    Stored("forms", "python data/studies/forms.py data/studies/forms", _FITS),
    Stored(
        "bounds",
        "python data/studies/bounds.py data/studies/bounds horizons proposals population not_told",
        _FITS,
    ),
    Stored("curves", "python data/studies/curves.py data/studies/curves", _HEADS),
)


def main(*names: str) -> None:
    """List the stored studies, or make some again."""
    known = {study.name: study for study in STUDIES}
    unknown = [name for name in names if name not in (*known, "--all-stale")]
    if unknown:
        raise SystemExit(f"no stored study {', '.join(unknown)}: there are {', '.join(known)}")
    for study in STUDIES:
        why = study.why_stale
        wanted = study.name in names or ("--all-stale" in names and bool(why))
        print(f"{study.name:10} {why or 'as today’s code makes it'}\n           {study.command}")
        if wanted:
            study.make()


if __name__ == "__main__":
    main(*sys.argv[1:])
