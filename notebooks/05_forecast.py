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
# # 05 Decoding: forecast, measurement, audit
#
# **Question.** Does decoding earn what was forecast, and is what it writes really the model's
# own?
#
# **Guess first.** A study counts all contexts alike. Decoding begins each cycle where the last
# draft failed. Will it earn more than the study says, or less?
#
# The forecast of tokens per call is a sum over the joint. Here it is held against drawing: the
# same draft, verified token by token on random numbers, many times over.

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

# %% [markdown]
# **How to read it.** On the dotted line the forecast is right. It weighs every position of a text
# by the probability that a cycle starts there; counting all positions alike promises some percent
# more (the column `plain_forecast` of the stored table).
#
# ## Is it the model's own text?
#
# An audit reads what was written once more by full passes of the model, and holds every
# distribution that was used against them.

# %%
head = cpmtp.DraftHead.from_pretrained(cpmtp.embedded_heads("code")["recommended"]).attach(lm)
out = cpmtp.speculative_generate(lm, head, ids, max_new_tokens=60, audit=True, seed=0)
print(lm.decode(out.token_ids))
print(f"{out.stats.tokens_per_call:.2f} tokens per call over {out.stats.calls} calls of the model")
print(f"largest total variation to a full pass: {out.stats.audit:.1e}")

# %% [markdown]
# **How to read it.** The distance is what rounding leaves: the text is one that the model itself
# could have written with the same probability, only in fewer calls.
#
# **Exercise.** Take the head `"baseline"` instead. Tokens per call fall. Does the audit change?
# Why not?
