"""`cpmtp study`: run a study and recommend a rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cpmtp.commands.options import (
    Device,
    Dtype,
    TopK,
    TopP,
    anchored_choices,
    executor_at,
    gigabytes_in_bytes,
    integers,
    numbers,
    pair,
)


def study(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="<str>",
            help="Embedded name, folder, GGUF file, hub id, or module:factory; several times for "
            "several.",
        ),
    ] = ["code", "prose"],  # noqa: B006 - typer copies it
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="File, folder or glob to cut contexts from; several times. Default: the model's "
            "own samples.",
        ),
    ] = None,
    horizons: Annotated[
        str, typer.Option(help="Numbers of future tokens, separated by commas.")
    ] = "3",
    ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "1,2,4,8",
    methods: Annotated[
        str,
        typer.Option(help="als, hals, mu, em, gradient, acceptance, separated by commas."),
    ] = "als,em,gradient,acceptance",
    forms: Annotated[
        str, typer.Option(help="cp, markov, markov_mixture, hmm, separated by commas.")
    ] = "cp",
    transition_ranks: Annotated[
        str, typer.Option(help="Transition ranks of the Markov forms, separated by commas.")
    ] = "16",
    contexts: Annotated[int, typer.Option(help="Contexts per model.")] = 8,
    context_length: Annotated[int, typer.Option(help="Tokens in a context.")] = 64,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="NAME=PATH: a named corpus (file, folder or glob); several times for domains "
            "side by side.",
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of a line of JSON (.jsonl) that holds its text.")
    ] = "text",
    temperatures: Annotated[
        str,
        typer.Option(
            "--temperatures",
            "--temperature",
            help="Temperatures of the target's distribution, separated by commas.",
        ),
    ] = "1.0",
    top_k: TopK = None,
    top_p: TopP = None,
    anchored: Annotated[
        str | None,
        typer.Option(
            help="no, yes or both: whether drafts are told the first token. Default: yes, as "
            "those of trained heads; no where a horizon is 2."
        ),
    ] = None,
    restarts: Annotated[int, typer.Option(help="Random starts per fit; the best is kept.")] = 1,
    out: Annotated[
        Path, typer.Option(help="Folder of the study; the same folder again goes on with it.")
    ] = Path("runs/study"),
    seed: Annotated[int, typer.Option(help="Seed of contexts and starts.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Local processes; default one per core.")
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler, tcp://HOST:PORT, to compute on."),
    ] = None,
    max_gigabytes: Annotated[
        float,
        typer.Option(help="Memory of a worker for dense joints; larger ones become trees."),
    ] = 4.0,
    width: Annotated[
        float,
        typer.Option(
            help="Where joints are truncated and certified intervals wider than this many tokens "
            "per call, these are estimated from sampled texts."
        ),
    ] = 0.05,
    samples: Annotated[int, typer.Option(help="Texts sampled per context for that.")] = 2000,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print nothing; status 1 says that cells failed.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show cells, memory and estimated time; compute nothing."),
    ] = False,
) -> None:
    """Run a study and recommend a rank.

    Example: cpmtp study --model ./my-model --corpus docs/ --horizons 3 --ranks 1,2,4,8 --out
    runs/mine
    """
    from cpmtp.study.running import run_study
    from cpmtp.study.settings import StudySettings

    settings = StudySettings(
        models=tuple(model),
        corpus=tuple(corpus or ()),
        domains=tuple(pair("--domain", text) for text in domain or ()),
        text_field=text_field,
        horizons=integers("--horizons", horizons),
        ranks=integers("--ranks", ranks),
        methods=tuple(part.strip() for part in methods.split(",") if part.strip()),
        forms=tuple(part.strip() for part in forms.split(",") if part.strip()),
        transition_ranks=integers("--transition-ranks", transition_ranks),
        contexts=contexts,
        context_length=context_length,
        anchored=anchored_choices(anchored),  # type: ignore[arg-type]  # None: the default
        temperatures=numbers("--temperatures", temperatures, float, "numbers", "1.0,0.7"),
        top_k=top_k,  # type: ignore[arg-type]  # None: all tokens
        top_p=top_p,  # type: ignore[arg-type]
        device=device,
        dtype=dtype,
        restarts=restarts,
        max_bytes=gigabytes_in_bytes(max_gigabytes),
        width=width,
        samples=samples,
        seed=seed,
    )
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if dry_run:
        _show_plan(settings, workers)
        return
    with executor_at(dask, workers) as executor:
        table = run_study(
            settings, out, executor, workers=workers, progress=False if quiet else None
        )
    _finish(table, out, quiet)


def _show_plan(settings, workers: int | None) -> None:
    from cpmtp.study.estimate import estimate_study

    estimate = estimate_study(settings, workers)
    print(f"cells           {estimate.cells:,}")
    print(f"largest joint   {estimate.joint_bytes / 1e6:,.1f} MB")
    for what in estimate.truncated:
        print(
            f"truncated       {what}: tokens per call will be lower and upper bounds, or estimates "
            f"where these are more than {settings.width:g} apart"
        )
    print(
        f"memory          about {estimate.memory_bytes / 1e9:.1f} GB with {estimate.workers} "
        "worker(s)"
    )
    print(
        f"time            about {max(estimate.seconds / 60, 0.1):.1f} minutes (a rough guide: "
        "machines differ)"
    )


def _finish(table, out: Path, quiet: bool) -> None:
    from cpmtp.report.document import Report, read_extras
    from cpmtp.study.running import read_study

    failed = int((table["status"] == "failed").sum())
    _, manifest = read_study(out)
    if failed < len(table):
        written = Report.of(table, manifest, read_extras(out))
        path = written.write_html(out / "report.html")
        if not quiet:
            print(written.summary)
            print(f"table   {out / 'table.parquet'}  ({len(table):,} rows)")
            print(f"report  {path}")
    if failed and not quiet:
        print(
            f"{failed} of {len(table)} cells failed: see the columns status and message",
            file=sys.stderr,
        )
    if failed:
        raise typer.Exit(1)
