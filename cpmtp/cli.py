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
) -> None:
    """Write a finished study's report again.

    Example: cpmtp report runs/study --out rank-report.html
    """
    from cpmtp.report import write_report
    from cpmtp.study import read_study

    table, manifest = read_study(folder)
    print(f"report  {write_report(table, manifest, out or folder / 'report.html')}")


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


@app.command("train-head")
def train_head_command(
    model: Annotated[str, typer.Option(help="Base model: code, prose, a folder or a hub id.")] = "code",
    out: Annotated[Path | None, typer.Option(help="Folder for head and checkpoint; default: runs/head-MODEL-rRANK.")] = None,
    horizon: Annotated[int, typer.Option(help="Tokens per call at most.")] = 4,
    rank: Annotated[int, typer.Option(help="Components of the CP distribution.")] = 8,
    anchored: Annotated[bool, typer.Option(help="The head reads the known first token.")] = True,
    objective: Annotated[str, typer.Option(help="distillation, likelihood or acceptance.")] = "distillation",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    seconds: Annotated[float | None, typer.Option(help="Train for so long instead of for --steps.")] = None,
    corpus: Annotated[list[str] | None, typer.Option(help="Files, folders or globs; default: the model's own samples.")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a head to begin with.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and batches.")] = 0,
) -> None:
    """Train a head for a base model that stays as it is; goes on from its checkpoint if there is one.

    Example: cpmtp train-head --model code --rank 8 --steps 2000 --out runs/head-code
    """
    from cpmtp.corpora import read_documents
    from cpmtp.cp_head import CPHead
    from cpmtp.head_training import HeadTrainingSettings, train_head, windows_of_text
    from cpmtp.pretrained import load_language_model

    settings = HeadTrainingSettings(
        horizon=horizon, rank=rank, anchored=anchored, objective=objective, steps=steps, seconds=seconds, seed=seed
    )
    lm = load_language_model(model, device=device)
    tokens = windows_of_text(lm, [d.text for d in read_documents(list(corpus))], settings.length) if corpus else None
    folder = out or Path(f"runs/head-{lm.name}-r{rank}")
    train_head(lm, settings, out=folder, tokens=tokens, start=CPHead.from_pretrained(start) if start else None)
    last = (folder / "metrics.csv").read_text("utf-8").splitlines()[-1].split(",")
    print(f"steps            {last[0]} in {float(last[1]):.0f} s")
    print(f"tokens per call  {float(last[3]):.3f} (block, on the last batch)")
    print(f"head             {folder}")


@app.command()
def generate(
    head: Annotated[Path | None, typer.Argument(help="Folder of a trained head; without one: plain decoding.")] = None,
    model: Annotated[str, typer.Option(help="Its base model: code, prose, a folder or a hub id.")] = "code",
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def add(a, b):\n    return ",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    rule: Annotated[str, typer.Option(help="block, token or greedy.")] = "block",
    temperature: Annotated[float, typer.Option(help="0 follows the most probable token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only the so many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most probable tokens of this mass.")] = None,
    monitor: Annotated[Path | None, typer.Option(help="File that gets a line of JSON per cycle.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
) -> None:
    """Generate text by lossless self-speculative decoding and say what it took.

    Example: cpmtp generate runs/head-code --model code --max-new-tokens 200 --monitor runs/generate.jsonl
    """
    from cpmtp.cp_head import CPHead
    from cpmtp.pretrained import load_language_model
    from cpmtp.speculative_decoding import speculative_generate

    lm = load_language_model(model, device=device)
    if head is not None and not (head / "config.json").is_file():
        raise ValueError(f"the folder {str(head)!r} holds no head: expected config.json and model.safetensors in it")
    draft = None if head is None else CPHead.from_pretrained(head).to(device)
    out = speculative_generate(
        lm, draft, lm.encode(prompt), max_new_tokens=max_new_tokens, rule=rule, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, monitor=monitor,
    )  # fmt: skip
    print(lm.decode(out.sequences[0]))
    stats = out.stats
    print(f"tokens per call    {stats.tokens_per_call:.3f} in {stats.calls} calls", file=sys.stderr)
    print(f"tokens per second  {stats.tokens_per_second:.1f}", file=sys.stderr)
    print(
        f"latency per token  {1e3 * stats.latency(0.5):.1f} ms median, {1e3 * stats.latency(0.95):.1f} ms p95", file=sys.stderr
    )


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
