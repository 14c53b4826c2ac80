"""What the components of a draft say, in words: its most illuminating table."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from cpmtp.drafts.mixture import Mixture
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.language_model import writes_text


@takes_what_is_given
def top_tokens(draft: Any, lm: Any, count: int = 5) -> pd.DataFrame:
    """Most probable tokens of every component at every position, the heaviest component first.

    A Markov mixture's positions after the first are given each component's most probable token
    before; a hidden Markov draft's components are its states, with the weights of the first.

    Parameters
    ----------
    draft : CPDistribution, MarkovMixture, HMMDistribution or FitResult
        Without batch axes: of an anchored one take one first token's, ``draft[token]``.
    lm : LanguageModel or None
        Its ``decode`` writes the tokens; without one they are numbers.
    count : int

    Returns
    -------
    pandas.DataFrame
        `component` (0 the heaviest), `weight`, `position` (1 the first), `place` (1 the most
        probable), `token_id`, `token`, `probability`.

    Raises
    ------
    ValueError
        If it is no mixture, has batch axes, or `count` is below 1.

    Examples
    --------
    >>> from cpmtp.drafts.cp_distribution import CPDistribution
    >>> weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    >>> draft = CPDistribution(weights, [torch.eye(2, dtype=torch.float64)] * 2)
    >>> table = top_tokens(draft, None, count=1)
    >>> table[["component", "weight", "position", "token", "probability"]].values.tolist()
    [[0, 0.75, 1, '1', 1.0], [0, 0.75, 2, '1', 1.0], [1, 0.25, 1, '0', 1.0], [1, 0.25, 2, '0', 1.0]]
    """
    mixture = getattr(draft, "distribution", draft)
    if not isinstance(mixture, Mixture):
        raise ValueError(f"a {type(mixture).__name__}: expected a draft that has components")
    if mixture.batch_shape:
        raise ValueError(
            f"a draft of batch axes {tuple(mixture.batch_shape)}: select one, as in draft[token]"
        )
    if count < 1:
        raise ValueError(f"count {count}: expected at least 1")
    weights = mixture.weights.detach().cpu()  # (rank,)
    order = weights.argsort(descending=True, stable=True).tolist()
    rows: list[dict] = []
    for position, probs in enumerate(mixture.component_probs()):
        found = probs.detach().cpu().topk(min(count, probs.shape[-1]))  # (rank, count) each
        for component, old in enumerate(order):
            for place, (value, token) in enumerate(
                zip(found.values[old].tolist(), found.indices[old].tolist(), strict=True), start=1
            ):
                if value > 0:
                    rows.append(
                        {
                            "component": component,
                            "weight": float(weights[old]),
                            "position": position + 1,
                            "place": place,
                            "token_id": token,
                            "token": _written(lm, token),
                            "probability": value,
                        }
                    )
    return pd.DataFrame(rows).sort_values(["component", "position", "place"], ignore_index=True)


def _written(lm: Any, token: int) -> str:
    return lm.decode(torch.tensor([token])) if writes_text(lm) else str(token)
