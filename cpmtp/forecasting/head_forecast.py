"""What each head would earn once it is trained, and which one to train: forecast from probes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cpmtp.forecasting.candidates import candidates_of, weight_bytes, with_draft_vocabulary
from cpmtp.forecasting.forecast_plan import ForecastSettings, Work
from cpmtp.forecasting.head_choice import HeadChoice, Loaded, chosen, schedule
from cpmtp.forecasting.held_out import HeldOut, split_texts
from cpmtp.forecasting.learning_curves.shape_choice import ShapeChoice
from cpmtp.forecasting.outlook import HEAD, Outlook, Scores
from cpmtp.forecasting.probes import MOST_PASSES, ProbePlan, train_probes
from cpmtp.joint_distribution.given import takes_what_is_given
from cpmtp.joint_distribution.habits import refuse_unknown
from cpmtp.latency import MeasuredLatency
from cpmtp.whole_files import require_folder, write_parquet, write_text

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"form": "cp", "rank": 1},
    {"form": "cp", "rank": 4},
    {"form": "markov", "transition_rank": 64},
    {"form": "recurrent"},
)
_BEYOND = 3  # doublings after the budget that are looked at for who overtakes


@dataclass(frozen=True)
class HeadForecast:
    """What heads would earn at a budget.

    Attributes
    ----------
    table : pandas.DataFrame
        A row per option (candidate and horizon, lookup, plain decoding) and budget, at the first
        load: `option`, `horizon`, the head's sizes, `budget`, `tokens_per_call` with `_low` and
        `_high`, `tenth_percentile` of requests, `cycle_seconds`, `tokens_per_second` with `_low`
        and `_high`, `speedup`, `device_hours`, `weight_bytes` of the head, `passes` over the text
        (0: own samples) and whether those are `too_many`.
    status : str
        Empty, or why there is no forecast of heads.
    probes : pandas.DataFrame
        What was measured, see `cpmtp.forecasting.probes.train_probes`; empty without a forecast.
    latency : MeasuredLatency, optional
        None where nothing was forecast and none was given.
    shapes : ShapeChoice
    settings : ForecastSettings
    model : dict of str to str
        The base model's `name`, `fingerprint`, `dtype` and `device`.
    candidates : dict of str to dict
        Name to the keywords of its head and training, the number of drafted tokens for the tokens.
    """

    table: pd.DataFrame
    status: str
    probes: pd.DataFrame = field(repr=False)
    latency: MeasuredLatency | None = field(repr=False)
    shapes: ShapeChoice = field(repr=False)
    settings: ForecastSettings = field(repr=False)
    model: dict[str, str] = field(repr=False, default_factory=dict)
    candidates: dict[str, dict[str, Any]] = field(repr=False, default_factory=dict)
    outlooks: tuple[Outlook, ...] = field(repr=False, default=())
    scores: Scores | None = field(repr=False, default=None)

    def __repr__(self) -> str:
        if self.status:
            return f"HeadForecast({self.status.partition(':')[0]})"
        budgets = [outlook.budget for outlook in self.outlooks]
        return (
            f"HeadForecast({len(self._scores().options)} options, {min(budgets):,.0f} to "
            f"{max(budgets):,.0f} positions, loads {self.settings.loads})"
        )

    @property
    def ahead(self) -> float:
        """How many times the budget is the largest probe; 0 without a forecast."""
        probed = self.probes["budget"].max() if len(self.probes) else np.inf
        return float(self.settings.budget / probed)

    def choice(self, load: int | None = None, *, source: str | None = None) -> HeadChoice:
        """The option of most predicted tokens per second at the budget.

        Parameters
        ----------
        load : int, optional
            Requests decoded together; default: the first of the settings.
        source : str, optional
            Whose step times; default: the first of the latency's.

        Raises
        ------
        ValueError
            If there was not enough to forecast from.
        """
        return self._choice_at(self.settings.budget, load, source)

    def worth(self, load: int | None = None, *, source: str | None = None) -> HeadChoice:
        """The choice with no more training than pays: at the budget from which on a doubling adds
        less than one per cent, where that is smaller than the budget asked for and the same option
        is the best there; else the choice itself. Parameters and errors as of `choice`.
        """
        whole = self.choice(load, source=source)
        if not 0 < whole.stop < whole.budget:
            return whole
        enough = self._choice_at(whole.stop, load, source)
        same = (enough.name, enough.horizon) == (whole.name, whole.horizon)
        return enough if same else whole

    def _choice_at(self, budget: float, load: int | None, source: str | None) -> HeadChoice:
        self._scores()
        at = next(i for i, o in enumerate(self.outlooks) if o.budget >= budget)
        return chosen(
            self.outlooks,
            at,
            self._loaded(load or self.settings.loads[0], source),
            self.shapes,
            seconds_per_position=self._seconds_per_position,
            confidence=self.settings.confidence,
        )

    def curve(self, candidate: str, horizon: int | None = None) -> pd.DataFrame:
        """A candidate's tokens per call by budget, measured and forecast.

        Raises
        ------
        ValueError
            If no candidate has this name, or there was not enough to forecast from.
        """
        scores = self._scores()
        named = [i for i, o in enumerate(scores.options) if o.name == candidate]
        named = [i for i in named if horizon in (None, scores.options[i].horizon)]
        if not named:
            known = ", ".join(dict.fromkeys(option.name for option in scores.options))
            raise ValueError(f"no candidate {candidate!r}: there are {known}")
        mine = max(named, key=lambda i: scores.options[i].horizon)
        measured = zip(scores.budgets, np.exp(scores.logs[mine]), strict=True)
        rows = [(budget, tokens, np.nan, np.nan, True) for budget, tokens in measured]
        for outlook in self.outlooks:
            ends = (np.exp(values[mine]) for values in (outlook.logs, outlook.low, outlook.high))
            rows.append((outlook.budget, *ends, False))
        names = ["tokens_per_call", "tokens_per_call_low", "tokens_per_call_high", "measured"]
        return pd.DataFrame(rows, columns=["budget", *names])

    def schedule(self, loads: Sequence[int] | None = None) -> pd.DataFrame:
        """The best option by load, see `cpmtp.forecasting.head_choice.schedule`."""
        sizes = sorted(set(loads or self.settings.loads))
        self._scores()
        at = next(o for o in self.outlooks if o.budget >= self.settings.budget)
        return schedule(at, [self._loaded(size) for size in sizes])

    def write(self, folder: str | Path, **beside: Any) -> Path:
        """`forecast.parquet`, `latency.json` and `forecast.json` into a folder, and into the last
        whatever else is to be told, such as where model and texts came from.
        """
        folder = Path(folder)
        write_parquet(folder / "forecast.parquet", self.table)
        if self.latency is not None:
            self.latency.write(folder / "latency.json")
        told: dict[str, Any] = {"model": self.model, "settings": asdict(self.settings)}
        told |= {"status": self.status, "candidates": self.candidates, "most_passes": MOST_PASSES}
        told["shapes"] = {"level": self.shapes.level.words, "groups": list(self.shapes.groups)}
        told["shapes"] |= {"farthest": self.shapes.farthest, "ahead": self.ahead}
        if not self.status:
            told["choices"] = [asdict(self.choice(load)) for load in self.settings.loads]
            told["worth"] = [asdict(self.worth(load)) for load in self.settings.loads]
            told["schedule"] = self.schedule().to_dict("records")
        told |= beside
        write_text(folder / "forecast.json", json.dumps(told, indent=1, default=str) + "\n")
        return folder

    def _scores(self) -> Scores:
        if self.scores is None:
            raise ValueError(self.status)
        return self.scores

    def _loaded(self, load: int, source: str | None = None) -> Loaded:
        scores = self._scores()
        assert self.latency is not None  # there is one wherever there are scores
        return Loaded.of(scores.options, self.latency, load, source=source)

    def _seconds_per_position(self, candidate: int) -> float:
        rows = self.probes[self.probes["candidate"] == candidate]
        return float(rows["seconds_per_position"].median()) if len(rows) else 0.0


@takes_what_is_given
def forecast_heads(
    lm: Any,
    candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
    settings: ForecastSettings = ForecastSettings(),
    *,
    texts: Sequence[str] | None = None,
    latency: MeasuredLatency | None = None,
    curves: pd.DataFrame | None = None,
    out: str | Path | None = None,
    **changes: Any,
) -> HeadForecast:
    """Forecast what heads earn after a training that nobody has paid for yet.

    All candidates are trained side by side to small budgets, each with its whole learning-rate
    decay; their curves are continued by a shape that other models' curves had.

    Parameters
    ----------
    lm : HuggingFaceLanguageModel
    candidates : sequence of dicts
        Keywords of `DraftHead`, and `learning_rate`. Shorter horizons are read off the longest
        head. Over more than 16,384 tokens heads draft the 4,096 most frequent ones of the text,
        unless a candidate has a `vocabulary`.
    settings : ForecastSettings
    texts : sequence of str, optional
        Documents like those that will be decoded; default: the model's own samples.
    latency : MeasuredLatency, optional
        Default: measured.
    curves : pandas.DataFrame, optional
        Curves that shapes are borrowed from; default: the stored ones.
    out : path, optional
        A folder: finished probes are kept there, the same folder again goes on from them, and the
        tables are written into it.
    changes
        Fields of the settings to replace, as in ``forecast_heads(lm, budget=1e7, minutes=10)``.

    Raises
    ------
    ValueError
        If a setting or a candidate is out of range, or the folder is of another forecast.
    """
    refuse_unknown("forecast_heads", changes, [f.name for f in fields(ForecastSettings)])
    settings, begun = replace(settings, **changes), time.perf_counter()
    settings.law.check_vocabulary(lm.vocab_size)
    folder = None if out is None else require_folder(out)
    shapes = ShapeChoice.stored() if curves is None else ShapeChoice.of(curves)
    training, held_back = (None, None) if texts is None else split_texts(texts)
    asked = with_draft_vocabulary(lm, candidates, training, seed=settings.seed)
    work = Work(lm, candidates_of(lm, asked), settings, begun)
    told = {one.name: one.told for one in work.candidates}
    common = (latency, shapes, settings, _told_model(lm), told)
    plan, windows, available = work.plan(training, folder)
    if len(plan.budgets) < 2:
        empty = pd.DataFrame()
        found = HeadForecast(empty, work.too_little(plan), empty, *common)
    else:
        common = (latency or work.measured_latency(), *common[1:])
        held_out = work.held_out(held_back)
        probes = train_probes(lm, work.candidates, plan, windows, held_out, folder=folder)
        lookup = _lookup(held_out, plan)
        scores = Scores.of(work.candidates, probes, lookup, seed=settings.seed)
        outlooks = tuple(
            scores.outlook(shapes, budget, settings.confidence, settings.seed)
            for budget in _grid(plan.budgets[-1], settings.budget)
        )
        found = HeadForecast(pd.DataFrame(), "", probes, *common, outlooks, scores)
        found = replace(found, table=_table(found, lookup, available, _weights(work, scores)))
    if folder is not None:
        found.write(folder)
    return found


def _told_model(lm: Any) -> dict[str, str]:
    told = {"name": lm.name, "fingerprint": lm.fingerprint, "device": str(lm.device)}
    return told | {"dtype": str(lm.model.dtype).removeprefix("torch.")}


def _grid(probed: int, budget: float) -> list[float]:
    """Doublings from the largest probe to the budget, the budget, and some beyond it."""
    steps = np.arange(1, max(np.ceil(np.log2(budget / probed)), 1))
    inside = [float(b) for b in probed * 2.0**steps if probed < b < budget]
    start = max(budget, probed)
    return [*inside, float(start), *(float(start * 2**k) for k in range(1, _BEYOND + 1))]


def _lookup(held_out: HeldOut, plan: ProbePlan) -> pd.DataFrame:
    cycles = held_out.cycles_of_lookup(plan.horizons, plan.rule)  # (horizons, texts)
    tables = [
        pd.DataFrame(
            {"candidate": -1, "budget": 0, "horizon": horizon, "cycles": row}
            | {"document": held_out.documents, "tokens": held_out.drawn}
        )
        for horizon, row in zip(plan.horizons, cycles, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def _weights(work: Work, scores: Scores) -> list[int]:
    """Bytes of every option's weights."""
    return [
        weight_bytes(work.lm, work.candidates[option.candidate], option.horizon)
        if option.kind == HEAD
        else 0
        for option in scores.options
    ]


