"""`cpmtp models`: what comes with the package."""

from __future__ import annotations

import json


def models() -> None:
    """List the embedded models.

    Example: cpmtp models
    """
    from cpmtp.pretrained import embedded_models

    for name, folder in embedded_models().items():
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        print(
            f"{name:8} {recipe['parameters']:>10,} parameters  "
            f"{recipe['held_out_bits_per_byte']:.3f} bits per byte  {folder}"
        )
