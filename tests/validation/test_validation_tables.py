"""From timed calls to a model of latency, and from all tables to one row per decoded cell."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from cpmtp.latency import LatencyModel
from cpmtp.validation.stages import fit_latency
from cpmtp.validation.summary import decoded_cells

SHAPES = list(itertools.product((2, 3, 5), (1, 4, 8)))


def timed(law, plain: float = 0.02) -> pd.DataFrame:
    """Calls of plain decoding and of a head of every shape."""
    heads = [
        {"head": f"n{n} r{r}", "horizon": n, "rank": r, "call_seconds": law(n, r)}
        for n, r in SHAPES
    ]
    return pd.DataFrame([{"head": "plain", "call_seconds": plain}, *heads])


def squares(latency: LatencyModel, calls: pd.DataFrame) -> float:
    heads = calls[calls["head"] != "plain"]
    return sum(
        (latency.call_seconds(int(row.horizon), int(row.rank)) - row.call_seconds) ** 2
        for row in heads.itertuples()
    )


def test_a_planted_law_of_calls_is_found_again():
    planted = LatencyModel(0.02, 0.021, 0.0004, 0.00003)
    found = fit_latency(timed(planted.call_seconds))
    assert vars(found) == pytest.approx(vars(planted))


def test_plain_steps_are_not_taken_for_calls_of_a_head():
    planted = LatencyModel(1.5, 0.021, 0.0004, 0.00003)
    found = fit_latency(timed(planted.call_seconds, plain=1.5))
    assert found.plain_step == 1.5 and found.base == pytest.approx(0.021)


def test_calls_that_are_cheaper_the_longer_they_are_give_no_negative_times():
    found = fit_latency(timed(lambda n, r: 0.03 - 0.001 * n))
    assert found.per_position == 0 and found.per_component == pytest.approx(0, abs=1e-9)
    mean = np.mean([0.03 - 0.001 * n for n, _ in SHAPES])
    assert found.base == pytest.approx(mean)


def test_no_other_law_of_times_of_at_least_zero_lies_nearer_to_noisy_calls():
    generator = np.random.default_rng(0)
    noise = dict(zip(SHAPES, 0.002 * generator.standard_normal(len(SHAPES)), strict=True))
    calls = timed(lambda n, r: 0.02 + 0.0002 * n + 0.00001 * n * r + noise[n, r])
    found = fit_latency(calls)
    least = squares(found, calls)
    for moved in generator.standard_normal((200, 3)) * [0.001, 0.0005, 0.0001]:
        times = np.maximum(
            np.array([found.base, found.per_position, found.per_component]) + moved, 0
        )
        assert squares(LatencyModel(0.02, *times.tolist()), calls) >= least


KEYS = {"base": "code", "head": "n3 r8", "temperature": 1.0}


def tables(**changes) -> dict[str, pd.DataFrame]:
    """One head and plain decoding, in two batches."""
    shape = {"horizon": 3.0, "rank": 8.0, "anchored": True, "head_parameters": 100.0}
    spent = {"target_seconds": 3.0, "draft_seconds": 0.5, "verification_seconds": 0.25}
    cell = {"tokens_per_second": 90.0, "rest_seconds": 0.25, "part_seconds": 1.0} | spent
    plain = dict.fromkeys(shape, np.nan)
    decoding = [
        KEYS | {"batch": batch, "head": head} | cell | form
        for batch in (1, 8)
        for head, form in (("plain", plain), ("n3 r8", shape))
    ]
    forecast = [
        KEYS
        | shape
        | {
            "forecast": 2.4,
            "forecast_low": 2.2,
            "forecast_high": 2.6,
            "plain_forecast": 2.1,
            "part_seconds": 1.0,
        }
    ]
    measured = [
        KEYS
        | shape
        | {"measured": 2.5, "measured_low": 2.3, "measured_high": 2.7, "part_seconds": 1.0}
    ]
    made = {"decoding": decoding, "forecast": forecast, "acceptance": measured} | changes
    return {name: pd.DataFrame(rows) for name, rows in made.items()}


LATENCY = LatencyModel(0.01, 0.012, per_position=0.001, per_component=0.0001)


def test_a_decoded_cell_has_its_forecast_its_measurement_and_their_errors():
    cells = decoded_cells(tables(), LATENCY).set_index(["batch", "head"])
    assert len(cells) == 4
    for batch in (1, 8):
        row = cells.loc[batch, "n3 r8"]
        assert (row["forecast"], row["measured"], row["plain_forecast"]) == (2.4, 2.5, 2.1)
        assert row["forecast_error"] == pytest.approx(2.4 / 2.5 - 1)
        assert row["plain_forecast_error"] == pytest.approx(2.1 / 2.5 - 1)
        # 12 ms, 1 ms for each of three positions, a tenth for each of 3 * 8 components.
        assert row["predicted_tokens_per_second"] == pytest.approx(2.4 / 0.0174)
        assert row["draft_and_verification_share"] == pytest.approx(1 - 3 / 4)
        assert (row["horizon"], row["rank"], row["anchored"]) == (3, 8, True)


def test_plain_decoding_has_no_forecast_and_keeps_its_times():
    cells = decoded_cells(tables(), LATENCY).set_index(["batch", "head"])
    row = cells.loc[1, "plain"]
    missing = ["forecast", "measured", "forecast_error", "predicted_tokens_per_second"]
    assert row[missing].isna().all()
    assert row["tokens_per_second"] == 90 and row["draft_and_verification_share"] == 0.25


def test_cells_keep_no_seconds_of_the_stages_themselves_nor_anything_twice():
    cells = decoded_cells(tables(), LATENCY)
    assert "part_seconds" not in cells
    assert not [name for name in cells if name.endswith(("_x", "_y"))]


@pytest.mark.parametrize("name", ["base", "temperature"])
def test_forecasts_of_another_base_or_temperature_are_not_taken(name):
    other = tables()["forecast"].assign(**{name: {"base": "prose", "temperature": 0.5}[name]})
    cells = decoded_cells(tables(forecast=other), LATENCY)
    assert len(cells) == 4 and cells["forecast"].isna().all()
    assert cells["measured"].notna().sum() == 2
