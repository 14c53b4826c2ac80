# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 Choosing the rank
#
# From the stored reference study: 64 contexts per domain, ranks 1 to 64, horizons 2 and 3.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import cpmtp
from cpmtp.latency import memory_bound_latency
from cpmtp.ranking.selection import compare_criteria, needed_ranks, paired_gains
from cpmtp.report.plots import house_style, plot_speedup, plot_tokens_per_call
from cpmtp.study.running import read_study

STUDIES = Path(cpmtp.__file__).parents[1] / "data" / "studies"

table, manifest = read_study(STUDIES / "reference")
code = table[table["model"] == "code"]
choice = cpmtp.select_rank(code)
for horizon in choice.rank:
    print(choice.sentence(horizon))

# %% [markdown]
# Tokens per call rise with every rank; what they are worth depends on what a call costs. Here calls
# are assumed to cost what reading the weights of a 32-layer model costs, each component one more
# matrix of d × d per position. Replace it by a measurement.

# %%
latency = memory_bound_latency(plain_step=0.02, layers=32)
choices = compare_criteria(code, latency=latency)
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
    plot_tokens_per_call(
        choice.table.query("horizon == 3"), left, recommended=choice.rank[3], horizon=3
    )
    plot_speedup(choices["throughput"].table, right)

# %% [markdown]
# What each doubling gains on the same contexts, and the smallest gain these contexts could have
# shown:

# %%
paired_gains(code).round(4)

# %% [markdown]
# Contexts differ: the rank that one needs follows the entropy of its joint.

# %%
needed = needed_ranks(code)
needed.groupby("horizon")[["needed_rank", "joint_entropy_nats", "total_correlation_nats"]].corr(
    method="spearman"
)["needed_rank"]
