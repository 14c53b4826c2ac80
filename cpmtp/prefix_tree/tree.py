"""A joint as a tree of prefixes with exact probabilities: what V**n entries cannot hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.sampling_law import SamplingLaw

# Probability of all sequences that a complete joint may leave out.
UNKEPT_MASS = 1e-9


@dataclass(frozen=True)
class TreeLevel:
    """The kept prefixes of one length; those with the same parent are neighbours.

    Attributes
    ----------
    parents : (nodes,) long tensor
        Each node's parent as a position in the level before (0, the empty prefix, in the first
        level).
    tokens : (nodes,) long tensor
        The last token of each prefix.
    conditionals : (nodes,) float64 tensor
        ``p(x_k | x_<k)``, exact.
    probs : (nodes,) float64 tensor
        ``P(x_1:k)``, exact.
    parent_entropies : (expanded,) float64 tensor
        Entropy in nats of the whole next-token law of each distinct parent, dropped children
        included.
    """

    parents: Int[Tensor, " nodes"]
    tokens: Int[Tensor, " nodes"]
    conditionals: Float[Tensor, " nodes"]
    probs: Float[Tensor, " nodes"]
    parent_entropies: Float[Tensor, " expanded"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)


@dataclass(frozen=True)
class PrefixTree:
    """The most probable prefixes of the next `horizon` tokens, each with its exact probability.

    A prefix is kept only with all its own prefixes. An expanded node has all its children, or the
    most probable ones: then every dropped child is no more probable than any kept sibling.

    Attributes
    ----------
    vocab_size : int
    levels : tuple of horizon TreeLevels
        ``levels[k - 1]`` holds the kept prefixes of k tokens.
    greedy_path : (horizon,) long tensor
        The argmax token after argmax tokens; always kept.
    law : SamplingLaw
        Temperature, top-k and top-p of the law whose joint this is.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> from cpmtp.prefix_tree import truncated_joint
    >>> tree = truncated_joint(separated_hmm(2, 8), torch.tensor([0]), 3, mass=0.9)
    >>> bool(tree.mass[-1] >= 0.9), tree.prefixes(3).shape[1]
    (True, 3)
    """

    vocab_size: int
    levels: tuple[TreeLevel, ...]
    greedy_path: Int[Tensor, " horizon"]
    law: SamplingLaw

    def __repr__(self) -> str:
        kept = ", ".join(f"{mass:.4g}" for mass in self.mass.tolist())
        return (
            f"PrefixTree(horizon={self.horizon}, vocab_size={self.vocab_size}, kept mass by length "
            f"[{kept}])"
        )

    @property
    def horizon(self) -> int:
        """Number of tokens."""
        return len(self.levels)

    @property
    def mass(self) -> Float[Tensor, " horizon"]:
        """Exact probability that the first k tokens are a kept prefix, for k = 1 … horizon; never
        rising.
        """
        return torch.stack([level.probs.sum() for level in self.levels]).clamp(max=1.0)

    @property
    def is_complete(self) -> bool:
        """Whether all mass but `UNKEPT_MASS` is kept: what is said of the joint is exact then."""
        return bool(self.mass[-1] >= 1 - UNKEPT_MASS)

    @property
    def expanded_nodes(self) -> int:
        """Prefixes whose next-token law was asked of the model (the empty one included)."""
        return sum(len(level.parent_entropies) for level in self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes of all levels."""
        return sum(level.nbytes for level in self.levels)

    def prefixes(self, length: int) -> Int[Tensor, "nodes length"]:
        """The kept prefixes of `length` tokens, in the order of ``levels[length - 1]``; (1, 0) for
        length 0.
        """
        return self._walk(length, None)

    def expanded_prefixes(self, length: int) -> Int[Tensor, "expanded length"]:
        """The prefixes of `length` tokens that have children, in the order of
        ``levels[length].parent_entropies``.
        """
        return self._walk(length, self.levels[length].parents.unique_consecutive())

    def keeps(self, tokens: Int[Tensor, "count length"]) -> Bool[Tensor, "count length"]:
        """Whether the first k tokens of each sequence are a kept prefix, for k = 1 … length."""
        node = torch.zeros(len(tokens), dtype=torch.long)
        kept, found = torch.ones(len(tokens), dtype=torch.bool), []
        for level, token in zip(self.levels, tokens.unbind(1), strict=False):
            keys = level.parents * self.vocab_size + level.tokens  # (nodes,)
            order = keys.argsort()
            wanted = node * self.vocab_size + token  # (count,)
            place = torch.searchsorted(keys[order], wanted).clamp_max(len(keys) - 1)  # (count,)
            node = order[place]
            kept = kept & (keys[node] == wanted)
            found.append(kept)
        return torch.stack(found, 1)  # (count, length)

    def _walk(self, length: int, nodes: Tensor | None) -> Tensor:
        if length == 0:
            return torch.empty(1, 0, dtype=torch.long)
        position = torch.arange(len(self.levels[length - 1])) if nodes is None else nodes
        columns = []
        for level in reversed(self.levels[:length]):
            columns.append(level.tokens[position])
            position = level.parents[position]
        return torch.stack(columns[::-1], 1)  # (nodes, length)
