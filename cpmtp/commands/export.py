"""`cpmtp export`: what was found, as serving tools and their simulators take it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a study, a forecast or a validation, or of decoding.")
    ],
    to: Annotated[
        str,
        typer.Option(help="vllm, llama.cpp, speculation-profile or aiconfigurator."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: one in the folder.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="measured, forecast or ceiling; default: the first that is there."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of several models.")] = None,
    domain: Annotated[str | None, typer.Option(help="Which of several kinds of contexts.")] = None,
    head: Annotated[
        str | None, typer.Option(help="A forecast's head, as 'markov 64', or a decoded one.")
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Tokens per call at most; default: the recommended.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of a ceiling; default: the recommended.")
    ] = None,
    load: Annotated[int | None, typer.Option(help="Requests decoded together.")] = None,
) -> None:
    """Write what was found for serving tools.

    Example: cpmtp export runs/mine --to vllm --out speculative_config.json
    """
    from cpmtp.report.exports.acceptance_table import KINDS
    from cpmtp.report.exports.formats import format_of, write_export
    from cpmtp.report.exports.wanted import Wanted

    form = format_of(to)
    table = _table(folder, kind, Wanted(model, domain, head, horizon, rank, load))
    file, whole = write_export(table, to, out or folder / form.file)
    told = table.conditions
    print(f"{KINDS[table.kind]}: {told['model'] or 'model not named'}, {told['draft']}")
    rates = ", ".join(f"{rate:.3f}" for rate in table.rates)
    print(f"  drafted tokens {table.drafted}, survive {rates}; mean length {table.mean_length:.3f}")
    if table.schedule:
        parts = (f"{one.first} to {one.last}: {one.drafted}" for one in table.schedule)
        print(f"  drafted tokens by batch: {'; '.join(parts)}")
    if told.get("caution"):
        print(f"caution   {told['caution']}")
    print(f"written   {file}\nconditions {whole}")
    print(f"use       {form.use.format(file=shlex.quote(file.name))}")


def _table(folder: Path, kind: str | None, wanted):
    """The best-founded table that a folder has, or the one of this kind."""
    from cpmtp.report.exports.acceptance_table import CEILING, FORECAST, KINDS, MEASURED

    if kind not in (None, *KINDS):
        raise ValueError(f"--kind {kind!r}: expected measured, forecast or ceiling")
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}")
    decoded = [p for p in (folder, folder / "results") if (p / "decoding.parquet").is_file()]
    there = {
        MEASURED: bool(decoded),
        FORECAST: bool(_forecasts(folder)),
        CEILING: (folder / "manifest.json").is_file(),
    }
    found = next((name for name, has in there.items() if has and kind in (None, name)), None)
    if found is None:
        raise ValueError(
            f"nothing {'to export' if kind is None else kind} in {str(folder)!r}: expected "
            "decoding.parquet (measured), forecast.json (forecast) or manifest.json (a study's "
            "ceilings)"
        )
    makers = {MEASURED: _measured, CEILING: _ceiling}
    if found == FORECAST:
        return _forecast(_forecast_of(_forecasts(folder), wanted), wanted)
    return makers[found](decoded[0] if found == MEASURED else folder, wanted)


def _forecasts(folder: Path) -> list[Path]:
    """The folder where it is a forecast's, else those of a study's models."""
    places = [folder, *sorted((folder / "forecast").glob("*"))]
    return [place for place in places if (place / "forecast.json").is_file()]


def _forecast_of(places: list[Path], wanted) -> Path:
    """The place of the model that is wanted; the only one where none is named."""
    from cpmtp.report.first_screen.stored_forecast import HeadsForecast

    if len(places) == 1:
        return places[0]
    told = {place: HeadsForecast.read(place).told for place in places}
    named = {
        place: str(one.get("studied_as") or one["model"]["name"]) for place, one in told.items()
    }
    found = [place for place in places if wanted.model in (None, named[place])]
    if len(found) != 1:
        raise ValueError(f"forecasts of {', '.join(named.values())}: choose one with --model")
    return found[0]


def _measured(folder: Path, wanted):
    import pandas as pd

    from cpmtp.report.exports.of_decoding import table_of_decoding

    return table_of_decoding(pd.read_parquet(folder / "decoding.parquet"), wanted)


def _forecast(folder: Path, wanted):
    from cpmtp.latency import read_latency
    from cpmtp.report.exports.of_forecast import table_of_forecast
    from cpmtp.report.first_screen.stored_forecast import HeadsForecast

    times = folder / "latency.json"
    latency = read_latency(times) if times.is_file() else None
    return table_of_forecast(HeadsForecast.read(folder), latency, wanted)


def _ceiling(folder: Path, wanted):
    from cpmtp.report.document import read_extras
    from cpmtp.report.exports.of_study import table_of_study
    from cpmtp.study.running import read_study

    table, manifest = read_study(folder)
    return table_of_study(table, manifest, wanted, read_extras(folder))
