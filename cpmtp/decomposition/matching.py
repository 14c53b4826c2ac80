"""How alike two fits are component by component: a fit whose restarts disagree has no components to
interpret.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cpmtp.decomposition.expectation import Mixtures
from cpmtp.decomposition.solution import Runs
from cpmtp.drafts.cp_distribution import CPDistribution


def factor_match_score(first: CPDistribution, second: CPDistribution) -> float:
    """Mean over the best one-to-one matching of components of
    ``(1 - |w - v| / max(w, v)) prod_i cos(A_i, B_i)``.

    Between 0 and 1; 1 only for the same components up to their order.

    Raises
    ------
    ValueError
        If shapes differ or there are batch axes.

    References
    ----------
    acar2011scalable

    Examples
    --------
    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    >>> dist = CPDistribution(half, [torch.eye(2, dtype=torch.float64)] * 2)
    >>> swapped = CPDistribution(half, [torch.eye(2, dtype=torch.float64).flip(1)] * 2)
    >>> factor_match_score(dist, swapped)
    1.0
    """
    shapes = [(tuple(d.batch_shape), d.rank, d.horizon, d.vocab_size) for d in (first, second)]
    if shapes[0] != shapes[1] or shapes[0][0]:
        raise ValueError(
            f"fits of (batch, rank, horizon, vocabulary) {shapes[0]} and {shapes[1]}: expected "
            "equal ones, no batch"
        )
    return _score(
        *(Mixtures(d.weights[None], torch.stack(list(d.factors)).mT[None]) for d in (first, second))
    )


def run_match_scores(runs: Runs, chosen: Int[Tensor, " items"], runs_per_item: int) -> Tensor:
    """Of every run with its item's chosen one, (items, runs per item); NaN where a run failed."""
    scores = torch.full((len(chosen), runs_per_item), torch.nan, dtype=torch.float64)
    for item, best in enumerate(chosen.tolist()):
        for place in range(runs_per_item):
            run = item * runs_per_item + place
            if run == best:
                scores[item, place] = 1.0
            elif not runs.failures[run] and not runs.failures[best]:
                scores[item, place] = _score(runs.mixtures[[best]], runs.mixtures[[run]])
    return scores


def _score(first: Mixtures, second: Mixtures) -> float:
    units = [m.factors[0] / m.factors[0].norm(dim=-1, keepdim=True) for m in (first, second)]
    cosines = (units[0] @ units[1].mT).prod(0)
    w, v = first.weights[0][:, None], second.weights[0][None, :]
    largest = torch.maximum(w, v)
    similar = torch.where(largest > 0, 1 - (w - v).abs() / largest.clamp_min(1e-300), 1.0)
    table = (similar * cosines).cpu().numpy()
    return float(table[linear_sum_assignment(table, maximize=True)].mean())
