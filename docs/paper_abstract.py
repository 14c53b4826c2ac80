"""Ten lines, the strongest findings first, every figure from a stored table."""

from __future__ import annotations

from page import Page
from paper import (
    ANCHORED,
    FIRST,
    FORMS,
    LEVELS,
    LONGER_REAL,
    MODELS,
    POPULATION,
    candidate,
    draft,
    every,
    more,
    of_three,
)
from paper_forecast import BACKTEST, CHOICES, choice_losses, errors, straight_errors
from paper_temperature import PROPOSALS, falls, gains_by_temperature

from cpmtp.ranking.parts import OUTCOME


def pair(values: dict[str, float], form: str = "{:.2f}") -> str:
    """A figure of the code model and of the prose model."""
    return " and ".join(form.format(values[model]) for model in MODELS)


def abstract(page: Page) -> None:
    """Ten lines; the first is a paragraph, what follows are bullets."""
    page.say("# Which draft head, and what it earns")
    page.say(
        "Pairs of figures are of two small models, of Python code and of English prose, in this order; "
        "they are tokens per call of the model ({doc}`definitions`)."
    )
    _orders(page)
    _ceilings(page)
    _temperature(page)
    _forecast(page)
    page.add(
        "* All of this is of models of 1.6 million parameters over 104 tokens unless it says otherwise, the largest budget of one seed: "
        "the strongest objections, and what is not shown, end the page."
    )


def _orders(page: Page) -> None:
    levels = page.stored(LEVELS)
    budget, earlier = sorted(levels["budget"].unique())[:-3:-1]
    before = levels[levels["budget"] == earlier]
    small, large = (
        candidate(rows, "cp 8", "tokens_per_call") for rows in (before, levels)
    )  # the same head after less and more training
    trunk, form, rank = (
        more(candidate(levels, name, "tokens_per_call"), large)
        for name in ("cp 8, wide", "markov 64", "cp 16")
    )
    wide, usual = (candidate(levels, n, "training_seconds") for n in ("cp 8, wide", "cp 8"))
    longer = {m: wide[m] / usual[m] for m in MODELS}
    page.say(
        "* **First training, then the trunk, then the form, then the rank**, at equal positions. "
        f"Eight times the training, {earlier * 1024:,} to {budget * 1024:,} positions, adds {pair(more(large, small))} of four tokens to a head of eight components; a wider and deeper trunk "
        f"({pair(longer, '{:.1f}')} times as long to train) {pair(trunk)}; a correction from token to token (Markov, rank 64) in place of components {pair(form)}; twice the components {pair(rank)}.",
        LEVELS,
        holds=every(more(large, small), trunk) and every(trunk, form) and every(form, rank),
    )
    late, soon = (lead(rows) for rows in (levels, before))
    page.add(
        f"* **The form's lead shrinks with training.** Over sixteen components the correction leads by {pair(soon)} after {earlier * 1024:,} positions and by {pair(late)} after "
        f"{budget * 1024:,}: which of them is ahead after much more is open.",
        LEVELS,
        holds=every(soon, late) and min(late.values()) > 0,
    )


def lead(levels: pd.DataFrame) -> dict[str, float]:
    """Of the Markov head over sixteen components, at the largest budget."""
    return more(*(candidate(levels, name, "tokens_per_call") for name in ("markov 64", "cp 16")))


def _ceilings(page: Page) -> None:
    levels, ceilings = page.stored(LEVELS), page.stored(ANCHORED)
    means = ceilings.groupby(["model", "rank"])[OUTCOME].mean().unstack("rank")
    over = {m: float(means.loc[m, 16] - means.loc[m, 1]) for m in MODELS}
    first = candidate(page.stored(FIRST), "cp 16", "difference")
    learned = more(*(of_three(levels, f"cp {rank}") for rank in (16, 1)))
    page.add(
        f"* **Ceilings ask for more rank than pays.** From rank 1 to 16 they rise by {pair(over)} of three tokens, the first three of four tokens of trained heads by {pair(learned)}; the first drafted token of rank 16 survives {pair({m: -v for m, v in first.items()}, '{:.3f}')} less often than that of rank 1.",
        ANCHORED,
        LEVELS,
        FIRST,
        holds=every(over, learned) and max(first.values()) < 0,
    )
    shared = page.stored(POPULATION)
    chain, eight = (
        draft(shared, name, "tokens_per_call") for name in ("markov 64 gated", "cp 8")
    )  # factors as a head stores them
    trained = more(*(candidate(levels, name, "gain") for name in ("markov 64", "cp 8")))
    page.add(
        f"* **And they do not foresee the form.** With factors that all contexts share, as a head stores them, the correction's ceiling is {pair(chain)} of three, below the "
        f"{pair(eight)} of eight components; trained, it earns {pair(trained)} of four more.",
        POPULATION,
        LEVELS,
        holds=every(eight, chain) and min(trained.values()) > 0,
    )


def _temperature(page: Page) -> None:
    path, plain = (
        draft(page.stored(FORMS), name, "tokens_per_call") for name in ("best path", "cp 1")
    )
    table = page.stored(PROPOSALS)
    gains = gains_by_temperature(table)
    told = ", ".join(
        f"{pair(row.to_dict())} at temperature {t:g}" for t, row in gains[::-1].iterrows()
    )
    page.add(
        f"* **The lower the temperature, the less the form can bring.** A gated correction's ceiling is above that of rank 1 by {told} ({int(table['contexts'].min())} contexts each).",
        PROPOSALS,
        holds=falls(gains) and gains.iloc[0].abs().max() < 1e-6,
    )
    page.add(
        f"* **Drafts that are not sampled** gain nothing by their form: the best of them has a ceiling of {pair(path)} at temperature 1, rank 1, sampled, {pair(plain)}.",
        FORMS,
        holds=every(plain, path),
    )
    real = page.stored(LONGER_REAL).set_index(["domain", "temperature"])
    copied, head = (real.loc[[(m, 0.0) for m in MODELS], n] for n in ("lookup", "measured"))
    warm = real.xs(1.0, level="temperature")
    page.add(
        f"* **Copying beats training at low temperatures.** On SmolLM2-135M prompt lookup earns {copied.iloc[0]:.2f} and {copied.iloc[1]:.2f} tokens at temperature 0, a recurrent head of 524,288 positions "
        f"{head.iloc[0]:.2f} and {head.iloc[1]:.2f}; at 1 lookup earns at most {warm['lookup'].max():.2f}, the head {warm['measured'].min():.2f} and more.",
        LONGER_REAL,
        holds=(copied > head).all() and warm["lookup"].max() < warm["measured"].min(),
    )


def _forecast(page: Page) -> None:
    error, straight = errors(page), straight_errors(page)
    losses = choice_losses(page)
    page.add(
        f"* **A head's tokens are forecast before it is trained** to {error.median():.1%} in the median, four to eight times the probes' budget ahead ({straight.median():.1%} by a straight line); "
        f"choosing by the forecast gives away {losses['forecast']:.1%} of the best candidate's speed, by the best probe alone {losses['best probe']:.1%}, always taking the recurrent head {losses['always recurrent']:.1%}.",
        BACKTEST,
        CHOICES,
        holds=error.median() < straight.median(),
    )
