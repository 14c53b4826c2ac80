"""What a head is trained for, over all positions of a window at once and within bounded memory.

At position t the head reads the hidden state h_t and drafts x_1 … x_n = tokens t+1 … t+n of the
window. The first comes from the target; the target's laws of the others are the base model's own,
at the positions t+1 … t+n-1 of the same window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.acceptance.verification import PrefixMasses, accepted_mass
from cpmtp.heads.conditionals import PathConditionals, path_conditionals
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.features import Features
from cpmtp.heads.target_laws import TargetLaws

OBJECTIVES = ("likelihood", "distillation", "acceptance")
_LOGITS_AT_ONCE = 1 << 23
# Fewer stay in a core's cache between one operation and the next, unless these are of few positions
# only: then a large unembedding would be read too often.
_IN_CACHE, _FEW_POSITIONS = 1 << 20, 256
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
    head: DraftHead,
    hidden: Float[Tensor, "rows time d"],
    tokens: Int[Tensor, "rows time"],
    unembed: Callable[[Tensor], Tensor] | TargetLaws,
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

    With a draft vocabulary the sums are over its tokens, and what follows a token that is never
    drafted does not count.

    Logits are computed in chunks of positions; where there are several, each chunk's gradient is
    taken at once and its logits are dropped, so that none is kept and none computed twice.

    Parameters
    ----------
    hidden : (rows, time, hidden) tensor
        The base model's last hidden states.
    tokens : (rows, time) long tensor
        ``hidden[:, t]`` has seen the tokens up to t.
    unembed : callable or TargetLaws
        Hidden states to the target's logits, or its laws at these states, which several heads may
        share.
    balance : float
        Weight of the load-balancing loss ``r sum_a wbar_a^2 - 1``, wbar the mean component weights
        over all positions.

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
    laws = unembed if isinstance(unembed, TargetLaws) else TargetLaws(hidden, unembed)
    features = head.features(hidden[:, :last], tokens)  # of (rows, last)
    paths = tokens[:, 1:].unfold(1, head.horizon, 1)  # (rows, last, horizon)
    drawn = _Part(head, laws, paths, objective)
    each = head.drafted * head.rank * head.support_size
    size = min(max(_IN_CACHE // each, _FEW_POSITIONS), _LOGITS_AT_ONCE // each)
    parts = list(_parts(len(tokens), last, max(size, 1)))
    inputs = _Inputs(features, head.weights())
    if len(parts) > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors):
        total = _InParts.apply(drawn, parts, inputs, *inputs.tensors)
    else:
        total = torch.stack([drawn(part, inputs[part]) for part in parts]).sum(0)  # (sums,)
    mean = total / (len(tokens) * last)
    loss = mean[0]
    if balance:
        shares = features.log_weights.exp().mean((0, 1))  # (rank,)
        loss = loss + balance * (head.rank * shares.square().sum() - 1)
    survival = torch.cat([torch.ones_like(mean[:1]), mean[1:].detach()])  # (horizon,)
    return HeadLoss(loss, survival)


@dataclass(frozen=True)
class _Inputs:
    """What logits are made of: features of positions, and weights of all of them."""

    features: Features
    weights: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.features.tensors, *self.weights)

    def __getitem__(self, part: tuple[slice, slice]) -> _Inputs:
        return _Inputs(self.features[part], self.weights)


@dataclass(frozen=True)
class _Part:
    """The sums over a part of the positions: of the loss, then of survival at k = 2 … n."""

    head: DraftHead
    laws: TargetLaws
    paths: Int[Tensor, "rows last horizon"]
    objective: str

    def __call__(self, part: tuple[slice, slice], inputs: _Inputs) -> Float[Tensor, " sums"]:
        """Loss, then survival, summed over the positions."""
        head, hidden = self.head, self.laws.hidden[part]
        # (rows, time, drafted, rank, support)
        logits = head.logits(hidden, inputs.features, *inputs.weights)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._sums(part, inputs.features.log_weights, logits)

    def _sums(self, part: tuple[slice, slice], log_weights: Tensor, logits: Tensor) -> Tensor:
        head, (rows, times), path = self.head, part, self.paths[part]
        found = path_conditionals(
            head,
            log_weights.to(head.maps.dtype),
            logits.to(head.maps.dtype),
            path,
            mixed=self.objective != "likelihood",
        )
        later = slice(times.start + 1, times.stop + head.horizon - 1)
        probs, entropies = self.laws.between(head, rows, later)
        # (rows, time, horizon - 1, support) and (rows, time, horizon - 1)
        target = probs.unfold(1, head.horizon - 1, 1).movedim(-1, 2)
        entropies = entropies.unfold(1, head.horizon - 1, 1)  # (rows, time, horizon - 1)

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.objective == "acceptance"):
            survival = _block_survival(target, found, path[..., 1:])  # (horizon - 1,)
        if self.objective == "likelihood":
            loss = -found.scores[..., -1, :].logsumexp(-1).sum()
        elif self.objective == "distillation":
            loss = _divergence(target, entropies, found)
        else:
            loss = -survival.sum() - path.shape[0] * path.shape[1]
        return torch.cat([loss[None], survival])  # (1 + horizon,)


def _divergence(target: Tensor, entropies: Tensor, found: PathConditionals) -> Tensor:
    """Sum of ``KL(p_k || q_k)`` over positions and k."""
    drafted = found.drafted
    if found.inside is not None:
        # (rows, time, later): whether all drafted tokens before could be drafted.
        reached = torch.cat([torch.ones_like(found.inside[..., :1]), found.inside[..., :-1]], -1)
        reached = reached.cumprod(-1).to(target)
        target, entropies = target * reached[..., None], entropies * reached
    return entropies.sum() + _CrossEntropy.apply(target, drafted)


class _CrossEntropy(torch.autograd.Function):
    """``-sum p log q``, kept as its gradient alone."""

    @staticmethod
    def forward(ctx, p: Tensor, q: Tensor) -> Tensor:
        q = q.clamp_min(_TINY)
        ctx.save_for_backward(p, q)
        return -torch.linalg.vecdot(p, q.log()).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        p, q = ctx.saved_tensors
        return None, (p / q).mul_(-gradient)


def _block_survival(
    target: Float[Tensor, "rows time later support"],
    found: PathConditionals,
    path: Int[Tensor, "rows time later"],
) -> Float[Tensor, " later"]:
    """Sums over positions of ``S_2 … S_n`` under block verification, given the paths so far.

    Per unit of the target's mass, which is one along the path.
    """
    wanted = target.gather(-1, found.places.unsqueeze(-1)).squeeze(-1)  # (rows, time, later)
    ratios = found.of_path() / wanted.clamp_min(_TINY)  # (rows, time, later)
    one = torch.ones_like(ratios[..., :1])  # (rows, time, 1)
    masses, sums = PrefixMasses(one, one, one), []
    for k in range(path.shape[-1]):
        p, q = target[..., k, :], found.drafted[..., k, :]  # (rows, time, support)
        sums.append(accepted_mass("block", masses, p, q).sum())
        here = ratios[..., k, None]  # (rows, time, 1)
        accepted = accepted_mass("block", masses, one, here)
        masses = PrefixMasses(one, masses.draft * here, accepted)
    return torch.stack(sums)


class _InParts(torch.autograd.Function):
    """Sums over all positions, part by part; the gradient of the first of them is taken on the
    way.
    """

    @staticmethod
    def forward(
        ctx, drawn: _Part, parts: list[tuple[slice, slice]], inputs: _Inputs, *tensors: Tensor
    ) -> Tensor:
        features = len(inputs.features.tensors)
        gradients = [torch.zeros_like(x) for x in tensors]
        total = tensors[0].new_zeros(drawn.head.horizon)
        for part in parts:
            with torch.enable_grad():
                own = [x[part].detach().requires_grad_() for x in tensors[:features]]
                shared = [x.detach().requires_grad_() for x in tensors[features:]]
                here = _Inputs(Features(*own), tuple(shared))
                out = drawn(part, here)
                found = torch.autograd.grad(out[0], (*own, *shared), allow_unused=True)
            total = total + out.detach()
            for whole, more in zip(gradients[:features], found, strict=False):
                if more is not None:
                    whole[part] = more
            for whole, more in zip(gradients[features:], found[features:], strict=True):
                whole += more
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return (None, None, None, *(gradient[0] * g for g in ctx.saved_tensors))


def _parts(rows: int, time: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of positions of at most `size`: whole rows where one fits, else pieces of one."""
    if size >= time:
        step = size // time
        for row in range(0, rows, step):
            yield slice(row, min(row + step, rows)), slice(0, time)
        return
    for row in range(rows):
        for start in range(0, time, size):
            yield slice(row, row + 1), slice(start, min(start + size, time))
