"""What every fit answers with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.decomposition.components import top_tokens
from cpmtp.decomposition.mixtures import Mixtures, Runs, Solved
from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.joint_distribution.stored import Stored

OK = "ok"
NOT_CONVERGED = "not_converged"
FAILED = "failed"


@dataclass(frozen=True)
class FitResult(Stored):
    """A proper distribution of the form asked for and what it took to get there.

    For a joint with batch axes every number is a (*batch,) tensor, and `status` and `message` are
    tuples of strings in the order of the flattened batch; for a single joint they are plain Python
    values. An anchored fit is one answer per joint.

    Attributes
    ----------
    distribution : CPDistribution, MarkovMixture or HMMDistribution
        Of the best restart. Anchored: batch axis (vocab,) over the first token and horizon n-1
        (fitted to a tree: a `FirstTokenDrafts`, which reads the same). Fitted to a tree it has the
        tree's ids as its support.
    objective : float or tensor
        Minimised value at `distribution`. ``em``, ``gradient``: KL divergence in nats; ``als``,
        ``hals``, ``mu``: relative Frobenius error; ``acceptance``: minus the tokens per call.
    converged : bool or tensor
        Whether the best restart met its stopping rule before its last iteration.
    iterations : int or tensor
        Of the best restart: passes over the joint (TensorLy methods: their outer iterations).
        Trials of starts and passes over a large joint's core are not counted.
    seconds : float
        Wall-clock time of the whole fit, all batch entries and restarts together.
    status : str or tuple of str
        ``"ok"``, ``"not_converged"``, or ``"failed"``: then `distribution` is the product of the
        joint's marginals.
    message : str or tuple of str
        Why, in words; empty when there is nothing to say.
    raw_relative_error, negative_mass, mass_deficit : float or tensor
        Of a squared-error fit before it was made a distribution: its relative Frobenius error, the
        sum of the magnitudes of its negative entries, and one minus the sum of all entries. NaN
        where not meant.
    restart_objectives : (*batch, restarts) tensor
        Objective of every restart (infinite if it failed): their spread shows how ill-posed the fit
        is. Of Markov and hidden Markov forms also of what they contain.
    restart_match_scores : (*batch, restarts) tensor
        `factor_match_score` of every restart with the best one: below 1 the components are no
        property of the joint. NaN for Markov and hidden Markov forms.
    trace : tuple of float or of tuples
        Objective after each recorded iteration of the best restart (empty where a method keeps
        none).
    method : str
    """

    distribution: Any
    objective: float | Float[Tensor, "*batch"]
    converged: bool | Bool[Tensor, "*batch"]
    iterations: int | Int[Tensor, "*batch"]
    seconds: float
    status: str | tuple[str, ...]
    message: str | tuple[str, ...]
    raw_relative_error: float | Float[Tensor, "*batch"]
    negative_mass: float | Float[Tensor, "*batch"]
    mass_deficit: float | Float[Tensor, "*batch"]
    restart_objectives: Float[Tensor, "*batch restarts"]
    restart_match_scores: Float[Tensor, "*batch restarts"]
    trace: tuple
    method: str

    def __repr__(self) -> str:
        shape = tuple(self.distribution.batch_shape)
        what = self.status
        if isinstance(self.objective, float):
            what = f"{self.status}, objective={self.objective:.4g}, iterations={self.iterations}"
        elif not isinstance(what, str):
            what = ", ".join(f"{self.status.count(s)} {s}" for s in sorted(set(self.status)))
        return (
            f"FitResult({self.method}, {type(self.distribution).__name__} "
            f"rank={self.distribution.rank}, batch_shape={shape}: {what})"
        )

    def top_tokens(self, lm: Any, count: int = 5) -> pd.DataFrame:
        """What the components say, see `cpmtp.top_tokens`."""
        return top_tokens(self, lm, count)

    @classmethod
    def of(
        cls,
        solved: Solved,
        method: str,
        *,
        batch_shape: tuple[int, ...],
        first_tokens: int | None,
        started: float,
        draft: Any = None,
    ) -> FitResult:
        """The answer for joints of these batch axes.

        Parameters
        ----------
        solved : Solved
            One item per joint.
        first_tokens : int, optional
            Of an anchored fit: how many distributions its answer holds for each joint.
        started : float
            `time.perf_counter` at the beginning.
        draft : CPDistribution or FirstTokenDrafts, optional
            The answer itself, where it does not run over all tokens; default: the best mixtures.
        """
        best, batched = solved.best, len(batch_shape) > 0
        if draft is None:
            draft = _over_all_tokens(best.mixtures, batch_shape, first_tokens)
        verdicts = [
            _verdict(failure, converged)
            for failure, converged in zip(best.failures, best.converged.tolist(), strict=True)
        ]
        status, message = zip(*verdicts, strict=True)

        def shaped(values: Tensor):
            return values.reshape(batch_shape) if batched else values.item()  # (*batch,)

        return cls(
            draft,
            objective=shaped(best.objective),
            converged=shaped(best.converged),
            iterations=shaped(best.iterations),
            seconds=time.perf_counter() - started,
            status=status if batched else status[0],
            message=message if batched else message[0],
            raw_relative_error=shaped(best.raw[:, 0]),
            negative_mass=shaped(best.raw[:, 1]),
            mass_deficit=shaped(best.raw[:, 2]),
            restart_objectives=solved.objectives.reshape(*batch_shape, -1),  # (*batch, restarts)
            restart_match_scores=solved.matches.reshape(*batch_shape, -1),  # (*batch, restarts)
            trace=best.traces if batched else best.traces[0],
            method=method,
        )

    @classmethod
    def of_form(
        cls,
        draft: Any,
        ends: Any,
        method: str,
        *,
        batch_shape: tuple[int, ...],
        started: float,
    ) -> FitResult:
        """The answer for forms whose runs ended as `ends` says, one group per joint."""
        batched = len(batch_shape) > 0
        verdicts = [_verdict("", converged) for converged in ends.converged.tolist()]
        status, message = zip(*verdicts, strict=True)
        unknown = torch.full_like(ends.objective, torch.nan)
        iterations = torch.tensor([max(len(trace) - 1, 0) for trace in ends.traces])

        def shaped(values: Tensor):
            return values.reshape(batch_shape) if batched else values.item()  # (*batch,)

        objectives = ends.objectives.reshape(*batch_shape, -1)  # (*batch, starts)
        return cls(
            draft,
            objective=shaped(ends.objective),
            converged=shaped(ends.converged),
            iterations=shaped(iterations),
            seconds=time.perf_counter() - started,
            status=status if batched else status[0],
            message=message if batched else message[0],
            raw_relative_error=shaped(unknown),
            negative_mass=shaped(unknown),
            mass_deficit=shaped(unknown),
            restart_objectives=objectives,
            restart_match_scores=torch.full_like(objectives, torch.nan),
            trace=ends.traces if batched else ends.traces[0],
            method=method,
        )


def _over_all_tokens(
    mixtures: Mixtures, batch_shape: tuple[int, ...], first_tokens: int | None
) -> CPDistribution:
    """Mixtures as a distribution with these batch axes, and that of the first token."""
    lead = batch_shape if first_tokens is None else (*batch_shape, first_tokens)
    columns = [
        factor.mT.reshape(*lead, *factor.mT.shape[1:]).contiguous()  # (*lead, vocab, rank)
        for factor in mixtures.factors.unbind(1)
    ]
    return CPDistribution(mixtures.weights.reshape(*lead, -1), columns)  # weights (*lead, rank)


def pooled(
    solved: Solved,
    first: Float[Tensor, "joints vocab"],
    noticed: Int[Tensor, " items"],
    others: Mixtures,
) -> Solved:
    """One answer per joint from those of its noticed first tokens, weighted by their mass.

    Parameters
    ----------
    first : (joints, vocab) tensor
        Probability of every first token.
    noticed : (items,) long tensor
        Numbers of those that were fitted, over all joints.
    others : Mixtures
        What stands for the rest: a run for every first token of every joint.
    """
    best = solved.best

    def spread(values: Tensor, fill: float) -> Tensor:
        full = values.new_full((first.numel(), *values.shape[1:]), fill)
        full[noticed] = values
        return full.reshape(*first.shape, *values.shape[1:])  # (joints, vocab, …)

    def averaged(values: Tensor) -> Tensor:
        return (share.view(*share.shape, *(1,) * (values.ndim - 1)) * spread(values, 0.0)).sum(1)

    mass = first / first.sum(1, keepdim=True)  # (joints, vocab)
    share = mass * spread(torch.ones_like(mass.flatten()[noticed]), 0.0)  # (joints, vocab)
    failures: list[list[str]] = [[] for _ in first]
    for item, failure in zip(noticed.tolist(), best.failures, strict=True):
        failures[item // first.shape[1]] += [failure] if failure else []
    summary = Runs(
        others.replaced(noticed, best.mixtures),
        objective=averaged(best.objective),
        converged=spread(best.converged, True).all(1),
        iterations=spread(best.iterations, 0).amax(1),
        failures=tuple(reasons[0] if reasons else "" for reasons in failures),
        traces=((),) * len(first),
        raw=averaged(best.raw),
    )
    return Solved(summary, averaged(solved.objectives), averaged(solved.matches))


def _verdict(failure: str, converged: bool) -> tuple[str, str]:
    """Status and message."""
    if failure:
        advice = "the product of the marginals is returned: lower the rank or use em"
        return FAILED, f"{failure}; {advice}"
    if not converged:
        advice = "raise max_iterations for a closer fit"
        return NOT_CONVERGED, f"stopped at the last iteration allowed: {advice}"
    return OK, ""
