"""Learned heads against the exact joint: what they earn, and where tokens per call are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cpmtp.acceptance.implied import acceptance_profiles
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.divergence import divergences
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.heads.conditionals import path_conditionals
from cpmtp.heads.draft_head import DraftHead
from cpmtp.heads.losses import head_loss
from cpmtp.joint_distribution import (
    JointDistribution,
    check_joint_size,
    exact_joint,
    grid_rows,
)
from cpmtp.joint_distribution.given import as_token_ids, takes_what_is_given
from cpmtp.joint_distribution.progress import progress_bar


@torch.no_grad()
@takes_what_is_given
def head_draft(
    lm: Any, head: DraftHead, context: Int[Tensor, " time"], *, horizon: int | None = None
) -> CPDistribution | MarkovMixture | JointDistribution:
    """What the head drafts after one context, in the form `implied_acceptance` takes; float64.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
        The head's base model.
    context : (time,) long tensor
        At least one token.
    horizon : int, optional
        Only the first so many tokens; default: the head's own.

    Returns
    -------
    CPDistribution, MarkovMixture or JointDistribution
        Of a head of components, of one with transitions, of a recurrent one; over x_1 … x_n, from
        an anchored head with a batch axis over x_1 and one token less.

    Raises
    ------
    ValueError
        If the head does not know the horizon, or reads the text by a layer of its own.
    """
    horizon = head.horizon if horizon is None else horizon
    if not 2 <= horizon <= head.horizon:
        raise ValueError(f"horizon {horizon}: this head knows 2 to {head.horizon}")
    hidden = lm.hidden_states(context[None])[0, -1].float()  # (d,)
    if head.form == "recurrent":
        return _enumerated(head, hidden, horizon)
    if not head.anchored:
        return _double(head(hidden).marginal(horizon))
    first = torch.arange(head.vocab_size, device=hidden.device)
    draft = head(hidden.expand(head.vocab_size, -1), first)  # of (vocab, d)
    return _double(draft.marginal(horizon - 1))


def _enumerated(head: DraftHead, hidden: Float[Tensor, " d"], horizon: int) -> JointDistribution:
    """A recurrent head's joint, token by token after every prefix."""
    if head.over_text:
        raise ValueError(
            "a head with a layer over the text has no draft after a hidden state alone: see what "
            "it drafts along texts, by `forecast_cycles`"
        )
    vocab = head.vocab_size
    check_joint_size(vocab, horizon)
    prefixes = grid_rows(0, vocab ** (horizon - 1), vocab, horizon - 1).to(hidden.device)
    # What comes after a prefix is read by nobody, but the shapes stay.
    path = functional.pad(prefixes, (0, head.horizon - horizon + 1))  # (prefixes, horizon of head)
    rows = hidden.expand(len(path), 1, -1).to(head.maps)  # (prefixes, 1, d)
    features = head.features(rows, functional.pad(path, (1, 0)))
    logits = head.logits(rows, features, *head.weights()).double()
    found = path_conditionals(head, features.log_weights.double(), logits, path[:, None])
    whole = found.drafted.new_zeros(len(path), head.horizon - 1, vocab)
    drafted = whole.index_copy(-1, head.kept, found.drafted[:, 0]).cpu()  # (prefixes, later, vocab)

    probs = drafted.new_ones(vocab)
    if not head.anchored:
        there = head.places[prefixes[:, 0]] >= 0
        own = torch.where(there, found.scores[:, 0, 1, 0].exp(), 0.0).cpu()  # (prefixes,)
        probs = own[:: vocab ** (horizon - 2)]  # (vocab,)
    for k in range(horizon - 1):
        # Prefixes come in lexicographic order: one of each beginning.
        rows_after = drafted[:: vocab ** (horizon - 2 - k), k]  # (vocab ** (k + 1), vocab)
        probs = probs.unsqueeze(-1) * rows_after.view(*probs.shape, vocab)  # k + 2 token axes
    lead = tuple(range(1, horizon)) if head.anchored else tuple(range(horizon))
    return JointDistribution(probs / probs.sum(lead, keepdim=True), horizon - head.anchored)


