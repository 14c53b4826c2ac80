"""What the learned heads earn in real decoding, beside what was forecast for them; goes on where it
was stopped.

Run from the checkout: python data/studies/decoding.py OUT HEADS [MODEL], where HEADS holds a folder
of heads per model.

The plain forecast counts all positions of texts drawn from the base model alike; decoding meets the
ends of its own cycles, and so does the weighted forecast. Both start from the same prompts: the
forecast from what the base model writes after them by plain decoding, the measurement from what it
writes with the head. Intervals are over prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

from cpmtp.heads.cp_head import CPHead
from cpmtp.language_model import sample_sequences
from cpmtp.pretrained import load_language_model
from cpmtp.validation.measurements import decode_beside_forecast, plain_texts

PROMPTS, PROMPT, NEW_TOKENS, RULES = 192, 64, 160, ("block", "token")


def rows_of(lm, folder: Path, prompts: list[torch.Tensor], texts: torch.Tensor) -> list[dict]:
    """One head: a row per rule."""
    head = CPHead.from_pretrained(folder).attach(lm)
    how = {"texts": texts, "prompts": prompts, "new_tokens": NEW_TOKENS, "seed": 5}
    rows = []
    for rule in RULES:
        (row,) = decode_beside_forecast(lm, [(folder.name, head)], rule=rule, **how)
        rows.append({"model": lm.name, "rule": rule} | row)
    return rows


def main(out: Path, heads: Path, only: str | None = None) -> None:
    """A part per head, then the table."""
    torch.set_num_threads(1)
    (out / "decoding").mkdir(parents=True, exist_ok=True)
    for name in sorted(folder.name for folder in heads.iterdir()) if only is None else [only]:
        lm = load_language_model(name)
        prompts = list(sample_sequences(lm, PROMPTS, PROMPT, seed=11))
        texts = plain_texts(lm, prompts, new_tokens=NEW_TOKENS, seed=101)
        for folder in sorted(path.parent for path in (heads / name).glob("*/config.json")):
            part = out / "decoding" / f"{name}-{folder.name}.parquet"
            if not part.exists():
                pd.DataFrame(rows_of(lm, folder, prompts, texts)).to_parquet(part)
    parts = [pd.read_parquet(part) for part in sorted((out / "decoding").glob("*.parquet"))]
    table = pd.concat(parts).sort_values(["rule", "model", "anchored", "rank"], ignore_index=True)
    table.to_parquet(out / "decoding.parquet")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
