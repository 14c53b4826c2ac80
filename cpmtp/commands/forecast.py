"""`cpmtp forecast`: what each head would earn once it is trained, before anybody trains it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cpmtp.commands.latency import head_grid
from cpmtp.commands.options import Device, QuickDtype, integers, quick_dtype
from cpmtp.report.words import multiple, percent

_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9}


def forecast(
    model: Annotated[str, typer.Option(help="code, prose, a folder or a hub id.")] = "code",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>", help="Files, folders or globs; default: the model's own samples."
        ),
    ] = None,
    forms: Annotated[
        str, typer.Option(help="Forms of heads, separated by commas.")
    ] = "cp,markov,recurrent",
    ranks: Annotated[str, typer.Option(help="Ranks of forms cp and markov_mixture.")] = "1,4",
    transition_ranks: Annotated[
        str, typer.Option(help="Transition ranks of forms markov and markov_mixture.")
    ] = "64",
    horizons: Annotated[
        str, typer.Option(help="Tokens per call at most; heads are probed at the longest.")
    ] = "2,3,4",
    budget: Annotated[
        str, typer.Option(help="Positions that a head is to be trained on: 50M, 200k.")
    ] = "50M",
    probe_budget: Annotated[
        str | None, typer.Option(help="Positions of the largest probes; default: by --minutes.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 10.0,
    loads: Annotated[str, typer.Option(help="Requests decoded together.")] = "1",
    latency: Annotated[
        Path | None, typer.Option(help="What `cpmtp latency` wrote; default: measured.")
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(help="Table of curves to borrow shapes from; default: the stored ones."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the target's distribution.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the tokens of this mass.")] = None,
    study: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished study, whose ceilings are shown beside."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of probes and tables; the same folder again goes on.")
    ] = Path("runs/forecast"),
    device: Device = "cpu",
    dtype: QuickDtype = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, windows and draws.")] = 0,
) -> None:
    """Forecast what heads earn, from short probes.

    Example: cpmtp forecast --model code --budget 50M --minutes 10 --loads 1,8
    """
    from cpmtp.corpora import read_documents
    from cpmtp.forecasting.head_forecast import forecast_heads
    from cpmtp.latency import read_latency
    from cpmtp.pretrained import load_language_model

    wanted = integers("--horizons", horizons)
    candidates = head_grid(forms, ranks, transition_ranks, str(max(wanted, default=2)))
    asked: dict[str, Any] = {
        "budget": positions("--budget", budget),
        "probe_budget": probe_budget and int(positions("--probe-budget", probe_budget)),
        "loads": integers("--loads", loads),
    }
    measured = None if latency is None else read_latency(latency)
    texts = [d.text for d in read_documents(list(corpus))] if corpus else None
    ceilings = None if study is None else study_ceilings(study)
    lm = load_language_model(model, device=device, dtype=dtype or quick_dtype([model], device))
    found = forecast_heads(
        lm,
        candidates,
        texts=texts,
        latency=measured,
        curves=None if curves is None else _table(curves),
        out=out,
        horizons=wanted,
        minutes=minutes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        **asked,
    )
    found.write(out, asked={"model": model, "corpus": list(corpus or ())})
    show_forecast(found, ceilings)
    print(f"tables in {out}; cpmtp report {shlex.quote(str(out))} writes them as a page")


def positions(option: str, text: str) -> float:
    """A number of positions such as 50M, 200k or 32768."""
    scale = _SUFFIXES.get(text[-1:].lower(), 1.0)
    try:
        return float(text[:-1] if scale != 1.0 else text) * scale
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected positions such as 50M or 200k") from None


def _table(path: Path):
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"--curves {str(path)!r}: no such file")
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except ValueError as error:  # of any reader: damaged, empty, no text
        raise ValueError(
            f"--curves {str(path)!r} is no table ({error}): expected CSV or Parquet"
        ) from None


def study_ceilings(folder: Path) -> dict[tuple[int, int], float]:
    """Tokens per call of the best anchored drafts of form cp in a study, by horizon and rank."""
    from cpmtp.ranking.parts import OUTCOME, best_fits
    from cpmtp.study.running import read_study

    table = read_study(folder)[0]
    anchored = table[table["anchored"] & (table["form"] == "cp")]
    if anchored.empty:
        raise ValueError(
            f"--study {str(folder)!r} has no anchored drafts, which heads are: run `cpmtp study "
            "--anchored both`"
        )
    return best_fits(anchored).groupby(["horizon", "rank"])[OUTCOME].mean().to_dict()


def show_forecast(found, ceilings: Mapping[tuple[int, int], float] | None = None) -> None:
    """The answer first, then what it rests on."""
    if found.status:
        print(found.status)
        return
    for load in found.settings.loads:
        _show_choice(found.worth(load))
    _show_options(found, ceilings or {})
    if len(found.settings.loads) > 1:
        _show_schedule(found.schedule())
    if found.table["too_many"].any():
        print(
            f"the budget reads the text {found.table['passes'].max():.0f} times: more than four "
            "passes teach less than new text would; give more text"
        )
    if found.ahead > found.shapes.farthest:
        print(
            f"the budget is {multiple(found.ahead)} times the largest probe, and nobody has held a "
            f"forecast against the truth beyond {found.shapes.farthest:.0f} times: take what lies "
            "farther as a direction, or give --minutes or --probe-budget for longer probes"
        )
    groups = found.shapes.groups
    print(
        f"curves continued by {found.shapes.level.words}, from {len(groups)} groups of stored "
        f"curves: {'; '.join(groups)}"
    )


def _show_choice(choice) -> None:
    print(choice.sentence)
    if choice.overtaken:
        print(f"  from {choice.overtaken[1]:,.0f} positions on {choice.overtaken[0]} is ahead")
    if not choice.budget:
        return
    more = "a doubling adds more than 1 % up to the largest budget looked at"
    if choice.stop < float("inf"):
        more = f"beyond {choice.stop:,.0f} positions a doubling adds less than 1 %"
    if choice.stop <= choice.budget:
        more = "twice as many would add less than 1 %"
    paid = (
        f"paid for after {choice.pays_after:,.0f} tokens"
        if choice.pays_after < float("inf")
        else "never paid for"
    )
    print(
        f"  trained on {choice.budget:,.0f} positions: {choice.device_hours:.2f} device-hours as "
        f"probes were trained here, {paid}; {more}"
    )


def _show_options(found, ceilings: Mapping[tuple[int, int], float]) -> None:
    settings, table = found.settings, found.table
    at = min((b for b in table["budget"] if b >= settings.budget), default=table["budget"].max())
    probed = found.probes["budget"].max()
    print(
        f"after {at:,.0f} positions (probed up to {probed:,}), {percent(settings.confidence)} "
        f"intervals, load {settings.loads[0]}, each at its fastest horizon:"
    )
    rows = table[table["budget"] == at].sort_values("tokens_per_second", ascending=False)
    rows = rows.drop_duplicates("option")
    for row in rows.itertuples():
        ceiling = ceilings.get((row.horizon, row.rank)) if row.form == "cp" else None
        print(
            f"  {row.option:24} n {row.horizon}  {row.tokens_per_call:5.2f} tokens per call "
            f"({row.tokens_per_call_low:.2f} to {row.tokens_per_call_high:.2f})  "
            f"{row.tokens_per_second:9.1f} tokens/s, {row.speedup:.2f} times plain"
            + ("" if ceiling is None else f"; ceiling {ceiling:.2f}")
        )


def _show_schedule(schedule) -> None:
    print("by load:")
    for row in schedule.itertuples():
        print(
            f"  {row.load:4d}  {row.option} n {row.horizon}: {row.speedup:.2f} times plain "
            f"decoding; {row.tail:.2f} while requests end from here down to none"
        )
