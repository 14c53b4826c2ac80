"""`cpmtp validate`: a forecast proved or refuted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


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
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:NUMBER; default: the preset's.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of base models; default: the preset's.")
    ] = None,
) -> None:
    """Prove or refute a forecast by real decoding.

    Base model, heads, forecast, decoding, report; goes on where it was stopped.

    Example: cpmtp validate --preset tiny --out runs/validate-tiny
    """
    from cpmtp.validation import PRESETS
    from cpmtp.validation import validate as run

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    done = run(
        PRESETS[preset].on(device, dtype),
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
