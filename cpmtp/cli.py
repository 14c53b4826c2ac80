"""The command line; the only module that prints."""

from __future__ import annotations

import errno
import json
import sys
from contextlib import contextmanager
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


_INTERRUPTED = 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main() -> None:
    """Entry point: bad input is one line and exit status 2, an interruption status 130."""
    try:
        status = app(standalone_mode=False) or 0
        # Some versions of typer make a status of an interruption.
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status)
    except ValueError as error:
        _stop(" ".join(str(error).split()))
    except _UsageError as error:
        _stop(getattr(error, "format_message", lambda: str(error))())
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            print(
                f"cpmtp: {error.strerror}; what could be written is kept, the same command goes "
                "on from there",
                file=sys.stderr,
            )
            sys.exit(1)
        _stop(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except (KeyboardInterrupt, typer.Abort):
        print(
            "cpmtp: interrupted; what is finished is kept, the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(_INTERRUPTED)


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
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def study(
    model: Annotated[
        list[str],
        typer.Option(
            help="Embedded name, folder, hub id, or module:factory; may be given several times."
        ),
    ] = ["code", "prose"],  # noqa: B006 - typer copies it
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder or glob to cut contexts from; several times. Default: the model's "
            "own samples."
        ),
    ] = None,
    horizons: Annotated[
        str, typer.Option(help="Numbers of future tokens, separated by commas.")
    ] = "2,3",
    ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "1,2,4,8,16,32",
    methods: Annotated[
        str, typer.Option(help="als, hals, mu, em, gradient, separated by commas.")
    ] = "als,em,gradient",
    contexts: Annotated[int, typer.Option(help="Contexts per model.")] = 8,
    context_length: Annotated[int, typer.Option(help="Tokens in a context.")] = 64,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: a named corpus (file, folder or glob); several times for domains "
            "side by side."
        ),
    ] = None,
    temperatures: Annotated[
        str,
        typer.Option(
            "--temperatures",
            "--temperature",
            help="Temperatures of the target's law, separated by commas.",
        ),
    ] = "1.0",
    anchored: Annotated[
        str, typer.Option(help="no, yes or both: whether drafts are told the first token.")
    ] = "no",
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
        typer.Option(
            help="Memory of a worker for dense joints; larger ones become truncated trees."
        ),
    ] = 4.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no summary.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show cells, memory and estimated time; compute nothing."),
    ] = False,
) -> None:
    """Run a study and recommend a rank.

    Example: cpmtp study --model ./my-model --corpus docs/ --horizons 2,3 --ranks 1,2,4,8 --out
    runs/mine
    """
    from cpmtp.study.plan import StudySettings
    from cpmtp.study.running import run_study

    settings = StudySettings(
        models=tuple(model),
        corpus=tuple(corpus or ()),
        domains=tuple(_pair("--domain", text) for text in domain or ()),
        horizons=_integers("--horizons", horizons),
        ranks=_integers("--ranks", ranks),
        methods=tuple(part.strip() for part in methods.split(",") if part.strip()),
        contexts=contexts,
        context_length=context_length,
        anchored=_anchored(anchored),
        temperatures=_numbers("--temperatures", temperatures, float, "numbers", "1.0,0.7"),
        restarts=restarts,
        max_bytes=_bytes(max_gigabytes),
        seed=seed,
    )
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if dry_run:
        _show_plan(settings, workers)
        return
    with _executor(dask, workers) as executor:
        table = run_study(
            settings, out, executor, workers=workers, progress=False if quiet else None
        )
    _finish(table, out, quiet)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a finished study.")],
    second: Annotated[Path, typer.Argument(help="Folder of the one to compare it with.")],
    rule: Annotated[str, typer.Option(help="token, block or coupling.")] = "block",
    first_token: Annotated[str, typer.Option(help="target or draft.")] = "target",
    out: Annotated[Path | None, typer.Option(help="File for the comparison as CSV.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two studies: two models, two corpora, two dates; paired where contexts are shared.

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
        print(f"{what}, horizon {horizon} ({paired})")
        for row in part.itertuples():
            print(
                f"  rank {row.rank:4d}  {row.first:7.3f}  {row.second:7.3f}  difference "
                f"{row.difference:+.3f} "
                f"(95 % interval {row.difference_low:+.3f} to {row.difference_high:+.3f})"
            )
    if out is not None:
        comparison.to_csv(out, index=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")],
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
    price: Annotated[float, typer.Option(help="Price of a device-hour.")] = 2.5,
) -> None:
    """Write a finished study's report again, as HTML and beside it as Markdown with its figures.

    Example: cpmtp report runs/study --price 2.5 --out rank-report.html
    """
    from cpmtp.report.document import Report, read_extras
    from cpmtp.study.running import read_study

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
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for model and checkpoint; default: runs/base-DOMAIN."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
) -> None:
    """Train a small base model on what this Python carries; goes on from its checkpoint if there is
    one.

    Example: cpmtp train-base code --steps 3000 --out runs/base-code
    """
    import torch

    from cpmtp.training.base_models import BaseTrainingSettings, train_base

    if steps < 1:
        raise ValueError(f"--steps {steps}: expected at least 1")
    if threads:
        torch.set_num_threads(threads)
    result = train_base(
        domain, out or Path(f"runs/base-{domain}"), BaseTrainingSettings(steps=steps, seed=seed)
    )
    print(f"held-out bits per byte  {result.bits_per_byte:.3f}")
    print(f"tokens seen             {result.tokens_seen:,}")
    print(f"model                   {result.folder}")


@app.command("train-head")
def train_head_command(
    model: Annotated[
        str, typer.Option(help="Base model: code, prose, a folder or a hub id.")
    ] = "code",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for head and checkpoint; default: runs/head-MODEL-rRANK."),
    ] = None,
    horizon: Annotated[int, typer.Option(help="Tokens per call at most.")] = 4,
    rank: Annotated[int, typer.Option(help="Components of the CP distribution.")] = 8,
    anchored: Annotated[bool, typer.Option(help="The head reads the known first token.")] = True,
    objective: Annotated[
        str, typer.Option(help="distillation, likelihood or acceptance.")
    ] = "distillation",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    seconds: Annotated[
        float | None, typer.Option(help="Train for so long instead of for --steps.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Files, folders or globs; default: the model's own samples."),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a head to begin with.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and batches.")] = 0,
) -> None:
    """Train a head for a base model that stays as it is; goes on from its checkpoint if there is
    one.

    Example: cpmtp train-head --model code --rank 8 --steps 2000 --out runs/head-code
    """
    from cpmtp.corpora import read_documents
    from cpmtp.heads.cp_head import CPHead
    from cpmtp.pretrained import load_language_model
    from cpmtp.training.heads import HeadTrainingSettings, train_head, windows_of_text

    settings = HeadTrainingSettings(
        horizon=horizon,
        rank=rank,
        anchored=anchored,
        objective=objective,
        steps=steps,
        seconds=seconds,
        seed=seed,
    )
    lm = load_language_model(model, device=device)
    tokens = (
        windows_of_text(lm, [d.text for d in read_documents(list(corpus))], settings.length)
        if corpus
        else None
    )
    folder = out or Path(f"runs/head-{lm.name}-r{rank}")
    train_head(
        lm,
        settings,
        out=folder,
        tokens=tokens,
        start=CPHead.from_pretrained(start) if start else None,
    )
    last = (folder / "metrics.csv").read_text("utf-8").splitlines()[-1].split(",")
    print(f"steps            {last[0]} in {float(last[1]):.0f} s")
    print(f"tokens per call  {float(last[3]):.3f} (block, on the last batch)")
    print(f"head             {folder}")


@app.command()
def generate(
    head: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a trained head, or recommended or baseline (embedded models); "
            "without: plain decoding."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Its base model: code, prose, a folder or a hub id.")
    ] = "code",
    prompt: Annotated[
        str, typer.Option(help="Text to go on from.")
    ] = "def add(a, b):\n    return ",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    rule: Annotated[str, typer.Option(help="block, token or greedy.")] = "block",
    temperature: Annotated[float, typer.Option(help="0 follows the most probable token.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Only the so many most probable tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the most probable tokens of this mass.")
    ] = None,
    monitor: Annotated[
        Path | None, typer.Option(help="File that gets a line of JSON per cycle.")
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(help="Table with forecast_low and forecast_high: warn of drift from it."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
) -> None:
    """Generate text by lossless self-speculative decoding and say what it took.

    Example: cpmtp generate recommended --model code --max-new-tokens 200 --monitor
    runs/generate.jsonl
    """
    from cpmtp.decoding.drift import drift_warning, expected_interval
    from cpmtp.decoding.speculative import speculative_generate
    from cpmtp.pretrained import load_language_model

    lm = load_language_model(model, device=device)
    draft = None if head is None else _load_head(head, model, device)
    if expect and draft is None:
        raise ValueError("--expect without a head: plain decoding has nothing to drift")
    keys = {
        "model": lm.name,
        "rank": getattr(draft, "rank", 0),
        "anchored": getattr(draft, "anchored", False),
        "rule": rule,
    }
    keys["head"] = Path(head or "").name
    expected = expected_interval(expect, **keys) if expect else None
    out = speculative_generate(
        lm,
        draft,
        lm.encode(prompt),
        max_new_tokens=max_new_tokens,
        rule=rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        monitor=monitor,
    )
    print(lm.decode(out.sequences[0]))
    stats = out.stats
    print(f"tokens per call    {stats.tokens_per_call:.3f} in {stats.calls} calls", file=sys.stderr)
    print(f"tokens per second  {stats.tokens_per_second:.1f}", file=sys.stderr)
    print(
        f"latency per token  {1e3 * stats.latency(0.5):.1f} ms median, "
        f"{1e3 * stats.latency(0.95):.1f} ms p95",
        file=sys.stderr,
    )
    if expected and (warning := drift_warning(stats, *expected)):
        print(f"drift: {warning}", file=sys.stderr)


def _load_head(name: str, model: str, device: str):
    from cpmtp.heads.cp_head import CPHead
    from cpmtp.pretrained import embedded_heads

    folder = embedded_heads(model).get(name, Path(name))
    if not (folder / "config.json").is_file():
        known = (
            f"; {model} comes with {', '.join(embedded_heads(model))}"
            if embedded_heads(model)
            else ""
        )
        raise ValueError(
            f"the folder {name!r} holds no head: expected config.json and model.safetensors in "
            f"it{known}"
        )
    return CPHead.from_pretrained(folder).to(device)


@app.command()
def validate(
    preset: Annotated[
        str, typer.Option(help="tiny (embedded model, CPU) or gpu (one CUDA device).")
    ] = "tiny",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the validation's state; default: runs/validate-PRESET."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Only base, heads, forecast, decode or report; default: all.")
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Begin nothing after so many seconds.")
    ] = None,
) -> None:
    """Prove or refute a forecast: base model, heads, forecast, real decoding, report; goes on where
    it was stopped.

    Example: cpmtp validate --preset tiny --out runs/validate-tiny
    """
    from cpmtp.validation import PRESETS
    from cpmtp.validation import validate as run

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    done = run(
        PRESETS[preset],
        out or Path(f"runs/validate-{preset}"),
        stage=stage,
        budget_seconds=budget_seconds,
    )
    if not done.finished:
        print(
            f"unfinished  {len(done.missing)} parts are left ({done.missing[0]} first); the same "
            "command goes on"
        )
    elif (done.results / "summary.json").is_file():
        found = json.loads((done.results / "summary.json").read_text("utf-8"))
        for choice in found["choices"]:
            print(
                f"T={choice['temperature']:g} batch {choice['batch']}: chosen {choice['chosen']} "
                f"({choice['chosen_speedup']:.2f} times plain decoding), measured best "
                f"{choice['measured_best']} "
                f"({choice['best_speedup']:.2f})"
            )
        print(f"forecast    off by {found['forecast_error_largest']:.1%} at most")
        print(
            f"law         {found['law_tests']} tests, uniformity p = "
            f"{found['law_uniformity_p_value']:.3f}"
        )
        print(f"report      {done.results / 'report.html'}")
    else:
        print(f"done        {done.folder}")


@app.command()
def models() -> None:
    """List the embedded models.

    Example: cpmtp models
    """
    from cpmtp.pretrained import embedded_models

    for name, folder in embedded_models().items():
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        print(
            f"{name:8} {recipe['parameters']:>10,} parameters  "
            f"{recipe['held_out_bits_per_byte']:.3f} bits per byte  {folder}"
        )


def _integers(option: str, text: str) -> tuple[int, ...]:
    return _numbers(option, text, int, "integers", "1,2,4")


def _numbers(option: str, text: str, kind: type, what: str, example: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: expected {what} separated by commas, such as {example}"
        ) from None


def _pair(option: str, text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not found:
        raise ValueError(f"{option} {text!r}: expected NAME=PATH, such as law=contracts/*.txt")
    return name, path


def _anchored(text: str) -> tuple[bool, ...]:
    choices = {"no": (False,), "yes": (True,), "both": (False, True)}
    if text not in choices:
        raise ValueError(f"--anchored {text!r}: expected no, yes or both")
    return choices[text]


def _bytes(gigabytes: float) -> int:
    if not (0 < gigabytes < float("inf")):
        raise ValueError(f"--max-gigabytes {gigabytes}: expected a number above 0")
    return max(int(gigabytes * 1e9), 1)


@contextmanager
def _executor(address: str | None, workers: int | None):
    """Dask's executor, or none."""
    if address is None:
        yield None
        return
    if workers is not None:
        raise ValueError(
            "--workers counts local processes and --dask computes elsewhere: give one of them"
        )
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            "--dask needs the package distributed: pip install 'cpmtp[distributed]'"
        ) from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"--dask {address!r}: no scheduler answers there ({error})") from error
    with client:
        # A context whose rows depend on nothing but itself may be computed twice; its first answer
        # counts.
        yield client.get_executor(pure=False)


