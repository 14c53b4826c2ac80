"""Drafts without a model behind them."""

from __future__ import annotations

import torch

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.drafts.support import Support

WIDTH = 2  # transition rank


def random_draft(
    vocab: int, horizon: int, rank: int, seed: int, batch: tuple[int, ...] = ()
) -> CPDistribution:
    numbers = _numbers(seed)
    weights = numbers(*batch, rank).softmax(-1)
    return CPDistribution(
        weights, [numbers(*batch, vocab, rank).softmax(-2) for _ in range(horizon)]
    )


def _numbers(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5


def random_support(vocab: int, horizon: int, seed: int, batch: tuple[int, ...] = ()) -> Support:
    """Two to three tokens of each position, of every entry's own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*batch, horizon, vocab, generator=generator).argsort(-1)
    ids = order[..., :3].clone()  # (*batch, horizon, 3)
    ids[torch.rand(ids.shape, generator=generator)[..., :1].expand(ids.shape) < 0.4] = vocab
    ids[..., :2] = order[..., :2]
    return Support(ids.sort(-1).values.unbind(-2), vocab)


def random_form(
    form: str,
    vocab: int,
    horizon: int,
    rank: int,
    seed: int,
    batch: tuple[int, ...] = (),
    *,
    some: bool = False,
    own: bool = False,
):
    """A draft of a form; `some`: over a support; `own`: with transitions of every entry's own."""
    numbers = _numbers(seed)
    support = random_support(vocab, horizon, seed, batch) if some else None
    size = 3 if some else vocab
    logits = numbers(*batch, horizon, rank, size)
    if support is not None:
        filled = torch.stack([support.filled(i) for i in range(horizon)], -2).unsqueeze(-2)
        logits = torch.where(filled, logits, -torch.inf)  # (*batch, horizon, rank, size)
    weights = numbers(*batch, rank).softmax(-1)
    factors = logits.softmax(-1).mT.unbind(-3)
    if form == "cp":
        return CPDistribution(weights, factors, support)
    if form == "hmm":
        transitions = numbers(*batch, horizon - 1, rank, rank).softmax(-1)
        return HMMDistribution(weights, transitions, factors, support)
    lead = batch if own or some else ()
    left, right = (
        numbers(*lead, horizon - 1, vocab, WIDTH),
        numbers(*lead, horizon - 1, WIDTH, size),
    )
    gate = numbers(*batch, horizon - 1, WIDTH)
    return MarkovMixture(weights, logits, left, right, gate, support)


FORMS = ("cp", "hmm", "markov_mixture")