@torch.no_grad()
@takes_what_is_given
def held_out_survival(
    lm: Any, head: DraftHead, tokens: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows horizon"]:
    """Survival under block verification, first token from the target, averaged over each row's
    positions.

    Unbiased for contexts like the rows'. Rows are independent of each other; positions within one
    are not.
    """
    rows = []
    for row in tokens.split(1):
        row = row.to(lm.device)
        rows.append(
            head_loss(head, lm.hidden_states(row).float(), row, lm.unembed).survival.cpu().double()
        )
    return torch.stack(rows)


def reachable_survival(
    head: DraftHead, tokens: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows horizon"]:
    """The probability that x_2 … x_k are all among what the head may draft, k = 1 … n, averaged
    over each row's positions: no head of this draft vocabulary survives more often, whatever it
    learns.

    Examples
    --------
    >>> head = DraftHead(hidden_size=2, vocab_size=3, horizon=2, rank=1, vocabulary=[0, 1])
    >>> reachable_survival(head, torch.tensor([[0, 0, 1, 2]]))
    tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    inside = (head.places[tokens] >= 0).double()  # (rows, length)
    later = inside[:, 2:].unfold(1, head.horizon - 1, 1)  # (rows, positions, horizon - 1)
    reached = later.cumprod(-1).mean(1)
    return torch.cat([torch.ones_like(reached[:, :1]), reached], 1)


@takes_what_is_given
def waterfall(
    lm: Any,
    heads: DraftHead | Sequence[DraftHead],
    contexts: Mapping[str, Any] | Sequence[Any],
    *,
    horizon: int = 3,
    rule: str = "token",
    seed: int = 0,
) -> pd.DataFrame:
    """Where tokens per call are lost: from the horizon to the best drafts of a head's form and rank
    after each context, to what the head learned.

    One row per context and head. ``exact_limit`` is what a draft equal to the target earns (the
    horizon, when the target gives the first token); ``acceptance_fit`` and ``em_fit`` are the fits
    of the head's form and rank to the context's joint, anchored where the head is, and ``learned``
    is the head.
    ``rank_gap = exact_limit - acceptance_fit``, ``objective_gap = acceptance_fit - em_fit`` and
    ``learning_gap = em_fit - learned`` add up to what is missing.

    What a head would output is free in the fits, what it stores is not: fits of the Markov forms
    keep the head's own left and right factors, which it learned from other texts. Beside them
    ``own_transitions`` is the `em` fit whose factors are the context's own, too (those of one
    context are shared by its first tokens; the gates are not); NaN where there are none. A
    recurrent head reads all that was drafted before: its ceiling is the exact limit.

    Parameters
    ----------
    heads : DraftHead, or several
    contexts : mapping of str to (time,) long tensors
        Held out from the heads' training, or texts; the names go into the table (of a sequence the
        numbers).
    horizon : int
        Tokens of the dense joint; at most the heads'.
    rule : {"token", "block"}

    Raises
    ------
    ValueError
        As `head_draft` does, for example if a head reads the text by a layer of its own.
    """
    heads = [heads] if isinstance(heads, DraftHead) else heads
    named = contexts if isinstance(contexts, Mapping) else dict(enumerate(contexts))
    rows: list[dict] = []
    bar = progress_bar(len(named) * len(heads), "head")
    for name, given in named.items():
        context = as_token_ids(given, lm)
        joint = exact_joint(lm, context, horizon=horizon)
        shared: dict[tuple[int, bool], dict[str, float]] = {}
        for head in heads:
            learned = learned_scores(lm, head, context, joint, rule=rule)
            shape = (head.rank, head.anchored)
            if head.form != "cp":
                found = head_ceilings(joint, head, rule=rule, seed=seed)
            else:
                if shape not in shared:
                    shared[shape] = rank_ceilings(joint, *shape, rule=rule, seed=seed)
                found = shared[shape]
            key = {
                "model": lm.name,
                "context": str(name),
                "horizon": horizon,
                "form": head.form,
                "rank": head.rank,
                "transition_rank": head.transition_rank,
                "anchored": head.anchored,
            }
            limit = {"rule": rule, "exact_limit": float(horizon)}
            rows.append(key | limit | {"own_transitions": float("nan")} | found | learned)
            bar.update()
    bar.close()
    table = pd.DataFrame(rows)
    table["rank_gap"] = table["exact_limit"] - table["acceptance_fit"]
    table["objective_gap"] = table["acceptance_fit"] - table["em_fit"]
    table["learning_gap"] = table["em_fit"] - table["learned"]
    return table


def head_ceilings(
    joint: JointDistribution,
    head: DraftHead,
    *,
    rule: str = "token",
    seed: int = 0,
    own: bool = True,
) -> dict[str, float]:
    """Tokens per call of the best drafts of a head's form and sizes after one context, first token
    from the target: ``em_fit``, ``acceptance_fit`` and, of the Markov forms and if asked for,
    ``own_transitions``; see `waterfall`.
    """
    if head.form == "recurrent":
        return {f"{method}_fit": float(joint.horizon) for method in ("em", "acceptance")}
    if not head.has_transitions:
        return rank_ceilings(joint, head.rank, head.anchored, rule=rule, seed=seed)
    asked: dict[str, Any] = {"form": head.form, "gated": head.gated}
    common: dict[str, Any] = {"rule": rule, "seed": seed}
    left, right = head.left.detach().double().cpu(), head.right.detach().double().cpu()
    # What is never drafted has no column of its own: (transition_rank, vocab)
    right = right.new_zeros(len(right), head.vocab_size).index_copy(-1, head.kept.cpu(), right)
    kept = asked | {"transitions": (left[None], right[None])}
    found = rank_ceilings(joint, head.rank, head.anchored, **common, **kept)
    if own:
        asked["transition_rank"] = head.transition_rank
        asked["gated"] = head.gated and head.anchored and head.transition_rank < head.vocab_size
        found["own_transitions"] = _earned(joint, head.rank, "em", head.anchored, **common, **asked)
    return found


def rank_ceilings(
    joint: JointDistribution,
    rank: int,
    anchored: bool,
    *,
    rule: str = "token",
    seed: int = 0,
    **form: Any,
) -> dict[str, float]:
    """Tokens per call of a context's fits of one rank, first token from the target: ``em_fit`` and
    ``acceptance_fit``.

    Parameters
    ----------
    form
        `form`, `transition_rank`, `gated`, `transitions`, as for `fit`.
    """
    return {
        f"{method}_fit": _earned(joint, rank, method, anchored, rule=rule, seed=seed, **form)
        for method in ("em", "acceptance")
    }


def _earned(
    joint: JointDistribution,
    rank: int,
    method: str,
    anchored: bool,
    *,
    rule: str,
    **options: Any,
) -> float:
    # Only ceilings need fits and what those import; a head can be judged without.
    from cpmtp.decomposition.fitting import fit

    draft = fit(joint, rank, method, anchored=anchored, rule=rule, **options).distribution
    return float(acceptance_profiles(joint, draft, (rule,))[rule].survival.sum())


def learned_scores(
    lm: Any,
    head: DraftHead,
    context: Int[Tensor, " time"],
    joint: JointDistribution,
    *,
    rule: str = "token",
) -> dict[str, float]:
    """What the draft after `context` earns: ``learned`` tokens per call, ``survival_1`` …;
    unanchored also divergences.
    """
    draft = head_draft(lm, head, context, horizon=joint.horizon)
    profile = acceptance_profiles(joint, draft, (rule,))[rule]
    found = {"learned": float(profile.survival.sum())}
    found |= {f"survival_{k + 1}": s for k, s in enumerate(profile.survival.tolist())}
    if not head.anchored:
        distance = divergences(joint, draft)
        found |= {
            "kl_nats": float(distance.kl_nats),
            "total_variation": float(distance.total_variation),
        }
    return found


def _double(draft: CPDistribution | MarkovMixture) -> CPDistribution | MarkovMixture:
    def normalised(values: Tensor, dim: int) -> Tensor:
        values = values.double().cpu()
        return values / values.sum(dim, keepdim=True)

    weights, support = normalised(draft.weights, -1), draft.support
    if isinstance(draft, CPDistribution):
        return CPDistribution(weights, [normalised(f, -2) for f in draft.factors], support)
    left, right = draft.left.double().cpu(), draft.right.double().cpu()
    gate = None if draft.gate is None else draft.gate.double().cpu()
    return MarkovMixture(weights, draft.logits.double().cpu(), left, right, gate, support)
