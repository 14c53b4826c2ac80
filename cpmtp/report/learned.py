"""What trained heads reached, and what one will earn as long as nobody has trained it: a share of
its rank's ceiling; and what forms beside cp can reach.

A ceiling is what the best draft of a rank does at each single context. Trained heads stay below it,
and by more than ranks differ, so that costs, throughput and alarms rest on what heads reach. Until
heads have been trained that is a stated share of the ceiling's tokens per call, never less than the
one token that plain decoding gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from cpmtp.ranking.forms import form_summary
from cpmtp.ranking.parts import table_parts
from cpmtp.report import plots
from cpmtp.report.blocks import Figure, Section, Table, Text
from cpmtp.report.words import readable

# Tokens per call of a trained head over those of its ceiling. The trained anchored heads of rank 8
# that come with the embedded models reached 78 % (code) and 87 % (prose), over three tokens
# (data/studies/head/waterfall.parquet); ranges reach by the margin to either side.
LEARNED_SHARE = 0.8
_MARGIN = 0.1
_SOURCE = (
    "trained heads of the embedded models reached 78 % on code and 87 % on prose of theirs, over "
    "three tokens"
)


@dataclass(frozen=True)
class LearnedShare:
    """The share of a ceiling's tokens per call that trained heads reach.

    Attributes
    ----------
    expected, low, high : float
        Between 0 and 1; `low` and `high` are what ranges are made from.
    source : str
        Where it is from.

    Raises
    ------
    ValueError
        If the expected share is not above 0 and at most 1.
    """

    expected: float
    low: float
    high: float
    source: str

    @classmethod
    def assumed(cls, share: float = LEARNED_SHARE, source: str = "") -> LearnedShare:
        """A share with the usual margin; LEARNED_SHARE knows its source.

        Examples
        --------
        >>> share = LearnedShare.assumed()
        >>> round(share.low, 3), share.expected, round(share.high, 3)
        (0.7, 0.8, 0.9)
        """
        if not 0 < share <= 1:
            raise ValueError(f"learned share {share}: expected a number above 0 and at most 1")
        source = source or (_SOURCE if share == LEARNED_SHARE else "as given")
        return cls(share, max(share - _MARGIN, 0.0), min(share + _MARGIN, 1.0), source)

    @property
    def words(self) -> str:
        """The assumption, as part of a sentence."""
        return (
            f"assuming a trained head reaches {100 * self.expected:.0f} % of its ceiling "
            f"({100 * self.low:.0f} to {100 * self.high:.0f} % for the range; {self.source})"
        )

    def of(self, tokens_per_call):
        """Tokens per call of a trained head with this ceiling; a number or a column of them."""
        if isinstance(tokens_per_call, pd.Series):
            return (self.expected * tokens_per_call).clip(lower=1.0)
        return max(self.expected * tokens_per_call, 1.0)


@dataclass(frozen=True)
class LearnedForecast:
    """Tokens per call of a trained head of one horizon and rank.

    Attributes
    ----------
    tokens_per_call, low, high : float
        In expectation and the ends of the range.
    words : str
        What that rests on, as part of a sentence.
    """

    tokens_per_call: float
    low: float
    high: float
    words: str


def forecast_from_share(row: pd.Series, share: LearnedShare) -> LearnedForecast:
    """From a ceiling: the range reaches from the low share of its interval's lower end to the high
    share of the upper end; where joints are truncated the expectation is that of the lower bound.

    Parameters
    ----------
    row : pandas.Series
        Of a `RankChoice`'s table.
    share : LearnedShare
    """
    ends = (row.tokens_per_call_low, row.tokens_per_call_high)
    if not all(map(math.isfinite, ends)):  # a single context
        ends = (row.tokens_per_call, row.get("tokens_per_call_upper", row.tokens_per_call))
    expected = share.of(float(row.tokens_per_call))
    low, high = max(share.low * float(ends[0]), 1.0), max(share.high * float(ends[1]), expected)
    return LearnedForecast(expected, low, high, share.words)


def share_of_heads(waterfall: pd.DataFrame | None, known: dict[str, object]) -> LearnedShare | None:
    """The share that the best trained head of a model reached; None without one.

    Parameters
    ----------
    waterfall : pandas.DataFrame, optional
        See `ReportExtras`.
    known : dict
        What the heads must agree with, such as `model` and `anchored`.
    """
    rows = _matching(waterfall, known)
    if rows is None or "model" not in rows:
        return None
    best = rows.loc[rows["learned"].idxmax()]
    ceiling = float(best[["acceptance_fit", "em_fit"]].max())
    reached = min(float(best["learned"]) / ceiling, 1.0)
    own = f"the best trained head in this folder, of rank {best['rank']}, did"
    return LearnedShare.assumed(reached, own)


def forecast_of_head(
    waterfall: pd.DataFrame | None, decoding: pd.DataFrame | None, known: dict[str, object]
) -> LearnedForecast | None:
    """What the best trained head of exactly this horizon and rank earned; None without one.

    Decoding, block verification, counts before what the head does at the contexts of a study.

    Parameters
    ----------
    waterfall, decoding : pandas.DataFrame, optional
        See `ReportExtras`.
    known : dict
        `model`, `horizon`, `rank` and what else the heads must agree with.
    """
    tables = (
        ("measured", _matching(decoding, known | {"rule": "block"}), "in decoding"),
        ("learned", _matching(waterfall, known), "on the contexts of the study"),
    )
    for column, rows, where in tables:
        if rows is None or not {"model", "horizon", "rank"} <= set(rows):
            continue
        best = rows.loc[rows[column].idxmax()]
        ends = [best.get(f"{column}_{end}", math.nan) for end in ("low", "high")]
        low, high = (float(best[column] if pd.isna(end) else end) for end in ends)
        words = f"as the trained head of this horizon and rank in this folder did {where}"
        return LearnedForecast(float(best[column]), low, high, words)
    return None


def _matching(table: pd.DataFrame | None, known: dict[str, object]) -> pd.DataFrame | None:
    """Rows that agree with all that is known and that the table has; None where there are none."""
    if table is None:
        return None
    for name, value in known.items():
        if name in table:
            table = table[table[name] == value]
    return table if len(table) else None


def learned_sections(
    waterfall: pd.DataFrame | None, decoding: pd.DataFrame | None, step_times: pd.DataFrame | None
) -> Iterator[Section]:
    """What the learned head reached; each part only where its table is there."""
    if waterfall is not None and len(waterfall):
        yield Section("Where tokens per call are lost", tuple(_waterfall_figures(waterfall)))
        yield Section("Every head's losses", (readable(waterfall),), level=3, folded=True)
    if decoding is not None and len(decoding):
        words = (
            f"Measured against forecast tokens per call of {len(decoding)} runs; mean difference "
            f"{(decoding['measured'] - decoding['forecast']).mean():+.3f}. On the dotted line the "
            "forecast is right."
        )
        yield Section(
            "Forecast against measurement",
            (Figure("Forecast and measurement", words, partial(plots.plot_forecast, decoding)),),
        )
        yield Section("Every run", (readable(decoding),), level=3, folded=True)
    if step_times is not None and len(step_times):
        yield Section(
            "What a call spends its time on",
            (
                readable(step_times),
                Figure(
                    "Time of a call",
                    "Milliseconds per call, by part.",
                    partial(plots.plot_step_times, step_times),
                ),
            ),
        )


def _waterfall_figures(waterfall: pd.DataFrame) -> Iterator[Figure]:
    waterfall = waterfall.assign(anchored=waterfall.get("anchored", False))
    for (model, horizon, anchored), rows in waterfall.groupby(
        ["model", "horizon", "anchored"], sort=False
    ):
        kind = "anchored" if anchored else "unanchored"
        yield Figure(
            f"Losses by rank, n = {horizon}, {kind}",
            "What a head of each rank has learned, and what is lost to learning, to the objective "
            "and to the rank.",
            partial(plots.plot_losses_over_rank, rows),
            str(model),
        )
    for _, row in waterfall.loc[
        waterfall.groupby(["model", "horizon"], sort=False)["learned"].idxmax()
    ].iterrows():
        yield Figure(
            f"The best head, n = {row['horizon']}, rank "
            f"{row['rank']}{', anchored' if row['anchored'] else ''}",
            f"Of {row['exact_limit']:.2f} tokens per call, "
            f"{row['exact_limit'] - row['acceptance_fit']:.2f} are lost to rank, "
            f"{row['acceptance_fit'] - row['em_fit']:.2f} to the objective and "
            f"{row['em_fit'] - row['learned']:.2f} to "
            f"learning; the learned head has {row['learned']:.2f}.",
            partial(plots.plot_waterfall, row),
            str(row["model"]),
        )


# Forms side by side.
_FORMS_HEAD = (
    "draft",
    "tokens per call",
    "95 % interval",
    "gain on the cheapest",
    "free numbers",
    "shared numbers",
    "serial steps",
    "nothing as cheap earns more",
)
_FORMS_READING = (
    "Every draft's left and right factors are a context's own here: what a head that stores them "
    "once for all contexts can reach is less. Free numbers are what a head would have to output, "
    "shared ones what it would store; serial steps are draws that must follow each other. Marked "
    "rows: where the form's ceiling saturates (tolerance)."
)
_COSTS = {"free_numbers": "free", "shared_numbers": "shared", "serial_steps": "steps"}


def form_sections(table: pd.DataFrame) -> Iterator[Section]:
    """A table per horizon of every part of a study; nothing where only one form was studied."""
    kinds = table[["form", "transition_rank"]].drop_duplicates() if "form" in table else ()
    if len(kinds) < 2:
        return
    whole = table.drop(columns=["form", "transition_rank"])
    for (model, domain), part in table_parts(whole):
        rows = table.loc[part.index]
        if (rows["status"] == "failed").all():
            continue
        found = form_summary(rows)
        blocks: list[Text | Table] = [Text(_FORMS_READING, "note")]
        for horizon, one in found.groupby("horizon"):
            blocks += [
                Text(f"{horizon} tokens, {one['contexts'].iloc[0]} contexts."),
                _table_of_forms(one),
            ]
        yield Section(f"Forms: {model} · contexts from {domain}", tuple(blocks))


def _table_of_forms(rows: pd.DataFrame) -> Table:
    cells = tuple(_cells_of_form(row) for _, row in rows.iterrows())
    marked = frozenset(place for place, own in enumerate(rows["saturated"]) if own)
    return Table(_FORMS_HEAD, cells, marked)


def _cells_of_form(row: pd.Series) -> tuple[str, ...]:
    name = f"{row['form']} {row['rank']}" if row["form"] != "markov" else "markov"
    name += f", transition rank {row['transition_rank']}" if row["transition_rank"] else ""
    at = [word for cost, word in _COSTS.items() if row[f"best_at_{cost}"]]
    return (
        name,
        f"{row['tokens_per_call']:.2f}",
        _ends(row, "tokens_per_call"),
        f"{row['gain']:+.2f} ({_ends(row, 'gain')})" if row["gain"] else "",
        f"{row['free_numbers']:,.0f}",
        f"{row['shared_numbers']:,.0f}",
        f"{row['serial_steps']:.0f}",
        ", ".join(at),
    )


def _ends(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) or pd.isna(high) else f"{low:.2f} to {high:.2f}"
