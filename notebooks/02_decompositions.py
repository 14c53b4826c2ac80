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
# # 02 Fits side by side
#
# **Question.** A draft of rank 4 can be fitted in several ways: least squares (what tensor
# libraries do), divergence, or tokens per call themselves. Does the way matter?
#
# **Guess first.** Which one earns most, and does a smaller divergence always mean more tokens?

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import cpmtp
from cpmtp import (
    house_style,
    method_summary,
    plot_error_against_rank,
    plot_lines_over_rank,
    read_study,
)

STUDIES = Path(cpmtp.__file__).parents[1] / "data" / "studies"

lm = cpmtp.load_language_model("code")
joint = cpmtp.exact_joint(lm, lm.encode("def add(a, b):\n    return "), horizon=3)
rows = []
for method in ("als", "hals", "em", "acceptance"):
    fit = cpmtp.fit(joint, rank=4, method=method, seed=0)
    row = {
        "method": method,
        "status": fit.status,
        "KL, nats": cpmtp.divergences(joint, fit.distribution).kl_nats,
    }
    for rule in ("token", "block", "coupling"):
        row[f"tokens per call, {rule}"] = cpmtp.implied_acceptance(
            joint, fit.distribution, rule=rule
        ).tokens_per_call
    rows.append(row)
pd.DataFrame(rows).round(3)

# %% [markdown]
# **How to read it.** Least squares projected to a distribution gives zero to sequences that the
# target can emit, so its divergence is infinite: a few impossible sequences cost nothing in a sum
# of squares and everything in a ratio. `acceptance` is not the closest by divergence and earns
# most. One context proves little; the stored study has twelve of each domain.

# %%
table, manifest = read_study(STUDIES / "methods")
summary = method_summary(table, pooled=True)  # both domains together
summary.pivot(index=["horizon", "rank"], columns="method", values="tokens_per_call").round(3)

# %%
with house_style():
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    three = summary[summary["horizon"] == 3]
    plot_error_against_rank(three, left)
    plot_lines_over_rank(
        three, right, by="method", value="tokens_per_call", label="tokens per call (mean)"
    )

# %% [markdown]
# **How to read it.** Left the divergence, right what it is worth. The lines of `em`, `gradient`
# and `acceptance` draw together as the rank grows: what is fitted matters at small ranks, which
# are the ones that a head can afford.
#
# **Exercise.** Replace `"tokens_per_call"` in the pivot by `"kl_nats"`. At which rank does `hals`
# stop being a good choice by divergence, and does tokens per call notice?
