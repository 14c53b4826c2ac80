"""Left and right factors from positions of text: what a head stores, over any vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Right factors begin at random, left ones at zero: no correction at first.
_SPREAD = 0.3
# Steps of scaling that a position's logits are given before every gradient.
_SCALINGS = 2


@dataclass(frozen=True)
class TextPairs:
    """Of many positions of text: some tokens that may come next, and what may follow each.

    Attributes
    ----------
    before : (positions, rows) long tensor
    after : (positions, support) long tensor
        The tokens that follow any of them; where a row is filled up, any.
    probs : (positions, rows, support) tensor
        Of both together; sums to one over a position's rows and support, zero where filled up.
    """

    before: Int[Tensor, "positions rows"]
    after: Int[Tensor, "positions support"]
    probs: Float[Tensor, "positions rows support"]

    @classmethod
    def of(
        cls,
        before: Int[Tensor, "positions rows"],
        before_probs: Float[Tensor, "positions rows"],
        after: Int[Tensor, "positions rows kept"],
        after_probs: Float[Tensor, "positions rows kept"],
    ) -> TextPairs:
        """From the tokens kept after each row, normalised over what is kept.

        Examples
        --------
        >>> before, after = torch.tensor([[3, 5]]), torch.tensor([[[1, 2], [2, 4]]])
        >>> half = torch.full((1, 2), 0.5)
        >>> pairs = TextPairs.of(before, half, after, half[:, None].expand(1, 2, 2))
        >>> pairs.after, pairs.probs
        (tensor([[1, 2, 4]]), tensor([[[0.2500, 0.2500, 0.0000],
                 [0.0000, 0.2500, 0.2500]]]))
        """
        flat, order = after.flatten(1).sort(1)  # (positions, rows * kept) each
        new = torch.ones_like(flat, dtype=torch.bool)
        new[:, 1:] = flat[:, 1:] != flat[:, :-1]
        place = new.cumsum(1) - 1  # (positions, rows * kept)
        size = int(place.max()) + 1
        ids = flat[:, -1:].expand(-1, size).scatter(1, place, flat)  # (positions, support)
        places = torch.empty_like(place).scatter(1, order, place).view(after.shape)
        rows = before_probs / before_probs.sum(-1, keepdim=True)
        kept = after_probs / after_probs.sum(-1, keepdim=True) * rows.unsqueeze(-1)
        probs = kept.new_zeros(*before.shape, size).scatter_add(2, places, kept)
        return cls(before, ids, probs)

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, some) -> TextPairs:
        return TextPairs(self.before[some], self.after[some], self.probs[some])


def scaled(
    logits: Float[Tensor, "*batch support"],
    bias: Float[Tensor, "*batch rows support"],
    probs: Float[Tensor, "*batch rows support"],
    passes: int,
) -> Float[Tensor, "*batch support"]:
    """Logits under which ``softmax(logits + bias)``, rows by their masses, comes nearer to the
    distribution of what follows: iterative scaling, whose divergence never rises.

    References
    ----------
    darroch1972generalized
    """
    rows, wanted = probs.sum(-1, keepdim=True), probs.sum(-2)  # (*batch, rows, 1), (…, support)
    possible = wanted > 0
    for _ in range(passes):
        found = (rows * (logits.unsqueeze(-2) + bias).softmax(-1)).sum(-2)  # (*batch, support)
        step = wanted.clamp_min(1e-30).log() - found.clamp_min(1e-30).log()
        logits = torch.where(possible, logits + step, logits)
    return logits


def text_factors(
    pairs: TextPairs,
    vocab_size: int,
    width: int,
    *,
    steps: int = 400,
    batch: int = 1024,
    rate: float = 0.03,
    seed: int = 0,
) -> tuple[Float[Tensor, "1 vocab width"], Float[Tensor, "1 width vocab"], Float[Tensor, " steps"]]:
    """Left and right factors that lower the divergence of what follows at many positions, the
    logits of each position free: ``q(v | u) = softmax_v(U(v) + <L[u], R[v]>)`` over its support.

    Every step takes some positions, brings their logits nearer to their best by scaling, and the
    factors down the gradient there (Adam, the rate falling to zero).

    Parameters
    ----------
    pairs : TextPairs
    vocab_size, width : int
    steps, batch : int
        Of the descent, and positions in each.
    rate : float
    seed : int

    Returns
    -------
    left : (1, vocab, width) tensor
    right : (1, width, vocab) tensor
        Zero at tokens that do not occur.
    trace : (steps,) tensor
        Mean divergence of each step's positions in nats.

    Examples
    --------
    >>> before, after = torch.tensor([[0, 1]]), torch.tensor([[[0, 1], [0, 1]]])
    >>> probs = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]])
    >>> pairs = TextPairs.of(before, torch.ones(1, 2), after, probs)
    >>> left, right, trace = text_factors(pairs, 4, 1, steps=200, batch=1)
    >>> left.shape, bool(trace[-1] < 0.01 * trace[0])
    (torch.Size([1, 4, 1]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.cat([pairs.before.flatten(), pairs.after.flatten()]).unique()  # (tokens,)
    before, after = (torch.searchsorted(tokens, ids) for ids in (pairs.before, pairs.after))
    right = _SPREAD * torch.randn(len(tokens), width, generator=generator)  # (tokens, width)
    factors = [torch.zeros(len(tokens), width), right]
    optimiser = torch.optim.Adam(factors, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    logits = pairs.probs.sum(1).clamp_min(1e-30).log().float()  # (positions, support)
    logits = torch.where(pairs.probs.sum(1) > 0, logits, -torch.inf)
    order, trace = torch.empty(0, dtype=torch.long), []
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(pairs), generator=generator)])
        some, order = order[:batch], order[batch:]
        probs = pairs.probs[some].float()  # (some, rows, support)
        left, right = (
            part[ids[some]] for part, ids in zip(factors, (before, after), strict=True)
        )  # (some, rows, width), (some, support, width)
        bias = left @ right.mT  # (some, rows, support)
        logits[some] = scaled(logits[some], bias, probs, _SCALINGS)
        log_q = (logits[some].unsqueeze(1) + bias).log_softmax(-1)  # (some, rows, support)
        rows = probs.sum(-1, keepdim=True)  # (some, rows, 1)
        slope = (rows * log_q.exp() - probs) / len(some)  # (some, rows, support)
        for part, ids, pull in (
            (factors[0], before[some], slope @ right),
            (factors[1], after[some], slope.mT @ left),
        ):
            part.grad = torch.zeros_like(part).index_add_(
                0,
                ids.flatten(),
                pull.flatten(0, 1),  # (some * rows or support, width)
            )
        optimiser.step()
        schedule.step()
        inside = torch.special.xlogy(probs, probs / rows.clamp_min(1e-30))
        trace.append((inside - torch.where(probs > 0, probs * log_q, 0.0)).sum() / len(some))
    left = torch.zeros(1, vocab_size, width, dtype=torch.float64)
    right = torch.zeros(1, width, vocab_size, dtype=torch.float64)
    left[0, tokens], right[0, :, tokens] = factors[0].double(), factors[1].double().mT
    return left, right, torch.stack(trace)
