"""The complete joint of a distribution that few tokens have: a tree of all that has mass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.joint_distribution import DEFAULT_MAX_BYTES, check_context
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree.children import next_tokens
from cpmtp.prefix_tree.pruning import noticeable
from cpmtp.prefix_tree.tree import UNKEPT_MASS, PrefixTree, TreeLevel
from cpmtp.sampling_law import KeptTokens, SamplingLaw

# A kept prefix with its parent, conditional and probability, and its entry while children are made.
_BYTES_PER_NODE = 64


@takes_what_is_given
def complete_joint(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    horizon: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Callable[[int], None] | None = None,
) -> PrefixTree:
    """The joint distribution of the next `horizon` tokens, but 1e-9 of it, as a tree over any
    vocabulary.

    Under top-k k it has at most ``k ** horizon`` sequences (more where tokens tie with the k-th).
    Prefixes are expanded level by level, all of one length together; the least probable ones of a
    level are left out as long as together they have less than ``5e-10 / horizon``. The greedy path
    is always kept.

    Parameters
    ----------
    lm : LanguageModel
    context : (time,) long tensor
        Token ids so far; may be empty where the model allows it.
    horizon : int
    temperature, top_k, top_p
        Part of the law: applied to every conditional.
    max_bytes : int
        What a level of the tree may need, in bytes.
    progress : callable, optional
        Called with the number of prefixes expanded since the last call.

    Raises
    ------
    ValueError
        If top-k exceeds the vocabulary, the horizon is below 1, a level may exceed `max_bytes`
        (before it is computed), the context does not suit the model, or the model returns something
        that is no distribution.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> tree = complete_joint(separated_hmm(4, 64), torch.tensor([0]), 3, top_k=5)
    >>> [len(level) for level in tree.levels], bool(tree.mass[-1] > 1 - 1e-9)
    ([5, 25, 125], True)
    """
    law = SamplingLaw(temperature, top_k, top_p)
    law.check_vocabulary(lm.vocab_size)
    if horizon < 1:
        raise ValueError(f"horizon {horizon}: expected at least 1")
    check_context(lm, context, horizon)
    prefixes = torch.empty(1, 0, dtype=torch.long)
    probs, greedy = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.long)
    levels: list[TreeLevel] = []
    path: list[Tensor] = []
    for length in range(1, horizon + 1):
        _check_level(len(prefixes), law, lm.vocab_size, length, max_bytes)
        found = next_tokens(lm, context, prefixes, law, lm.vocab_size)
        if progress:
            progress(len(prefixes))
        level = _level(found, probs)
        best = _greedy_child(level, greedy)
        kept = noticeable(level.probs, UNKEPT_MASS / (2 * horizon))
        kept[best] = True
        levels.append(_only(level, kept))
        greedy, path = kept[: best + 1].sum() - 1, [*path, level.tokens[best]]
        tokens = levels[-1].tokens[:, None]  # (nodes, 1)
        prefixes = torch.cat([prefixes[levels[-1].parents], tokens], 1)  # (nodes, length)
        probs = levels[-1].probs
    return PrefixTree(lm.vocab_size, tuple(levels), torch.stack(path), law)


def _level(found: KeptTokens, probs: Float[Tensor, " parents"]) -> TreeLevel:
    """All children of positive probability of all prefixes of the level before."""
    parents, place = (found.probs > 0).nonzero().unbind(1)  # (nodes,) each
    conditionals = found.probs[parents, place]  # (nodes,)
    tokens = found.tokens[parents, place]  # (nodes,)
    return TreeLevel(parents, tokens, conditionals, probs[parents] * conditionals, found.entropies)


def _greedy_child(level: TreeLevel, parent: Tensor) -> Tensor:
    """Number of the most probable child of one parent, the one of lowest id on ties."""
    own = (level.parents == parent).nonzero().squeeze(1)  # (children,), tokens ascending
    return own[level.conditionals[own].argmax()]


def _only(level: TreeLevel, kept: Bool[Tensor, " nodes"]) -> TreeLevel:
    """Some nodes of a level; parents of which no child is left count as not expanded."""
    with_children = torch.zeros(len(level.parent_entropies), dtype=torch.bool)
    with_children[level.parents[kept]] = True
    fields = {name: getattr(level, name)[kept] for name in ("parents", "tokens")}
    fields |= {name: getattr(level, name)[kept] for name in ("conditionals", "probs")}
    return replace(level, **fields, parent_entropies=level.parent_entropies[with_children])


def _check_level(
    prefixes: int, law: SamplingLaw, vocab_size: int, length: int, max_bytes: int
) -> None:
    children = min(law.most_tokens or vocab_size, vocab_size)
    needed = _BYTES_PER_NODE * prefixes * children
    if needed > max_bytes:
        raise ValueError(
            f"a complete joint of {length} tokens may have {prefixes} times {children} sequences, "
            f"{needed / 1e9:.3g} GB; the limit is {max_bytes / 1e9:.3g} GB: lower top_k or the "
            "horizon, or use truncated_joint"
        )
