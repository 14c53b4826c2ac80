"""What a head is trained for, over all positions of a window at once and within bounded memory.

At position t the head reads the hidden state h_t and drafts x_1 … x_n = tokens t+1 … t+n of the window. The first comes from
the target; the target's laws of the others are the base model's own, at the positions t+1 … t+n-1 of the same window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cpmtp.cp_head import CPHead

OBJECTIVES = ("likelihood", "distillation", "acceptance")
# Logits held at once; below this nothing is computed twice.
_LOGITS_AT_ONCE = 1 << 22
_TINY = 1e-30


@dataclass(frozen=True)
class HeadLoss:
    """A loss and what the head would earn, averaged over positions.

    Attributes
    ----------
    loss : scalar tensor
        Differentiable; nats per position, or for ``acceptance`` minus the tokens per call.
    survival : (horizon,) tensor
        ``S_1 … S_n`` under block verification, first token from the target; unbiased for contexts like the window's.
    """

    loss: Float[Tensor, ""]
    survival: Float[Tensor, " horizon"]

    @property
    def tokens_per_call(self) -> float:
        return float(self.survival.sum())


def head_loss(
    head: CPHead,
    hidden: Float[Tensor, "rows time d"],
    tokens: Int[Tensor, "rows time"],
    unembed: Callable[[Tensor], Tensor],
    *,
    objective: str = "distillation",
    balance: float = 0.0,
) -> HeadLoss:
    """The mean loss over every position of the windows that has `horizon` tokens after it.

    * ``likelihood``: ``-log Q(x_1 … x_n)`` (anchored: of x_2 … x_n given x_1), the negative log-likelihood of the paper
    * ``distillation``: ``sum_k KL(p_k || q_k)``, k = 2 … n, the target's law at k against the draft's conditional given
      x_1 … x_{k-1}: the expectation of the likelihood over the last token of each prefix, so the same optimum with less noise
    * ``acceptance``: minus the tokens per call of block verification, whose survival is
      ``E_P[sum_v min(R_{k-1} q_k(v), m_{k-1} p_k(v))]`` with ``R_k = Q(x_2:k|x_1) / P(x_2:k|x_1)``, ``m_k = min_{j<=k} R_j``

    Logits are computed in chunks of positions and, where there are many, computed again on the way back instead of kept.

    Parameters
    ----------
    hidden : (rows, time, hidden) tensor
        The base model's last hidden states.
    tokens : (rows, time) long tensor
        ``hidden[:, t]`` has seen the tokens up to t.
    unembed : callable
        Hidden states to the target's logits.
    balance : float
        Weight of the load-balancing loss ``r sum_a wbar_a^2 - 1``, wbar the mean component weights over a chunk of positions.

    References
    ----------
    basharin2024faster, sun2024block, shazeer2017outrageously
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    last = tokens.shape[1] - head.horizon
    if last < 1:
        raise ValueError(
            f"windows of {tokens.shape[1]} tokens for a horizon of {head.horizon}: need at least {head.horizon + 1}"
        )
    trunk = head.trunk(hidden[:, :last], tokens[:, 1 : last + 1]).flatten(0, 1)
    paths = tokens[:, 1:].unfold(1, head.horizon, 1).flatten(0, 1)
    seen = hidden.unfold(1, head.horizon, 1)[:, :last].mT.flatten(0, 1)
    drawn = _Chunk(head, unembed, objective, balance)
    size = max(_LOGITS_AT_ONCE // (head.drafted * head.rank * head.vocab_size), 1)
    parts = [x.split(size) for x in (trunk, seen, paths)]
    again = len(parts[0]) > 4 and torch.is_grad_enabled()
    total = torch.zeros(head.horizon, device=tokens.device)
    for z, h, x in zip(*parts, strict=True):
        total = total + (checkpoint(drawn, z, h, x, use_reentrant=False) if again else drawn(z, h, x))
    mean = total / len(paths)
    survival = torch.cat([torch.ones_like(mean[:1]), mean[1:].detach()])
    return HeadLoss(mean[0], survival)


@dataclass(frozen=True)
class _Chunk:
    """The sums over a chunk of positions: of the loss, then of survival at k = 2 … n."""

    head: CPHead
    unembed: Callable[[Tensor], Tensor]
    objective: str
    balance: float

    def __call__(self, trunk: Tensor, seen: Tensor, paths: Tensor) -> Tensor:
        head = self.head
        log_weights, logits = head.components(seen[:, 0], trunk)
        given = paths[:, head.anchored :]
        # (chunk, drafted, rank): log-probability of each path token in each component
        log_path = -functional.cross_entropy(
            logits.flatten(0, 2), given[:, :, None].expand(-1, -1, head.rank).flatten(), reduction="none"
        ).unflatten(0, logits.shape[:3])
        scores = torch.cat([log_weights[:, None], log_weights[:, None] + log_path.cumsum(1)], 1)
        if self.objective == "likelihood":
            with torch.no_grad():
                survival = self._survival(scores, logits, seen, paths)
            loss = -scores[:, -1].logsumexp(-1).sum()
        else:
            survival = self._survival(scores, logits, seen, paths, with_loss=self.objective == "distillation")
            loss = survival[0] if self.objective == "distillation" else -survival[1:].sum() - len(paths)
            survival = survival[1:]
        if self.balance:
            loss = loss + self.balance * len(paths) * (head.rank * log_weights.exp().mean(0).square().sum() - 1)
        return torch.cat([loss[None], survival])

    def _survival(
        self, scores: Tensor, logits: Tensor, seen: Tensor, paths: Tensor, *, with_loss: bool | None = None
    ) -> Tensor:
        """Sums of survival at k = 2 … n; with `with_loss` given, preceded by the summed divergence (or zero)."""
        head = self.head
        first = 1 - head.anchored
        posterior = scores[:, first:-1].softmax(-1)
        drafted = (posterior.unsqueeze(-2) @ logits[:, first:].softmax(-1)).squeeze(-2)
        with torch.no_grad():
            target = self.unembed(seen[:, 1:]).to(drafted.dtype).softmax(-1)
        ratio = drafted.gather(-1, paths[:, 1:, None]) / target.gather(-1, paths[:, 1:, None]).clamp_min(_TINY)
        running, least, sums = torch.ones_like(ratio[:, 0]), torch.ones_like(ratio[:, 0]), []
        for k in range(head.horizon - 1):
            sums.append(torch.minimum(running * drafted[:, k], least * target[:, k]).sum())
            running = running * ratio[:, k]
            least = torch.minimum(least, running)
        if with_loss is None:
            return torch.stack(sums)
        if not with_loss:
            return torch.stack([sums[0] * 0, *sums])
        divergence = (target * (target.clamp_min(_TINY).log() - drafted.clamp_min(_TINY).log())).sum()
        return torch.stack([divergence, *(s.detach() for s in sums)])
