"""What every fit answers with."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpmtp.drafts.cp_distribution import CPDistribution

OK = "ok"
NOT_CONVERGED = "not_converged"
FAILED = "failed"


@dataclass(frozen=True)
class FitResult:
    """A proper CP distribution and what it took to get there.

    For a joint with batch axes every number is a (*batch,) tensor, and `status` and `message` are
    tuples of strings in the order of the flattened batch; for a single joint they are plain Python
    values. An anchored fit is one answer per joint.

    Attributes
    ----------
    distribution : CPDistribution
        Of the best restart. Anchored: batch axis (vocab,) over the first token and horizon n-1.
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
        is.
    restart_match_scores : (*batch, restarts) tensor
        `factor_match_score` of every restart with the best one: below 1 the components are no
        property of the joint.
    trace : tuple of float or of tuples
        Objective after each recorded iteration of the best restart (empty where a method keeps
        none).
    method : str
    """

    distribution: CPDistribution
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
