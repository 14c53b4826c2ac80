"""What a head can output where the vocabulary exceeds its width: logits that are an unembedding's
products with one vector.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.descent.text_factors import scaled
from cpmtp.decomposition.forms.chains import IMPOSSIBLE, Chains
from cpmtp.decomposition.forms.solving import Shape
from cpmtp.decomposition.restarts import NOTICEABLE_MASS
from cpmtp.decomposition.trees.chains import tree_counts
from cpmtp.decomposition.trees.forms import TreeForms
from cpmtp.decomposition.trees.neighbours import TreeGroups
from cpmtp.drafts.protocol import Draft
from cpmtp.prefix_tree import PrefixTree

# Of a least-squares step: what is added to its diagonal, as a share of the mean entry there.
_RIDGE = 1e-6
# Logits that a start is asked for at least.
_LOWEST = -20.0
# Halvings of a step that does not lower the divergence.
_MOST_HALVINGS = 8


def fit_readout(
    tree: PrefixTree,
    unembedding: Float[Tensor, "vocab d"] | None = None,
    *,
    transitions: tuple[Tensor, Tensor] | None = None,
    anchored: bool = True,
    passes: int = 12,
    least_mass: float = NOTICEABLE_MASS,
) -> tuple[Draft, float]:
    """The best single chain whose logits are products of an unembedding with one vector for each
    position (anchored: and first token); without one, of any logits.

    The problem is convex. Each pass is a least-squares step against an upper bound of the
    divergence's curvature, halved until the divergence falls.

    Parameters
    ----------
    tree : PrefixTree
    unembedding : (vocab, d) tensor, optional
    transitions : (left, right), optional
        Factors of others, (1 or steps, vocab, k) and (1 or steps, k, vocab); none: no correction.
    anchored : bool
    passes : int
    least_mass : float
        Anchored: first tokens of no more than this are left out, and earn one token.

    Returns
    -------
    draft : Draft
    kl : float
        Mean divergence in nats of what follows the first tokens that were fitted (anchored), or of
        the tree.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.prefix_tree import complete_joint
    >>> tree = complete_joint(separated_hmm(3, 8), torch.tensor([0]), 3, top_k=4)
    >>> narrow = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    >>> fit_readout(tree)[1] < fit_readout(tree, narrow)[1]
    True
    """
    forms = TreeForms.of(tree, anchored, least_mass)
    groups, steps = forms.groups, forms.groups.positions - 1
    if transitions is None:
        nothing = torch.zeros(1, tree.vocab_size, 1, dtype=torch.float64)
        transitions = (nothing, nothing.mT)  # (1, vocab, 1), (1, 1, vocab)
    left, right = (part.expand(steps, -1, -1) for part in transitions)
    shape = Shape(1, left.shape[-1], False, (left, right)).narrowed(groups.tokens)
    chains = shape.start(groups)
    logits = torch.full_like(chains.logits, IMPOSSIBLE)  # (1, trees, positions, 1, width)
    for number in range(len(groups.forest)):
        for position in range(steps + 1):
            probs, bias, ids = _tables(groups, chains, number, position)
            readout = None if unembedding is None else unembedding[ids].double()  # (size, d)
            found = _solved(probs, bias, readout, passes)
            logits[0, number, position, 0, : len(found)] = found
    chains = replace(chains, logits=logits)
    kl = float(tree_counts(groups, chains).kl[0])
    draft = forms.markov(chains)
    return draft, kl


def _tables(
    groups: TreeGroups, chains: Chains, number: int, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one tree and position: probabilities and corrections (tokens before, support), the
    support's ids.
    """
    forest = groups.forest
    ids = forest.support.ids[position][number]  # (size,)
    ids = ids[ids < forest.support.vocab_size]  # (support,)
    if position == 0:
        probs = forest.marginals[number, 0, : len(ids)][None]  # (1, support)
        return probs, torch.zeros_like(probs), ids
    pairs, counts = groups.pairs[position - 1], groups.shares_of_one[1][position - 1]
    mine = pairs.owners == number  # (pairs,)
    rows = int(groups.sizes(position - 1)[number])
    probs = torch.zeros(rows, len(ids), dtype=torch.float64)
    probs[pairs.before[mine], pairs.after[mine]] = counts[mine]
    left = chains.left[0, position - 1][groups.places[position - 1][number, :rows]]
    right = chains.right[0, position - 1][:, groups.places[position][number, : len(ids)]]
    return probs / probs.sum(), left @ right, ids  # (rows, support) each


def _solved(
    probs: Float[Tensor, "rows support"],
    bias: Float[Tensor, "rows support"],
    readout: Float[Tensor, "support d"] | None,
    passes: int,
) -> Float[Tensor, " support"]:
    """The logits of least divergence; with a readout among those that it makes."""
    wanted, rows = probs.sum(0), probs.sum(1, keepdim=True)  # (support,), (rows, 1)
    free = wanted.clamp_min(1e-30).log()  # (support,)
    if readout is None:
        return scaled(free, bias, probs, passes)
    weights = (wanted + 1 / len(wanted)) / 2  # (support,)
    start = scaled(free, bias, probs, passes).clamp_min(_LOWEST)  # (support,)
    logits = _projected(readout, weights, start)
    value = _missed(logits, bias, probs)
    for _ in range(passes):
        found = (rows * (logits + bias).softmax(-1)).sum(0).clamp_min(1e-12)  # (support,)
        step = _projected(readout, found, (wanted - found) / found)
        for _ in range(_MOST_HALVINGS):
            trial = _missed(logits + step, bias, probs)
            if trial < value:
                logits, value = logits + step, trial
                break
            step = step / 2
        else:
            break
    return logits


def _missed(logits: Tensor, bias: Tensor, probs: Tensor) -> float:
    """Cross entropy of what follows."""
    log_q = (logits + bias).log_softmax(-1)  # (rows, support)
    return float(-(probs * log_q.clamp_min(IMPOSSIBLE)).sum())


def _projected(
    readout: Float[Tensor, "support d"],
    weights: Float[Tensor, " support"],
    wanted: Float[Tensor, " support"],
) -> Float[Tensor, " support"]:
    """The nearest to some logits that the readout makes, up to a constant, by weighted squares.

    With a draft's own probabilities ``q`` as weights and ``(p - q) / q`` as what is wanted, a
    Newton step under the curvature ``diag(q) - q q^T``.
    """
    weights = weights / weights.sum()
    root = weights.sqrt()  # (support,)
    centred = readout - weights @ readout  # (support, d)
    weighted = root[:, None] * centred  # (support, d)
    error = root * (wanted - weights @ wanted)  # (support,)
    short = len(readout) <= readout.shape[1]
    gram = weighted @ weighted.mT if short else weighted.mT @ weighted
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    if short:
        return centred @ (weighted.mT @ torch.linalg.solve(gram, error))
    return centred @ torch.linalg.solve(gram, weighted.mT @ error)
