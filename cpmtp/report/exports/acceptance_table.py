"""The one table behind every export: how often drafted tokens survive, and under what conditions.

Others count from the first drafted token on: a head of horizon n drafts K = n - 1 of them, the
first survives with S_2, the first two with S_3, and so on (`docs/exports.md`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CEILING, FORECAST, MEASURED = "ceiling", "forecast", "measured"
KINDS = {
    CEILING: "ceiling: the best draft of each single context, which no trained head reaches",
    FORECAST: "forecast of a trained head",
    MEASURED: "measured in decoding",
}
_DECIMALS = 6


@dataclass(frozen=True)
class DraftedFor:
    """How many tokens to draft for batches of these sizes; 0 is plain decoding.

    Attributes
    ----------
    first, last : int
        Requests decoded together, both ends included.
    drafted : int
    """

    first: int
    last: int
    drafted: int


@dataclass(frozen=True)
class AcceptanceTable:
    """What a draft's tokens are worth, as serving tools count them.

    Attributes
    ----------
    rates : tuple of float
        S_2 … S_n: the probability that the first 1 … n - 1 drafted tokens all survive.
    kind : {"ceiling", "forecast", "measured"}
    conditions : dict
        What the figures were obtained under; JSON values.
    by_drafted : dict of int to float
        Mean length by the number of drafted tokens, where several are known.
    schedule : tuple of DraftedFor
        Empty where nothing is known of other batch sizes.

    Raises
    ------
    ValueError
        If a rate is outside 0 to 1 or above the one before it, there is none, or the kind is
        unknown.

    Examples
    --------
    >>> table = AcceptanceTable((0.8, 0.6), "measured")
    >>> table.drafted, table.accepted, round(table.mean_length, 6)
    (2, 1.4, 2.4)
    >>> table.conditional
    (0.8, 0.75)
    """

    rates: tuple[float, ...]
    kind: str
    conditions: Mapping[str, Any] = field(default_factory=dict)
    by_drafted: Mapping[int, float] = field(default_factory=dict)
    schedule: tuple[DraftedFor, ...] = ()

    def __post_init__(self):
        if not self.rates:
            raise ValueError("no drafted token: expected a draft of horizon 2 or more")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        before = 1.0
        for position, rate in enumerate(self.rates, 1):
            if not (math.isfinite(rate) and 0 <= rate <= 1):
                raise ValueError(f"rate {rate} of drafted token {position}: expected 0 to 1")
            if rate > before:
                raise ValueError(
                    f"rate {rate} of drafted token {position} is above {before}, that of the one "
                    "before it: as many drafted tokens cannot survive more often than fewer do"
                )
            before = rate

    @property
    def drafted(self) -> int:
        """Drafted tokens, K: the horizon less the token that is the target's own."""
        return len(self.rates)

    @property
    def accepted(self) -> float:
        """Drafted tokens that survive a call, on average."""
        return round(sum(self.rates), _DECIMALS)

    @property
    def mean_length(self) -> float:
        """Tokens per call, the target's own with them."""
        return round(1 + sum(self.rates), _DECIMALS)

    @property
    def conditional(self) -> tuple[float, ...]:
        """How often each drafted token survives once those before it have; 0 after a 0."""
        pairs = itertools.pairwise((1.0, *self.rates))
        return tuple(round(rate / all_of, _DECIMALS) if all_of else 0.0 for all_of, rate in pairs)


def never_rising(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest rates between 0 and 1 that do not rise, by least squares, as they are written.

    Rates that are differences of estimates may rise by chance; neighbours that do are replaced by
    their mean, so that the sum stays what it was (unless a value is outside 0 to 1).

    Examples
    --------
    >>> never_rising([0.7, 0.3, 0.4])
    (0.7, 0.35, 0.35)
    """
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (second, more), (first, some) = blocks.pop(), blocks.pop()
            blocks.append(((first * some + second * more) / (some + more), some + more))
    means = [mean for mean, length in blocks for _ in range(length)]
    return tuple(round(min(max(mean, 0.0), 1.0), _DECIMALS) for mean in means)


def rates_of_lengths(lengths: Mapping[int, float]) -> tuple[float, ...]:
    """Rates of every drafted token from mean lengths at some horizons.

    Where the next shorter horizon is known, the difference is its rate; in between, each token
    survives as often, given those before it, as makes the lengths come out.

    Parameters
    ----------
    lengths : dict of int to float
        Tokens per call by horizon.

    Raises
    ------
    ValueError
        If there is no horizon of at least 2.

    Examples
    --------
    >>> rates_of_lengths({2: 1.8, 3: 2.4})
    (0.8, 0.6)
    >>> rates_of_lengths({3: 1.75})
    (0.5, 0.25)
    """
    known = {1: 1.0} | {n: length for n, length in lengths.items() if n >= 2}
    if len(known) == 1:
        raise ValueError("no mean length of a horizon of at least 2")
    rates = [1.0]
    for shorter, longer in itertools.pairwise(sorted(known)):
        steps, gained = longer - shorter, known[longer] - known[shorter]
        if steps == 1:
            rates.append(gained)
        else:
            ratio = _ratio(gained / rates[-1], steps) if rates[-1] > 0 else 0.0
            rates += [rates[-1] * ratio**k for k in range(1, steps + 1)]
    return never_rising(rates[1:])


def _ratio(total: float, steps: int) -> float:
    """The ratio between 0 and 1 whose first so many powers add up to this."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = sum(middle**k for k in range(1, steps + 1)) >= total
        low, high = (low, middle) if enough else (middle, high)
    return high
