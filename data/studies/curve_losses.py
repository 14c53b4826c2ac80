"""The heads of the grid of curves, scored at every horizon: tokens per call, and the loss that
forecasts go by.

Run from the checkout, after `data/studies/curves.py` in the same folder:

    python data/studies/curve_losses.py OUT [--texts N]

Writes OUT/losses.parquet, a row per head (that `running` still has) and horizon, after each head;
goes on where it was stopped. `data/studies/backtest.py adopt` takes the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from curves import PROMPT, held_out_texts, read_rows

import cpmtp
from cpmtp.forecasting.cycles import (
    ReadText,
    divergences_along,
    forecast_from_ratios,
    head_ratios,
)
from cpmtp.forecasting.learning_curves.losses import pooled_loss
from cpmtp.heads.draft_head import DraftHead
from cpmtp.sampling_law import SamplingLaw
from cpmtp.whole_files import write_parquet

HORIZONS = (2, 3, 4)
KEYS = ["model", "candidate", "budget", "seed", "learning_rate"]
SIZES = ["form", "rank", "transition_rank", "width", "blocks"]


def scored(head: DraftHead, read: tuple[ReadText, ...], names: list[str]) -> list[dict]:
    """Tokens per call, its error over documents, and the loss, by horizon."""
    ratios = head_ratios(head, read, PROMPT)
    divergences, rows = divergences_along(ratios).numpy().mean(0), []  # (drafted,)
    for horizon in HORIZONS:
        calls = forecast_from_ratios(ratios[..., : horizon - 1]).calls.numpy()
        tokens = ratios.shape[1]
        sums = pd.DataFrame({"calls": calls, "tokens": tokens}).groupby(names).sum()
        ratio = sums["tokens"].sum() / sums["calls"].sum()
        error = (sums["tokens"] - ratio * sums["calls"]).std() / len(sums) ** 0.5
        found = {"horizon": horizon, "tokens_per_call": ratio}
        found |= {"s_doc": error / sums["tokens"].mean()}
        rows.append(found | {"loss": float(pooled_loss(divergences[: horizon - 1]))})
    return rows


def main() -> None:
    """Every head that is not in the table yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=int, help="fewer, for a trial")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.out / "losses.parquet"
    found = pd.read_parquet(file) if file.exists() else pd.DataFrame(columns=KEYS)
    grid = read_rows(given.out)
    grid = grid[grid["tokens_per_call"].notna() & ~grid["over_text"].astype(bool)]
    done = set(found[KEYS].itertuples(index=False, name=None))
    for model, rows in grid.groupby("model"):
        lm, read = cpmtp.load_language_model(model), ()
        texts, names = held_out_texts(lm, given.out)
        texts, names = texts[: given.texts], names[: given.texts]
        for row in rows.to_dict("records"):
            key = tuple(row[name] for name in KEYS)
            folder = f"{model}-{row['budget']}k-{row['seed']}-{row['candidate']}"
            place = given.out / "running" / f"{folder}-{row['learning_rate']:g}"
            if key in done or not (place / "model.safetensors").exists():
                continue
            read = read or tuple(ReadText.of(lm, text, SamplingLaw()) for text in texts.split(1))
            head = DraftHead.from_pretrained(place).attach(lm).eval()
            own = {name: row[name] for name in (*KEYS, *SIZES)}
            own |= {"positions": row["positions"]}
            own |= {"seconds_per_position": row["training_seconds"] / row["positions"]}
            some = pd.DataFrame([own | one for one in scored(head, read, names)])
            found = pd.concat([found, some], ignore_index=True) if len(found) else some
            write_parquet(file, found)


if __name__ == "__main__":
    main()
