"""What probes say of budgets that nobody has trained to: levels, intervals and draws of them all.

An option is a candidate at one horizon, a draft that is looked up, or plain decoding. Draws take
documents with replacement, the same for every option and probe, and add what extrapolations are off
by: a part that all levels share and one of each option's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from cpmtp.forecasting.candidates import Candidate
from cpmtp.forecasting.learning_curves.losses import DIVERGENCES, pooled_loss
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.learning_curves.shapes import forecast_logs
from cpmtp.forecasting.learning_curves.tasks import Tasks, reference_of, short_name
from cpmtp.resampling import normal_half_width, resampling_weights

PLAIN, LOOKUP, HEAD = "plain", "lookup", "head"


@dataclass(frozen=True)
class Option:
    """One way to decode.

    Attributes
    ----------
    kind : {"head", "lookup", "plain"}
    name : str
    horizon : int
    candidate : int
        Its number; -1 of what is not trained.
    sizes : dict
        Of the head.
    """

    kind: str
    name: str
    horizon: int
    candidate: int
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Outlook:
    """All options at one budget; arrays in the options' order, logarithms of tokens per call.

    Attributes
    ----------
    budget : float
    logs, low, high, gains : (options,) arrays
        Gain: what is added to the last probe.
    documents : (draws, options) array
        Documents drawn, extrapolations as they are.
    draws : (draws, options) array
        The same with what extrapolations are off by.
    variances : (options,) array
        Of the training's seed.
    """

    budget: float
    logs: Float[ndarray, " options"]
    low: Float[ndarray, " options"]
    high: Float[ndarray, " options"]
    gains: Float[ndarray, " options"]
    documents: Float[ndarray, "draws options"]
    draws: Float[ndarray, "draws options"]
    variances: Float[ndarray, " options"]


@dataclass(frozen=True)
class Scores:
    """What was measured: of every option at every probe's budget, per document drawn.

    Attributes
    ----------
    options : tuple of Option
    budgets : (probes,) float array
    logs : (options, probes) array
        Logarithms of tokens per call; of untrained options the same at each.
    drawn : (draws, options, probes) array
        The same of resampled documents.
    losses : (options, probes) array
        See `cpmtp.forecasting.learning_curves.losses`; NaN of untrained options.
    drawn_losses : (draws, options, probes) array
    limits : (options,) array
        Tokens per call of an exact draft; of a head over the tokens that it can draft.
    """

    options: tuple[Option, ...]
    budgets: Float[ndarray, " probes"]
    logs: Float[ndarray, "options probes"]
    drawn: Float[ndarray, "draws options probes"]
    losses: Float[ndarray, "options probes"]
    drawn_losses: Float[ndarray, "draws options probes"]
    limits: Float[ndarray, " options"]

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        probes: pd.DataFrame,
        lookup: pd.DataFrame,
        *,
        seed: int,
    ) -> Scores:
        """From the probes' table and that of looked-up drafts."""
        budgets = np.array(sorted(probes["budget"].unique()), dtype=float)
        whole = pd.concat([probes, lookup], ignore_index=True)
        options, columns = [Option(PLAIN, "plain decoding", 1, -1, {})], []
        told = [name for name in DIVERGENCES if name in whole]
        more = ["exact_cycles", *told] if told else []
        sums = whole.pivot_table(
            index="document",
            columns=["candidate", "horizon", "budget"],
            values=["tokens", "cycles", *more],
            aggfunc="sum",
        )
        for candidate, horizon in sorted({key[1:3] for key in sums.columns}):
            trained = candidate >= 0
            chosen = budgets if trained else np.zeros(len(budgets))
            columns.append([(candidate, horizon, budget) for budget in chosen])
            which = candidates[candidate] if trained else None
            options.append(
                Option(HEAD, which.name, int(horizon), int(candidate), which.at(int(horizon)))
                if which
                else Option(LOOKUP, "lookup", int(horizon), -1, {})
            )
        weights = resampling_weights(len(sums), seed)  # (draws, documents)
        weights = np.concatenate([np.ones_like(weights[:1]), weights])  # the first: as it is
        flat = [key for row in columns for key in row]
        totals = [weights @ sums[name][flat].to_numpy() for name in ("tokens", "cycles")]
        logs = np.log(totals[0] / totals[1]).reshape(len(weights), -1, len(budgets))
        logs = np.concatenate([np.zeros_like(logs[:, :1]), logs], 1)  # plain decoding: one token
        losses = np.full(logs.shape, np.nan)  # (1 + draws, options, probes)
        limits = np.array([float(option.horizon) for option in options])  # (options,)
        for i, option in enumerate(options):
            if option.kind == HEAD and told:
                keys = [(option.candidate, option.horizon, budget) for budget in budgets]
                off = [weights @ sums[name][keys].to_numpy() for name in told[: option.horizon - 1]]
                tokens = weights @ sums["tokens"][keys].to_numpy()  # (1 + draws, probes)
                losses[:, i] = pooled_loss(np.stack(off, -1) / tokens[..., None])
                limits[i] = sums["tokens"][keys[-1]].sum() / sums["exact_cycles"][keys[-1]].sum()
        return cls(tuple(options), budgets, logs[0], logs[1:], losses[0], losses[1:], limits)

    def outlook(self, shapes: ShapeChoice, budget: float, confidence: float, seed: int) -> Outlook:
        """All options at a budget; one that was probed is as it was measured."""
        logs, documents = self.logs[:, -1].copy(), self.drawn[:, :, -1].copy()
        weights = np.zeros(len(self.options))
        for horizon in sorted({o.horizon for o in self.options if o.kind == HEAD}):
            mine = np.array(
                [i for i, o in enumerate(self.options) if o.kind == HEAD and o.horizon == horizon]
            )
            tasks = self._tasks(mine, budget, horizon)
            reference = self._reference(mine)
            shape = shapes.level, shapes.difference
            logs[mine] = forecast_logs(*shape, tasks, reference)
            drawn = self.drawn[:, mine], self.drawn_losses[:, mine]
            documents[:, mine] = forecast_logs(*shape, tasks, reference, *drawn)
            weights[mine] = shapes.seed_weights_of(tasks, reference)
        gains = logs - self.logs[:, -1]
        variances = shapes.of_level.seeds * weights
        wide = gains * shapes.widening(budget / self.budgets[-1])
        half = shapes.half_widths(wide, documents.var(0), weights, confidence=confidence)
        # What is not trained is not extrapolated: its documents are all that is uncertain.
        trained = np.array([option.kind == HEAD for option in self.options])
        half = np.where(trained, half, normal_half_width(1.0, confidence) * documents.std(0))
        most = np.log(self.limits)
        low, high = np.maximum(logs - half, 0.0), np.minimum(logs + half, most)
        off = self._off(shapes, wide, variances, len(documents), seed)
        return Outlook(budget, logs, low, high, gains, documents, documents + off, variances)

    def _tasks(self, rows: ndarray, budget: float, horizon: int) -> Tasks:
        count = len(rows)
        return Tasks(
            self.budgets,
            float(budget),
            float(horizon),
            np.array(["new"] * count, dtype=object),
            np.array([self.options[i].name for i in rows], dtype=object),
            np.zeros(count, dtype=int),
            self.logs[rows],
            np.full(count, np.nan),
            np.zeros(count),
            np.ones(count),
            self.losses[rows],
            np.full(count, np.nan),
            self.limits[rows],
        )

    def _reference(self, rows: ndarray) -> Int[ndarray, " tasks"]:
        """The place, among these options, of the one that differences are taken to."""
        table = pd.DataFrame([self.options[i].sizes for i in rows])
        names = [short_name(self.options[i].name) for i in rows]
        wanted = reference_of(table.assign(candidate=names))
        return np.full(len(rows), names.index(wanted), dtype=int)

    @staticmethod
    def _off(
        shapes: ShapeChoice, gains: ndarray, variances: ndarray, draws: int, seed: int
    ) -> ndarray:
        """What extrapolations may be off by: (draws, options)."""
        chance, freedom = np.random.default_rng(seed), len(shapes.groups) - 1
        shared = chance.standard_t(freedom, (draws, 1)) * shapes.of_level.scale * gains
        own = chance.standard_t(freedom, (draws, len(gains))) * shapes.of_difference.scale * gains
        seeds = chance.standard_normal((draws, len(gains))) * np.sqrt(variances)
        return shared + own / np.sqrt(2) + seeds
