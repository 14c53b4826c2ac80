"""What any training could reach: left and right factors shared by many contexts, the rest free in
each of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cpmtp.decomposition.fit_result import FitResult
from cpmtp.decomposition.fitting import fit
from cpmtp.decomposition.forms.chains import Chains
from cpmtp.decomposition.forms.ends import Ends, Plans
from cpmtp.decomposition.forms.entrance import (
    FORMS,
    Form,
    FormProblem,
    TreeFormProblem,
    problem_of,
)
from cpmtp.decomposition.forms.groups import Groups
from cpmtp.decomposition.forms.markov import Problem
from cpmtp.decomposition.forms.solving import Shape, solve_markov
from cpmtp.decomposition.restarts import NOTICEABLE_MASS, planned
from cpmtp.decomposition.trees.neighbours import TreeGroups
from cpmtp.decomposition.trees.nodes import merged
from cpmtp.joint_distribution import JointDistribution
from cpmtp.joint_distribution.stored import Stored
from cpmtp.prefix_tree import PrefixTree

# Most passes over all contexts: of mixtures, and of one component, whose passes are cheap.
_PASSES = {"em": (60, 150), "gradient": (150, 300)}


@dataclass(frozen=True, repr=False)
class PopulationFit(Stored):
    """Drafts of many contexts that share left and right factors.

    Attributes
    ----------
    form : str
    rank, transition_rank : int
    gated, anchored : bool
    left : (steps, vocab, transition_rank) tensor
    right : (steps, transition_rank, vocab) tensor
        Zero at tokens that no context has.
    fits : tuple of FitResult
        Of every context, where the population ended.
    objective : float
        Mean over the contexts of ``KL(P || Q)`` in nats.
    trace : tuple of float
        The same after every pass.
    converged : bool
    seconds : float
    method : str
    """

    form: str
    rank: int
    transition_rank: int
    gated: bool
    anchored: bool
    left: Float[Tensor, "steps vocab width"]
    right: Float[Tensor, "steps width vocab"]
    fits: tuple[FitResult, ...]
    objective: float
    trace: tuple[float, ...]
    converged: bool
    seconds: float
    method: str

    def __repr__(self) -> str:
        gated = ", gated" if self.gated else ""
        return (
            f"PopulationFit({self.form} rank={self.rank}, transition_rank={self.transition_rank}"
            f"{gated}: {len(self.fits)} contexts, objective={self.objective:.4g})"
        )

    @property
    def shared_numbers(self) -> int:
        """Numbers of left and right factors, which all contexts share."""
        return self.left.numel() + self.right.numel()

    def refit(
        self, joint: JointDistribution | PrefixTree, method: str = "em", **options: Any
    ) -> FitResult:
        """The best draft of another context with these left and right factors: its logits, weights
        and gates are fitted.

        Parameters
        ----------
        joint : JointDistribution or PrefixTree
        method : {"em", "gradient", "acceptance"}
        **options
            As for `fit`: restarts, seed, max_iterations, tolerance, rule, first_token.
        """
        asked = options | {"anchored": self.anchored}
        if self.transition_rank == 0:
            return fit(joint, self.rank, method, **asked)
        transitions = (self.left, self.right)
        asked |= {"form": self.form, "gated": self.gated, "transitions": transitions}
        return fit(joint, self.rank, method, **asked)


def fit_population(
    joints: Sequence[JointDistribution | PrefixTree] | JointDistribution,
    rank: int = 1,
    transition_rank: int = 16,
    *,
    form: str | None = None,
    gated: bool = True,
    anchored: bool = False,
    method: str = "em",
    restarts: int = 1,
    seed: int = 0,
    max_iterations: int | None = None,
    tolerance: float = 1e-4,
    least_mass: float = NOTICEABLE_MASS,
) -> PopulationFit:
    """Fit left and right factors to many contexts at once, and everything else to each.

    What a trained head stores is the same in all contexts, and what it outputs is not: no training
    ends below this on the contexts fitted. Judge it on others, by `PopulationFit.refit`.

    Parameters
    ----------
    joints : sequence of JointDistribution or of PrefixTree, or one with a batch axis
        All dense or all trees, of one horizon and vocabulary.
    rank : int
        Number of components.
    transition_rank : int
        0: nothing is shared; the contexts are fitted by themselves as ``cp``.
    form : {"markov", "markov_mixture", "cp"}, optional
        Default: by the ranks.
    gated : bool
        Whether every context (anchored: and first token) scales the products of left and right
        factors by gates of its own.
    anchored : bool
        Fit what follows each first token: n of at least 3.
    method : {"em", "gradient"}
    restarts, seed : int
        As for `fit`.
    max_iterations : int, optional
        Most passes over all contexts.
    tolerance : float
        In nats per context: the fit stops when ten passes have gained less than this.
    least_mass : float
        Anchored: first tokens of no more than this are left out.

    Raises
    ------
    ValueError
        If there are no joints, they do not fit each other, or the form does not go with its ranks.

    Examples
    --------
    >>> from cpmtp.joint_distribution import exact_joint
    >>> from cpmtp.language_model import separated_hmm
    >>> lm = separated_hmm(3, 6)
    >>> joints = [exact_joint(lm, torch.tensor([token]), 3) for token in (0, 2, 4)]
    >>> population = fit_population(joints, rank=1, transition_rank=2)
    >>> population.left.shape, population.objective < fit_population(joints, 1, 0).objective
    (torch.Size([2, 6, 2]), True)
    """
    started = time.perf_counter()
    given = _checked(joints)
    name = form or ("cp" if not transition_rank else "markov" if rank == 1 else "markov_mixture")
    _check(name, rank, transition_rank, method, given[0], anchored)
    how = {"restarts": restarts, "seed": seed}
    if name == "cp":
        fits = tuple(fit(joint, rank, method, anchored=anchored, **how) for joint in given)
        return _of_nothing_shared(fits, rank, gated, anchored, method, started)
    problems = [problem_of(joint, anchored, least_mass) for joint in given]
    groups = _all_groups(problems)
    width = min(transition_rank, groups.vocab)
    passes = _PASSES[method] if max_iterations is None else (max_iterations, max_iterations)
    plan = planned(given[0], method, max_iterations=None, tolerance=tolerance, **how)
    plan = replace(plan, goal=replace(plan.goal, first_token="draft"))
    many, single = (replace(plan, max_iterations=most) for most in passes)
    ends = solve_markov(groups, Shape(rank, width, gated), Plans(many, plan, single))

    left, right = _over_all_tokens(ends.found, groups, given[0].vocab_size)
    asked = Form(name, width, gated, (left, right))
    fits = _fits(ends, groups, problems, asked, method)
    return PopulationFit(
        name,
        rank,
        width,
        gated,
        anchored,
        left,
        right,
        fits,
        float(ends.objective),
        tuple(ends.traces[0]),
        bool(ends.converged),
        time.perf_counter() - started,
        method,
    )


def _checked(joints: Any) -> list[JointDistribution | PrefixTree]:
    """The joints one by one."""
    if isinstance(joints, JointDistribution):
        flat = joints.probs.reshape(-1, *(joints.vocab_size,) * joints.horizon)  # (joints, …)
        return [JointDistribution(probs, joints.horizon) for probs in flat]
    given = list(joints)
    if not given:
        raise ValueError("no joints: expected those of at least one context")
    kinds = {
        (type(joint).__name__, getattr(joint, "horizon", None), getattr(joint, "vocab_size", None))
        for joint in given
    }
    if len(kinds) > 1 or not isinstance(given[0], JointDistribution | PrefixTree):
        raise ValueError(
            f"joints of (kind, horizon, vocabulary) {sorted(kinds, key=str)}: expected one kind, "
            "JointDistribution or PrefixTree, of one horizon and vocabulary"
        )
    if any(tuple(getattr(joint, "batch_shape", ())) for joint in given):
        raise ValueError("a joint in the sequence has batch axes: give it by itself, or its parts")
    return given


def _check(
    form: str, rank: int, transition_rank: int, method: str, joint: Any, anchored: bool
) -> None:
    if form not in FORMS or form == "hmm":
        raise ValueError(f"form {form!r} of a population: expected cp, markov or markov_mixture")
    if (form == "cp") != (transition_rank == 0):
        raise ValueError(
            f"transition_rank {transition_rank} for form {form!r}: expected 0 for 'cp', and at "
            "least 1 for the others"
        )
    if rank < 1 or transition_rank < 0 or (form == "markov" and rank != 1):
        raise ValueError(
            f"rank {rank} and transition_rank {transition_rank} for form {form!r}: expected at "
            "least 1 component (exactly 1 for 'markov') and a transition rank of at least 0"
        )
    if method not in _PASSES:
        raise ValueError(f"method {method!r} of a population: expected {', '.join(_PASSES)}")
    if joint.horizon < 2 + anchored:
        raise ValueError(
            f"a population of horizon {joint.horizon}: expected at least {2 + anchored} tokens"
        )


def _of_nothing_shared(
    fits: tuple[FitResult, ...],
    rank: int,
    gated: bool,
    anchored: bool,
    method: str,
    started: float,
) -> PopulationFit:
    """What `cp` fits of every context by itself come to."""
    draft = fits[0].distribution
    steps, vocab = draft.horizon - 1, draft.vocab_size
    left = torch.zeros(steps, vocab, 0, dtype=torch.float64)
    objective = sum(float(one.objective) for one in fits) / len(fits)
    return PopulationFit(
        "cp",
        rank,
        0,
        False,
        anchored,
        left,
        left.mT,  # (steps, 0, vocab)
        fits,
        objective,
        (objective,),
        all(bool(one.converged) for one in fits),
        time.perf_counter() - started,
        method,
    )


def _all_groups(problems: list[FormProblem | TreeFormProblem]) -> Groups | TreeGroups:
    """All contexts' members as those of one group, every context of equal weight."""
    parts = [problem.groups for problem in problems]
    mass = torch.cat([part.mass for part in parts], 1) / len(parts)  # (1, members)
    if isinstance(parts[0], TreeGroups):
        return TreeGroups(merged([part.forest for part in parts]), mass)  # type: ignore[union-attr]
    probs = torch.cat([part.probs for part in parts], 1)  # type: ignore[union-attr]
    return Groups(probs, mass)


