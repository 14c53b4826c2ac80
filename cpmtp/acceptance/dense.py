"""The rules' sums over sequences, position by position, in pieces that stay in the processor's
cache.

At position k everything is a table of prefixes of k-1 tokens (rows) by next tokens. A piece of rows
of both laws is made once, serves all rules, and is gone: no rule walks over the joint by itself,
and a CP draft's joint is never held at its own size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution import JointDistribution
from cpmtp.sampling_law import SamplingLaw

# Entries of a piece; a few tensors of this size are alive at a time.
_PIECE = 1 << 16


@dataclass(frozen=True)
class _Step:
    """Both laws of the first k tokens, as rows of prefixes by next tokens.

    The draft's rows are ``rows @ columns.mT`` (a CP distribution's rows carry its components) or,
    without columns, `rows`. The leading axes are the batch's, and for an anchored draft the first
    token's, too.
    """

    p: Float[Tensor, "*lead prefixes vocab"]
    rows: Float[Tensor, "*lead prefixes width"]
    columns: Float[Tensor, "*lead vocab width"] | None

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of target and draft after the other."""
        entries_per_row = self.p.numel() // max(self.p.shape[-2], 1)
        size = max(_PIECE // max(entries_per_row, 1), 1)
        # `split` rather than slices: its gradient is one concatenation.
        for p, rows in zip(self.p.split(size, -2), self.rows.split(size, -2), strict=True):
            yield p, rows if self.columns is None else rows @ self.columns.mT

    def row(self, prefix: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The row of one prefix per batch entry, (*batch, 1, vocab) of each law."""
        p, rows, columns = self.p, self.rows, self.columns
        index = prefix[..., None, None]
        if columns is not None:
            if columns.ndim - 2 > batch:
                first = (prefix // p.shape[-2])[..., None, None, None]
                columns = columns.take_along_dim(first, batch).squeeze(batch)
            return _rows_of(p, batch, index), _rows_of(rows, batch, index) @ columns.mT
        return _rows_of(p, batch, index), _rows_of(rows, batch, index)


def _rows_of(table: Tensor, batch: int, index: Tensor) -> Tensor:
    return table.flatten(batch, -2).take_along_dim(index, -2)


def survivals(
    joint: JointDistribution,
    draft: CPDistribution | JointDistribution,
    rules: tuple[str, ...],
    first_token: str,
    law: SamplingLaw,
    *,
    epsilon: float,
    delta: float,
) -> dict[str, Float[Tensor, "*batch horizon"]]:
    """``S_1 … S_n`` of each rule; arguments are taken to fit each other. The draft is put through
    `law`.
    """
    batch, told = len(joint.batch_shape), first_token == "target"
    p = _prefix_laws(joint.probs, joint.horizon)
    state = _State(
        tuple(r for r in rules if r != "greedy"),
        p[1] if told else p[0].unsqueeze(-1),
        epsilon,
        delta,
    )
    greedy = _GreedyPath(p[1], batch, law, told) if "greedy" in rules else None
    found: dict[str, list[Tensor]] = {
        rule: [torch.ones_like(p[0])] if told else [] for rule in rules
    }
    steps = _told_steps(joint, draft, p) if told else _own_steps(joint, draft, p)
    for step in steps:
        last = len(found[rules[0]]) + 1 == joint.horizon
        sums, state = state.judged(step, batch, law, last)
        for rule, value in sums.items():
            found[rule].append(value)
        if greedy is not None:
            found["greedy"].append(greedy.judged(step))
    return {rule: torch.stack(values, -1) for rule, values in found.items()}


def _prefix_laws(probs: Tensor, horizon: int) -> list[Tensor]:
    laws = [probs]
    for _ in range(horizon):
        laws.append(laws[-1].sum(-1))
    return laws[::-1]


def _own_steps(joint: JointDistribution, draft, p: list[Tensor]) -> Iterator[_Step]:
    """A draft that gives all tokens."""
    batch = len(joint.batch_shape)
    if isinstance(draft, JointDistribution):
        yield from (
            _Step(_table(a, batch), _table(b, batch), None)
            for a, b in _later(p, _prefix_laws(draft.probs, draft.horizon), 1)
        )
        return
    rows = draft.weights.unsqueeze(-2)
    for k, factor in enumerate(draft.factors, start=1):
        yield _Step(_table(p[k], batch), rows, factor)
        if k < joint.horizon:
            rows = (rows.unsqueeze(-2) * factor.unsqueeze(-3)).flatten(-3, -2)


def _told_steps(joint: JointDistribution, draft, p: list[Tensor]) -> Iterator[_Step]:
    """A draft that is told the first token: ``P(x1) Q(x_2:k | x1)``, from the second token on."""
    n, batch, first = joint.horizon, len(joint.batch_shape), p[1]
    anchored = draft.horizon == n - 1
    if isinstance(draft, JointDistribution):
        given = _times(first, draft.probs) if anchored else _given_first(draft, first)
        yield from (
            _Step(_table(a, batch), _table(b, batch), None)
            for a, b in _later(p, _prefix_laws(given, n), 2)
        )
        return
    rows = draft.weights if anchored else posterior_after_first(draft)
    rows = rows * first.unsqueeze(-1)
    if anchored:
        rows, batch = rows.unsqueeze(-2), batch + 1
    for k, factor in enumerate(draft.factors if anchored else draft.factors[1:], start=2):
        yield _Step(_table(p[k], batch), rows, factor)
        if k < n:
            rows = (rows.unsqueeze(-2) * factor.unsqueeze(-3)).flatten(-3, -2)


def _later(p: list[Tensor], q: list[Tensor], start: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(p[start:], q[start:], strict=True))


def _table(law: Tensor, lead: int) -> Tensor:
    """Prefixes by next tokens, after `lead` axes that stay."""
    return law.reshape(*law.shape[:lead], -1, law.shape[-1])


def _given_first(draft: JointDistribution, first: Tensor) -> Tensor:
    rest = draft.horizon - 1
    own = draft.prefix_probs(1)
    given = _times(ratio(first, own, otherwise=0.0), draft.probs)
    if bool((own > 0).all()):
        return given
    # Where the draft gives the first token no mass there is no posterior: the prior, its law of the
    # others, is used.
    prior = draft.probs.sum(dim=-draft.horizon, keepdim=True)
    return torch.where(own.reshape(*own.shape, *(1,) * rest) > 0, given, _times(first, prior))


def posterior_after_first(draft: CPDistribution) -> Float[Tensor, "*batch vocab rank"]:
    """Weights after each first token; the prior weights after one of zero mass."""
    scores = draft.weights.unsqueeze(-2) * draft.factors[0]
    total = scores.sum(-1, keepdim=True)
    return torch.where(total > 0, ratio(scores, total, otherwise=0.0), draft.weights.unsqueeze(-2))


def _times(first: Tensor, rest: Tensor) -> Tensor:
    return first.reshape(*first.shape, *(1,) * (rest.ndim - first.ndim)) * rest


class _State:
    """What the rules carry from one position to the next: a number per prefix each, shaped (*batch,
    prefixes).
    """

    def __init__(self, rules: tuple[str, ...], p: Tensor, epsilon: float, delta: float):
        self._rules, self._thresholds = rules, (epsilon, delta)
        self._p = self._q = p
        self._kept = {
            rule: torch.ones_like(p, dtype=torch.bool) if rule == "typical" else p for rule in rules
        }

    def judged(
        self, step: _Step, batch: int, law: SamplingLaw, last: bool
    ) -> tuple[dict[str, Tensor], _State]:
        """Survival of one more position per rule, and the state after it (after the last one:
        worthless).
        """
        lead = step.p.shape[:-1]
        before = {name: value.reshape(lead) for name, value in self._scales().items()}
        grown: dict[str, list[Tensor]] = {name: [] for name in ("p", "q", *self._rules)}
        totals: dict[str, Tensor] = {}
        start = 0
        for p, q in step.pieces():
            here = {
                name: value[..., start : start + p.shape[-2], None]
                for name, value in before.items()
            }
            start += p.shape[-2]
            if not law.is_identity:
                q = here["q"] * _processed(q, law)
            made = self._judge(p, q, here)
            for rule in self._rules:
                survives = torch.where(made[rule], q, 0.0) if rule == "typical" else made[rule]
                value = survives.flatten(batch).sum(-1)
                totals[rule] = totals[rule] + value if rule in totals else value
            if not last:
                for name, value in {"p": p, "q": q, **made}.items():
                    grown[name].append(value)
        after = _State(self._rules, self._p, *self._thresholds)
        if not last:
            flat = {name: torch.cat(pieces, -2).flatten(batch) for name, pieces in grown.items()}
            after._p, after._q = flat.pop("p"), flat.pop("q")
            after._kept = flat
        return totals, after

    def _scales(self) -> dict[str, Tensor]:
        """Per prefix, what the rules multiply with: divisions by the shorter prefix only."""
        scales = {"p": self._p, "q": self._q}
        if "token" in self._rules:
            # T_k = T_{k-1} min(p_k, q_k) = min(P_k T_{k-1}/P_{k-1}, Q_k T_{k-1}/Q_{k-1}).
            kept = self._kept["token"]
            scales |= {
                "token_p": ratio(kept, self._p, otherwise=0.0),
                "token_q": ratio(kept, self._q, otherwise=0.0),
            }
        if "block" in self._rules:
            scales["block"] = ratio(self._kept["block"], self._p, otherwise=0.0)
        if "typical" in self._rules:
            scales["typical"] = self._kept["typical"]
        return scales

    def _judge(self, p: Tensor, q: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each rule keeps of every continuation of some prefixes."""
        made = {}
        for rule in self._rules:
            if rule == "token":
                made[rule] = torch.minimum(p * before["token_p"], q * before["token_q"])
            elif rule == "block":
                made[rule] = torch.minimum(p * before["block"], q)
            elif rule == "coupling":
                made[rule] = torch.minimum(p, q)
            else:
                made[rule] = before["typical"] & self._typical(ratio(p, before["p"], otherwise=0.0))
        return made

    def _typical(self, p: Tensor) -> Tensor:
        epsilon, delta = self._thresholds
        entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1, keepdim=True)
        return p > (delta * torch.exp(-entropy)).clamp_max(epsilon)


class _GreedyPath:
    """The path of the target's argmaxes, and what of it the draft has kept so far."""

    def __init__(self, first: Tensor, batch: int, law: SamplingLaw, told: bool):
        self._batch, self._law = batch, law
        self._prefix = (
            first.argmax(-1) if told else torch.zeros_like(first[..., 0], dtype=torch.long)
        )
        # The first token is the target's argmax, whatever mass the joint gives it.
        self._mass = (
            first.take_along_dim(self._prefix.unsqueeze(-1), -1).squeeze(-1) if told else None
        )
        self._survived = torch.ones_like(first[..., 0])

    def judged(self, step: _Step) -> Tensor:
        p, q = (row.squeeze(-2) for row in step.row(self._prefix, self._batch))
        token = p.argmax(-1, keepdim=True)
        if self._law.is_identity:
            self._survived = q.take_along_dim(token, -1).squeeze(-1)
            found = self._survived if self._mass is None else self._survived / self._mass
        else:
            self._survived = found = self._survived * _processed(q, self._law).take_along_dim(
                token, -1
            ).squeeze(-1)
        self._prefix = self._prefix * p.shape[-1] + token.squeeze(-1)
        return found


def _processed(q: Tensor, law: SamplingLaw) -> Tensor:
    """Conditionals of rows of a joint, put through the law; after a prefix without mass any law
    will do.
    """
    conditional = ratio(q, q.sum(-1, keepdim=True), otherwise=1 / q.shape[-1])
    return law.process(conditional / conditional.sum(-1, keepdim=True))


def ratio(a: Tensor, b: Tensor, *, otherwise: float) -> Tensor:
    """``a / b``, and `otherwise` where b is zero, without a NaN in the value or in the gradient."""
    positive = b > 0
    return torch.where(positive, a / torch.where(positive, b, 1.0), otherwise)
