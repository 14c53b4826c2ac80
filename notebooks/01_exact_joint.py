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
# # 01 The exact joint and its structure
#
# What a multi-token head has to model: the joint distribution of the next three tokens of a
# language model, here computed exactly.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import cpmtp
from cpmtp import COLOURS, house_style

lm = cpmtp.load_language_model("code")
ids = lm.encode("def add(a, b):\n    return ")
joint = cpmtp.exact_joint(lm, ids, horizon=3)
print(tuple(joint.probs.shape), float(joint.probs.sum()))

# %% [markdown]
# Most of the mass lies on few sequences, yet the tail is long: how many sequences hold half, nine
# tenths, 99 % of it?

# %%
mass = joint.probs.flatten().sort(descending=True).values.cumsum(0)
print({share: int((mass < share).sum()) + 1 for share in (0.5, 0.9, 0.99)}, "of", mass.numel())
best = joint.probs.flatten().topk(8)
pd.DataFrame(
    {
        "continuation": [
            lm.decode(torch.stack(torch.unravel_index(i, joint.probs.shape))) for i in best.indices
        ],
        "probability": best.values,
    }
)

# %% [markdown]
# Tokens depend on each other. The total correlation says by how much a product of the three
# marginals (rank 1) misses the joint, in nats; the singular values of an unfolding bound what any
# rank can reach.

# %%
entropies = [float(-torch.special.xlogy(m, m).sum()) for m in joint.marginals()]
print("entropies", [round(e, 3) for e in entropies], "joint", round(float(joint.entropy()), 3))
print("total correlation", round(sum(entropies) - float(joint.entropy()), 3))

with house_style():
    figure, ax = plt.subplots(figsize=(4.8, 3.3))
    for position, colour in zip(range(3), COLOURS, strict=False):
        unfolded = joint.probs.movedim(position, 0).reshape(joint.vocab_size, -1)
        singular = torch.linalg.svdvals(unfolded @ unfolded.T).sqrt()
        ax.plot(
            range(1, 1 + len(singular)),
            singular.clamp_min(1e-10),
            color=colour,
            label=f"token {position + 1} against the others",
        )
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("singular value of the unfolding")
    ax.legend()
