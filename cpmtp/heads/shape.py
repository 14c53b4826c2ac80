"""What forms of heads there are, and which sizes each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORMS = ("cp", "markov", "markov_mixture", "recurrent")
_RANKS = {"cp": 8, "markov_mixture": 4}
_TRANSITION_RANKS = {"markov": 64, "markov_mixture": 32}


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of a head that are not those of its base model, each in its range.

    Attributes
    ----------
    form : str
    horizon, rank, transition_rank : int
        No rank given: 8 of ``cp``, 4 of ``markov_mixture``, 1 of the others; no transition rank: 64
        of ``markov``, 32 of ``markov_mixture``, 0 of the others.
    """

    form: str
    horizon: int
    rank: int
    transition_rank: int

    @classmethod
    def of(
        cls,
        form: str,
        horizon: int,
        rank: int | None,
        transition_rank: int | None,
        *,
        blocks: int = 0,
    ) -> HeadSizes:
        """With the form's own defaults.

        Raises
        ------
        ValueError
            If a size is out of range, or is none that the form has.

        Examples
        --------
        >>> HeadSizes.of("markov", 4, None, None)
        HeadSizes(form='markov', horizon=4, rank=1, transition_rank=64)
        """
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
        rank = _RANKS.get(form, 1) if rank is None else rank
        own = _TRANSITION_RANKS.get(form, 0)
        transition_rank = own if transition_rank is None else transition_rank
        if horizon < 2:
            raise ValueError(
                f"horizon {horizon}: a head needs at least 2 tokens, the first comes from the "
                "target"
            )
        for name, value, least in (
            ("rank", rank, 1),
            ("transition rank", transition_rank, min(own, 1)),
            ("blocks", blocks, 0),
        ):
            if value < least:
                raise ValueError(f"{name} {value} of form {form!r}: expected at least {least}")
        if form not in _RANKS and rank != 1:
            raise ValueError(
                f"rank {rank} of form {form!r}, which has one component: leave the rank out, or "
                "choose form cp or markov_mixture"
            )
        if not own and transition_rank:
            raise ValueError(
                f"transition rank {transition_rank} of form {form!r}, which has no transitions: "
                "leave it out, or choose form markov or markov_mixture"
            )
        return cls(form, horizon, rank, transition_rank)

    @property
    def name(self) -> str:
        """What tells a head from others of its base model, for folders.

        Examples
        --------
        >>> HeadSizes.of("cp", 4, 8, None).name, HeadSizes.of("markov", 4, None, None).name
        ('r8', 'markov-r1-k64')
        """
        form = "" if self.form == "cp" else f"{self.form}-"
        transitions = f"-k{self.transition_rank}" if self.transition_rank else ""
        return f"{form}r{self.rank}{transitions}"


def checked_vocabulary(ids: Sequence[int] | None, vocab_size: int) -> list[int] | None:
    """The ids that may be drafted, ascending; None: all of them.

    Raises
    ------
    ValueError
        If there are none, one comes twice, or one is not in the vocabulary.
    """
    if ids is None:
        return None
    kept = sorted(int(i) for i in ids)
    if not kept or kept[0] < 0 or kept[-1] >= vocab_size or len(set(kept)) < len(kept):
        raise ValueError(
            f"a draft vocabulary of {len(kept)} ids ({kept[:1]} to {kept[-1:]}): expected different"
            f" ids in [0, {vocab_size})"
        )
    return kept
