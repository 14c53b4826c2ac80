"""Recurrent heads for the embedded models; goes on where it was stopped.

Run from the checkout: python data/studies/best_heads.py OUT MODEL [--positions N]
[--learning-rate R] [--windows FILE ...]. Windows of 256 tokens are the base model's own samples:
4,096 of them are drawn, or those of files that were drawn before are read. `OUT/MODEL` holds the
head, what it earned step by step, and its recipe; `OUT/MODEL.csv` what it earns beside the stored
ones on other samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

import cpmtp
from cpmtp.forecasting.cycles import forecast_cycles
from cpmtp.heads.draft_head import DraftHead
from cpmtp.pretrained import embedded_heads
from cpmtp.training.head_settings import HeadTrainingSettings
from cpmtp.training.heads import train_head
from cpmtp.whole_files import write_text

JUDGED_BY, PROMPT = 64, 64
SETTINGS = HeadTrainingSettings(
    form="recurrent",
    horizon=4,
    width=384,
    blocks=2,
    rows=4,
    length=256,
    sequences=4096,
    precision="bfloat16",
)


def main() -> None:
    """Train, then judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("model", choices=cpmtp.embedded_models())
    parser.add_argument("--positions", type=int, default=4 * 1024 * 1024)
    parser.add_argument("--learning-rate", type=float, default=1.6e-2)
    parser.add_argument("--windows", type=Path, nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm, folder = cpmtp.load_language_model(given.model), given.out / given.model
    if not (folder / "config.json").exists():
        parts = [load_file(file)["tokens"].long() for file in given.windows or ()]
        train_head(
            lm,
            SETTINGS,
            out=folder,
            tokens=torch.cat(parts) if parts else None,
            positions=given.positions,
            learning_rate=given.learning_rate,
        )
    texts = cpmtp.sample_sequences(lm, JUDGED_BY, SETTINGS.length, seed=90_210)
    rows = []
    for name, place in {"new": folder, **embedded_heads(given.model)}.items():
        head = DraftHead.from_pretrained(place).attach(lm).requires_grad_(False)
        found = forecast_cycles(lm, head, texts, start=PROMPT)
        row = {"head": name, "form": head.form, "tokens_per_call": found.tokens_per_call}
        rows.append(row | dict(zip(("low", "high"), found.interval, strict=True)))
    table = pd.DataFrame(rows).round(4).to_csv(index=False)
    write_text(given.out / f"{given.model}.csv", table)


if __name__ == "__main__":
    main()
