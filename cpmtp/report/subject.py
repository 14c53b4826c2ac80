"""One model and kind of contexts: what was found, what it costs, what a trained head will earn.

The recommendation has one home, `Subject.best`: first screen, tables, figures, pilot and console
all read it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from cpmtp.latency import (
    LatencyModel,
    cost_per_million_tokens,
    memory_bound_latency,
    read_latency,
)
from cpmtp.ranking.criteria import throughput_choice
from cpmtp.ranking.parts import partial_methods, reference_form, table_parts
from cpmtp.ranking.scores import sampled_rows
from cpmtp.ranking.selection import RankChoice, compare_criteria
from cpmtp.ranking.summary import partial_gains
from cpmtp.report.first_screen.stored_forecast import HeadsForecast
from cpmtp.report.learned import (
    LEARNED_SHARE,
    LearnedForecast,
    LearnedShare,
    forecast_from_share,
    forecast_of_head,
    share_of_heads,
)
from cpmtp.report.words import served_as

PRICE = 2.5
# What a recommendation needs: documents, and the share of their resamples that agree.
FEWEST_DOCUMENTS, LEAST_SURE = 8, 0.5
_ASSUMED_STEP, _ASSUMED_LAYERS = 0.02, 32


@dataclass(frozen=True)
class ReportExtras:
    """What a report can show beside the study; a part that is None is left out.

    Attributes
    ----------
    latency : LatencyModel, optional
        As measured. Without it calls are assumed to cost what reading the weights of 32 layers
        costs, and the report says so.
    latency_source : str
        Device and precision it was measured on, where that is known.
    price : float
        Per device-hour.
    learned_share : float
        Tokens per call of a trained head over those of its ceiling, assumed where no trained head
        is known; 1 reports ceilings as if heads reached them.
    waterfall : pandas.DataFrame, optional
        `model`, `domain`, `horizon`, `rank`, `anchored`, and in tokens per call `exact_limit`,
        `acceptance_fit`, `em_fit`, `learned` with `learned_low` and `learned_high`. What these
        heads reached is used instead of the assumption.
    decoding : pandas.DataFrame, optional
        `forecast` and `measured` tokens per call, each with `_low` and `_high`, and `rank`; with
        `model`, `horizon` and `anchored` used as `waterfall` is.
    step_times : pandas.DataFrame, optional
        `label` and one column of seconds per part of a call.
    components : pandas.DataFrame, optional
        Of `cpmtp.top_tokens`, with `model`, `domain` and `context_text`.
    heads : HeadsForecast, optional
        What `cpmtp forecast` stored: it answers first, and ceilings become diagnosis.
    of_models : mapping of str to ReportExtras
        Of a study of several models: forecast and step times of each.
    """

    latency: LatencyModel | None = None
    latency_source: str = ""
    price: float = PRICE
    learned_share: float = LEARNED_SHARE
    waterfall: pd.DataFrame | None = None
    decoding: pd.DataFrame | None = None
    step_times: pd.DataFrame | None = None
    components: pd.DataFrame | None = None
    heads: HeadsForecast | None = None
    of_models: Mapping[str, ReportExtras] = field(default_factory=dict)

    def of_model(self, name: str) -> ReportExtras:
        """Those of one model of a study: its own forecast and step times where there are some."""
        own = self.of_models.get(name)
        if own is None:
            return self
        found: dict[str, Any] = {}
        if own.latency is not None:
            found = {"latency": own.latency, "latency_source": own.latency_source}
        return replace(self, heads=own.heads or self.heads, **found)


@dataclass(frozen=True)
class Economics:
    """What calls cost and whether that was measured."""

    latency: LatencyModel
    source: str
    price: float

    @classmethod
    def of(cls, extras: ReportExtras) -> Economics:
        """Measured, or assumed and said to be."""
        t = extras.latency
        if t is None:
            words = (
                "assumed, not measured: one request at a time on a device that only reads weights, "
                f"{_ASSUMED_LAYERS} layers, {1e3 * _ASSUMED_STEP:.0f} ms a plain step; "
                "`cpmtp latency` measures yours in a minute"
            )
            assumed = memory_bound_latency(_ASSUMED_STEP, _ASSUMED_LAYERS)
            return cls(assumed, words, extras.price)
        where = f" on {extras.latency_source}" if extras.latency_source else ""
        words = (
            f"measured{where} as {1e3 * t.base:.3g} + {1e3 * t.per_position:.3g} n + "
            f"{1e3 * t.per_component:.3g} n r ms, a plain step {1e3 * t.plain_step:.3g} ms"
        )
        return cls(t, words, extras.price)


@dataclass(frozen=True)
class Subject:
    """One model and kind of contexts: its part of the table and every criterion's choice."""

    title: str
    table: pd.DataFrame
    choices: dict[str, RankChoice]
    economics: Economics
    extras: ReportExtras

    @classmethod
    def of(cls, title: str, table: pd.DataFrame, extras: ReportExtras) -> Subject:
        """A part of a study's table with every criterion's choice from it."""
        economics = Economics.of(extras)
        choices = compare_criteria(table, latency=economics.latency)
        return cls(title, table, choices, economics, extras)

    @property
    def recommended(self) -> RankChoice:
        """The choice of most throughput."""
        return self.choices["throughput"]

    @property
    def saturation(self) -> RankChoice:
        """Where ceilings saturate, whatever a call costs."""
        return self.choices["tolerance"]

    @property
    def best(self) -> tuple[int, int]:
        """The recommendation: horizon and rank of most throughput."""
        horizon = self.recommended.horizon
        assert horizon is not None  # throughput chooses one
        return horizon, self.recommended.rank[horizon]

    @property
    def headline(self) -> str:
        """The recommendation in words."""
        horizon, rank = self.best
        edge = "at least " if self.recommended.at_grid_edge[horizon] else ""
        return f"horizon {horizon} with rank {edge}{rank}"

    @property
    def marked_as(self) -> str:
        """What the best by ceilings is called: the recommendation, unless heads are forecast."""
        return "recommended" if self.extras.heads is None else "fastest by ceilings"

    @property
    def is_carried(self) -> bool:
        """Whether documents are enough, and resamples of them agree enough, to recommend anything:
        else it is a tie, or chance.
        """
        sure = float(self.row.fastest_frequency) >= LEAST_SURE
        return self.recommended.documents >= FEWEST_DOCUMENTS and sure

    @property
    def row(self) -> pd.Series:
        """The recommendation's row of means."""
        return self.recommended.row(self.best[0])

    @property
    def anchored(self) -> bool | None:
        """Whether the drafts are told the first token; None where the table does not say."""
        return bool(self.table["anchored"].iloc[0]) if "anchored" in self.table else None

    @property
    def share(self) -> LearnedShare:
        """What trained heads reach of their ceilings: those of the folder, or the assumption."""
        found = share_of_heads(self.extras.waterfall, self._known)
        return found or LearnedShare.assumed(self.extras.learned_share)

    @property
    def forecast(self) -> LearnedForecast:
        """What a trained head of the recommended horizon and rank earns."""
        return self._of_same_head or forecast_from_share(self.row, self.share)

    @property
    def knows_trained_heads(self) -> bool:
        """Whether the forecast rests on trained heads of this model, not on an assumed share."""
        share = share_of_heads(self.extras.waterfall, self._known)
        return self._of_same_head is not None or share is not None

    @property
    def _of_same_head(self) -> LearnedForecast | None:
        horizon, rank = self.best
        known = self._known | {"horizon": horizon, "rank": rank}
        return forecast_of_head(self.extras.waterfall, self.extras.decoding, known)

    @property
    def _known(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.table["model"].iloc[0]}
        if self.anchored is not None:
            found["anchored"] = self.anchored
        if "temperature" in self.table:
            found["temperature"] = float(self.table["temperature"].iloc[0])
        return found

    def speedup(self, tokens_per_call: float) -> float:
        """Over plain decoding, at the recommended horizon and rank."""
        return tokens_per_call * self.economics.latency.plain_step / self.call_seconds

    @property
    def call_seconds(self) -> float:
        """What a call of the recommended horizon and rank takes."""
        return self.economics.latency.call_seconds(*self.best)

    @property
    def break_even(self) -> float:
        """Tokens per call at which the recommendation is as fast as plain decoding."""
        return self.call_seconds / self.economics.latency.plain_step

    def cost(self, tokens_per_call: float) -> float:
        """Per million tokens, at the recommended horizon and rank."""
        return cost_per_million_tokens(tokens_per_call / self.call_seconds, self.economics.price)

    @property
    def plain_cost(self) -> float:
        """Per million tokens of plain decoding."""
        return cost_per_million_tokens(1 / self.economics.latency.plain_step, self.economics.price)

    @property
    def learned_cells(self) -> pd.DataFrame:
        """The table of means with the speedups of trained heads in the place of the ceilings'."""
        cells, latency = self.recommended.table, self.economics.latency
        learned = self.share.of(cells["tokens_per_call"])
        return cells.assign(speedup=learned * latency.plain_step / cells["call_seconds"])

    @property
    def truncated(self) -> dict[int, tuple[float, float]]:
        """Horizons whose joints are truncated, with the probability they hold: mean, smallest."""
        rows = self.saturation.table.drop_duplicates("horizon")
        return {
            int(row.horizon): (row.kept_mass, row.kept_mass_lowest)
            for row in rows.itertuples()
            if row.truncated
        }

    @property
    def sampled(self) -> tuple[int, ...]:
        """Horizons whose tokens per call are estimates."""
        rows = self.saturation.table.drop_duplicates("horizon")
        return tuple(int(row.horizon) for row in rows.itertuples() if row.sampled)

    @property
    def best_by_upper_bounds(self) -> tuple[int, int]:
        """What the recommendation would be if every upper bound were the ceiling."""
        cells = self.recommended.table
        means = cells[["tokens_per_call_upper"]].to_numpy().T
        row = cells.iloc[int(throughput_choice(means, cells["call_seconds"].to_numpy())[0])]
        return int(row["horizon"]), int(row["rank"])

    def truncation_sentences(self) -> Iterator[str]:
        """What is not exact, horizon by horizon, and fits that means leave out."""
        for horizon, (mean, lowest) in self.truncated.items():
            yield (
                f"Horizon {horizon} is truncated: its joints hold {100 * mean:.1f} % of the "
                f"probability on average and {100 * lowest:.1f} % at least, so that its tokens per "
                "call are certified lower bounds with upper ones beside them."
            )
        rows = self.saturation.table.drop_duplicates("horizon").set_index("horizon")
        for horizon in self.sampled:
            kept = 100 * rows.loc[horizon, "kept_mass"]
            here = self.table[self.table["horizon"] == horizon]
            number, all_contexts = (
                len(part.drop_duplicates(["document", "context"]))
                for part in (here[sampled_rows(here)], here)
            )
            yield (
                f"Horizon {horizon} is sampled: its drafts are fitted to {kept:.1f} % of the "
                f"probability on average, and what they earn on all of it is estimated, of "
                f"{number} of {all_contexts} contexts, from texts drawn from the model, the same "
                "for all ranks of a context."
            )
            if number < all_contexts:
                yield (
                    "The other contexts count by certified lower bounds, in the upper end of the "
                    "interval by upper ones."
                )
        for method, (number, every) in partial_methods(self.table).items():
            gains = partial_gains(self.table, method)
            gains = gains.loc[gains.index.get_level_values("horizon").max()]
            yield (
                f"Fits by {method} are of {number} of {every} contexts, and means leave them out; "
                f"on those {number} they earn {gains.iloc[0]:.2f} more at rank {gains.index[0]} "
                f"and {gains.iloc[-1]:.2f} more at rank {gains.index[-1]}."
            )


