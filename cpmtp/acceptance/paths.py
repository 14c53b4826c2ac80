"""Texts drawn from the target, with its conditionals along them: what many drafts are judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.acceptance.children import ChildReader
from cpmtp.joint_distribution import check_context, conditional_probs, prefixes_at_once
from cpmtp.language_model import LanguageModel
from cpmtp.prefix_tree import PrefixTree
from cpmtp.sampling_law import SamplingLaw, draw

_ENTRIES_AT_ONCE = 1 << 21
_AS_IS = SamplingLaw()


@dataclass(frozen=True, eq=False)
class SampledPaths:
    """Continuations of one context drawn from the target's law.

    Drafts that are judged on the same paths are compared pair by pair: what the paths have in
    common is not taken for a difference of drafts.

    Attributes
    ----------
    tokens : (samples, horizon) long tensor
    probs : (samples, horizon) float64 tensor
        The target's conditional of each token given those before it.
    vocab_size : int
    law : SamplingLaw
        What the target's next-token distributions were put through.
    outside : (samples, horizon) bool tensor, optional
        Whether the first k tokens are no prefix that a tree keeps (see `outside_of`).
    outside_mass : (horizon,) float64 tensor, optional
        Exact probability of that.

    Examples
    --------
    >>> from cpmtp.language_model import separated_hmm
    >>> lm, context = separated_hmm(2, 8), torch.tensor([0])
    >>> paths = SampledPaths.drawn(lm, context, 3, samples=5)
    >>> paths.tokens.shape, paths.first(2).probs.shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    tokens: Int[Tensor, "samples horizon"]
    probs: Float[Tensor, "samples horizon"]
    vocab_size: int
    law: SamplingLaw
    outside: Bool[Tensor, "samples horizon"] | None = None
    outside_mass: Float[Tensor, " horizon"] | None = None

    def __repr__(self) -> str:
        samples, horizon = self.tokens.shape
        return f"SampledPaths({samples=}, {horizon=}, vocab_size={self.vocab_size}, {self.law})"

    @classmethod
    def drawn(
        cls,
        lm: LanguageModel,
        context: Int[Tensor, " time"],
        horizon: int,
        *,
        samples: int = 1000,
        seed: int = 0,
        law: SamplingLaw = _AS_IS,
    ) -> SampledPaths:
        """Draw `samples` continuations; each prefix that several share is asked for once.

        Raises
        ------
        ValueError
            If there are fewer than 2 samples, or context and horizon do not suit the model.
        """
        if samples < 2:
            raise ValueError(f"samples {samples}: expected at least 2")
        check_context(lm, context, horizon)
        generator = torch.Generator().manual_seed(seed)
        paths = cls(
            torch.zeros(samples, 0, dtype=torch.long),
            torch.zeros(samples, 0, dtype=torch.float64),
            lm.vocab_size,
            law,
        )
        for depth in range(horizon):
            drawn = torch.empty(samples, dtype=torch.long)
            found = torch.empty(samples, dtype=torch.float64)
            uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
            for prefixes, row, rows in paths.prefixes(depth):
                probs = conditional_probs(lm, context, prefixes, law)
                drawn[rows] = _drawn(probs, row, uniform[rows])
                found[rows] = probs[row, drawn[rows]]  # (rows,)
            paths = replace(
                paths,
                tokens=torch.cat([paths.tokens, drawn[:, None]], 1),  # (samples, depth + 1)
                probs=torch.cat([paths.probs, found[:, None]], 1),  # (samples, depth + 1)
            )
        return paths

    def first(self, horizon: int) -> SampledPaths:
        """The same texts, cut after `horizon` tokens."""
        cut = {name: getattr(self, name)[:, :horizon] for name in ("tokens", "probs")}
        return replace(self, **cut, outside=None, outside_mass=None)

    def outside_of(self, tree: PrefixTree) -> SampledPaths:
        """The same texts, marked where they leave a truncated joint of the same context: what it
        holds need not be estimated.

        Raises
        ------
        ValueError
            If the tree is of another horizon, vocabulary or law.
        """
        own = (self.tokens.shape[1], self.vocab_size, self.law)
        if (tree.horizon, tree.vocab_size, tree.law) != own:
            raise ValueError(
                f"a tree of horizon {tree.horizon} over {tree.vocab_size} tokens under {tree.law} "
                f"for texts of {own[0]} over {own[1]} under {own[2]}: expected the same"
            )
        return replace(self, outside=~tree.keeps(self.tokens), outside_mass=1 - tree.mass)

    def prefixes(self, depth: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Distinct prefixes of `depth` tokens (some, depth), some at a time; the place among them
        of each sample that has one of these (rows,), and which samples that are (rows,).
        """
        samples = len(self.tokens)
        distinct, which = self.tokens[:1, :0], torch.zeros(samples, dtype=torch.long)
        if depth:
            distinct, which = torch.unique(self.tokens[:, :depth], dim=0, return_inverse=True)
        at_once = prefixes_at_once(self.vocab_size)
        for start in range(0, len(distinct), at_once):
            rows = ((which >= start) & (which < start + at_once)).nonzero()[:, 0]  # (rows,)
            yield distinct[start : start + at_once], which[rows] - start, rows

    def ratios(self, children: ChildReader) -> Float[Tensor, "samples horizon"]:
        """``q / p`` of every token; 1 for a first token that is the target's own."""
        ratios = torch.ones_like(self.probs)
        for depth in range(int(children.told), self.tokens.shape[1]):
            for prefixes, row, rows in self.prefixes(depth):
                q = children.probs(prefixes, row, self.tokens[rows, depth])  # (rows,)
                ratios[rows, depth] = q / self.probs[rows, depth]
        return ratios


def _drawn(
    probs: Float[Tensor, "some vocab"], row: Int[Tensor, " rows"], uniform: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """A token for every sample from its prefix's distribution."""
    size = max(_ENTRIES_AT_ONCE // probs.shape[1], 1)
    parts = zip(row.split(size), uniform.split(size), strict=True)
    return torch.cat([draw(probs[some], u) for some, u in parts])
