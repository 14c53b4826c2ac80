"""A warning where decoding leaves the forecast, and only there."""

from __future__ import annotations

import pandas as pd
import pytest

from cpmtp.decoding.drift import drift_report, drift_warning, expected_interval
from cpmtp.decoding.stats import GenerationStats


def stats(*accepted: int) -> GenerationStats:
    calls = sum(accepted)
    tokens = sum(count * (k + 1) for k, count in enumerate(accepted))
    return GenerationStats(calls + 1, accepted, tokens / max(calls, 1), (), 1.0, {}, (), tokens)


def test_a_measurement_inside_the_forecast_is_no_drift():
    assert drift_warning(stats(100, 100), 1.4, 1.6) is None


def test_a_measurement_is_given_its_own_uncertainty():
    assert drift_warning(stats(5, 5), 1.7, 1.8) is None
    assert "below the forecast" in drift_warning(stats(500, 500), 1.7, 1.8)
    assert "above the forecast" in drift_warning(stats(500, 500), 1.1, 1.2)


def test_the_report_says_which_of_the_two_it_is():
    assert drift_report(stats(100, 100), 1.4, 1.6) == (
        "tokens per call within the forecast of 1.400 to 1.600"
    )
    assert drift_report(stats(500, 500), 1.7, 1.8).startswith("drift: tokens per call 1.500")
    assert "nothing to compare" in drift_report(stats(0, 0), 1.7, 1.8)


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"temperature": 0.7}, "temperature 0.7"),
        ({"top_k": 5}, "top_k 5"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_a_forecast_that_does_not_say_holds_for_temperature_one_only(tmp_path, sampling, named):
    path = tmp_path / "table.parquet"
    pd.DataFrame([dict(rank=8, forecast_low=1.0, forecast_high=2.0)]).to_parquet(path)
    plain = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    assert expected_interval(path, rank=8, **plain) == (1.0, 2.0)
    with pytest.raises(ValueError, match=named):
        expected_interval(path, rank=8, **plain | sampling)


def test_a_forecast_without_truncation_is_the_row_without_a_number(tmp_path):
    path = tmp_path / "table.csv"
    rows = [
        dict(top_k=k, temperature=1.0, forecast_low=low, forecast_high=2.0)
        for k, low in ((None, 1.0), (20, 1.5))
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    assert expected_interval(path, temperature=1.0, top_k=None) == (1.0, 2.0)
    assert expected_interval(path, temperature=1.0, top_k=20) == (1.5, 2.0)
    with pytest.raises(ValueError, match="has 0 rows"):
        expected_interval(path, temperature=0.5, top_k=20)


def test_nothing_measured_is_no_drift():
    assert drift_warning(stats(0, 0), 1.7, 1.8) is None


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_row_of_the_model_and_head_is_taken(tmp_path, suffix):
    table = pd.DataFrame(
        dict(
            model=["a", "a", "b"],
            rank=[1, 8, 8],
            forecast_low=[1.0, 2.0, 3.0],
            forecast_high=[1.5, 2.5, 3.5],
        )
    )
    path = tmp_path / f"table.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    assert expected_interval(path, model="a", rank=8, rule="block") == (2.0, 2.5)
    with pytest.raises(ValueError, match="has 0 rows"):
        expected_interval(path, model="c", rank=8)
    with pytest.raises(ValueError, match="has 2 rows"):
        expected_interval(path, rank=8)


def test_what_is_no_table_of_forecasts_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no column forecast_low"):
        expected_interval(tmp_path / "x.csv")
    for name in ("x.parquet", "absent.parquet"):
        with pytest.raises(ValueError, match="no table of forecasts"):
            expected_interval(tmp_path / name)


def test_of_several_such_heads_the_named_one_is_meant(tmp_path):
    rows = [("r8", 1.9, 2.0), ("recommended", 2.5, 2.6)]
    table = pd.DataFrame(
        [
            {"head": h, "rank": 8, "forecast_low": low, "forecast_high": high}
            for h, low, high in rows
        ]
    )
    table.to_parquet(tmp_path / "table.parquet")
    assert expected_interval(tmp_path / "table.parquet", rank=8, head="recommended") == (2.5, 2.6)
    with pytest.raises(ValueError, match="2 rows"):
        expected_interval(tmp_path / "table.parquet", rank=8)
    table[:1].to_parquet(tmp_path / "one.parquet")
    assert expected_interval(tmp_path / "one.parquet", rank=8, head="mine") == (1.9, 2.0)


@pytest.mark.parametrize("model", ["code", "prose"])
def test_the_stored_forecasts_know_the_recommended_heads(root, model):
    path = root / "data" / "studies" / "head" / "decoding.parquet"
    low, high = expected_interval(
        path, model=model, rank=8, anchored=True, rule="block", head="recommended"
    )
    assert 2.4 < low < high < 3
