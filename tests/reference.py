"""Slow, obvious versions: one sequence at a time, every prefix through a full forward pass, a
verifier that is simulated.
"""

from __future__ import annotations

import itertools
import math

import torch

from cpmtp.acceptance.verification import verify


def brute_force_joint(lm, context, horizon):
    """Every sequence's probability by the chain rule, one full forward pass per prefix; float64."""
    vocab = lm.vocab_size
    joint = torch.zeros((vocab,) * horizon, dtype=torch.float64)
    laws = {}
    for sequence in itertools.product(range(vocab), repeat=horizon):
        prob = 1.0
        for k in range(horizon):
            if sequence[:k] not in laws:
                row = torch.cat([context, torch.tensor(sequence[:k], dtype=torch.long)])[None]
                laws[sequence[:k]] = lm.next_token_log_probs(row)[0].double().exp()
            prob *= float(laws[sequence[:k]][sequence[k]])
        joint[sequence] = prob
    return joint


def full_pass_joint(lm, context, horizon):
    """The same for vocabularies where Python loops over all sequences would take minutes; returns
    the last conditionals too.
    """
    vocab = lm.vocab_size
    joint, conditionals = torch.ones(1, dtype=torch.float64), []
    for depth in range(horizon):
        prefixes = torch.tensor(
            list(itertools.product(range(vocab), repeat=depth)), dtype=torch.long
        ).view(vocab**depth, depth)
        rows = torch.cat([context.expand(len(prefixes), -1), prefixes], 1)
        log_probs = (
            torch.cat([lm.next_token_log_probs(part) for part in rows.split(64)]).double().cpu()
        )
        conditionals.append(log_probs)
        joint = (joint[:, None] * log_probs.exp()).flatten()
    return joint.view((vocab,) * horizon), conditionals


def conditionals(joint: torch.Tensor, sequence) -> list[torch.Tensor]:
    """The law of each token of a sequence, position by position."""
    laws, left = [], joint
    for token in sequence:
        mass = left.reshape(len(joint), -1).sum(1)
        laws.append(mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(mass)))
        left = left[token]
    return laws


def brute_force_survival(
    target: torch.Tensor,
    draft: torch.Tensor,
    rule: str,
    first_token: str = "draft",
    *,
    epsilon: float = 0.3,
    delta: float = 0.09,
) -> torch.Tensor:
    """``S_1 … S_n`` by the definitions, over all sequences of two dense joints.

    A first token from the target conditions the draft; one that the draft gives no mass leaves it
    as it was before.
    """
    found = torch.zeros(target.ndim, dtype=torch.float64)
    if first_token == "draft":
        for k in range(1, target.ndim + 1):
            for x in itertools.product(range(len(target)), repeat=k):
                found[k - 1] += _survives(target, draft, x, rule, epsilon, delta)
        return found
    found[0] = 1.0
    prior = draft.sum(0)
    for token, mass in enumerate(target.reshape(len(target), -1).sum(1)):
        if mass > 0 and target.ndim > 1:
            given = draft[token] / draft[token].sum() if draft[token].sum() > 0 else prior
            found[1:] += mass * brute_force_survival(
                target[token] / mass, given, rule, epsilon=epsilon, delta=delta
            )
    return found


def _survives(
    target: torch.Tensor, draft: torch.Tensor, x, rule: str, epsilon: float, delta: float
) -> float:
    """The share of one sequence: what is drafted of it and emitted unchanged."""
    laws = conditionals(target, x)
    p = [law[token].item() for law, token in zip(laws, x, strict=True)]
    q = [law[token].item() for law, token in zip(conditionals(draft, x), x, strict=True)]
    if rule == "token":
        return math.prod(map(min, p, q))
    if rule == "coupling":
        return min(math.prod(p), math.prod(q))
    if rule == "block":
        kept = 1.0
        for i in range(1, len(x) + 1):
            kept = min(math.prod(q[:i]), kept * p[i - 1])
        return kept
    entropies = [-float(torch.special.xlogy(law, law).sum()) for law in laws]
    passes = [
        mine > min(epsilon, delta * math.exp(-h)) for mine, h in zip(p, entropies, strict=True)
    ]
    return math.prod(q) if all(passes) else 0.0


def emitted_law(
    target: torch.Tensor, draft: torch.Tensor, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Law of n+1 tokens a call emits, plain target sampling after the correction, and the law of
    the accepted length.

    `target` has n+1 axes, `draft` n. Every drafted path and every verdict is enumerated.
    """
    vocab, n = len(draft), draft.ndim
    law, lengths = torch.zeros_like(target), torch.zeros(n + 1, dtype=torch.float64)
    for path in itertools.product(range(vocab), repeat=n):
        mass = draft[path]
        if mass == 0:
            continue
        p = torch.stack(conditionals(target, (*path, 0)))
        q = torch.stack(conditionals(draft, path))
        outcome = verify(p, q, torch.tensor(path), rule)
        for accepted in range(n + 1):
            stopped = mass * outcome.accepted_length_probs[accepted]
            lengths[accepted] += stopped
            for token in range(vocab):
                emitted = (*path[:accepted], token)
                there = target[emitted]
                share = (
                    there / there.sum()
                    if there.sum() > 0
                    else torch.full_like(there, 1 / there.numel())
                )
                law[emitted] += stopped * outcome.next_token_probs[accepted, token] * share
    return law, lengths
