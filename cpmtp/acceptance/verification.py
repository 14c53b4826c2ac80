"""Token and block verification as pure functions: what is accepted, what comes next.

One target call returns the target's laws `p` at every position of a drafted path and at the one
after it; `q` holds the laws the draft was sampled from. Both rules accept a path's first ``tau``
tokens with probabilities that depend on `p`, `q` and the path alone, then emit one more token from
the residual (or, after the whole path, from the target). What is emitted follows the target's law
exactly, for any draft.

Axes: ``batch position vocab``; `position` of `q` and of the path is ``length``, of `p`
``length + 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

RULES = ("token", "block")


@dataclass(frozen=True)
class Verification:
    """What a rule makes of drafted paths, before any random number is drawn.

    Attributes
    ----------
    accepted_length_probs : (*batch, length + 1) tensor
        Probability that exactly the first 0 … length tokens are accepted; sums to one.
    next_token_probs : (*batch, length + 1, vocab) tensor
        Law of the token emitted after that many accepted ones.
    """

    accepted_length_probs: Float[Tensor, "*batch positions"]
    next_token_probs: Float[Tensor, "*batch positions vocab"]


def verify(
    p: Float[Tensor, "*batch positions vocab"],
    q: Float[Tensor, "*batch length vocab"],
    path: Int[Tensor, "*batch length"],
    rule: str,
) -> Verification:
    """Verify drafted paths.

    ``token`` (Leviathan et al. 2023; Chen et al. 2023) accepts token i with probability
    ``min(1, p_i / q_i)`` and stops at the first refusal; the correction follows ``max(p - q, 0)``,
    normalised.

    ``block`` (Sun et al. 2024) carries ``w_0 = 1, w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i))``,
    accepts the longest prefix i that passes with probability ``h_i = s_i / (s_i + 1 - w_i)``,
    ``s_i = sum_x max(w_i p_{i+1}(x) - q_{i+1}(x), 0)``, ``h_length = w_length``; the correction
    after i follows ``max(w_i p_{i+1} - q_{i+1}, 0)``, normalised.

    Parameters
    ----------
    p, q : (*batch, length + 1, vocab) and (*batch, length, vocab) tensors
        Laws of target and draft along the path.
    path : (*batch, length) long tensor
        The drafted tokens; a token the draft gives no mass has no business here and is refused.
    rule : {"token", "block"}

    Raises
    ------
    ValueError
        If the rule is unknown or the shapes do not match.

    References
    ----------
    leviathan2023fast, chen2023accelerating, sun2024block

    Examples
    --------
    >>> p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> q = torch.tensor([[1.0, 0.0]])
    >>> verify(p, q, torch.tensor([0]), "token").accepted_length_probs
    tensor([0.5000, 0.5000])
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: verification knows {', '.join(RULES)}")
    length = path.shape[-1]
    if p.shape[-2] != length + 1 or q.shape[-2] != length or p.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"laws of shapes {tuple(p.shape)} and {tuple(q.shape)} for paths of {length} tokens: "
            f"expected {length + 1} and "
            f"{length} positions over one vocabulary"
        )
    accepted, scale = accepted_lengths(p, q, path, rule)
    following = torch.cat([residual_law(p[..., :length, :], q, scale), p[..., length:, :]], -2)
    return Verification(accepted, following)


def accepted_lengths(
    p: Float[Tensor, "*batch positions vocab"],
    q: Float[Tensor, "*batch length vocab"],
    path: Int[Tensor, "*batch length"],
    rule: str,
) -> tuple[Float[Tensor, "*batch positions"], Float[Tensor, "*batch length"]]:
    """`verify` for a decoder, which needs the correction's law at one position only; arguments are
    not checked.

    Returns
    -------
    accepted_length_probs : (*batch, length + 1) tensor
    scale : (*batch, length) tensor
        The correction after i accepted tokens follows ``residual_law(p_i, q_i, scale_i)``; after
        all of them, the target.
    """
    ratio = _divide(_at(p[..., : path.shape[-1], :], path), _at(q, path), otherwise=0.0)
    return _token(ratio) if rule == "token" else _block(p, q, ratio)


def residual_law(
    p: Float[Tensor, "*batch vocab"],
    q: Float[Tensor, "*batch vocab"],
    scale: Float[Tensor, "*batch"] | float = 1.0,
) -> Float[Tensor, "*batch vocab"]:
    """``max(scale * p - q, 0)`` normalised; `p` where nothing is left (never asked for)."""
    scaled = scale.unsqueeze(-1) * p if isinstance(scale, Tensor) else scale * p
    left = (scaled - q).clamp_min(0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / torch.where(total > 0, total, 1.0), p)


def _token(ratio: Tensor) -> tuple[Tensor, Tensor]:
    passed = torch.cumprod(ratio.clamp_max(1), -1)
    reached = torch.cat([torch.ones_like(passed[..., :1]), passed], -1)
    stopped = torch.cat([reached[..., :-1] - reached[..., 1:], reached[..., -1:]], -1)
    return stopped.clamp_min(0), torch.ones_like(ratio)


def _block(p: Tensor, q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    length = q.shape[-2]
    running = [torch.ones_like(p[..., 0, 0])]
    for i in range(length):
        running.append((running[-1] * ratio[..., i]).clamp_max(1))
    w = torch.stack(running, -1)
    left = (w[..., :length, None] * p[..., :length, :] - q).clamp_min(0).sum(-1)
    # Where nothing is left and nothing was lost (p = q), every longer prefix passes: the limit of h
    # is one.
    h = torch.cat(
        [_divide(left, left + 1 - w[..., :length], otherwise=1.0), w[..., length:]], -1
    ).clamp_max(1)
    # The longest passing prefix: it passes and every longer one fails. The empty prefix always
    # passes.
    fails_after = torch.flip(torch.cumprod(torch.flip(1 - h[..., 1:], [-1]), -1), [-1])
    fails_after = torch.cat([fails_after, torch.ones_like(h[..., :1])], -1)
    passes = torch.cat([torch.ones_like(h[..., :1]), h[..., 1:]], -1)
    return passes * fails_after, w[..., :length]


def _at(laws: Tensor, path: Tensor) -> Tensor:
    return laws.gather(-1, path.unsqueeze(-1)).squeeze(-1)


def _divide(a: Tensor, b: Tensor, *, otherwise: float) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), otherwise)
