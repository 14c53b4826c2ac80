"""The truncated joint: the most probable prefixes, found best-first, with certified mass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cpmtp.joint_distribution import check_context
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree.children import next_tokens
from cpmtp.prefix_tree.tree import PrefixTree, TreeLevel
from cpmtp.sampling_law import SamplingLaw

# Share of the wanted mass's complement that may be lost to dropped children, over all depths.
_TAIL_SHARE = 0.25
# Nodes expanded together: at least this many, then a share of those already expanded (best-first in
# growing steps).
_LEAST_STEP = 64
_STEP_SHARE = 0.25


@takes_what_is_given
def truncated_joint(
    lm: LanguageModel,
    context: Int[Tensor, " time"],
    horizon: int,
    *,
    mass: float = 0.95,
    max_nodes: int = 200_000,
    max_children: int = 512,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> PrefixTree:
    """The most probable prefixes of the next `horizon` tokens: a tree expanded best-first by exact
    prefix probability.

    The most probable unexpanded prefixes are expanded, many at a time, until the kept sequences of
    `horizon` tokens have the wanted mass, or `max_nodes` prefixes have been expanded. What is kept
    is exact. The greedy path is always kept.

    Parameters
    ----------
    lm : LanguageModel
    context : (time,) long tensor
        Token ids so far; may be empty where the model allows it.
    horizon : int
    mass : float
        Wanted probability of the kept sequences, at most 1 (then all are kept, nodes permitting).
    max_nodes : int
        Most prefixes whose next-token law is asked for: what the time is spent on.
    max_children : int
        Most children kept per prefix, the most probable ones. The tree needs at most
        ``32 * max_nodes * max_children`` bytes.
    temperature, top_k, top_p
        Part of the law: applied to every conditional.
    progress : callable, optional
        Called with the number of prefixes expanded since the last call.

    Raises
    ------
    ValueError
        If a number is out of range, top-k exceeds the vocabulary, a context token is not in the
        vocabulary, context and horizon exceed the model's window, or the model returns something
        that is no distribution.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> tree = truncated_joint(separated_hmm(4, 64), torch.tensor([0]), 3, mass=1.0, max_nodes=100)
    >>> tree.expanded_nodes, [len(level) for level in tree.levels], round(tree.mass[0].item(), 9)
    (100, [64, 4096, 2240], 1.0)
    """
    law = SamplingLaw(temperature, top_k, top_p)
    law.check_vocabulary(lm.vocab_size)
    _check_limits(horizon, mass, max_nodes, max_children)
    check_context(lm, context, horizon)
    threshold = _TAIL_SHARE * (1 - mass) / (horizon * lm.vocab_size)
    growth = _Growth(
        lm,
        context,
        horizon,
        law,
        threshold=threshold,
        max_children=max_children,
        max_nodes=max_nodes,
    )
    growth.expand_greedy_path()
    _report(progress, growth.expanded)
    while growth.mass < mass and growth.expanded < max_nodes and len(growth.frontier):
        before = growth.expanded
        growth.expand(
            growth.frontier.take_best(growth.next_step(), mass - growth.mass, horizon - 1)
        )
        _report(progress, growth.expanded - before)
    return growth.tree()


def _check_limits(horizon: int, mass: float, max_nodes: int, max_children: int) -> None:
    if horizon < 1:
        raise ValueError(f"horizon {horizon}: expected at least 1")
    if not 0 < mass <= 1:
        raise ValueError(f"mass {mass}: expected a probability above 0, at most 1")
    if max_nodes < horizon:
        raise ValueError(
            f"max_nodes {max_nodes}: the greedy path alone expands {horizon} prefixes; allow at "
            "least that many"
        )
    if max_children < 1:
        raise ValueError(f"max_children {max_children}: expected at least 1")


def _report(progress: Callable[[int], None] | None, expanded: int) -> None:
    if progress:
        progress(expanded)


@dataclass(frozen=True)
class _Nodes:
    """Prefixes with what is needed to expand them; tokens are padded to the longest that may be
    expanded.
    """

    probs: Tensor
    depths: Tensor
    positions: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.probs)

    def __getitem__(self, index: Tensor) -> _Nodes:
        return _Nodes(*(field[index] for field in vars(self).values()))

    def joined(self, other: _Nodes) -> _Nodes:
        return _Nodes(
            *(
                torch.cat(fields)
                for fields in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )


class _Frontier:
    """The unexpanded prefixes that may still be expanded: never many more than the nodes left to
    expand.
    """

    def __init__(self, horizon: int):
        empty = torch.empty(0, dtype=torch.long)
        self.nodes = _Nodes(
            torch.empty(0, dtype=torch.float64),
            empty,
            empty,
            torch.empty(0, horizon, dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, found: _Nodes, room: int) -> None:
        nodes = self.nodes.joined(found)
        self.nodes = (
            nodes[nodes.probs.topk(room, sorted=False).indices] if len(nodes) > room else nodes
        )

    def take_best(self, count: int, missing: float, last_depth: int) -> _Nodes:
        """The `count` most probable prefixes, or as many of them as bring the `missing` mass."""
        best = self.nodes.probs.topk(min(count, len(self))).indices
        brought = (self.nodes.probs * (self.nodes.depths == last_depth))[best].cumsum(0)
        enough = int(torch.searchsorted(brought, missing)) + 1
        best = best[:enough]
        left = torch.ones(len(self), dtype=torch.bool)
        left[best] = False
        taken, self.nodes = self.nodes[best], self.nodes[left]
        return taken


class _Growth:
    """A tree while it grows: levels as lists of pieces, and the frontier."""

    def __init__(
        self, lm, context, horizon, law, *, threshold: float, max_children: int, max_nodes: int
    ):
        self.lm, self.context, self.horizon, self.law = lm, context, horizon, law
        self.threshold, self.max_children, self.max_nodes = threshold, max_children, max_nodes
        self.pieces: list[list[TreeLevel]] = [[] for _ in range(horizon)]
        self.sizes = [0] * horizon
        self.frontier = _Frontier(horizon)
        self.greedy: list[int] = []
        self.expanded, self.mass = 0, 0.0

    def next_step(self) -> int:
        return min(
            max(_LEAST_STEP, int(_STEP_SHARE * self.expanded)), self.max_nodes - self.expanded
        )

    def expand_greedy_path(self) -> None:
        nothing = torch.zeros(1, dtype=torch.long)
        node = _Nodes(
            torch.ones(1, dtype=torch.float64),
            nothing,
            nothing,
            torch.zeros(1, self.horizon, dtype=torch.long),
        )
        for depth in range(self.horizon):
            children = self._children(node, depth)
            best = children.probs == children.probs.max()
            token = int(children.tokens[best, depth].min())
            chosen = children.tokens[:, depth] == token
            self.greedy.append(token)
            node = children[chosen]
            if depth < self.horizon - 1:
                self.frontier.add(children[~chosen], self.max_nodes)

    def expand(self, nodes: _Nodes) -> None:
        for depth in nodes.depths.unique().tolist():
            some = nodes[nodes.depths == depth]
            # Sorted, prefixes that begin alike are evaluated together.
            # (nodes,)
            order = torch.from_numpy(np.lexsort(some.tokens[:, :depth].T.flip(0).numpy()))
            children = self._children(some[order], depth)
            if depth < self.horizon - 1:
                self.frontier.add(children, max(self.max_nodes - self.expanded, 1))

    def _children(self, nodes: _Nodes, depth: int) -> _Nodes:
        """Ask for the next-token laws of prefixes of one depth, store the kept children and return
        them.
        """
        found = next_tokens(
            self.lm, self.context, nodes.tokens[:, :depth], self.law, self.max_children
        )
        row, place = ((found.probs >= self.threshold) & (found.probs > 0)).nonzero().unbind(1)
        token, conditional = found.tokens[row, place], found.probs[row, place]  # (children,) each
        probs = nodes.probs[row] * conditional
        level = TreeLevel(nodes.positions[row], token, conditional, probs, found.entropies)
        self.pieces[depth].append(level)
        positions = torch.arange(self.sizes[depth], self.sizes[depth] + len(token))
        self.sizes[depth] += len(token)
        self.expanded += len(nodes)
        if depth == self.horizon - 1:
            self.mass += float(probs.sum())
        tokens = nodes.tokens[row]
        tokens[:, depth] = token
        return _Nodes(probs, torch.full_like(positions, depth + 1), positions, tokens)

    def tree(self) -> PrefixTree:
        levels = []
        for depth in range(self.horizon):
            pieces, self.pieces[depth] = self.pieces[depth], []
            levels.append(
                TreeLevel(
                    *(
                        torch.cat(fields)
                        for fields in zip(*(vars(p).values() for p in pieces), strict=True)
                    )
                )
            )
        return PrefixTree(self.lm.vocab_size, tuple(levels), torch.tensor(self.greedy), self.law)