def _show_plan(settings, workers: int | None) -> None:
    from cpmtp.study.plan import estimate_study

    estimate = estimate_study(settings, workers)
    print(f"cells           {estimate.cells:,}")
    print(f"largest joint   {estimate.joint_bytes / 1e6:,.1f} MB")
    print(
        f"memory          about {estimate.memory_bytes / 1e9:.1f} GB with {estimate.workers} "
        "worker(s)"
    )
    print(
        f"time            about {max(estimate.seconds / 60, 0.1):.1f} minutes (a rough guide: "
        "machines differ)"
    )


def _finish(table, out: Path, quiet: bool) -> None:
    from cpmtp.report.document import write_report
    from cpmtp.study.running import read_study

    failed = int((table["status"] == "failed").sum())
    _, manifest = read_study(out)
    if failed < len(table):
        path = write_report(table, manifest, out / "report.html")
        if not quiet:
            _summarise(table, manifest)
            print(f"table   {out / 'table.parquet'}  ({len(table):,} rows)")
            print(f"report  {path}")
    if failed:
        print(
            f"{failed} of {len(table)} cells failed: see the columns status and message",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _summarise(table, manifest: dict) -> None:
    """One screen: what was studied, and per horizon what each rank gives."""
    from cpmtp.ranking.selection import select_rank
    from cpmtp.report.document import table_parts

    for name, corpus in manifest["corpora"].items():
        replaced = corpus["replaced_bytes"]
        note = f", {replaced:,} bytes that were not UTF-8 replaced" if replaced else ""
        print(f"domain {name}: {corpus['documents']:,} documents{note}")
    for name, facts in manifest["models"].items():
        for horizon in facts["truncated_horizons"]:
            held = table[(table["model"] == name) & (table["horizon"] == horizon)][
                "kept_mass"
            ].min()
            print(
                f"{name}, horizon {horizon}: {facts['vocab_size']:,} tokens are too many for a "
                "dense joint; truncated trees of "
                f"at least {held:.1%} of the mass, tokens per call are lower bounds"
            )
    for (model, domain), part in table_parts(table):
        title = f"{model} · contexts from {domain}"
        if (part["status"] == "failed").all():
            print(f"{title}: every fit failed")
            continue
        choice = select_rank(part)
        bits = part["domain_bits_per_byte"].iloc[0]
        known = f", {bits:.2f} bits per byte" if bits == bits else ""
        print(f"{title} ({choice.contexts} contexts{known})")
        for horizon in choice.rank:
            rows = choice.table[choice.table["horizon"] == horizon]
            cells = [
                f"r={r.rank}: {r.tokens_per_call:.2f} [{r.tokens_per_call_low:.2f}, "
                f"{r.tokens_per_call_high:.2f}]"
                for r in rows.itertuples()
            ]
            print(f"  {choice.sentence(horizon)}")
            print(f"    {'  '.join(cells)}")
        if choice.caution:
            print(f"  {choice.caution}")


if __name__ == "__main__":
    main()
