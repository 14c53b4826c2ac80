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
# # 01 The exact joint, and forms of drafts
#
# **Question.** What does a multi-token head have to model, and how much of it can a simple form
# hold?
#
# **Guess first.** After `return ` a small code model could go on with 104³, more than a million,
# sequences of three tokens. How many of them hold half of the probability? And if the three
# tokens were drafted independently, how many of three would survive on average: one, two, almost
# three?

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
# **How to read it.** Most of the mass lies on few sequences, yet the tail is long: how many hold
# half, nine tenths, 99 % of it?

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
# rank can reach: where they fall slowly, a mixture of few products must miss something.

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

# %% [markdown]
# ## Forms of drafts
#
# A draft may be a mixture of products (`cp`), a chain in which every token corrects the next
# (`markov`), or both. Each earns so many of three tokens per call:

# %%
forms = {
    "cp, rank 1": dict(rank=1),
    "cp, rank 4": dict(rank=4),
    "markov, transition rank 4": dict(rank=1, form="markov", transition_rank=4),
    "both": dict(rank=4, form="markov_mixture", transition_rank=4),
}
drafts = {name: cpmtp.fit(joint, method="em", seed=0, **how) for name, how in forms.items()}
pd.DataFrame(
    [
        {
            "draft": name,
            "KL, nats": cpmtp.divergences(joint, draft.distribution).kl_nats,
            "tokens per call": cpmtp.implied_acceptance(joint, draft.distribution).tokens_per_call,
        }
        for name, draft in drafts.items()
    ]
).round(3)

# %% [markdown]
# **How to read it.** The divergence says how far a draft is from the joint; tokens per call what
# that costs in decoding. A chain of few numbers can be worth several components.
#
# **Exercise.** Take a context of your own, one where you are sure what comes next and one where
# you are not. For which does the form matter?
