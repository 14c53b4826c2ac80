"""The check of types and shapes that pytest installs on every function of the package."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An integer may stand where a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