def _table(
    found: HeadForecast, lookup: pd.DataFrame, available: int, weights: Sequence[int]
) -> pd.DataFrame:
    return pd.DataFrame(list(_rows(found, lookup, available, weights)))


def _rows(
    found: HeadForecast, lookup: pd.DataFrame, available: int, weights: Sequence[int]
) -> Iterator[dict[str, Any]]:
    scores = found.scores
    assert scores is not None
    loaded = found._loaded(found.settings.loads[0])
    plain = 1 / loaded.seconds[[o.horizon for o in scores.options].index(1)]
    last = pd.concat([found.probes[found.probes["budget"] == scores.budgets[-1]], lookup])
    tenth = {
        key: float((rows["tokens"] / rows["cycles"]).quantile(0.1))
        for key, rows in last.groupby(["candidate", "horizon"])
    }
    for outlook in found.outlooks:
        for i, option in enumerate(scores.options):
            trained = option.kind == HEAD
            tokens = [float(np.exp(v[i])) for v in (outlook.logs, outlook.low, outlook.high)]
            speed = [t * loaded.load / loaded.seconds[i] for t in tokens]
            hours = outlook.budget * found._seconds_per_position(option.candidate) / 3600
            passes = outlook.budget / available if available and trained else 0.0
            low_tenth = tenth.get((option.candidate, option.horizon), 1.0)
            yield (
                {"option": option.name, "kind": option.kind, "horizon": option.horizon}
                | {k: v for k, v in option.sizes.items() if k != "horizon"}
                | {"budget": outlook.budget}
                | _with_ends("tokens_per_call", tokens)
                | {"tenth_percentile": max(low_tenth * float(np.exp(outlook.gains[i])), 1.0)}
                | {"cycle_seconds": float(loaded.seconds[i])}
                | _with_ends("tokens_per_second", speed)
                | {"speedup": speed[0] / loaded.load / plain, "load": loaded.load}
                | {"device_hours": hours if trained else 0.0, "weight_bytes": weights[i]}
                | {"passes": passes, "too_many": passes > MOST_PASSES}
            )


def _with_ends(name: str, values: Sequence[float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
