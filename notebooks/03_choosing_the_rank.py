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
# # 03 Ceilings, and the rank they ask for
#
# **Question.** Which rank should a head have, if all we know is what the best possible drafts
# earn?
#
# **Guess first.** Ceilings rise with every rank and every rank costs time. Of ranks 1 to 64,
# which would you take?
#
# From the stored reference study: 64 contexts per domain, ranks 1 to 64, horizons 2 and 3. A
# study of several models has a choice for each; here it is made for the code model.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import cpmtp
from cpmtp import (
    LearnedShare,
    compare_criteria,
    house_style,
    memory_bound_latency,
    needed_ranks,
    paired_gains,
    plot_speedup,
    plot_tokens_per_call,
    read_study,
)

STUDIES = Path(cpmtp.__file__).parents[1] / "data" / "studies"

table, manifest = read_study(STUDIES / "reference")
code = table[table["model"] == "code"]

# %% [markdown]
# ## Where the ceiling saturates
#
# A rank's ceiling is the best draft of that rank, fitted to each context's own exact joint. A
# table has a row per method; `best_fits` keeps the best one's of every context, horizon and rank.
# The ceiling saturates at the smallest rank within 1 % (or one standard error) of the best.

# %%
ceilings = cpmtp.best_fits(code).groupby(["horizon", "rank"])["tokens_per_call_block_target"]
print(ceilings.mean().unstack("horizon").round(3))
saturation = cpmtp.select_rank(code)
for horizon in saturation.rank:
    print(saturation.sentence(horizon))

# %% [markdown]
# ## Which rank to take
#
# Tokens per call rise with every rank; what they are worth depends on what a call costs. Here
# calls are assumed to cost what reading the weights of a 32-layer model costs, each component one
# more matrix of d × d per position. Replace it by a measurement. The recommendation is the
# horizon and rank of most tokens per second; the other criteria stand beside it and answer other
# questions.

# %%
latency = memory_bound_latency(plain_step=0.02, layers=32)
choices = compare_criteria(code, latency=latency)
recommended = choices["throughput"]
horizon, rank = recommended.horizon, recommended.rank[recommended.horizon]
ceiling = recommended.row(horizon).tokens_per_call
share = LearnedShare.assumed()
print(f"recommended: horizon {horizon} with rank {rank}")
print(f"its ceiling: {ceiling:.2f} tokens per call")
print(f"forecast: {share.of(ceiling):.2f} tokens per call, {share.words}")
pd.DataFrame(
    [
        {"criterion": name, "horizon": c.horizon}
        | {f"rank at n = {n}": f"{c.rank[n]} ({c.frequency[n][c.rank[n]]:.0%})" for n in c.rank}
        for name, c in choices.items()
    ]
)

# %%
with house_style():
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    rows = recommended.table.query("horizon == @horizon")
    plot_tokens_per_call(rows, left, recommended=rank, horizon=horizon)
    plot_speedup(recommended.table, right)

# %% [markdown]
# **How to read it.** Left the ceilings with the recommended rank marked: it lies where the curve
# bends, far below its end. Right their speedups, the fastest cells of at least 5 % of resamples
# outlined. What each doubling gains on the same contexts, and the smallest gain these contexts
# could have shown:

# %%
paired_gains(code).round(4)

# %% [markdown]
# Contexts differ: the rank that one needs follows the entropy of its joint.

# %%
needed = needed_ranks(code)
needed.groupby("horizon")[["needed_rank", "joint_entropy_nats", "total_correlation_nats"]].corr(
    method="spearman"
)["needed_rank"]

# %% [markdown]
# **What to take.** The recommended rank, by these ceilings and these costs; not the one at which
# ceilings saturate. And trained heads keep less of a high rank than of a low one: the next
# notebook.
#
# **Exercise.** Call `memory_bound_latency(plain_step=0.02, layers=8)`: in a shallow model a
# component costs more beside a step. Which rank is recommended then?
