"""What a head is trained for, over all positions of a window at once and within bounded memory.

At position t the head reads the hidden state h_t and drafts x_1 … x_n = tokens t+1 … t+n of the
window. The first comes from the target; the target's laws of the others are the base model's own,
at the positions t+1 … t+n-1 of the same window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.verification import PrefixMasses, accepted_mass
from cpmtp.heads.cp_head import CPHead

OBJECTIVES = ("likelihood", "distillation", "acceptance")
_LOGITS_AT_ONCE = 1 << 23
_TINY = 1e-30


@dataclass(frozen=True)
class HeadLoss:
    """A loss and what the head would earn, averaged over positions.

    Attributes
    ----------
    loss : scalar tensor
        Differentiable; nats per position, or for ``acceptance`` minus the tokens per call.
    survival : (horizon,) tensor
        ``S_1 … S_n`` under block verification, first token from the target; unbiased for contexts
        like the window's.
    """

    loss: Float[Tensor, ""]
    survival: Float[Tensor, " horizon"]

    @property
    def tokens_per_call(self) -> float:
        """Expected tokens per call of the target: the sum of the survival."""
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

    * ``likelihood``: ``-log Q(x_1 … x_n)`` (anchored: of x_2 … x_n given x_1), the negative
      log-likelihood of the paper
    * ``distillation``: ``sum_k KL(p_k || q_k)``, k = 2 … n, the target's law at k against the
      draft's conditional given x_1 … x_{k-1}: the expectation of the likelihood over the last token
      of each prefix, so the same optimum with less noise
    * ``acceptance``: minus the tokens per call of block verification, whose survival is
      ``E_P[sum_v min(R_{k-1} q_k(v), m_{k-1} p_k(v))]`` with ``R_k = Q(x_2:k|x_1) / P(x_2:k|x_1)``,
      ``m_k = min_{j<=k} R_j``

    Logits are computed in chunks of positions; where there are several, each chunk's gradient is
    taken at once and its logits are dropped, so that none is kept and none computed twice.

    Parameters
    ----------
    hidden : (rows, time, hidden) tensor
        The base model's last hidden states.
    tokens : (rows, time) long tensor
        ``hidden[:, t]`` has seen the tokens up to t.
    unembed : callable
        Hidden states to the target's logits.
    balance : float
        Weight of the load-balancing loss ``r sum_a wbar_a^2 - 1``, wbar the mean component weights
        over a chunk of positions.

    References
    ----------
    basharin2024faster, sun2024block, shazeer2017outrageously
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    last = tokens.shape[1] - head.horizon
    if last < 1:
        raise ValueError(
            f"windows of {tokens.shape[1]} tokens for a horizon of {head.horizon}: need at least "
            f"{head.horizon + 1}"
        )
    # (positions, width)
    trunk = head.trunk(hidden[:, :last], tokens[:, 1 : last + 1]).flatten(0, 1)
    paths = tokens[:, 1:].unfold(1, head.horizon, 1).flatten(0, 1)  # (positions, horizon)
    seen = hidden.unfold(1, head.horizon, 1)[:, :last].mT.flatten(0, 1)  # (positions, horizon, d)
    drawn = _Chunk(head, unembed, objective, balance)
    size = max(_LOGITS_AT_ONCE // (head.drafted * head.rank * head.vocab_size), 1)
    weights = (head.maps, head.mixture.weight, head.mixture.bias)
    learns = torch.is_grad_enabled() and any(w.requires_grad for w in (trunk, *weights))
    if learns and size < len(paths):
        total = _Chunked.apply(drawn, size, seen, paths, trunk, *weights)
    else:
        # (sums,)
        total = torch.stack([drawn(*part) for part in _chunks(size, trunk, seen, paths)]).sum(0)
    mean = total / len(paths)
    survival = torch.cat([torch.ones_like(mean[:1]), mean[1:].detach()])  # (horizon,)
    return HeadLoss(mean[0], survival)


@dataclass(frozen=True)
class _Chunk:
    """The sums over a chunk of positions: of the loss, then of survival at k = 2 … n."""

    head: CPHead
    unembed: Callable[[Tensor], Tensor]
    objective: str
    balance: float

    def __call__(
        self,
        trunk: Float[Tensor, "chunk width"],
        seen: Float[Tensor, "chunk horizon d"],
        paths: Int[Tensor, "chunk horizon"],
    ) -> Float[Tensor, " sums"]:
        """Loss, then survival, summed over the positions."""
        head = self.head
        log_weights, logits = head.components(seen[:, 0], trunk)
        # Log-probability of each path token in each component: (chunk, drafted, rank).
        log_path, probs = _TokenProbs.apply(logits, paths[:, head.anchored :])
        grown = log_weights[:, None] + log_path.cumsum(1)  # (chunk, drafted, rank)
        scores = torch.cat([log_weights[:, None], grown], 1)  # (chunk, drafted + 1, rank)

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.objective != "likelihood"):
            posterior = scores[:, :-1].softmax(-1)  # (chunk, drafted, rank)
            mixed = (posterior.unsqueeze(-2) @ probs).squeeze(-2)  # (chunk, drafted, vocab)
            drafted = mixed[:, 1 - head.anchored :]  # (chunk, horizon - 1, vocab)
        with torch.no_grad():
            logits = self.unembed(seen[:, 1:])  # (chunk, horizon - 1, vocab)
            target = logits.to(drafted.dtype).softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.objective == "acceptance"):
            survival = _block_survival(target, drafted, paths[:, 1:])  # (horizon - 1,)

        if self.objective == "likelihood":
            loss = -scores[:, -1].logsumexp(-1).sum()
        elif self.objective == "distillation":
            logs = target.clamp_min(_TINY).log() - drafted.clamp_min(_TINY).log()
            loss = (target * logs).sum()
        else:
            loss = -survival.sum() - len(paths)
        if self.balance:
            uneven = head.rank * log_weights.exp().mean(0).square().sum() - 1
            loss = loss + self.balance * len(paths) * uneven
        return torch.cat([loss[None], survival])


def _block_survival(
    target: Float[Tensor, "chunk later vocab"],
    drafted: Float[Tensor, "chunk later vocab"],
    path: Int[Tensor, "chunk later"],
) -> Float[Tensor, " later"]:
    """Sums over positions of ``S_2 … S_n`` under block verification, given the paths so far.

    Per unit of the target's mass, which is one along the path.
    """
    wanted = target.gather(-1, path.unsqueeze(-1)).clamp_min(_TINY)  # (chunk, later, 1)
    ratios = drafted.gather(-1, path.unsqueeze(-1)) / wanted  # (chunk, later, 1)
    one = torch.ones_like(ratios[:, 0])  # (chunk, 1)
    masses, sums = PrefixMasses(one, one, one), []
    for k in range(path.shape[1]):
        sums.append(accepted_mass("block", masses, target[:, k], drafted[:, k]).sum())
        accepted = accepted_mass("block", masses, one, ratios[:, k])
        masses = PrefixMasses(one, masses.draft * ratios[:, k], accepted)
    return torch.stack(sums)


class _TokenProbs(torch.autograd.Function):
    """Logits (…, rank, vocab) to the given tokens' log-probabilities (…, rank) and to all
    probabilities.

    What autograd would keep of a log-softmax, a gather and a softmax is here one tensor of the
    logits' size.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        at = tokens[..., None, None].expand(*logits.shape[:-1], 1)  # (…, rank, 1)
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(-1, at).squeeze(-1)  # (…, rank)
        probs = log_probs.exp_()
        ctx.save_for_backward(probs, at)
        return chosen, probs

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        of_chosen, of_probs = gradients
        probs, at = ctx.saved_tensors
        if of_probs is None and of_chosen is None:
            return None, None
        of_chosen = probs.new_zeros(probs.shape[:-1]) if of_chosen is None else of_chosen
        if of_probs is None:
            logits = probs * -of_chosen[..., None]  # (…, rank, vocab)
        else:
            inner = torch.linalg.vecdot(probs, of_probs)  # (…, rank)
            logits = (of_probs - (inner + of_chosen)[..., None]).mul_(probs)  # (…, rank, vocab)
        return logits.scatter_add_(-1, at, of_chosen[..., None]), None  # (…, rank, vocab)


class _Chunked(torch.autograd.Function):
    """Sums over all positions, chunk by chunk; the gradient of the first of them is taken on the
    way.
    """

    @staticmethod
    def forward(
        ctx, drawn: _Chunk, size: int, seen: Tensor, paths: Tensor, trunk: Tensor, *weights: Tensor
    ) -> Tensor:
        total, to_trunk = (
            torch.zeros(drawn.head.horizon, device=trunk.device, dtype=trunk.dtype),
            torch.zeros_like(trunk),
        )
        to_weights = [torch.zeros_like(w) for w in weights]
        for part, (z, h, x) in zip(
            to_trunk.split(size), _chunks(size, trunk, seen, paths), strict=True
        ):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                out = drawn(z, h, x)
                found = torch.autograd.grad(out[0], (z, *weights))
            total += out.detach()
            part.copy_(found[0])
            for mine, more in zip(to_weights, found[1:], strict=True):
                mine += more
        ctx.save_for_backward(to_trunk, *to_weights)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return (None, None, None, None, *(gradient[0] * g for g in ctx.saved_tensors))


def _chunks(size: int, *tensors: Tensor):
    return zip(*(x.split(size) for x in tensors), strict=True)
