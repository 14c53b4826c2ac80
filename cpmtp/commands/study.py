"""`cpmtp study`: run a study and recommend a rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cpmtp.commands.options import (
    Device,
    TopK,
    TopP,
    anchored_choices,
    executor_at,
    gigabytes_in_bytes,
    integers,
    numbers,
    pair,
    quick_dtype,
)
from cpmtp.commands.studying.timing import (
    TimeFor,
    show_plan,
    watched_study,
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
    ranks: Annotated[
        str | None,
        typer.Option(help="Ranks, separated by commas; default 1,2,4,8, with --minutes 16 too."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="als, hals, mu, em, gradient, acceptance, separated by commas; default all but "
            "hals and mu, with --minutes em, and acceptance on the first six contexts."
        ),
    ] = None,
    forms: Annotated[
        str, typer.Option(help="cp, markov, markov_mixture, hmm, separated by commas.")
    ] = "cp",
    transition_ranks: Annotated[
        str, typer.Option(help="Transition ranks of the Markov forms, separated by commas.")
    ] = "16",
    contexts: Annotated[
        int | None,
        typer.Option(
            help="Contexts per model and domain; default 8, with --minutes as many as there is "
            "time for, up to 32."
        ),
    ] = None,
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
            "those of trained heads, with --minutes both; no where a horizon is 2."
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
    cheapest: Annotated[
        bool | None,
        typer.Option(
            "--cheapest/--exact",
            help="Where joints are trees: no larger than --width needs, or complete where --top-k "
            "lets them be. Default: exact, with --minutes cheapest.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for everything: as many contexts as a trial says there is room for, then "
            "probes, forecast and report."
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Whether heads are probed for a forecast: about a minute per model, or half of "
            "--minutes.",
        ),
    ] = True,
    device: Device = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Precision of the model: float32, bfloat16, float16 or float64. Default: float32, "
            "with --minutes bfloat16 where the device has units for it, but not of embedded "
            "models.",
        ),
    ] = None,
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
    from cpmtp.study.settings import StudySettings

    if dtype is None:
        dtype = "float32" if minutes is None else quick_dtype(model, device)
    usual = _USUAL if minutes is None else _WITHIN_MINUTES
    kinds = usual["anchored"] if 2 not in integers("--horizons", horizons) else None
    given = usual["methods"] if methods is None else methods
    chosen = {
        "ranks": integers("--ranks", usual["ranks"] if ranks is None else ranks),
        "methods": tuple(part.strip() for part in given.split(",") if part.strip()),
        "contexts": usual["contexts"] if contexts is None else contexts,
        "anchored": anchored_choices(kinds if anchored is None else anchored),
        "cheapest": usual["cheapest"] if cheapest is None else cheapest,
        "acceptance_contexts": usual["acceptance_contexts"],
    }
    settings = StudySettings(
        models=tuple(model),
        corpus=tuple(corpus or ()),
        domains=tuple(pair("--domain", text) for text in domain or ()),
        text_field=text_field,
        horizons=integers("--horizons", horizons),
        forms=tuple(part.strip() for part in forms.split(",") if part.strip()),
        transition_ranks=integers("--transition-ranks", transition_ranks),
        context_length=context_length,
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
        **chosen,  # type: ignore[arg-type]
    )
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if minutes is not None and not (0 < minutes < float("inf")):
        raise ValueError(f"--minutes {minutes}: expected a number above 0")
    time_for = TimeFor(minutes, probe)
    if dry_run:
        show_plan(settings, workers, time_for)
        return
    with executor_at(dask, workers) as executor:
        watched_study(settings, out, executor, workers, time_for, quiet=quiet)
    _finish(out, quiet)


_USUAL: dict[str, Any] = {
    "ranks": "1,2,4,8",
    "methods": "als,em,gradient,acceptance",
    "contexts": 8,
    "anchored": None,
    "cheapest": False,
    "acceptance_contexts": None,
}
_WITHIN_MINUTES: dict[str, Any] = {
    "ranks": "1,2,4,8,16",
    "methods": "em,acceptance",
    "contexts": 32,
    "anchored": "both",
    "cheapest": True,
    "acceptance_contexts": 6,
}


def _finish(out: Path, quiet: bool) -> None:
    from cpmtp.report.document import Report, read_extras
    from cpmtp.study.running import read_study

    table, manifest = read_study(out)
    failed = int((table["status"] == "failed").sum())
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
