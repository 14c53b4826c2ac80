"""The table of a study: the ceiling of a horizon and rank on its contexts."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cpmtp.ranking.parts import best_fits
from cpmtp.report.exports.acceptance_table import CEILING, AcceptanceTable, never_rising
from cpmtp.report.exports.wanted import Wanted, by_drafted, described, ends, json_values, listed
from cpmtp.report.subject import ReportExtras, Subject, subjects_of

_OUTCOME, _SURVIVAL = "tokens_per_call_block_target", "survival_block_target_"


def table_of_study(
    table: pd.DataFrame,
    manifest: dict[str, Any],
    wanted: Wanted = Wanted(),
    extras: ReportExtras = ReportExtras(),
) -> AcceptanceTable:
    """Means over the study's contexts of each one's best draft.

    Parameters
    ----------
    table, manifest
        Of `read_study`.
    wanted : Wanted
        Default of horizon and rank: the study's recommendation.
    extras : ReportExtras
        Its step times are what the recommendation rests on.

    Raises
    ------
    ValueError
        If the study has several models or kinds of contexts and none is named, or not what is
        wanted; a head or a load is nothing that ceilings have.
    """
    for name in ("head", "load"):
        if (value := getattr(wanted, name)) is not None:
            raise ValueError(
                f"{name} {value!r}: ceilings of a study are of no {name}; a forecast's or decoded "
                "figures are"
            )
    subject = _one_subject(table, wanted, extras)
    horizon, rank = subject.best
    horizon, rank = wanted.horizon or horizon, wanted.rank or rank
    best = best_fits(subject.table)
    rows = best[(best["rank"] == rank) & (best["horizon"] == horizon)]
    if rows.empty or horizon < 2:
        known = best.loc[best["horizon"] > 1, ["horizon", "rank"]].drop_duplicates()
        told = listed(f"{n} with {r}" for n, r in sorted(known.itertuples(index=False, name=None)))
        raise ValueError(f"no horizon {horizon} with rank {rank}: the study has {told}")
    names = [f"{_SURVIVAL}{k}" for k in range(2, horizon + 1)]
    if rows[names].isna().all().any():
        raise ValueError(f"horizon {horizon}: the study does not say how often each token survives")
    lengths = best[best["rank"] == rank].groupby("horizon")[_OUTCOME].mean()
    return AcceptanceTable(
        never_rising(rows[names].mean().tolist()),
        CEILING,
        json_values(_conditions(subject, rows, manifest)),
        by_drafted(dict(lengths)),
    )


def _one_subject(table: pd.DataFrame, wanted: Wanted, extras: ReportExtras) -> Subject:
    for column, value in (("model", wanted.model), ("domain", wanted.domain)):
        if value is not None:
            known, table = listed(table[column].unique()), table[table[column] == value]
            if table.empty:
                raise ValueError(f"no {column} {value!r} in this study: it has {known}")
    first, *others = subjects_of(table, extras)
    if others:
        told = "; ".join(one.title for one in (first, *others))
        raise ValueError(
            f"the study is of several models or kinds of contexts ({told}): choose one with "
            "--model and --domain"
        )
    return first


def _conditions(subject: Subject, rows: pd.DataFrame, manifest: dict[str, Any]) -> dict[str, Any]:
    first, means = rows.iloc[0], subject.saturation.table
    same = (means["horizon"] == first["horizon"]) & (means["rank"] == first["rank"])
    return {
        "model": first["model"],
        "model_sha256": manifest.get("models", {}).get(first["model"], {}).get("sha256"),
        "draft": described({"form": first.get("form"), "rank": first["rank"]}),
        "horizon": first["horizon"],
        "anchored": first.get("anchored"),
        "rule": "block",
        "first_token": "target",
        **{name: first.get(name) for name in ("temperature", "top_k", "top_p")},
        "texts": first["domain"],
        "contexts": len(rows),
        "documents": rows["document"].nunique(),
        "context_tokens": manifest.get("settings", {}).get("context_length"),
        "computed": listed(sorted(rows["computed"].unique())) if "computed" in rows else None,
        "mean_length_interval": ends(means[same].iloc[0], "tokens_per_call"),
        "interval_confidence": 0.95,
        "versions": manifest.get("versions"),
    }
