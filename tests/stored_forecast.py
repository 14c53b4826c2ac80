"""A forecast's folder as `HeadForecast.write` leaves it, with planted figures."""

from __future__ import annotations

import json

import pandas as pd

PLAIN_SECONDS, LOAD = 0.01, 2


def option(
    name: str, kind: str, tokens, seconds: float, horizon: int = 3, budget: float = 1e6, **sizes
):
    ends = ("", "_low", "_high")
    return (
        dict(option=name, kind=kind, horizon=horizon, budget=budget, cycle_seconds=seconds)
        | {f"tokens_per_call{end}": value for end, value in zip(ends, tokens, strict=True)}
        | {
            f"tokens_per_second{end}": value * LOAD / seconds
            for end, value in zip(ends, tokens, strict=True)
        }
        | dict(speedup=tokens[0] * PLAIN_SECONDS / seconds, tenth_percentile=1.2, load=LOAD)
        | dict(device_hours=0.5, weight_bytes=2_800_000, passes=1.0, too_many=False)
        | sizes
    )


def stored(tmp_path, *, best: str = "cp 4", low: float = 1.8, groups: int = 5, **changes):
    """A forecast's folder as `HeadForecast.write` leaves it; `changes` are of the choice."""
    rows = [
        option(name, kind, tokens, seconds, horizon, budget, **sizes)
        for budget in (5e5, 1e6, 2e6)
        for name, kind, tokens, seconds, horizon, sizes in (
            ("plain decoding", "plain", (1.0, 1.0, 1.0), PLAIN_SECONDS, 1, {}),
            ("lookup", "lookup", (1.2, 1.1, 1.3), 0.011, 3, {}),
            ("cp 4", "head", (2.2, low, 2.5), 0.012, 3, dict(form="cp", rank=4, transition_rank=0)),
            ("cp 4", "head", (1.7, 1.5, 1.8), 0.011, 2, dict(form="cp", rank=4, transition_rank=0)),
            (
                *("markov 64", "head", (2.1, 1.7, 2.4), 0.012, 3),
                dict(form="markov", rank=1, transition_rank=64),
            ),
        )
    ]
    table = pd.DataFrame(rows)
    chosen = next(r for r in rows if r["option"] == best and r["budget"] == 1e6)
    ends = ("", "_low", "_high")
    choice = dict(
        name=best,
        horizon=chosen["horizon"],
        budget=1e6 if chosen["kind"] == "head" else 0.0,
        load=LOAD,
        tokens_per_call=[chosen[f"tokens_per_call{end}"] for end in ends],
        tokens_per_second=[chosen[f"tokens_per_second{end}"] for end in ends],
        speedup=chosen["speedup"],
        sure=0.95,
        pays=0.98,
        luck=0.0,
        ties=["markov 64 (n = 3)"],
        overtaken=["markov 64", 4e6],
        stop=1e7,
        device_hours=0.5,
        pays_after=1e6,
    )
    choice |= changes
    table.to_parquet(tmp_path / "forecast.parquet")
    told = {
        "settings": {"budget": 1e6, "confidence": 0.9, "temperature": 1.0},
        "status": "",
        "shapes": {"level": "damped", "groups": list("abcdefgh"[:groups])},
        "choices": [choice],
    }
    (tmp_path / "forecast.json").write_text(json.dumps(told))
    return tmp_path


def told_anew(folder, **changes):
    """A stored forecast that says something else."""
    file = folder / "forecast.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def not_enough(folder):
    """The folder of a forecast that had no time for its probes."""
    told = {"settings": {}, "shapes": {"groups": []}, "model": {"name": "mine"}}
    told["status"] = (
        "not enough for a forecast: the time has no room for two probes; give more minutes, or a "
        "larger --probe-budget"
    )
    pd.DataFrame().to_parquet(folder / "forecast.parquet")
    (folder / "forecast.json").write_text(json.dumps(told))
    return folder
