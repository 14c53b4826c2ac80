"""`cpmtp report` and `cpmtp compare`: what finished studies say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished study, or of a forecast.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder.")
    ] = None,
    latency: Annotated[
        Path | None,
        typer.Option(
            help="JSON with plain_step, base, per_position, per_component in seconds; default: "
            "the folder's own."
        ),
    ] = None,
    forecast: Annotated[
        Path | None,
        typer.Option(help="Folder that `cpmtp forecast` wrote; default: the study's own."),
    ] = None,
    price: Annotated[float, typer.Option(help="Price of a device-hour.")] = 2.5,
    learned_share: Annotated[
        float,
        typer.Option(
            help="Tokens per call of a trained head over its ceiling's, where the folder has no "
            "tables of trained heads."
        ),
    ] = 0.8,
) -> None:
    """Write a finished study's or a forecast's report.

    As one HTML page, and beside it as Markdown with its figures.

    Example: cpmtp report runs/study --price 2.5 --out rank-report.html
    """
    from cpmtp.report.document import Report, read_extras
    from cpmtp.study.running import read_study

    if not price > 0:
        raise ValueError(f"--price {price}: expected a price above 0")
    if not 0 < learned_share <= 1:
        raise ValueError(f"--learned-share {learned_share}: expected a share above 0, at most 1")
    if (folder / "forecast.json").is_file() and not (folder / "manifest.json").is_file():
        written = Report.of_forecast(_only_forecast(folder, latency, forecast), price)
    else:
        table, manifest = read_study(folder)
        extras = read_extras(folder, latency, price, learned_share, forecast)
        written = Report.of(table, manifest, extras)
    page = out or folder / "report.html"
    print(f"report    {written.write_html(page)}")
    print(f"markdown  {written.write_markdown(page.with_suffix('.md'))}")


def _only_forecast(folder: Path, latency: Path | None, forecast: Path | None):
    """The forecast that a folder holds alone; its step times are in it."""
    from cpmtp.report.first_screen.stored_forecast import HeadsForecast

    for name, value in (("latency", latency), ("forecast", forecast)):
        if value is not None:
            raise ValueError(
                f"--{name} {str(value)!r}: {str(folder)!r} holds a forecast alone, which has its "
                "own; give a study's folder, or leave the option out"
            )
    return HeadsForecast.read(folder)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a finished study.")],
    second: Annotated[Path, typer.Argument(help="Folder of the one to compare it with.")],
    rule: Annotated[str, typer.Option(help="token, block or coupling.")] = "block",
    first_token: Annotated[str, typer.Option(help="target or draft.")] = "target",
    out: Annotated[Path | None, typer.Option(help="File for the comparison as CSV.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two finished studies.

    Two models, two corpora or two dates; paired where contexts are shared.

    Example: cpmtp compare runs/before runs/after
    """
    from cpmtp.ranking.comparison import compare_studies
    from cpmtp.study.running import read_study

    tables = [read_study(folder)[0] for folder in (first, second)]
    comparison = compare_studies(*tables, rule=rule, first_token=first_token, seed=seed)
    print(f"{first} against {second}, tokens per call ({rule}, first token from the {first_token})")
    for (what, horizon), part in comparison.groupby(["compared", "horizon"], sort=False):
        paired = (
            f"{part['shared_contexts'].iloc[0]} shared contexts, paired"
            if part["paired"].iloc[0]
            else "unpaired"
        )
        bounds = "; truncated joints: lower bounds" if part["truncated"].any() else ""
        bounds += "; estimated from samples" if part["sampled"].any() else ""
        print(f"{what}, horizon {horizon} ({paired}{bounds})")
        for row in part.itertuples():
            print(
                f"  rank {row.rank:4d}  {row.first:7.3f}  {row.second:7.3f}  difference "
                f"{row.difference:+.3f} "
                f"(95 % interval {row.difference_low:+.3f} to {row.difference_high:+.3f})"
            )
    if out is not None:
        comparison.to_csv(out, index=False)
