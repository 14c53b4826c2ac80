"""The rules of acceptance: their names, their one formula, and what they make of a drafted path.

What a rule accepts of a continuation x of a prefix is the lesser of two products, the target's
conditional p(x) and the draft's q(x), each times a mass of the prefix:

========  =======================  ======================  ============================
rule      p(x) is multiplied with  q(x) is multiplied with  accepted
========  =======================  ======================  ============================
token     accepted mass A          accepted mass A         ``A min(p, q)``
block     accepted mass A          draft's mass Q          ``min(A p, Q q)``
coupling  target's mass P          draft's mass Q          ``min(P p, Q q)``, the bound
========  =======================  ======================  ============================

Dense sums, trees, sampled texts, cycles, decoding and the heads' loss all read this table; they
differ in the unit in which they count mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.sampling_law import ratio

# Which mass of the prefix multiplies the target's conditional, and which the draft's.
_SCALES = {
    "token": ("accepted", "accepted"),
    "block": ("accepted", "draft"),
    "coupling": ("target", "draft"),
}
VERIFIED = ("token", "block")  # what a decoder can do
SUMMED = tuple(_SCALES)
RULES = (*SUMMED, "greedy", "typical")
FIRST_TOKENS = ("target", "draft")


def check_rule(
    rule: str, known: tuple[str, ...] = RULES, *, temperature: float | None = None
) -> None:
    """Refuse a rule that is not known here, and greedy matching above temperature 0.

    Raises
    ------
    ValueError
        With the rules there are.
    """
    if rule not in known:
        raise ValueError(f"unknown rule {rule!r}: expected one of {', '.join(known)}")
    if rule == "greedy" and temperature is not None and temperature > 0:
        raise ValueError(
            f"rule 'greedy' at temperature {temperature}: it follows the argmax and is lossless "
            "at temperature 0 only; use token or block"
        )


def check_first_token(first_token: str) -> None:
    """Refuse an unknown source of the first token.

    Raises
    ------
    ValueError
        With the sources there are.
    """
    if first_token not in FIRST_TOKENS:
        raise ValueError(
            f"unknown first_token {first_token!r}: expected one of {', '.join(FIRST_TOKENS)}"
        )


@dataclass(frozen=True)
class PrefixMasses:
    """What is known of some prefixes, in any one unit.

    Attributes
    ----------
    target, draft : (*prefixes,) tensors
        ``P(x_1:k)`` and ``Q(x_1:k)``.
    accepted : (*prefixes,) tensor
        What the rule has accepted of them.
    """

    target: Float[Tensor, "*prefixes"]
    draft: Float[Tensor, "*prefixes"]
    accepted: Float[Tensor, "*prefixes"]

    def __getitem__(self, index) -> PrefixMasses:
        return PrefixMasses(self.target[index], self.draft[index], self.accepted[index])


def accepted_mass(rule: str, prefix: PrefixMasses, p: Tensor, q: Tensor) -> Tensor:
    """What a rule accepts of continuations with conditionals `p` and `q` (shaped to broadcast)."""
    of_target, of_draft = (getattr(prefix, name) for name in _SCALES[rule])
    return torch.minimum(of_target * p, of_draft * q)


def joint_scales(rule: str, prefix: PrefixMasses) -> tuple[Tensor | None, Tensor | None]:
    """What to multiply joint masses of continuations with, where these are there already.

    ``min(a P(x_1:k), b Q(x_1:k))`` is then the accepted mass; None stands for one, so that nothing
    is divided by what it is multiplied with.
    """
    of_target, of_draft = _SCALES[rule]
    return (
        _share(prefix, of_target, "target"),
        _share(prefix, of_draft, "draft"),
    )


def _share(prefix: PrefixMasses, wanted: str, own: str) -> Tensor | None:
    if wanted == own:
        return None
    return ratio(getattr(prefix, wanted), getattr(prefix, own), otherwise=0.0)


def survival_along(ratios: Float[Tensor, "*texts drafted"], rule: str) -> Tensor:
    """Probability that the first k drafted tokens survive, along texts drawn from the target.

    Counted per unit of the target's mass, along a text P and p are one and q is the ratio.

    Parameters
    ----------
    ratios : (*texts, drafted) tensor
        ``q / p`` of each token of the text given those before it.

    Returns
    -------
    (*texts, drafted) tensor
        ``token``: ``prod min(1, q / p)``; ``block``: ``min(1, R_1, …, R_k)``, R the product.

    Examples
    --------
    >>> survival_along(torch.tensor([2.0, 0.5, 2.0]), "block")
    tensor([1., 1., 1.])
    """
    one = torch.ones_like(ratios[..., 0])
    masses, found = PrefixMasses(one, one, one), []
    for ratio_here in ratios.unbind(-1):
        accepted = accepted_mass(rule, masses, one, ratio_here)
        masses = PrefixMasses(one, masses.draft * ratio_here, accepted)
        found.append(accepted)
    return torch.stack(found, -1)  # (*texts, drafted)


def accepted_lengths(
    p: Float[Tensor, "*batch positions vocab"],
    q: Float[Tensor, "*batch length vocab"],
    path: Int[Tensor, "*batch length"],
    rule: str,
) -> tuple[Float[Tensor, "*batch positions"], Float[Tensor, "*batch length"]]:
    """What a rule makes of drafted paths, before any random number is drawn.

    ``token`` (Leviathan et al. 2023; Chen et al. 2023) accepts token i with probability ``min(1,
    p_i / q_i)`` and stops at the first refusal; the correction follows ``max(p - q, 0)``,
    normalised.

    ``block`` (Sun et al. 2024) carries ``w_0 = 1, w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i))``,
    accepts the longest prefix i that passes with probability ``h_i = s_i / (s_i + 1 - w_i)``, ``s_i
    = sum_x max(w_i p_{i+1}(x) - q_{i+1}(x), 0)``, ``h_length = w_length``; the correction after i
    follows ``max(w_i p_{i+1} - q_{i+1}, 0)``, normalised.

    Nothing is checked: a decoder asks for it at every call.

    Parameters
    ----------
    p, q : (*batch, length + 1, vocab) and (*batch, length, vocab) tensors
        Distributions of target and draft along the path.
    path : (*batch, length) long tensor
        The drafted tokens; none that the draft gives no mass.
    rule : {"token", "block"}

    Returns
    -------
    accepted_length_probs : (*batch, length + 1) tensor
        Probability that exactly the first 0 … length tokens are accepted; sums to one.
    scale : (*batch, length) tensor
        The correction after i accepted tokens follows ``residual_law(p_i, q_i, scale_i)``; after
        all of them, the target.

    References
    ----------
    leviathan2023fast, chen2023accelerating, sun2024block

    Examples
    --------
    >>> p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> q = torch.tensor([[1.0, 0.0]])
    >>> accepted_lengths(p, q, torch.tensor([0]), "token")[0]
    tensor([0.5000, 0.5000])
    """
    length = path.shape[-1]
    drafted = q.gather(-1, path.unsqueeze(-1)).squeeze(-1)  # (*batch, length)
    wanted = p[..., :length, :].gather(-1, path.unsqueeze(-1)).squeeze(-1)  # (*batch, length)
    w = _accepted_per_draft(ratio(wanted, drafted, otherwise=0.0), rule)  # (*batch, length + 1)
    if rule == "token":
        stopped = torch.cat([w[..., :-1] - w[..., 1:], w[..., -1:]], -1)  # (*batch, length + 1)
        return stopped.clamp_min(0), torch.ones_like(drafted)

    before = w[..., :length]  # (*batch, length)
    left = (before.unsqueeze(-1) * p[..., :length, :] - q).clamp_min(0).sum(-1)  # (*batch, length)
    # Where nothing is left and nothing was lost (p = q), every longer prefix passes: h is one.
    inner = ratio(left, left + 1 - before, otherwise=1.0)
    h = torch.cat([inner, w[..., length:]], -1).clamp_max(1)  # (*batch, length + 1)

    # The longest passing prefix: it passes and every longer one fails. The empty one always passes.
    longer_fail = torch.flip(torch.cumprod(torch.flip(1 - h[..., 1:], [-1]), -1), [-1])
    longer_fail = torch.cat([longer_fail, torch.ones_like(h[..., :1])], -1)  # (*batch, length + 1)
    passes = torch.cat([torch.ones_like(h[..., :1]), h[..., 1:]], -1)  # (*batch, length + 1)
    return passes * longer_fail, before


def _accepted_per_draft(ratios: Tensor, rule: str) -> Tensor:
    """``w_0 … w_length``: the accepted mass of each beginning of a path per unit of the draft's.

    Counted so, Q and q are one along the path, and p is the ratio ``p / q``.
    """
    one = torch.ones(ratios.shape[:-1], dtype=ratios.dtype, device=ratios.device)
    found = [one]
    for ratio_here in ratios.unbind(-1):
        masses = PrefixMasses(one, one, found[-1])
        found.append(accepted_mass(rule, masses, ratio_here, one))
    return torch.stack(found, -1)  # (*batch, length + 1)


def residual_law(
    p: Float[Tensor, "*batch vocab"],
    q: Float[Tensor, "*batch vocab"],
    scale: Float[Tensor, "*batch"] | float = 1.0,
) -> Float[Tensor, "*batch vocab"]:
    """``max(scale * p - q, 0)`` normalised; `p` where nothing is left (never asked for)."""
    scaled = scale.unsqueeze(-1) * p if isinstance(scale, Tensor) else scale * p  # (*batch, vocab)
    left = (scaled - q).clamp_min(0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / torch.where(total > 0, total, 1.0), p)
