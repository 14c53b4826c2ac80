"""The page of the programming interface, from the one list of public names.

Run from the checkout: python docs/make_api.py
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent
_HEAD = """# Programming interface

What `import cpmtp` offers, by the step it belongs to. Everything else may change.
"""
_TABLE = """
## {title}

```{{eval-rst}}
.. autosummary::
   :toctree: api
   :nosignatures:

{names}
```
"""


def interface_page(stub: str) -> str:
    """The page's text, from the text of the stub that lists all public names."""
    page, title, names = _HEAD, "", []
    for line in [*stub.splitlines(), "# "]:
        listed = re.fullmatch(r"from cpmtp[\w.]* import (\w+) as \w+", line)
        if listed:
            names.append(f"   cpmtp.{listed[1]}")
        elif line.startswith("# ") and names:
            page += _TABLE.format(title=title, names="\n".join(names))
            names = []
        if line.startswith("# "):
            title = line[2:]
    return page


if __name__ == "__main__":
    stub = (DOCS.parent / "cpmtp" / "__init__.pyi").read_text("utf-8")
    (DOCS / "api.md").write_text(interface_page(stub), encoding="utf-8")
