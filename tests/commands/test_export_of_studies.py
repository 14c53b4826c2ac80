"""A study with forecasts of its models in its folder is exported like a forecast."""

from __future__ import annotations

import json

from command_line import run
from stored_forecast import stored


def test_the_command_finds_the_forecasts_in_a_studys_folder(monkeypatch, capsys, tmp_path):
    def forecast(place: int, name: str, best: str):
        folder = tmp_path / "forecast" / f"{place}"
        folder.mkdir(parents=True)
        file = stored(folder, best=best) / "forecast.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"studied_as": name}))

    def exported(*more):
        return run(monkeypatch, capsys, "export", tmp_path, "--to", "vllm", *more)

    forecast(0, "m", "cp 4")
    status, out, _ = exported()
    assert status == 0 and "cp, rank 4" in out and (tmp_path / "speculative_config.json").is_file()
    forecast(1, "n", "markov 64")
    status, _, err = exported()
    assert status == 2 and "forecasts of m, n: choose one with --model" in err
    assert exported("--model", "x")[0] == 2
    status, out, _ = exported("--model", "n")
    assert status == 0 and "markov, rank 1, transition rank 64" in out
