"""Mixtures of Markov drafts: two ranks, one of components and one of token-to-token transitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.drafts.mixture import Mixture, check_simplex
from cpmtp.drafts.prefix_tables import LowRankTable, rows_at
from cpmtp.drafts.support import Support
from cpmtp.drafts.transition import MarkovTable, Transition
from cpmtp.sampling_law import SamplingLaw


@dataclass(frozen=True, repr=False)
class MarkovMixture(Mixture):
    """``Q(x) = sum_a w_a prod_i softmax_v(U_{i,a}(v) + <L_i[x_{i-1}] * g_i, R_i[v]>)[x_i]``, where
    the first token has no transition.

    With one component it is the Markov correction of recent block drafters, with a transition rank
    of 0 a `CPDistribution`.

    Attributes
    ----------
    weights : (*batch, rank) tensor
    logits : (*batch, horizon, rank, vocab) tensor
        ``U``; ``-inf`` where a probability is zero. With a support its size takes the place of
        vocab, here and in `right`.
    left : (horizon - 1 or 1, vocab, transition_rank) tensor
        ``L``, over all tokens; one for all positions or one for each. May have the batch's axes
        before: then each entry has its own.
    right : (horizon - 1 or 1, transition_rank, vocab) tensor
        ``R``, likewise.
    gate : (*batch, horizon - 1, transition_rank) tensor, optional
        ``g``, shared by the components; default: ones.
    support : Support, or ids in a shape that `Support.of` takes, optional
        The tokens that logits and right factors run over, as many at each position; default: all.

    Raises
    ------
    ValueError
        If shapes do not match, weights leave the simplex, a component can emit nothing at a
        position, or a number is NaN or infinite where it may not be.

    References
    ----------
    basharin2024faster

    Examples
    --------
    >>> one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, 1, dtype=torch.float64)
    >>> flat = torch.zeros(2, 1, 2, dtype=torch.float64)
    >>> left = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    >>> right = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    >>> draft = MarkovMixture(one, flat, left, right)
    >>> draft.next_token_probs(torch.tensor([0])), draft.next_token_probs(torch.tensor([1]))
    (tensor([0.8808, 0.1192], dtype=torch.float64), tensor([0.1192, 0.8808], dtype=torch.float64))
    """

    weights: Float[Tensor, "*batch rank"]
    logits: Float[Tensor, "*batch horizon rank size"]
    left: Float[Tensor, "*left_batch _ vocab width"]
    right: Float[Tensor, "*right_batch _ width size"]
    gate: Float[Tensor, "*batch steps width"] | None = None
    support: Any = None
    _named: ClassVar[tuple[str, ...]] = ("transition_rank",)

    def __post_init__(self):
        if self.gate is None:
            shape = (*self.batch_shape, self.horizon - 1, self.transition_rank)
            object.__setattr__(self, "gate", self.logits.new_ones(shape))
        if self.support is not None and not isinstance(self.support, Support):
            shape = {"positions": self.horizon, "batch_shape": self.batch_shape}
            support = Support.of(self.support, vocab_size=self.vocab_size, **shape)
            object.__setattr__(self, "support", support)
        self._check_shapes()
        if self.support is not None:
            self._check_support(self.support)
        check_simplex(self.weights.detach(), -1, "the weights")
        for name in ("left", "right", "gate"):
            if not bool(torch.isfinite(getattr(self, name).detach()).all()):
                raise ValueError(f"{name} has an entry that is NaN or infinite: expected numbers")
        if not bool(torch.isfinite(self.logits.detach().amax(-1)).all()):
            raise ValueError(
                "logits of a component at a position are NaN, +inf or all -inf: it must be able to "
                "emit something, with a finite logit"
            )

    @property
    def horizon(self) -> int:
        """Number of tokens."""
        return self.logits.shape[-3]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.left.shape[-2]

    @property
    def transition_rank(self) -> int:
        """Rank of what a token's logits owe to the one before; 0: nothing."""
        return self.left.shape[-1]

    @property
    def free_numbers(self) -> int:
        """Free parameters of one distribution: what a head would have to give for it.

        A gate of ones is none. Left and right factors of an entry's own are counted as matrices of
        that rank, which make the gate redundant.
        """
        size, steps = self._sizes[0], self.horizon - 1
        free = self.rank - 1 + self.horizon * self.rank * (size - 1)
        if self._own_factors:
            width = min(self.transition_rank, self.vocab_size, size)
            each = width * (self.vocab_size + size - width)
            return free + min(steps, max(self._count(self.left), self._count(self.right))) * each
        gated = bool((self._gate != 1).any())
        return free + gated * steps * self.transition_rank

    @property
    def shared_numbers(self) -> int:
        """Parameters that all contexts share: left and right factors without batch axes.

        Beside shared left factors, right ones of an entry's own are the columns of its support in
        right factors over all tokens.
        """
        if self._own_factors:
            return 0
        each = self.vocab_size * self.transition_rank
        return each * (self._count(self.left) + self._count(self.right))

    def serial_steps(self, law: SamplingLaw | None = None) -> int:
        """Steps that must follow each other to draw from it: one per token."""
        at_once = self.transition_rank == 0 and (law is None or law.is_identity)
        return 1 if at_once else self.horizon

    def __getitem__(self, index) -> MarkovMixture:
        """Select along the first batch axes."""
        self._check_batched()
        return MarkovMixture(
            self.weights[index],
            self.logits[index],
            self.left if self.left.ndim == 3 else self.left[index],
            self.right if self.right.ndim == 3 else self.right[index],
            self._gate[index],
            None if self.support is None else self.support[index],
        )

    def marginal(self, length: int) -> MarkovMixture:
        """The mixture of the first `length` tokens."""
        self._check_length(length)
        return self._part(self.weights, self.logits[..., :length, :, :], 0)

    def without_support(self) -> MarkovMixture:
        """The same over all tokens, with zeros outside the support."""
        if self.support is None:
            return self
        spread = self.support.scatter
        logits = [spread(i, part, fill=-torch.inf) for i, part in enumerate(self.logits.unbind(-3))]
        steps = self.right.unbind(-3)[: self.horizon - 1]
        right = [spread(i, part) for i, part in enumerate(steps, 1)]
        nothing = self.right.new_zeros(
            *self.right.shape[:-3], 0, self.transition_rank, self.vocab_size
        )
        return MarkovMixture(
            self.weights,
            torch.stack(logits, -3),  # (*batch, horizon, rank, vocab)
            self.left,
            torch.stack(right, -3) if right else nothing,  # (*batch, steps, width, vocab)
            self.gate,
        )

    def _rest(self, length: int, weights: Tensor, last: Tensor | None) -> MarkovMixture:
        logits = self.logits[..., length:, :, :]  # (*batch, remaining, rank, size)
        if last is not None:
            bias = self._transition(length).bias(last.unsqueeze(-1))  # (*batch, 1, size)
            first = logits[..., :1, :, :] + bias.unsqueeze(-3)  # (*batch, 1, rank, size)
            logits = torch.cat([first, logits[..., 1:, :, :]], -3)
        return self._part(weights, logits, length)

    def _part(self, weights: Tensor, logits: Tensor, start: int) -> MarkovMixture:
        """Of some neighbouring positions, whose logits these are."""
        steps = slice(start, start + logits.shape[-3] - 1)
        left, right = (
            part if self._count(part) == 1 else part[..., steps, :, :]
            for part in (self.left, self.right)
        )
        stop = start + logits.shape[-3]
        support = None if self.support is None else self.support.part(start, stop)
        return MarkovMixture(weights, logits, left, right, self._gate[..., steps, :], support)

    def _transition(self, position: int) -> Transition:
        """Into a position after the first."""
        left, right = (
            part[..., 0 if self._count(part) == 1 else position - 1, :, :]
            for part in (self.left, self.right)
        )
        logits, gate = self.logits[..., position, :, :], self._gate[..., position - 1, :]
        return Transition(logits, left, right, gate)

    def _log_emission(self, position: int, before: Tensor | None, tokens: Tensor) -> Tensor:
        place, there = self._place(position, tokens)
        if before is None:
            logits = self.logits[..., position, :, :].log_softmax(-1)  # (*batch, rank, size)
            found = rows_at(logits.mT, place)  # (*batch, rows, rank)
        else:
            found = self._transition(position).log_emission(before, place)
        return torch.where(there.unsqueeze(-1), found, -torch.inf)  # (*batch, rows, rank)

    def _mixed(self, position: int, weights: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            return weights @ self.logits[..., position, :, :].softmax(-1)  # (*batch, rows, size)
        return self._transition(position).after(before).mixed(weights)

    def _of_components(self, position: int, component: Tensor, before: Tensor | None) -> Tensor:
        logits = rows_at(self.logits[..., position, :, :], component)  # (*batch, rows, size)
        if before is not None:
            logits = logits + self._transition(position).bias(before)
        return logits.softmax(-1)

    def _table(self, position: int, rows: Tensor) -> LowRankTable | MarkovTable:
        if position == 0:
            return LowRankTable(rows, self.logits[..., 0, :, :].softmax(-1).mT)
        return MarkovTable(rows, self._transition(position))

    @property
    def _gate(self) -> Tensor:
        """The gate, which is there once the checks are done."""
        return cast(Tensor, self.gate)

    @property
    def _own_factors(self) -> bool:
        """Whether every entry of the batch has left and right factors of its own."""
        return self.left.ndim > 3 and self.right.ndim > 3

    @staticmethod
    def _count(part: Tensor) -> int:
        """Transitions that a left or right factor is for; one is for all."""
        return part.shape[-3]

    def _check_shapes(self) -> None:
        batch, steps = tuple(self.batch_shape), self.horizon - 1
        size = self.vocab_size if self.support is None else self.logits.shape[-1]
        expected = {
            "logits": [(*batch, self.horizon, self.rank, size)],
            "gate": [(*batch, steps, self.transition_rank)],
            "left": self._shapes(self.vocab_size, self.transition_rank),
            "right": self._shapes(self.transition_rank, size),
        }
        for name, shapes in expected.items():
            found = tuple(getattr(self, name).shape)
            if found not in shapes:
                allowed = " or ".join(map(str, dict.fromkeys(shapes)))
                raise ValueError(f"{name} has shape {found}: expected {allowed}")

    def _shapes(self, *own: int) -> list[tuple[int, ...]]:
        """What a left or right factor may have."""
        leads, counts = [(), tuple(self.batch_shape)], {1, self.horizon - 1}
        return [(*lead, count, *own) for lead in leads for count in sorted(counts, reverse=True)]

    def _check_support(self, support: Support) -> None:
        fits = support.batch_shape == self.batch_shape and support.vocab_size == self.vocab_size
        if not fits or support.sizes != (self.logits.shape[-1],) * self.horizon:
            raise ValueError(
                f"a support of sizes {support.sizes} over {support.vocab_size} tokens, batch axes "
                f"{tuple(support.batch_shape)}: expected {self.horizon} positions of "
                f"{self.logits.shape[-1]} over {self.vocab_size}, {tuple(self.batch_shape)}; fill "
                "shorter rows up with the vocabulary's size"
            )
        for position in range(self.horizon):
            empty = ~support.filled(position).unsqueeze(-2)  # (*batch, 1, size)
            logits = self.logits.detach()[..., position, :, :]
            if bool((empty & (logits > -torch.inf)).any()):
                raise ValueError(
                    f"logits of position {position} are finite where the support only fills up: "
                    "expected -inf there"
                )
        same = all(torch.equal(ids, support.ids[1]) for ids in support.ids[2:])
        if (self._count(self.right) == 1 and not same) or (
            self.right.ndim == 3 and not support.is_shared
        ):
            raise ValueError(
                "a right factor is shared by positions or entries whose supports differ: its "
                "columns would stand for different tokens; give each its own"
            )