def _over_all_tokens(
    chains: Chains, groups: Groups | TreeGroups, vocab: int
) -> tuple[Tensor, Tensor]:
    """Left and right factors over the whole vocabulary, zero at tokens that do not occur."""
    if isinstance(groups, Groups):
        return chains.left[0].clone(), chains.right[0].clone()
    _, steps, _, width = chains.left.shape
    left = chains.left.new_zeros(steps, vocab, width)
    right = chains.right.new_zeros(steps, width, vocab)
    left[:, groups.tokens], right[..., groups.tokens] = chains.left[0], chains.right[0]
    return left, right


def _fits(
    ends: Ends,
    groups: Groups | TreeGroups,
    problems: list[FormProblem | TreeFormProblem],
    asked: Form,
    method: str,
) -> tuple[FitResult, ...]:
    """Every context's part of the end."""
    found, start = [], 0
    for problem in problems:
        started = time.perf_counter()
        own = problem.groups
        members = slice(start, start + own.mass.shape[1])
        chains, start = ends.found.of_members(members), members.stop
        if isinstance(own, TreeGroups) and isinstance(groups, TreeGroups):
            there = torch.searchsorted(groups.tokens, own.tokens)  # (tokens,)
            chains = replace(
                chains,
                logits=chains.logits[..., : own.forest.width],
                left=chains.left[:, :, there],  # (1, steps, tokens, width)
                right=chains.right[..., there],  # (1, steps, width, tokens)
            )
        zero = torch.zeros(1, dtype=torch.long)
        kl = Problem(own, zero, chains, ()).counts(zero, chains).kl  # (1,)
        part = replace(
            Ends.standing(chains, kl), converged=ends.converged, traces=(tuple(kl.tolist()),)
        )
        found.append(problem.result([part], asked, method, started))
    return tuple(found)
