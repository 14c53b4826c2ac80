"""What a draft says of each token along given paths, of every form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.heads.draft_head import DraftHead


@dataclass(frozen=True)
class PathConditionals:
    """A draft along paths.

    Attributes
    ----------
    scores : (*batch, drafted + 1, rank) tensor
        ``log w_a + log Q_a`` of the first 0 … drafted modelled tokens, in each component; a token
        that is never drafted adds nothing.
    drafted : (*batch, horizon - 1, support) tensor
        The conditionals of x_2 … x_n, each given the path before it.
    places : (*batch, horizon - 1) long tensor
        Where the path's x_2 … x_n stand in the support; 0 where they are not in it.
    inside : (*batch, horizon - 1) bool tensor or None
        Whether they are; None: all are.
    """

    scores: Tensor
    drafted: Tensor
    places: Tensor
    inside: Tensor | None

    def of_path(self) -> Float[Tensor, "*batch later"]:
        """The conditional of each token of the path; 0 of one that is never drafted."""
        found = self.drafted.gather(-1, self.places.unsqueeze(-1)).squeeze(-1)  # (*batch, later)
        return found if self.inside is None else torch.where(self.inside, found, 0.0)


def path_conditionals(
    head: DraftHead,
    log_weights: Float[Tensor, "*batch rank"],
    logits: Float[Tensor, "*batch drafted rank support"],
    path: Int[Tensor, "*batch horizon"],
    *,
    mixed: bool = True,
) -> PathConditionals:
    """Conditionals of x_2 … x_n along paths, from the head's logits along them.

    Parameters
    ----------
    head : DraftHead
    log_weights, logits : tensors
        Of the head at each position.
    path : (*batch, horizon) long tensor
        x_1 … x_n.
    mixed : bool
        Whether the gradient goes through the conditionals; else through the scores alone.
    """
    places = head.places[path]  # (*batch, horizon)
    inside = None if head.vocabulary is None else places >= 0
    places = places.clamp_min(0)
    modelled = slice(int(head.anchored), None)
    # (*batch, drafted, rank)
    log_path, probs = _TokenProbs.apply(logits, places[..., modelled])
    if inside is not None:
        log_path = torch.where(inside[..., modelled, None], log_path, 0.0)
    before = log_weights.unsqueeze(-2)  # (*batch, 1, rank)
    scores = torch.cat([before, before + log_path.cumsum(-2)], -2)  # (*batch, drafted + 1, rank)
    with torch.set_grad_enabled(torch.is_grad_enabled() and mixed):
        if head.rank == 1:
            along = probs.squeeze(-2)  # (*batch, drafted, support)
        else:
            posterior = scores[..., :-1, :].softmax(-1)  # (*batch, drafted, rank)
            along = (posterior.unsqueeze(-2) @ probs).squeeze(-2)  # (*batch, drafted, support)
    drafted = along[..., head.drafted - head.horizon + 1 :, :]  # (*batch, horizon - 1, support)
    later = None if inside is None else inside[..., 1:]
    return PathConditionals(scores, drafted, places[..., 1:], later)


class _TokenProbs(torch.autograd.Function):
    """Logits (…, rank, support) to the given tokens' log-probabilities (…, rank) and to all
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
            logits = probs * -of_chosen[..., None]  # (…, rank, support)
        else:
            inner = torch.linalg.vecdot(probs, of_probs)  # (…, rank)
            logits = (of_probs - (inner + of_chosen)[..., None]).mul_(probs)  # (…, rank, support)
        return logits.scatter_add_(-1, at, of_chosen[..., None]), None  # (…, rank, support)
