"""What one token of memory can do: how much of a joint a chain of neighbours holds, and what it
would earn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.trees.neighbours import TreeGroups
from cpmtp.decomposition.trees.nodes import (
    Forest,
    Level,
    first_token_forest,
    forest_after_first,
    tree_forest,
)
from cpmtp.decomposition.trees.targets import survival_sums
from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.prefix_tree import PrefixTree
from cpmtp.sampling_law import ratio


@dataclass(frozen=True)
class TokenMemory:
    """What of a joint the token before does not say.

    Attributes
    ----------
    total_correlation : float
        ``sum_i H(x_i) - H(x_1:n)`` in nats: what the best product of marginals loses.
    beyond_one_token : (n - 2,) tensor
        ``I(x_i; x_<i-1 | x_{i-1})`` in nats, i from 3: what no Markov draft of any transition rank
        has. Their sum is the divergence of the chain of the joint's own conditionals.
    markov_tokens_per_call : float
        What that chain earns: the full Markov draft of one context.
    beyond_one_token_anchored : (n - 3 or 0,) tensor
        The same where the first token is told, i from 4: averages over the first token.
    markov_tokens_per_call_anchored : float
        What chains of the conditionals after every first token earn.
    """

    total_correlation: float
    beyond_one_token: Float[Tensor, " positions"]
    markov_tokens_per_call: float
    beyond_one_token_anchored: Float[Tensor, " fewer"]
    markov_tokens_per_call_anchored: float


@takes_what_is_given
def token_memory(joint: JointDistribution | PrefixTree, *, rule: str = "block") -> TokenMemory:
    """How far drafts that look at the token before can get, in one context.

    Parameters
    ----------
    joint : JointDistribution or PrefixTree
        Without batch axes; a complete tree.
    rule : {"token", "block", "coupling"}
        Of the tokens per call; the first token comes from the target.

    Raises
    ------
    ValueError
        If the tree is not complete, the joint has batch axes or the rule is unknown.

    Examples
    --------
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> memory = token_memory(exact_joint(separated_hmm(2, 6), [], 4))
    >>> memory.beyond_one_token.shape, memory.markov_tokens_per_call <= 4
    (torch.Size([2]), True)
    """
    if rule not in ("token", "block", "coupling"):
        raise ValueError(f"rule {rule!r}: expected token, block or coupling")
    whole, rest, mass = _forests(joint)
    one = torch.ones(1, 1, dtype=torch.float64)
    groups, after = TreeGroups(whole, one), TreeGroups(rest, mass[None]) if rest else None
    singles, lengths = _single_entropies(groups), _prefix_entropies(groups)  # (1, n) each
    anchored, earned = torch.zeros(0, dtype=torch.float64), float(whole.horizon)
    if after is not None:
        anchored = (mass[:, None] * _beyond(after)).sum(0)  # (n - 3,)
        earned = 1 + float((mass * _earned(after, rule, "draft")).sum())
    return TokenMemory(
        float(singles.sum() - lengths[0, -1]),
        _beyond(groups)[0],
        float(_earned(groups, rule, "target")),
        anchored,
        earned,
    )


def _forests(
    joint: JointDistribution | PrefixTree,
) -> tuple[Forest, Forest | None, Float[Tensor, " trees"]]:
    """The joint, what follows every first token (none of two tokens), and their probabilities."""
    nothing = torch.ones(1, dtype=torch.float64)
    if isinstance(joint, PrefixTree):
        if not joint.is_complete:
            raise ValueError(
                f"a tree that keeps {float(joint.mass[-1]):.4g} of the mass: expected a complete "
                "one, as of complete_joint"
            )
        whole = tree_forest(joint, sum(map(len, joint.levels)))
        if joint.horizon < 3:
            return whole, None, nothing
        rest, _, mass = first_token_forest(joint, 0.0)
        return whole, rest, mass / mass.sum()
    if tuple(joint.batch_shape):
        raise ValueError(
            f"a joint with batch axes {tuple(joint.batch_shape)}: expected one context"
        )
    whole = _of_everything(joint)
    if joint.horizon < 3:
        return whole, None, nothing
    rest, mass = forest_after_first(whole)
    return whole, rest, mass


def _of_everything(joint: JointDistribution) -> Forest:
    """All sequences of a dense joint that have mass."""
    before = torch.ones(1, dtype=torch.float64)
    place, levels = torch.zeros(1, dtype=torch.long), []
    for length in range(1, joint.horizon + 1):
        probs = joint.prefix_probs(length).double().flatten()  # (vocab ** length,)
        kept = (probs > 0).nonzero().squeeze(1)  # (nodes,)
        parents = place[kept // joint.vocab_size]  # (nodes,)
        here = probs[kept]  # (nodes,)
        own = here if length == joint.horizon else torch.zeros_like(here)
        owners, tokens = torch.zeros_like(parents), kept % joint.vocab_size
        levels.append(Level(owners, parents, tokens, here / before[parents], here, own))
        place = torch.full_like(probs, -1, dtype=torch.long)
        place[kept] = torch.arange(len(kept))
        before = here
    return Forest.of(levels, torch.zeros(1, dtype=torch.float64), joint.vocab_size)


def _sums(owners: Tensor, values: Tensor, trees: int) -> Float[Tensor, " trees"]:
    return torch.zeros(trees, dtype=torch.float64).index_add_(0, owners, values)


def _prefix_entropies(groups: TreeGroups) -> Float[Tensor, "trees positions"]:
    """``H(x_1:k)`` of every tree, k from 1."""
    forest = groups.forest
    found = [
        -_sums(level.owners, torch.special.xlogy(level.probs, level.probs), len(forest))
        for level in forest.levels
    ]
    return torch.stack(found, 1)  # (trees, positions)


def _single_entropies(groups: TreeGroups) -> Float[Tensor, "trees positions"]:
    """``H(x_i)`` of every tree."""
    law = groups.forest.marginals  # (trees, positions, width)
    return -torch.special.xlogy(law, law).sum(-1)  # (trees, positions)


def _beyond(groups: TreeGroups) -> Float[Tensor, "trees _"]:
    """``I(x_i; x_<i-1 | x_{i-1})`` of every tree, i from 3."""
    forest, found = groups.forest, []
    singles, lengths = _single_entropies(groups), _prefix_entropies(groups)
    for step in range(1, forest.horizon - 1):
        pairs, law = groups.pairs[step], _pair_law(groups, step)
        of_pairs = -_sums(pairs.owners, torch.special.xlogy(law, law), len(forest))  # (trees,)
        chain = of_pairs - singles[:, step]  # (trees,): H(x_i | x_{i-1})
        exact = lengths[:, step + 1] - lengths[:, step]  # (trees,): H(x_i | x_<i)
        found.append((chain - exact).clamp_min(0.0))
    return torch.stack(found, 1) if found else singles[:, :0]  # (trees, positions - 2)


def _pair_law(groups: TreeGroups, step: int) -> Float[Tensor, " pairs"]:
    """Probability of every pair of neighbours in its own tree."""
    pairs, level = groups.pairs[step], groups.forest.levels[step + 1]
    return _sums(pairs.of_nodes, level.probs, len(pairs))


def _earned(groups: TreeGroups, rule: str, first_token: str) -> Float[Tensor, " trees"]:
    """``S_1 + … + S_n`` of the chains of the trees' own conditionals."""
    forest = groups.forest
    first = forest.levels[0]
    emitted = [first.probs[:, None]]  # (nodes, 1)
    for step, pairs in enumerate(groups.pairs):
        law = _pair_law(groups, step)  # (pairs,)
        keys = pairs.owners * forest.width + pairs.before  # (pairs,)
        total = _sums(keys, law, len(forest) * forest.width)[keys]  # (pairs,)
        emitted.append(ratio(law, total, otherwise=0.0)[pairs.of_nodes, None])  # (nodes, 1)
    weights = torch.ones(len(forest), 1, dtype=torch.float64)
    return survival_sums(forest.levels, weights, emitted, rule, first_token)
