"""The command line; the only module that prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which rank does a multi-token prediction head need, and what will it buy?",
)

# typer brings its own copy of click from some version on; this is the base class in either.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Entry point: bad input is one line and exit status 2, an interruption status 130."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except ValueError as error:
        _stop(" ".join(str(error).split()))
    except _UsageError as error:
        _stop(getattr(error, "format_message", lambda: str(error))())
    except OSError as error:
        _stop(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except (KeyboardInterrupt, typer.Abort):
        print("cpmtp: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def _stop(message: str) -> None:
    print(f"cpmtp: {message}", file=sys.stderr)
    sys.exit(2)


def _show_version(value: bool) -> None:
    if value:
        from cpmtp import __version__

        print(f"cpmtp {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def study(
    model: Annotated[
        list[str], typer.Option(help="Embedded name, folder, hub id, or module:factory; may be given several times.")
    ] = ["code", "prose"],  # noqa: B006 - typer copies it
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or glob to cut contexts from; several times. Default: the model's own samples."),
    ] = None,
    horizons: Annotated[str, typer.Option(help="Numbers of future tokens, separated by commas.")] = "2,3",
    ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "1,2,4,8,16,32",
    methods: Annotated[str, typer.Option(help="als, hals, mu, em, gradient, separated by commas.")] = "als,em,gradient",
    contexts: Annotated[int, typer.Option(help="Contexts per model.")] = 8,
    context_length: Annotated[int, typer.Option(help="Tokens in a context.")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of the target's law.")] = 1.0,
    restarts: Annotated[int, typer.Option(help="Random starts per fit; the best is kept.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the study; the same folder again goes on with it.")] = Path("runs/study"),
    seed: Annotated[int, typer.Option(help="Seed of contexts and starts.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Local processes; default one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show cells, memory and estimated time; compute nothing.")] = False,
) -> None:
    """Run a study and recommend a rank.

    Example: cpmtp study --model ./my-model --corpus docs/ --horizons 2,3 --ranks 1,2,4,8 --out runs/mine
    """
    from cpmtp.study import run_study
    from cpmtp.study_plan import StudySettings

    settings = StudySettings(
        models=tuple(model),
        corpus=tuple(corpus or ()),
        horizons=_integers("--horizons", horizons),
        ranks=_integers("--ranks", ranks),
        methods=tuple(part.strip() for part in methods.split(",") if part.strip()),
        contexts=contexts,
        context_length=context_length,
        temperature=temperature,
        restarts=restarts,
        seed=seed,
    )
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if dry_run:
        _show_plan(settings, workers)
        return
    table = run_study(settings, out, workers=workers)
    _finish(table, out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the folder.")] = None,
    latency: Annotated[
        Path | None,
        typer.Option(help="JSON with plain_step, base, per_position, per_component in seconds; default: the folder's own."),
    ] = None,
    price: Annotated[float, typer.Option(help="Price of a device-hour.")] = 2.5,
) -> None:
    """Write a finished study's report again, as HTML and beside it as Markdown with its figures.

    Example: cpmtp report runs/study --price 2.5 --out rank-report.html
    """
    from cpmtp.report import Report, read_extras
    from cpmtp.study import read_study

    if not price > 0:
        raise ValueError(f"--price {price}: expected a price above 0")
    table, manifest = read_study(folder)
    written = Report.of(table, manifest, read_extras(folder, latency, price))
    page = out or folder / "report.html"
    print(f"report    {written.write_html(page)}")
    print(f"markdown  {written.write_markdown(page.with_suffix('.md'))}")


@app.command("train-base")
def train_base_command(
    domain: Annotated[str, typer.Argument(help="code or prose.")],
    out: Annotated[Path | None, typer.Option(help="Folder for model and checkpoint; default: runs/base-DOMAIN.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Train a small base model on what this Python carries; goes on from its checkpoint if there is one.

    Example: cpmtp train-base code --steps 3000 --out runs/base-code
    """
    import torch

    from cpmtp.training import BaseTrainingSettings, train_base

    if steps < 1:
        raise ValueError(f"--steps {steps}: expected at least 1")
    if threads:
        torch.set_num_threads(threads)
    result = train_base(domain, out or Path(f"runs/base-{domain}"), BaseTrainingSettings(steps=steps, seed=seed))
    print(f"held-out bits per byte  {result.bits_per_byte:.3f}")
    print(f"tokens seen             {result.tokens_seen:,}")
    print(f"model                   {result.folder}")


@app.command()
def models() -> None:
    """List the embedded models.

    Example: cpmtp models
    """
    from cpmtp.pretrained import embedded_models

    for name, folder in embedded_models().items():
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        print(
            f"{name:8} {recipe['parameters']:>10,} parameters  {recipe['held_out_bits_per_byte']:.3f} bits per byte  {folder}"
        )


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected integers separated by commas, such as 1,2,4") from None


def _show_plan(settings, workers: int | None) -> None:
    from cpmtp.study_plan import estimate_study

    estimate = estimate_study(settings, workers)
    print(f"cells           {estimate.cells:,}")
    print(f"largest joint   {estimate.joint_bytes / 1e6:,.1f} MB")
    print(f"memory          about {estimate.memory_bytes / 1e9:.1f} GB with {estimate.workers} worker(s)")
    print(f"time            about {max(estimate.seconds / 60, 0.1):.1f} minutes (a rough guide: machines differ)")


def _finish(table, out: Path) -> None:
    from cpmtp.rank_selection import select_rank
    from cpmtp.report import write_report
    from cpmtp.study import read_study

    failed = int((table["status"] == "failed").sum())
    path = write_report(*read_study(out), out / "report.html")
    for (model, domain), part in table.groupby(["model", "domain"], sort=False):
        choice = select_rank(part)
        print(f"{model} ({choice.contexts} contexts from {domain})")
        for horizon in choice.rank:
            print(f"  {choice.sentence(horizon)}")
        if choice.few_documents:
            print(f"  only {choice.documents} independent documents: take the intervals as too narrow (--contexts 32 or more)")
    print(f"table   {out / 'table.parquet'}  ({len(table):,} rows)")
    print(f"report  {path}")
    if failed:
        print(f"{failed} of {len(table)} cells failed: see the columns status and message", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
