"""What is fitted of a tree by the forms that are more than CP, and the drafts that come of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpmtp.decomposition.forms.chains import IMPOSSIBLE, Chains
from cpmtp.decomposition.forms.ends import Ends, Plans
from cpmtp.decomposition.forms.hmm import solve_hidden
from cpmtp.decomposition.forms.solving import Shape, solve_markov
from cpmtp.decomposition.restarts import NOTICEABLE_MASS
from cpmtp.decomposition.trees.anchored import FirstTokenDrafts
from cpmtp.decomposition.trees.neighbours import TreeGroups
from cpmtp.decomposition.trees.nodes import Forest, first_token_forest, tree_forest
from cpmtp.drafts.hmm_distribution import HMMDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.drafts.support import Support
from cpmtp.prefix_tree import PrefixTree

# Logits up to this are of what a position never has.
_NEVER = IMPOSSIBLE / 2
# Tokens up to which every pair may have a number of its own.
_MOST_COMPLETE = 2048


@dataclass(frozen=True)
class TreeForms:
    """The tree itself or, anchored, what follows each first token of noticeable mass.

    Attributes
    ----------
    groups : TreeGroups
    first_tokens : (trees,) long tensor, optional
        Anchored only: those tokens.
    kept : float
        Anchored only: their probability.
    """

    groups: TreeGroups
    first_tokens: Int[Tensor, " trees"] | None = None
    kept: float = 1.0

    @classmethod
    def of(cls, tree: PrefixTree, anchored: bool, least: float = NOTICEABLE_MASS) -> TreeForms:
        """What there is to fit of a tree; anchored, of first tokens of more than `least`."""
        if not anchored:
            one = torch.ones(1, 1, dtype=torch.float64)
            return cls(TreeGroups(tree_forest(tree), one))
        forest, tokens, mass = first_token_forest(tree, least)
        kept = float(mass.sum())
        return cls(TreeGroups(forest, (mass / kept)[None]), tokens, kept)

    def solved(self, shape: Shape | None, rank: int, plans: Plans, below: Ends | None) -> Ends:
        """The best of the form; without a shape hidden Markov distributions, tree by tree.

        Raises
        ------
        ValueError
            If every pair is to have a number of its own and there are too many.
        """
        if shape is None:
            return solve_hidden(self.groups, rank, plans, below)
        tokens = self.groups.vocab
        if shape.given is not None:
            return solve_markov(self.groups, shape.narrowed(self.groups.tokens), plans, below)
        if shape.width >= tokens > _MOST_COMPLETE:
            raise ValueError(
                f"a full transition rank over {tokens} tokens: a number for every pair of at most "
                f"{_MOST_COMPLETE}; give a smaller transition_rank"
            )
        return solve_markov(
            self.groups, replace(shape, width=min(shape.width, tokens)), plans, below
        )

    def pooled(self, ends: Ends, method: str) -> Ends:
        """One answer for the tree; first tokens that are not among the fitted ones earn one token,
        and add nothing to a divergence.
        """
        if self.first_tokens is None:
            return ends
        if len(ends.objective) > 1:
            mass = self.groups.mass[0]  # (trees,)
            ends = Ends(
                ends.found[:1],
                (mass * ends.objective).sum()[None],
                ends.converged.all()[None],
                ((),),
                (mass[:, None] * ends.objectives).sum(0)[None],  # (1, starts)
            )
        rest = (1 - self.kept) * float(method == "acceptance")
        return replace(
            ends,
            objective=self.kept * ends.objective - rest,
            objectives=self.kept * ends.objectives - rest,
        )

    def markov(self, chains: Chains) -> MarkovMixture | FirstTokenDrafts:
        """The drafts of a single run's chains."""
        forest, groups = self.groups.forest, self.groups
        vocab, width = forest.support.vocab_size, forest.width
        ids = [_filled_up(part, width, vocab) for part in forest.support.ids]  # (trees, width) each
        logits = chains.logits[0]  # (trees, positions, rank, width)
        filled = torch.stack([part < vocab for part in ids], 1).unsqueeze(2)
        logits = torch.where(filled & (logits > _NEVER), logits, -torch.inf)
        _, steps, _, k = chains.left.shape
        left = torch.zeros(steps, vocab, k, dtype=torch.float64)
        left[:, groups.tokens] = chains.left[0]
        right = chains.right.new_zeros(len(forest), steps, k, width)
        for step, places in enumerate(groups.places[1:]):
            here = chains.right[0, step][:, places]  # (k, trees, size)
            right[:, step, :, : places.shape[1]] = here.transpose(0, 1)
        weights = chains.weights[0].softmax(-1)  # (trees, rank)
        parts = [weights, logits, right, chains.gate[0]]
        if self.first_tokens is None:
            weights, logits, right, gate = (part[0] for part in parts)
            support = Support(tuple(part[0] for part in ids), vocab)
            return MarkovMixture(weights, logits, left, right, gate, support)
        others, more = zip(*(_others(groups, i) for i in range(len(ids))), strict=True)
        rest = torch.stack(others).log()[None, :, None]  # (1, positions, 1, width)
        rank = chains.rank
        fallback = (
            weights.new_full((1, rank), 1 / rank),
            rest.expand(-1, -1, rank, -1),  # (1, positions, rank, width)
            right.new_zeros(1, *right.shape[1:]),
            chains.gate.new_ones(1, steps, k),
        )
        weights, logits, right, gate = (
            torch.cat(pair) for pair in zip(parts, fallback, strict=True)
        )  # (trees + 1, …) each
        support = Support(tuple(map(torch.cat, zip(ids, more, strict=True))), vocab)
        entries = MarkovMixture(weights, logits, left, right, gate, support)
        return FirstTokenDrafts(entries, self.first_tokens)

    def hidden(self, found) -> HMMDistribution | FirstTokenDrafts:
        """The drafts of one run per tree."""
        forest, rank = self.groups.forest, found.weights.shape[1]
        vocab = forest.support.vocab_size
        weights, moves, factors = found.probs()
        columns, ids = [], list(forest.support.ids)
        for position, part in enumerate(ids):
            kept = factors[:, position, :, : part.shape[1]] * (part < vocab)[:, None]
            columns.append((kept / kept.sum(-1, keepdim=True)).mT)  # (trees, size, rank)
        if self.first_tokens is None:
            support = Support(tuple(part[0] for part in ids), vocab)
            return HMMDistribution(weights[0], moves[0], [part[0] for part in columns], support)
        for position, part in enumerate(ids):
            probs, more = _others(self.groups, position)
            size = part.shape[1]
            others = probs[None, :size, None].expand(-1, -1, rank)  # (1, size, rank)
            columns[position] = torch.cat([columns[position], others / others.sum(1, keepdim=True)])
            ids[position] = torch.cat([part, more[:, :size]])  # (trees + 1, size)
        stay = torch.eye(rank).to(moves).expand(1, *moves.shape[1:])  # (1, steps, rank, rank)
        entries = HMMDistribution(
            torch.cat([weights, weights.new_full((1, rank), 1 / rank)]),
            torch.cat([moves, stay]),
            columns,
            Support(tuple(ids), vocab),
        )
        return FirstTokenDrafts(entries, self.first_tokens)


def _filled_up(
    ids: Int[Tensor, "trees size"], width: int, vocab: int
) -> Int[Tensor, "trees width"]:
    missing = (0, width - ids.shape[1])
    return torch.nn.functional.pad(ids, missing, value=vocab)


def _others(
    groups: TreeGroups, position: int
) -> tuple[Float[Tensor, " width"], Int[Tensor, "1 width"]]:
    """What stands for all other first tokens: the most probable tokens of the position, as many as
    a tree has at most, and their ids, filled up.
    """
    forest: Forest = groups.forest
    vocab, width = forest.support.vocab_size, forest.width
    ids = forest.support.ids[position]  # (trees, size)
    size = ids.shape[1]
    sums = torch.zeros(vocab + 1, dtype=torch.float64)
    weighted = groups.mass[0, :, None] * forest.marginals[:, position, :size]  # (trees, size)
    sums.index_add_(0, ids.flatten(), weighted.flatten())
    some = sums[:vocab].topk(size).indices.sort().values  # (size,)
    probs = sums[some] / sums[some].sum()  # (size,)
    missing = (0, width - size)
    return (
        torch.nn.functional.pad(probs, missing),
        torch.nn.functional.pad(some, missing, value=vocab)[None],  # (1, width)
    )
