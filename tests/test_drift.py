"""A warning where decoding leaves the forecast, and only there."""

from __future__ import annotations

import pandas as pd
import pytest

from cpmtp.drift import drift_warning, expected_interval
from cpmtp.generation_stats import GenerationStats


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


def test_nothing_measured_is_no_drift():
    assert drift_warning(stats(0, 0), 1.7, 1.8) is None


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_row_of_the_model_and_head_is_taken(tmp_path, suffix):
    table = pd.DataFrame(
        dict(model=["a", "a", "b"], rank=[1, 8, 8], forecast_low=[1.0, 2.0, 3.0], forecast_high=[1.5, 2.5, 3.5])
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
