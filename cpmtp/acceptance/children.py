"""What a draft says of children of prefixes: all that trees and samples ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.drafts.prefix_tables import picked
from cpmtp.drafts.protocol import as_draft, needed_context
from cpmtp.joint_distribution import conditional_probs
from cpmtp.language_model import LanguageModel
from cpmtp.sampling_law import SamplingLaw


@dataclass(frozen=True, eq=False)
class ChildReader:
    """What is proposed after prefixes, whoever proposes it, read for some tokens alone.

    Attributes
    ----------
    draft : Draft or LanguageModel
        Without batch axes, or, anchored, with that of the first token.
    law : SamplingLaw
        What the draft's next-token distributions are put through.
    anchored, told : bool
        Whether it holds one distribution per first token; whether that token is the target's.
    context : (time,) long tensor, optional
        What a language model continues.

    Examples
    --------
    >>> from cpmtp.drafts.cp_distribution import CPDistribution
    >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    >>> draft = CPDistribution(half, [torch.eye(2, dtype=torch.float64)] * 2)
    >>> children = ChildReader.of(draft, SamplingLaw(), anchored=False, told=True)
    >>> children.probs(torch.tensor([[0]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    tensor([1., 0.], dtype=torch.float64)
    """

    draft: Any
    law: SamplingLaw
    anchored: bool
    told: bool
    context: Int[Tensor, " time"] | None = None

    @classmethod
    def of(
        cls,
        proposed: Any,
        law: SamplingLaw,
        *,
        anchored: bool,
        told: bool,
        context: Int[Tensor, " time"] | None = None,
    ) -> ChildReader:
        """Of whatever may be proposed.

        Raises
        ------
        ValueError
            If a language model comes without a context.
        """
        if isinstance(proposed, LanguageModel):
            return cls(proposed, law, anchored, told, needed_context(context))
        return cls(as_draft(proposed), law, anchored, told)

    def probs(
        self,
        prefixes: Int[Tensor, "count length"],
        row: Int[Tensor, " children"],
        tokens: Int[Tensor, " children"],
    ) -> Float[Tensor, " children"]:
        """Processed conditionals, float64, of tokens after the prefixes that `row` numbers.

        Raises
        ------
        ValueError
            If an anchored draft is asked for the first token.
        """
        if self.context is not None:
            return picked(self._of_model, prefixes, row, tokens, self.draft.vocab_size)
        if not self.anchored:
            return self.draft.child_probs(prefixes, row, tokens, law=self.law, told=self.told)
        found = torch.zeros(len(tokens), dtype=torch.float64)
        for first, nodes, children in _by_first(prefixes, row):
            own = torch.searchsorted(nodes, row[children])  # (children of this first token,)
            found[children] = self.draft[first].child_probs(
                prefixes[nodes, 1:], own, tokens[children], law=self.law, told=False
            )
        return found

    def proposes(self, prefixes: Int[Tensor, "count length"]) -> Bool[Tensor, " count"]:
        """Whether anything is drafted after each prefix."""
        if self.context is not None:
            return torch.ones(len(prefixes), dtype=torch.bool)
        return self.draft.proposes(prefixes, told=self.told)

    def _of_model(self, prefixes: Tensor) -> Tensor:
        return conditional_probs(self.draft, needed_context(self.context), prefixes, self.law)


def _by_first(prefixes: Tensor, row: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every first token with its prefixes, ascending, and their children."""
    if prefixes.shape[1] == 0:
        raise ValueError(
            "an anchored draft says nothing of the first token: it needs first_token='target'"
        )
    firsts, which = prefixes[:, 0].unique(return_inverse=True)
    nodes = _grouped(which, len(firsts))
    children = _grouped(which[row], len(firsts))
    yield from zip(firsts.tolist(), nodes, children, strict=True)


def _grouped(which: Int[Tensor, " members"], groups: int) -> tuple[Tensor, ...]:
    """The members of each group, ascending."""
    counts = torch.bincount(which, minlength=groups)
    return which.argsort(stable=True).split(counts.tolist())
