"""Joints as trees of prefixes: truncated ones, and complete ones of truncated distributions."""

from cpmtp.prefix_tree.complete import complete_joint
from cpmtp.prefix_tree.growing import truncated_joint
from cpmtp.prefix_tree.pruning import pruned
from cpmtp.prefix_tree.tree import PrefixTree, TreeLevel

__all__ = ["PrefixTree", "TreeLevel", "complete_joint", "pruned", "truncated_joint"]
