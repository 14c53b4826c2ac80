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
# # 05 Decoding: forecast against measurement
#
# The forecast of tokens per call is a sum over the joint. Here it is held against drawing: the same
# draft, verified token by token on random numbers, many times over. Where decoding with a learned
# head has been measured, its table is shown below.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import cpmtp
from cpmtp import house_style, plot_forecast

STUDIES = Path(cpmtp.__file__).parents[1] / "data" / "studies"

lm = cpmtp.load_language_model("code")
ids = lm.encode("def add(a, b):\n    return ")
joint = cpmtp.exact_joint(lm, ids, horizon=3)
rows = []
for rank in (1, 8):
    draft = cpmtp.fit(joint, rank, seed=0).distribution
    for rule in ("token", "block"):
        forecast = cpmtp.implied_acceptance(joint, draft, rule=rule).tokens_per_call
        drawn = cpmtp.estimate_acceptance(lm, draft, ids, rule=rule, samples=1000, seed=1)
        low, high = drawn.tokens_per_call_interval
        row = {"rank": rank, "rule": rule, "forecast": forecast, "measured": drawn.tokens_per_call}
        rows.append(row | {"measured_low": low, "measured_high": high})
checked = pd.DataFrame(rows)
checked.round(3)

# %%
with house_style():
    figure, ax = plt.subplots(figsize=(4.8, 3.3), layout="constrained")
    plot_forecast(checked, ax)

# %%
stored = STUDIES / "head" / "decoding.parquet"
if stored.is_file():
    decoding = pd.read_parquet(stored)
    with house_style():
        figure, ax = plt.subplots(figsize=(4.8, 3.3), layout="constrained")
        plot_forecast(decoding, ax)
else:
    print("no table of measured decoding is stored")