def subjects_of(table: pd.DataFrame, extras: ReportExtras) -> list[Subject]:
    """Every part of a study's table that has a usable fit.

    Raises
    ------
    ValueError
        If none has.
    """
    parts = table_parts(reference_form(table))
    usable = [named for named in parts if (named[1]["status"] != "failed").any()] or parts
    return [
        Subject.of(
            f"{model} · contexts from {domain}{_served(part, domain)}", part, extras.of_model(model)
        )
        for (model, domain), part in usable
    ]


def _served(part: pd.DataFrame, said: str) -> str:
    """Temperature and truncation of one part, unless they are the usual or said already."""
    row = part.iloc[0]
    temperature = 1.0 if "temperature " in said else float(row.get("temperature", 1.0))
    kept = [row.get(name) for name in ("top_k", "top_p")]
    return served_as(temperature, *(None if value is None else float(value) for value in kept))


def by_forecast(subjects: Sequence[Subject]) -> list[tuple[HeadsForecast | None, list[Subject]]]:
    """Subjects that share a forecast, and those without one, in order."""
    found: dict[int, tuple[HeadsForecast | None, list[Subject]]] = {}
    for subject in subjects:
        heads = subject.extras.heads
        found.setdefault(id(heads), (heads, []))[1].append(subject)
    return list(found.values())


def models_of(subjects: Sequence[Subject]) -> list[str]:
    """Names of the subjects' models."""
    return list(dict.fromkeys(str(subject.table["model"].iloc[0]) for subject in subjects))


def forecasts_beside(folder: Path) -> dict[str, ReportExtras]:
    """The forecast of each model of a study, as the command `study` probes them."""
    found: dict[str, ReportExtras] = {}
    for file in sorted((folder / "forecast").glob("*/forecast.json")):
        heads = HeadsForecast.read(file.parent)
        told: dict[str, Any] = {"heads": heads}
        times = file.with_name("latency.json")
        if times.is_file():
            measured = read_latency(times)
            told |= {"latency": measured.model, "latency_source": measured.where}
        found[str(heads.told.get("studied_as", ""))] = ReportExtras(**told)
    return found
