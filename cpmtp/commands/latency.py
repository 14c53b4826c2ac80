"""`cpmtp latency`: what calls cost on this device, for this model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from cpmtp.commands.options import Device, Dtype, integers


def latency(
    model: Annotated[str, typer.Option(help="code, prose, a folder or a hub id.")] = "code",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    tokens: Annotated[
        str, typer.Option(help="Tokens verified in a call, in each request.")
    ] = "1,2,4,8,16,32,64,128,256,512",
    batches: Annotated[str, typer.Option(help="Requests decoded together.")] = "1",
    context: Annotated[int, typer.Option(help="Tokens before a call.")] = 128,
    forms: Annotated[str, typer.Option(help="Forms of heads, separated by commas.")] = "cp",
    ranks: Annotated[str, typer.Option(help="Ranks of forms cp and markov_mixture.")] = "1,4",
    transition_ranks: Annotated[
        str, typer.Option(help="Transition ranks of forms markov and markov_mixture.")
    ] = "64",
    horizons: Annotated[str, typer.Option(help="Tokens per call at most.")] = "4",
    seconds: Annotated[float, typer.Option(help="Time to spend.")] = 60.0,
    engine: Annotated[
        str | None, typer.Option(help="Whose step curve --engine-curve is, its device with it.")
    ] = None,
    engine_curve: Annotated[
        Path | None,
        typer.Option(help="CSV with columns batch, tokens, seconds from a serving engine."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("latency.json"),
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
) -> None:
    """Measure step times.

    Study, forecast and report read the file.

    Example: cpmtp latency --model ./my-model --device cuda --batches 1,8,64 --out latency.json
    """
    from cpmtp.forecasting.step_times import measure_latency
    from cpmtp.pretrained import load_language_model
    from cpmtp.whole_files import require_file

    if (engine is None) != (engine_curve is None):
        raise ValueError("--engine and --engine-curve go together: whose curve, and the curve")
    heads = head_grid(forms, ranks, transition_ranks, horizons)
    require_file(out)
    curve = engine and engine_curve and read_curve(engine, engine_curve)
    lm = load_language_model(model, device=device, dtype=dtype)
    found = measure_latency(
        lm,
        heads,
        integers("--tokens", tokens),
        batches=integers("--batches", batches),
        context=context,
        seconds=seconds,
        seed=seed,
    )
    if curve:
        found = found.with_curve(curve)
    _show(found)
    print(f"written to {found.write(out)}")


def head_grid(forms: str, ranks: str, transition_ranks: str, horizons: str) -> list[dict[str, Any]]:
    """Keywords of heads of every form in every size it has."""
    wanted = integers("--ranks", ranks), integers("--transition-ranks", transition_ranks)
    for option, numbers in zip(("--ranks", "--transition-ranks"), wanted, strict=True):
        if not numbers:
            raise ValueError(f"{option} is empty: name at least one, such as 4")
    sizes: dict[str, dict[str, tuple]] = {
        "cp": {"rank": wanted[0]},
        "markov": {"transition_rank": wanted[1]},
        "markov_mixture": {"rank": tuple(r for r in wanted[0] if r > 1) or wanted[0]}
        | {"transition_rank": wanted[1]},
        "recurrent": {},
    }
    found = []
    for form in (part.strip() for part in forms.split(",") if part.strip()):
        if form not in sizes:
            raise ValueError(
                f"--forms {form!r}: choose of {', '.join(sizes)}; lookup and plain decoding are in "
                "every forecast"
            )
        for horizon in integers("--horizons", horizons):
            for chosen in itertools.product(*sizes[form].values()):
                found.append(
                    {"form": form, "horizon": horizon} | dict(zip(sizes[form], chosen, strict=True))
                )
    return found


def read_curve(source: str, path: Path):
    """A serving engine's step curve out of a CSV file."""
    import pandas as pd

    from cpmtp.latency import StepCurve, StepTime

    names = ["batch", "tokens", "seconds"]
    try:
        table = pd.read_csv(path)
        missing = set(names) - set(table)
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        rows = table[names].itertuples(index=False)
        return StepCurve(source, tuple(StepTime(int(b), int(t), float(s)) for b, t, s in rows))
    except ValueError as error:
        raise ValueError(
            f"--engine-curve {str(path)!r}: {error}; expected a CSV file with the columns batch, "
            "tokens (in each request) and seconds"
        ) from None


def _show(found) -> None:
    where = found.measured_on
    print(f"{where['model']} on {where['device']}, {where['dtype']}, {where['rounds']} rounds")
    for curve in found.curves:
        print(f"seconds of a call, {curve.source}")
        for time in curve.times:
            print(
                f"  batch {time.batch:4d}  tokens {time.tokens:4d}  {1e3 * time.seconds:9.3f} ms "
                f"({1e3 * time.low:.3f} to {1e3 * time.high:.3f})"
            )
    print("seconds that a head adds")
    for time in found.heads:
        print(
            f"  batch {time.batch:4d}  {time.form} n {time.horizon} r {time.rank} k "
            f"{time.transition_rank}  draft {1e3 * time.draft:.3f} ms, verification "
            f"{1e3 * time.verification:.3f} ms, rest {1e3 * time.rest:.3f} ms"
        )
    for time in found.plain:
        print(f"plain step, batch {time.batch}: {1e3 * time.seconds:.3f} ms ({time.way})")
