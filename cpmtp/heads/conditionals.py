"""What a draft says of each token along given paths, of every form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

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
    there = None if inside is None else inside[..., modelled, None]
    # (*batch, drafted + 1, rank) and (*batch, drafted, support)
    scores, along = _Along.apply(logits, log_weights, places[..., modelled], there)
    along = along if mixed else along.detach()
    drafted = along[..., head.drafted - head.horizon + 1 :, :]  # (*batch, horizon - 1, support)
    later = None if inside is None else inside[..., 1:]
    return PathConditionals(scores, drafted, places[..., 1:], later)


class _Along(torch.autograd.Function):
    """Logits (*batch, drafted, rank, support) and log-weights (*batch, rank) to the scores along
    the given tokens, and to the conditionals that these scores mix.

    What autograd would keep of it all is here one tensor of the logits' size, and the way back
    makes one more: the conditionals' gradient reaches logits and posterior weights in one pass.
    """

    @staticmethod
    def forward(
        ctx, logits: Tensor, log_weights: Tensor, tokens: Tensor, inside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        at = tokens[..., None, None].expand(*logits.shape[:-1], 1)  # (*batch, drafted, rank, 1)
        log_probs = logits.log_softmax(-1)
        log_path = log_probs.gather(-1, at).squeeze(-1)  # (*batch, drafted, rank)
        if inside is not None:
            log_path = torch.where(inside, log_path, 0.0)
        before = log_weights.unsqueeze(-2)  # (*batch, 1, rank)
        scores = torch.cat([before, before + log_path.cumsum(-2)], -2)
        posterior = scores[..., :-1, :].softmax(-1)  # (*batch, drafted, rank)

        probs = log_probs.exp_()
        if probs.shape[-2] == 1:
            along = probs.squeeze(-2).clone()  # (*batch, drafted, support)
        else:
            along = (posterior.unsqueeze(-2) @ probs).squeeze(-2)  # (*batch, drafted, support)
        ctx.save_for_backward(probs, posterior, at, inside)
        return scores, along

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_scores, of_along = gradients
        probs, posterior, at, inside = ctx.saved_tensors
        if of_along is None and of_scores is None:
            return None, None, None, None
        if of_scores is None:
            of_scores = posterior.new_zeros((*at.shape[:-3], at.shape[-3] + 1, at.shape[-2]))
        own = torch.zeros_like(posterior)
        if of_along is not None:
            each = (probs @ of_along.unsqueeze(-1)).squeeze(-1)  # (*batch, drafted, rank)
            own = posterior * each
            moved = own - posterior * own.sum(-1, keepdim=True)
            of_scores = of_scores + functional.pad(moved, (0, 0, 0, 1))  # of all but the last

        # A token's log-probability is in every score after it.
        of_path = of_scores[..., 1:, :].flip(-2).cumsum(-2).flip(-2)  # (*batch, drafted, rank)
        if inside is not None:
            of_path = torch.where(inside, of_path, 0.0)
        less = (own + of_path).unsqueeze(-1)  # (*batch, drafted, rank, 1)
        if of_along is None:
            logits = probs * -less
        else:
            logits = posterior.unsqueeze(-1) * of_along.unsqueeze(-2)  # (*batch, drafted, …)
            logits.sub_(less).mul_(probs)
        logits.scatter_add_(-1, at, of_path.unsqueeze(-1))
        return logits, of_scores.sum(-2), None, None
