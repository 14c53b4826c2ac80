"""Slow, obvious versions: one sequence at a time, and a verifier that is simulated."""

from __future__ import annotations

import itertools
import math

import torch

from cpmtp.acceptance.verification import verify


def conditionals(joint: torch.Tensor, sequence) -> list[torch.Tensor]:
    """The law of each token of a sequence, position by position."""
    laws, left = [], joint
    for token in sequence:
        mass = left.reshape(len(joint), -1).sum(1)
        laws.append(mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(mass)))
        left = left[token]
    return laws


def survival(target: torch.Tensor, draft: torch.Tensor, rule: str) -> torch.Tensor:
    """``S_1 … S_n`` with the first token drafted, by the definitions, sequence by sequence."""
    n, vocab = target.ndim, len(target)
    found = torch.zeros(n, dtype=torch.float64)
    for k in range(1, n + 1):
        for x in itertools.product(range(vocab), repeat=k):
            p, q = (
                [law[t].item() for law, t in zip(conditionals(j, x), x, strict=True)]
                for j in (target, draft)
            )
            if rule == "token":
                found[k - 1] += math.prod(map(min, p, q))
            elif rule == "coupling":
                found[k - 1] += min(math.prod(p), math.prod(q))
            elif rule == "block":
                kept = 1.0
                for i in range(1, k + 1):
                    kept = min(math.prod(q[:i]), kept * p[i - 1])
                found[k - 1] += kept
    return found


def told_the_first(target: torch.Tensor, draft: torch.Tensor, rule: str) -> torch.Tensor:
    """``S_1 … S_n`` with the first token from the target."""
    found = torch.zeros(target.ndim, dtype=torch.float64)
    found[0] = 1.0
    prior = draft.sum(0)
    for token, mass in enumerate(target.reshape(len(target), -1).sum(1)):
        if mass > 0:
            given = draft[token] / draft[token].sum() if draft[token].sum() > 0 else prior
            found[1:] += mass * survival(target[token] / mass, given, rule)
    return found


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


def random_joint(vocab: int, horizon: int, seed: int, zeros: float = 0.0) -> torch.Tensor:
    """A joint with a share of zero entries."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand((vocab,) * horizon, generator=generator, dtype=torch.float64) ** 3
    probs[torch.rand(probs.shape, generator=generator) < zeros] = 0
    probs.view(-1)[0] += 1e-3
    return probs / probs.sum()
