"""What a study or a forecast was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from cpmtp.report.blocks import Section, Table
from cpmtp.report.first_screen.console import left_out
from cpmtp.report.first_screen.stored_forecast import HeadsForecast


def study_set_up(
    table: pd.DataFrame, manifest: dict, forecasts: Sequence[HeadsForecast] = ()
) -> Section:
    """What a study, and the forecasts beside it, were made of.

    Parameters
    ----------
    table, manifest
        Of `read_study`.
    forecasts : sequence of HeadsForecast
    """
    settings, versions = manifest["settings"], manifest["versions"]
    starts = settings["restarts"]
    models = [
        f"{name} (V = {m['vocab_size']}, sha256 {str(m['sha256'])[:12]})"
        for name, m in manifest["models"].items()
    ]
    rows = (
        ("Models", ", ".join(models)),
        ("Contexts", f"{settings['contexts']} per model, {settings['context_length']} tokens each"),
        *([("Left out", missing)] if (missing := left_out(table, manifest)) else []),
        ("Contexts from", _places(settings)),
        ("Temperature", ", ".join(map(str, _several(settings, "temperature")))),
        *[(f"Top-{n}", f"{settings[f'top_{n}']:g}") for n in "kp" if settings.get(f"top_{n}")],
        ("Horizons", ", ".join(map(str, settings["horizons"]))),
        *_kinds_of_draft(table),
        *_truncated_horizons(table, settings),
        ("Ranks", ", ".join(map(str, settings["ranks"]))),
        ("Methods", f"{', '.join(settings['methods'])}; {starts} start{'s' * (starts > 1)} each"),
        ("Seed", str(settings["seed"])),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("Time in fits", f"{table['fit_seconds'].sum():.0f} s"),
        ("Rows", f"{len(table):,}"),
    )
    return _section((*rows, *(row for found in forecasts for row in _of_forecast(found))))


def forecast_set_up(found: HeadsForecast) -> Section:
    """What a forecast without a study was made of."""
    return _section(tuple(_of_forecast(found)))


def _section(rows: tuple[tuple[str, str], ...]) -> Section:
    return Section("Set-up", (Table(("what", "value"), rows, wide=True),))


def _of_forecast(found: HeadsForecast) -> Iterator[tuple[str, str]]:
    settings, shapes = found.told["settings"], found.told["shapes"]
    model = found.told.get("model", {})
    told = [f"on {model['device']}, {model['dtype']}"] if "device" in model else []
    if found.known and found.probed:
        told.append(f"probes of up to {found.probed:,.0f} positions of training")
    if "held_out" in settings:
        told.append(f"judged on {settings['held_out']} held-out texts")
    told.append(f"curves of {len(shapes['groups'])} kinds of model and text")
    told += [f"seed {settings['seed']}"] if "seed" in settings else []
    of = f" of {found.model}" if found.model else ""
    yield f"Forecast{of}", "; ".join(told)


def _places(settings: dict) -> str:
    named = [f"{name} ({pattern})" for name, pattern in settings.get("domains", ())]
    return ", ".join([*settings["corpus"], *named]) or "samples of each model itself"


def _kinds_of_draft(table: pd.DataFrame) -> list[tuple[str, str]]:
    if "anchored" not in table:
        return []
    told = {True: "told the first token (anchored)", False: "not told the first token"}
    return [("Drafts", " and ".join(told[bool(kind)] for kind in table["anchored"].unique()))]


def _truncated_horizons(table: pd.DataFrame, settings: dict) -> list[tuple[str, str]]:
    if "joint" not in table:
        return []
    rows = table[table["joint"] == "tree"]
    ways = set(rows["computed"]) if "computed" in rows else set()
    found = [
        f"{model}: horizon {horizon} (joints hold {100 * part['kept_mass'].min():.1f} % at least)"
        for (model, horizon), part in rows.groupby(["model", "horizon"], sort=False)
    ]
    told = [("Truncated joints", ", ".join(found))] if found else []
    if "sampled" in ways:
        texts = f"{settings['samples']:,} texts per context"
        told.append(("Estimated", f"{_sampled_cells(rows)}; from {texts}"))
    return told


def _sampled_cells(rows: pd.DataFrame) -> str:
    cells = rows[rows["computed"] == "sampled"].groupby(["model", "horizon"], sort=False)
    contexts = ((name, part[["domain", "context"]].drop_duplicates()) for name, part in cells)
    return ", ".join(f"{model}: horizon {n}, {len(some)} contexts" for (model, n), some in contexts)


def _several(settings: dict, name: str) -> list:
    """A setting's values, whether the study knows it as one or as an axis."""
    value = settings.get(name, settings.get(f"{name}s", ""))
    return list(value) if isinstance(value, list) else [value]
