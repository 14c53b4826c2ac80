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
from cpmtp import (
    COLOURS,
    house_style,
    objective_gap,
    plot_losses_over_rank,
    plot_waterfall,
    read_study,
)

STUDIES = Path(cpmtp.__file__).parents[1] / "data" / "studies"

table, _ = read_study(STUDIES / "methods")
gap = objective_gap(table)
three = gap[gap["horizon"] == 3].drop(columns=["domain", "horizon"]).round(3)
three.rename(columns=lambda name: name.replace("_", " "))

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
# several budgets. Filled marks are probes of up to 128 thousand positions; before you look at the
# hollow ones, eight times as far, continue each line by eye. Which head will be in front, and will
# it stay so far in front?

# %%
levels = pd.read_csv(STUDIES / "curves" / "levels.csv")
code = levels[levels["model"] == "code"]
shown = ["cp 1", "cp 16", "markov 64", "recurrent"]
curves = code[code["candidate"].isin(shown)].pivot(
    index="budget", columns="candidate", values="tokens_per_call"
)
# Three doublings beyond the last probe, by the step between the last two.
straight = curves.loc[128] + 3 * (curves.loc[128] - curves.loc[64])
with house_style():
    figure, ax = plt.subplots(figsize=(4.8, 3.3), layout="constrained")
    for name, colour in zip(shown, COLOURS, strict=False):
        ax.plot([32, 64, 128], curves.loc[[32, 64, 128], name], "o-", color=colour, label=name)
        ax.plot([128, 1024], [curves.loc[128, name], straight[name]], ":", color=colour)
        ax.plot([1024], [curves.loc[1024, name]], "o", color=colour, markerfacecolor="none")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("thousand positions of training")
    ax.set_ylabel("tokens per call, at most 4")
    ax.legend()
pd.DataFrame(
    {
        "straight line": straight,
        "trained": curves.loc[1024],
        "above cp 1 at 128k": curves.loc[128] - curves.loc[128, "cp 1"],
        "above cp 1 at 1,024k": curves.loc[1024] - curves.loc[1024, "cp 1"],
    }
).loc[shown].round(3)

# %% [markdown]
# **How to read it.** Dotted is the straight line through the last two probes. It promises too much
# to most heads, and too little to the one that begins to learn late: the rank's gain is hardly to
# be seen in the probes and grows fivefold after them, while the lead of `markov` over `cp` 16
# halves. The order is the same at both ends, the distances are not.
#
# ## A forecast
#
# `cpmtp forecast` continues each probe by the shape that curves of other models had, with an
# interval that says how wrong such continuations were. This one was written down before its head
# was trained; the last row is what the head then earned in decoding.

# %%
folder = STUDIES / "end_to_end" / "code"
forecast, measured = (
    pd.read_parquet(folder / f"{name}.parquet") for name in ("forecast", "measured")
)
promised = forecast[forecast["budget"] == measured["budget"].item()]
earned = measured[["option", "decoded", "decoded_speedup"]].set_axis(
    ["option", "tokens_per_call", "speedup"], axis=1
)
columns = ["option", "tokens_per_call", "tokens_per_call_low", "tokens_per_call_high", "speedup"]
pd.concat([promised[columns], earned.assign(option="decoded: " + earned["option"])]).round(2)

# %% [markdown]
# **How to read it.** Tokens per call and their interval, then times the speed of plain decoding.
# What was decoded lies inside the interval. Prompt lookup and plain decoding are options like any
# other: a head that is not faster than these is not worth its training.
#
# **Exercise.** Set `levels["model"] == "prose"` above. Which head does the straight line wrong
# most? Then read `STUDIES / "end_to_end" / "prose"`: was the forecast for its head kept as well?
