"""What the learned heads earn in real decoding, beside what was forecast for them; goes on where it was stopped.

Run from the checkout: python data/studies/decoding.py OUT HEADS [MODEL], where HEADS holds a folder of heads per model.

The forecast averages block survival over all positions of windows drawn from the base model; decoding meets the ends of its own
cycles. Intervals are over windows and over prompts, whose cycles are dependent.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

from cpmtp.cp_head import CPHead
from cpmtp.head_evaluation import held_out_survival
from cpmtp.language_model import sample_sequences
from cpmtp.pretrained import load_language_model
from cpmtp.speculative_decoding import speculative_generate

WINDOWS, WINDOW, PROMPTS, PROMPT, NEW_TOKENS, RULES = 96, 256, 128, 64, 160, ("block", "token")


def with_interval(name: str, values: torch.Tensor, mean: float) -> dict[str, float]:
    """Mean and 95 % interval, in the columns that reports read."""
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def rows_of(lm, folder: Path) -> list[dict]:
    """One head: a row per rule."""
    head = CPHead.from_pretrained(folder).attach(lm)
    survival = held_out_survival(lm, head, sample_sequences(lm, WINDOWS, WINDOW, seed=12)).sum(1)
    key = {"model": lm.name, "head": folder.name, "rank": head.rank, "anchored": head.anchored, "horizon": head.horizon}
    rows = []
    for rule in RULES:
        prompts = list(sample_sequences(lm, PROMPTS, PROMPT, seed=11))
        stats = speculative_generate(lm, head, prompts, max_new_tokens=NEW_TOKENS, rule=rule, seed=5).stats
        measured = with_interval("measured", torch.tensor(stats.tokens_per_call_by_row), stats.tokens_per_call)
        # What is forecast is block verification, the better of the two rules.
        rows.append(key | {"rule": rule} | with_interval("forecast", survival, float(survival.mean())) | measured)
    return rows


def main(out: Path, heads: Path, only: str | None = None) -> None:
    """A part per head, then the table."""
    torch.set_num_threads(1)
    (out / "decoding").mkdir(parents=True, exist_ok=True)
    for name in sorted(folder.name for folder in heads.iterdir()) if only is None else [only]:
        lm = load_language_model(name)
        for folder in sorted(path.parent for path in (heads / name).glob("*/config.json")):
            part = out / "decoding" / f"{name}-{folder.name}.parquet"
            if not part.exists():
                pd.DataFrame(rows_of(lm, folder)).to_parquet(part)
    parts = [pd.read_parquet(part) for part in sorted((out / "decoding").glob("*.parquet"))]
    table = pd.concat(parts).sort_values(["rule", "model", "anchored", "rank"], ignore_index=True)
    table.to_parquet(out / "decoding.parquet")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
