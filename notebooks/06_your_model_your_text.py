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
# # 06 Your model, your text
#
# **Question.** You have a model of transformers in memory and texts of the kind you will decode.
# Does a draft head of several tokens pay, and of which rank? Here is the way from one to the other,
# in half a minute. Put your own model and texts into the next cell; nothing else has to change.
#
# **Guess first.** How many of three tokens will the best draft of rank 1 have accepted on your
# texts, and how many a head that has been trained for a few seconds?

# %%
import matplotlib.pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

import cpmtp

folder = cpmtp.embedded_models()["code"]  # or a folder or a hub id of yours
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

texts = [
    """def mean(values):
    total = 0
    for value in values:
        total += value
    return""",
    """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def""",
    """import os


def listed(path):
    for name in sorted(os.listdir(path)):
        yield name
""",
    """try:
    value = int(text)
except ValueError:
    raise SystemExit("expected a number")
else""",
]

# %% [markdown]
# ## What comes next?
#
# The joint distribution of the next three tokens is computed exactly: every text of three tokens
# gets its probability. A model of transformers and its tokenizer go where a language model goes,
# and a text goes where token ids go.

# %%
pair = (model, tokenizer)
joint = cpmtp.exact_joint(pair, texts[0], 3)
joint

# %% [markdown]
# A draft of rank r is a mixture of r products: in each component the three tokens are independent.
# The components say what the model hesitates between. Each row below is one component, its bars are
# the positions, and a bar is shared out among the most probable tokens.

# %%
fit = cpmtp.fit(joint, rank=4)
components = fit.top_tokens(pair, count=4)
with cpmtp.house_style():
    figure, ax = plt.subplots(figsize=(7, 5))
    cpmtp.plot_components(components, ax)
components.query("place == 1").pivot(index="component", columns="position", values="token")

# %% [markdown]
# ## Which rank?
#
# A study does this at contexts cut from your texts, at several ranks, and counts what every draft
# would earn: tokens per call of the model, at most three here. Drafts are told the first token, as
# trained heads are.

# %%
table = cpmtp.run_study(
    models=[pair], texts=texts, ranks=(1, 4), methods="em", contexts=4, context_length=40
)
choice = cpmtp.select_rank(table, tolerance=0.02)
print(choice.sentence(3))

# %% [markdown]
# **How to read it.** These are ceilings: the best draft of every single context. A trained head
# earns less, half to nine tenths of what such a draft adds to one token, by how long it is trained.
# Four contexts say little; take 32 or more of your own before you decide, and read the interval.

# %% [markdown]
# ## Does it pay?
#
# A short training says whether a head learns on this model at all, and decoding with and without it
# says what a call costs here. The text follows the model's own distribution whatever the head is.

# %%
head = cpmtp.train_head(pair, horizon=3, rank=2, steps=40, rows=4, length=64, sequences=64)
options = {"max_new_tokens": 60, "seed": 1, "eos_token_id": "model"}
plain = cpmtp.speculative_generate(pair, None, texts[0], **options)
drafted = cpmtp.speculative_generate(pair, head, texts[0], **options)
print(tokenizer.decode(drafted.token_ids))
for name, out in (("plain", plain), ("with the head", drafted)):
    stats = out.stats
    print(f"{name:14} {stats.tokens_per_call:.2f} tokens per call, {stats.calls} calls")

# %% [markdown]
# **How to read it.** Calls are what you pay for: the same number of tokens in fewer calls of the
# model. So short a training reaches little of the ceiling; what it shows is that the head learns.
#
# **Exercise.** Train with `steps=160`, then with `form="markov", transition_rank=16`. Which of the
# two saves more calls, and which was dearer to train?
#
# ## And now
#
# * `cpmtp.run_study(models=[pair], texts=texts, contexts=32, out="runs/mine")` keeps its table;
#   `cpmtp report runs/mine` makes a page of it.
# * `cpmtp.train_head(pair, out="runs/head", steps=2000)` trains longer, and
#   `cpmtp generate runs/head --model FOLDER --compare` says what it buys on your machine.
