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
    """The same for vocabularies where Python loops over all sequences would take minutes; returns the last conditionals too."""
    vocab = lm.vocab_size
    joint, conditionals = torch.ones(1, dtype=torch.float64), []
    for depth in range(horizon):
        prefixes = torch.tensor(list(itertools.product(range(vocab), repeat=depth)), dtype=torch.long).view(vocab**depth, depth)
        rows = torch.cat([context.expand(len(prefixes), -1), prefixes], 1)
        log_probs = torch.cat([lm.next_token_log_probs(part) for part in rows.split(64)]).double().cpu()
        conditionals.append(log_probs)
        joint = (joint[:, None] * log_probs.exp()).flatten()
    return joint.view((vocab,) * horizon), conditionals
