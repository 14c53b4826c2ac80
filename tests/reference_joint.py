"""Slow, obvious versions of the joint distribution: every prefix through a full forward pass."""

from __future__ import annotations

import itertools

import torch


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


def brute_force_survival(joint, draft, rule, first_token, *, epsilon=0.3, delta=0.09):
    """Survival by the definitions, over all sequences of two dense joints of positive
    probabilities.
    """
    horizon, vocab = joint.ndim, joint.shape[0]
    if first_token == "target":
        axes = tuple(range(1, horizon))
        first, own = joint.sum(dim=axes), draft.sum(dim=axes)
        draft = draft * (first / own).view(-1, *[1] * (horizon - 1))
    start = 2 if first_token == "target" else 1
    survival = [1.0] * (start - 1)
    for k in range(start, horizon + 1):
        total = 0.0
        for x in itertools.product(range(vocab), repeat=k):
            total += _term(joint, draft, x, rule, start, epsilon, delta)
        survival.append(total)
    return torch.tensor(survival, dtype=torch.float64)


def _term(joint, draft, x, rule, start, epsilon, delta):
    p = [float(joint[x[:i]].sum()) for i in range(len(x) + 1)]
    q = [float(draft[x[:i]].sum()) for i in range(len(x) + 1)]
    if rule == "coupling":
        return min(p[-1], q[-1])
    if rule == "token":
        kept = p[start - 1]
        for i in range(start, len(x) + 1):
            kept *= min(p[i] / p[i - 1], q[i] / q[i - 1])
        return kept
    if rule == "block":
        kept = p[start - 1]
        for i in range(start, len(x) + 1):
            kept = min(q[i], kept * p[i] / p[i - 1])
        return kept
    for i in range(start, len(x) + 1):
        law = joint[x[: i - 1]].reshape(joint.shape[0], -1).sum(1) / p[i - 1]
        entropy = float(-(law * law.log()).sum())
        if p[i] / p[i - 1] <= min(epsilon, delta * 2.718281828459045**-entropy):
            return 0.0
    return q[-1]
