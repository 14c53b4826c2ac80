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
# # 04 What training reaches: losses, probes, forecast
#
# **Question.** A ceiling says what no training can exceed. What does a trained head earn, and can
# it be told before it is trained?
#
# **Guess first.** An exact draft of three tokens earns three tokens per call. What costs a
# trained head more: its rank, what it was fitted for, or learning?

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
# The last step, learning, needs trained heads.

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

# %% [markdown]
# **How to read it.** A rank-r draft earns less than three (rank), a fit by divergence less than
# one by tokens per call (objective), and a learned head less than a fit to every context
# (learning). Learning is the largest part by far, and it grows with the rank.
#
# ## Probes
#
# So heads are compared by what they *learn*: all forms side by side on the same windows, at
# several budgets. This is the stored grid; `cpmtp forecast` makes a small one for your model and
# continues it.

# %%
levels = pd.read_csv(STUDIES / "curves" / "levels.csv")
code = levels[levels["model"] == "code"]
shown = ["cp 1", "cp 8", "markov 64", "recurrent"]
with house_style():
    figure, ax = plt.subplots(figsize=(4.8, 3.3), layout="constrained")
    for name in shown:
        rows = code[code["candidate"] == name].sort_values("budget")
        ax.plot(rows["budget"], rows["tokens_per_call"], marker="o", label=name)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("thousand positions of training")
    ax.set_ylabel("tokens per call, at most 4")
    ax.legend()

# %% [markdown]
# **How to read it.** The order of the forms is there from the first budget, and the distances
# grow. Curves are still rising at the end: a forecast continues each by a shape that other
# models' curves had, with an interval that says how wrong such continuations were.
#
# **Exercise.** Continue the lines by eye to 1,024 thousand positions, then draw the straight line
# through the last two points. By how much do the two differ, and which would you pay for?
