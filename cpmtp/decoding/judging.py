"""What a cycle keeps of its draft, and the token after it, in few operations.

At temperature 0 tokens are compared and nothing else is computed. Above it probabilities have the
precision of the model's scores, at least single, and only what the draft may emit is looked at,
with all other tokens as one more; what is left for the last token, a difference of numbers that may
be nearly the same, and the sums that are drawn from are in double precision.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cpmtp.acceptance.verification import accepted_lengths, residual_law
from cpmtp.drafts.blocks import Drafted
from cpmtp.sampling_law import SamplingLaw, draw


def judge(
    scores: Float[Tensor, "batch positions vocab"],
    drafted: Drafted,
    law: SamplingLaw,
    rule: str,
    uniform: Float[Tensor, "batch 2"],
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """How many drafted tokens each row keeps, and the token after them.

    Parameters
    ----------
    scores : (batch, length + 1, vocab) tensor
        The target's logits after the known token and each drafted one.
    drafted : Drafted
        Drawn under the same law.
    law : SamplingLaw
    rule : {"block", "token"}
    uniform : (batch, 2) tensor
        In [0, 1).

    Raises
    ------
    ValueError
        If a score is no number.
    """
    if law.temperature == 0:
        highest, best = scores.max(-1)  # (batch, length + 1) each
        _check_numbers(highest)
        kept = best[:, :-1] == drafted.tokens  # (batch, length)
        accepted = kept.long().cumprod(1).sum(1)  # (batch,)
        return accepted, best.gather(1, accepted[:, None]).squeeze(1)
    p = law.of_logits(scores)
    _check_numbers(p[..., 0])  # a logit that is no number makes its whole row none
    if not drafted.length:
        return drafted.tokens.new_zeros(len(p)), draw(p[:, 0], uniform[:, 1])
    return verified(p, drafted, rule, uniform)


def verified(
    p: Float[Tensor, "batch positions vocab"],
    drafted: Drafted,
    rule: str,
    uniform: Float[Tensor, "batch 2"],
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """The same of the target's processed probabilities, for a draft that has some."""
    assert drafted.probs is not None
    length, inside, q = drafted.length, p, drafted.probs
    if drafted.ids is not None:
        # What is never drafted is one token more, which the draft gives nothing.
        inside = p[..., drafted.ids]  # (batch, length + 1, support)
        others = (1 - inside.sum(-1, keepdim=True)).clamp_min(0)  # (batch, length + 1, 1)
        inside = torch.cat([inside, others], -1)  # (batch, length + 1, support + 1)
        q = functional.pad(q, (0, 1))  # (batch, length, support + 1)
    lengths, scale = accepted_lengths(inside, q, drafted.places, rule)
    accepted = draw(lengths, uniform[:, 0])

    rows, at = torch.arange(len(p), device=p.device), accepted.clamp_max(length - 1)
    whole, last = accepted == length, p[rows, accepted]  # (batch,) and (batch, vocab)
    # (batch, support)
    taken = drafted.probs[rows, at].double().masked_fill(whole[:, None], 0.0)
    shares = scale[rows, at].double().masked_fill(whole, 1.0)  # (batch,)
    return accepted, draw(_correction(last, taken, shares, drafted.ids), uniform[:, 1])


def _correction(
    p: Float[Tensor, "batch vocab"],
    taken: Float[Tensor, "batch support"],
    shares: Float[Tensor, " batch"],
    ids: Int[Tensor, " support"] | None,
) -> Float[Tensor, "batch vocab"]:
    """``max(share p - q, 0)``, which need not sum to one; `p` where nothing is left.

    A difference only where the draft has tokens: over all others it is p times a number.
    """
    if ids is None:
        return residual_law(p.double(), taken, shares)
    left = (shares[:, None] * p[:, ids] - taken).clamp_min(0)  # (batch, support)
    wide = shares.to(p.dtype)[:, None] * p  # (batch, vocab)
    wide.index_copy_(-1, ids, left.to(p.dtype))
    some = wide.amax(-1) > 0  # (batch,)
    return wide if bool(some.all()) else torch.where(some[:, None], wide, p)


def _check_numbers(values: Tensor) -> None:
    if bool(torch.isnan(values).any()):
        raise ValueError("the model returned NaN logits: check its weights and the prompt")
