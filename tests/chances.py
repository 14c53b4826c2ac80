"""How often something happens, held against how often it should: bounds from the binomial law."""

from __future__ import annotations

from scipy.stats import binom


def assert_share(hits: int, runs: int, law: float, *, wrong: float, chance: float = 1e-3) -> None:
    """`hits` of independent `runs` are what a share of `law` gives and a share of `wrong` does not.

    Counts that `law` exceeds or undercuts with less than `chance` are refused, and the test refuses
    itself where a share of `wrong` would pass more often than that: there are too few runs.
    """
    low, high = binom.ppf([chance, 1 - chance], runs, law)
    passes = binom.cdf(high, runs, wrong) - binom.cdf(low - 1, runs, wrong)
    assert passes < chance, f"{runs} runs let a share of {wrong} pass with probability {passes:.2g}"
    assert low <= hits <= high, f"{hits} of {runs}: a share of {law} gives {low:.0f} to {high:.0f}"
