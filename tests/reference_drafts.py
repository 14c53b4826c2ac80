"""The definitions of the forms, entry by entry, without batch axes and without a support."""

from __future__ import annotations

import itertools
import math

import torch

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.hmm_distribution import HMMDistribution


def naive_tensor(draft) -> torch.Tensor:
    """All probabilities of a draft, sequence by sequence."""
    shape = (draft.vocab_size,) * draft.horizon
    total = torch.zeros(shape, dtype=draft.weights.dtype)
    one = _markov if not hasattr(draft, "factors") else _hmm
    for tokens in itertools.product(range(draft.vocab_size), repeat=draft.horizon):
        total[tokens] = one(draft, tokens)
    return total


def _hmm(draft: CPDistribution | HMMDistribution, tokens: tuple[int, ...]) -> float:
    """Over all paths of states; of a CP distribution the state never changes."""
    total = 0.0
    for states in itertools.product(range(draft.rank), repeat=draft.horizon):
        term = draft.weights[states[0]].item()
        for i, (token, state) in enumerate(zip(tokens, states, strict=True)):
            term *= draft.factors[i][token, state].item()
            if i and isinstance(draft, HMMDistribution):
                term *= draft.transitions[i - 1, states[i - 1], state].item()
            elif i:
                term *= state == states[i - 1]
        total += term
    return total


def _markov(draft, tokens: tuple[int, ...]) -> float:
    total = 0.0
    for a in range(draft.rank):
        term = draft.weights[a].item()
        for i, token in enumerate(tokens):
            scores = []
            for v in range(draft.vocab_size):
                score = draft.logits[i, a, v].item()
                if i:
                    at = i - 1 if len(draft.left) > 1 else 0
                    to = i - 1 if len(draft.right) > 1 else 0
                    for c in range(draft.transition_rank):
                        left = draft.left[at, tokens[i - 1], c].item()
                        score += left * draft.gate[i - 1, c].item() * draft.right[to, c, v].item()
                scores.append(score)
            highest = max(scores)
            exps = [math.exp(score - highest) for score in scores]
            term *= exps[token] / sum(exps)
        total += term
    return total
