# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 Where tokens per call are lost: the waterfall
#
# An exact draft of n tokens earns n tokens per call. A rank-r draft earns less (rank), a fit by
# divergence less than one by tokens per call (objective), and a learned head less than a fit to
# every context (learning).

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import cpmtp
from cpmtp import house_style, objective_gap, plot_losses_over_rank, plot_waterfall, read_study

STUDIES = Path(cpmtp.__file__).parents[1] / "data" / "studies"

table, _ = read_study(STUDIES / "methods")
gap = objective_gap(table)
gap[gap["horizon"] == 3].round(3)

# %% [markdown]
# The last step needs a trained head. Where its table has been stored, the whole waterfall is drawn.

# %%
stored = STUDIES / "head" / "waterfall.parquet"
if stored.is_file():
    waterfall = pd.read_parquet(stored)
    panels = list(waterfall.groupby(["model", "anchored"]))
    with house_style():
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained"
        )
        for ax, ((model, anchored), rows) in zip(axes[0], panels, strict=True):
            plot_losses_over_rank(rows, ax).set_title(
                f"{model}, {'anchored' if anchored else 'unanchored'}"
            )
    best = waterfall.loc[waterfall.groupby("model")["learned"].idxmax()]
    with house_style():
        figure, axes = plt.subplots(
            1, len(best), figsize=(5 * len(best), 3.5), squeeze=False, layout="constrained"
        )
        for ax, (_, row) in zip(axes[0], best.iterrows(), strict=True):
            plot_waterfall(row, ax).set_title(
                f"{row['model']}, n = {row['horizon']}, rank {row['rank']}"
            )
else:
    print("no table of a learned head is stored: the waterfall ends at the objective")
