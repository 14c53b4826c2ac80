"""A validation's tables and its report: few files, everything worth carrying away."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import torch
import transformers
from scipy.stats import kstest

from cpmtp.decoding.stats import STAGES
from cpmtp.latency import LatencyModel
from cpmtp.report.blocks import Figure, Section, Text
from cpmtp.report.document import Report
from cpmtp.report.plots import plot_forecast, plot_step_times
from cpmtp.report.words import readable
from cpmtp.validation.measurements import SHAPE
from cpmtp.validation.stages import Workplace, fit_latency
from cpmtp.whole_files import write_parquet, write_text


def write_results(tables: dict[str, pd.DataFrame], place: Workplace) -> None:
    """The tables as Parquet, `summary.json`, and the report as HTML, in the validation's
    ``results`` folder.
    """
    folder = place.folder / "results"
    latency = fit_latency(tables["calls"])
    cells = decoded_cells(tables, latency)
    # Eight files at most: the small tables share one.
    write_parquet(folder / "decoding.parquet", cells)
    for name in ("heads", "overhead"):
        write_parquet(folder / f"{name}.parquet", tables[name])
    others = [tables[name].assign(table=name) for name in ("bases", "calls", "estimates", "law")]
    write_parquet(folder / "checks.parquet", pd.concat(others, ignore_index=True))
    found = summary(tables, cells, latency, place)
    write_text(folder / "summary.json", json.dumps(found, indent=2) + "\n")
    Report.of_sections(sections(tables, cells, found)).write_html(folder / "report.html")


def decoded_cells(tables: dict[str, pd.DataFrame], latency: LatencyModel) -> pd.DataFrame:
    """One row per head, temperature and batch: forecast, measurement, times, throughput."""
    keys = ["base", "head", "temperature"]
    cells = tables["decoding"]
    for name in ("forecast", "acceptance"):
        # What a head is stands in every table.
        more = tables[name].drop(columns=["part_seconds", *SHAPE])
        cells = cells.merge(more, on=keys, how="left")
    seconds = [
        latency.call_seconds(int(row.horizon), int(row.rank))
        if row.horizon == row.horizon
        else np.nan
        for row in cells.itertuples()
    ]
    cells["predicted_tokens_per_second"] = cells["forecast"] / np.array(seconds)
    cells["forecast_error"] = cells["forecast"] / cells["measured"] - 1
    cells["plain_forecast_error"] = cells["plain_forecast"] / cells["measured"] - 1
    spent = cells[[f"{name}_seconds" for name in STAGES]]
    cells["draft_and_verification_share"] = 1 - spent["target_seconds"] / spent.sum(axis=1)
    return cells.drop(columns="part_seconds")


def summary(
    tables: dict[str, pd.DataFrame], cells: pd.DataFrame, latency: LatencyModel, place: Workplace
) -> dict:
    """What was chosen before decoding, what decoding then measured, and on what machine."""
    drafted = cells[cells["forecast"].notna()]
    calls = tables["calls"]
    heads = calls[calls["head"] != "plain"]
    predicted = [
        latency.call_seconds(int(row.horizon), int(row.rank)) for row in heads.itertuples()
    ]
    residuals = (np.array(predicted) / heads["call_seconds"] - 1).abs()
    choices = []
    for (temperature, batch), part in drafted.groupby(["temperature", "batch"]):
        chosen = part.loc[part["predicted_tokens_per_second"].idxmax()]
        best = part.loc[part["tokens_per_second"].idxmax()]
        first = part[part["rank"] == part["rank"].min()]
        choices.append(
            {
                "temperature": float(temperature),
                "batch": int(batch),
                "chosen": chosen["head"],
                "measured_best": best["head"],
            }
            | {"chosen_speedup": float(chosen["speedup"]), "best_speedup": float(best["speedup"])}
            | {"best_of_lowest_rank_speedup": float(first["speedup"].max())}
        )
    p_values = tables["law"]["p_value"]
    return {
        "device": torch.cuda.get_device_name()
        if place.preset.device.startswith("cuda")
        else platform.processor() or "cpu",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "latency": asdict(latency),
        "latency_residual_median": float(residuals.median()),
        "latency_residual_largest": float(residuals.max()),
        "choices": choices,
        "forecast_error_largest": float(drafted["forecast_error"].abs().max()),
        "plain_forecast_error_largest": float(drafted["plain_forecast_error"].abs().max()),
        "law_tests": len(p_values),
        "law_smallest_p_value": float(p_values.min()),
        "law_uniformity_p_value": float(kstest(p_values, "uniform").pvalue),
        "stage_seconds": {
            name: float(part["part_seconds"].iloc[0]) for name, part in tables.items()
        },
    }


def sections(tables: dict[str, pd.DataFrame], cells: pd.DataFrame, found: dict) -> list[Section]:
    """The report's text, tables and figures."""
    drafted = cells[cells["forecast"].notna()]
    one = drafted[drafted["batch"] == drafted["batch"].min()]
    warmest = one[one["temperature"] == one["temperature"].max()]
    warmest = warmest.assign(rank=warmest["rank"].astype(int))
    told = warmest[warmest["anchored"].astype(bool)]
    steps = told[[f"{name}_seconds" for name in STAGES]]
    steps.insert(
        0, "label", [f"n{n:.0f} r{r}" for n, r in zip(told["horizon"], told["rank"], strict=True)]
    )
    machine = f"Device: {found['device']}; " + ", ".join(
        f"{name} {version}" for name, version in found["versions"].items()
    )
    shown = ["head", "temperature", "batch", "tokens_per_second", "speedup", "forecast", "measured"]
    return [
        Section(
            "What was run",
            (Text(machine, "strong"), readable(tables["bases"].drop(columns="part_seconds"))),
        ),
        Section(
            "Chosen and measured",
            (
                Text(
                    "Chosen from forecast and latency model before decoding, beside what decoding "
                    "measured."
                ),
                readable(pd.DataFrame(found["choices"])),
            ),
        ),
        Section(
            "Decoding",
            (
                readable(
                    cells[[*shown, "draft_and_verification_share", "latency_p50", "latency_p95"]]
                ),
            ),
        ),
        Section(
            "Forecast against measurement",
            (
                Text(
                    f"Largest error of the forecast {found['forecast_error_largest']:.1%}; where "
                    "every position counts alike "
                    f"{found['plain_forecast_error_largest']:.1%}."
                ),
                Figure(
                    "Forecast and measurement",
                    "Tokens per call, one point per head.",
                    partial(plot_forecast, warmest),
                ),
            ),
        ),
        Section(
            "Where a call's time goes",
            (
                Figure(
                    "Time per call",
                    "Stages of a call, one bar per anchored head.",
                    partial(plot_step_times, steps),
                ),
            ),
        ),
        Section(
            "The head's share by model width",
            (readable(tables["overhead"].drop(columns="part_seconds")),),
        ),
        Section("Heads", (readable(tables["heads"].drop(columns="part_seconds")),)),
        Section(
            "The output's law",
            (
                Text(
                    f"{found['law_tests']} tests against the exact joint of three tokens: "
                    "smallest p-value "
                    f"{found['law_smallest_p_value']:.3g}, uniformity of all of them p = "
                    f"{found['law_uniformity_p_value']:.3g}."
                ),
            ),
        ),
        Section(
            "Estimates against exact joints",
            (readable(tables["estimates"].drop(columns="part_seconds")),),
        ),
    ]
