"""A stored forecast of trained heads answers first, and ceilings become diagnosis."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from samples import MANIFEST, study_table
from stored_forecast import LOAD, stored

from cpmtp.report import plots
from cpmtp.report.document import Report, read_extras
from cpmtp.report.first_screen.forecast import HeadsForecast
from cpmtp.report.subject import ReportExtras

ANCHORED = study_table(lambda rank: 0.4 / rank).assign(anchored=True)


def report_of(folder, table=None, **changes) -> Report:
    table = ANCHORED if table is None else table
    return Report.of(table, MANIFEST, read_extras(folder, **changes))


def lines_of(report: Report) -> dict[str, str]:
    (card,) = report.answers
    return {block.label: block.text for block in card.blocks if block.kind == "line"}


def test_a_forecast_in_the_folder_answers_alone_and_first(tmp_path):
    report = report_of(stored(tmp_path))
    lines = lines_of(report)
    assert list(lines) == ["Train", "Brings", "How sure", "Next"]
    assert lines["Train"] == "form cp, horizon 3, rank 4, on 1,000,000 positions."
    assert lines["Brings"].startswith("1.50 to 2.08 times the speed of plain decoding (1.83 ")
    # 2.5 a device-hour over 2.2 tokens of two requests in 12 ms.
    cheap, dear, plain = (
        2.5 / 3600 * 1e6 * s / t / LOAD for s, t in ((0.012, 2.5), (0.012, 1.8), (0.01, 1))
    )
    assert (
        f"at {cheap:.2f} to {dear:.2f} per million tokens instead of {plain:.2f}" in lines["Brings"]
    )
    assert "0.5 device-hours" in lines["Brings"]
    assert "95%" in lines["How sure"] and "markov 64 (n = 3)" in lines["How sure"]
    assert "markov 64 instead from 4,000,000 positions on" in lines["How sure"]
    assert "--form cp --horizon 3 --rank 4 --positions 1000000`" in lines["Next"]
    assert report.sections[0].title == "Forecast of trained heads"
    assert report.summary.splitlines()[1] == "  Train: " + lines["Train"]


def test_beside_a_forecast_ceilings_recommend_nothing(tmp_path):
    report = report_of(stored(tmp_path))
    text = report.write_markdown(tmp_path / "r.md").read_text("utf-8").replace("\\", "")
    own = text[text.index("## m · contexts from d") :]
    assert "By these ceilings alone horizon 3 with rank" in own
    assert not re.search(r"[Rr]ecommended( rank|: )", own)
    assert "recommended" not in report.summary and "train it" not in report.summary
    plan = text[text.index("## Pilot plan") :]
    assert "the forecast of a trained head, cp 4: 2.20 tokens per call (1.80 to 2.50)" in plan
    assert "below 1.80: look at the traffic" in plan and "below 1.20 (break-even)" in plan


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(sure=0.5), "Pilot first"),
        (dict(low=1.1), "Pilot first"),  # 1.1 tokens in 12 ms are slower than 1 in 10
        (dict(best="lookup"), "Do not train"),
        (dict(best="plain decoding"), "Do not train"),
    ],
)
def test_what_is_not_sure_or_not_faster_is_not_to_be_trained(tmp_path, changes, expected):
    report = report_of(stored(tmp_path, **changes))
    assert next(iter(lines_of(report))) == expected
    page = report.write_html(tmp_path / "r.html").read_text("utf-8")
    assert ("No head to pilot" in page) == (expected == "Do not train")


def test_few_groups_and_an_unnamed_model_are_cautioned_of(tmp_path):
    table = ANCHORED
    both = pd.concat([table, table.assign(model="n")], ignore_index=True)
    (card,) = report_of(stored(tmp_path, groups=2), both).answers
    cautions = [block.text for block in card.blocks if block.kind == "caution"]
    assert cautions[0].startswith("Curves are continued by those of 2 groups only")
    assert cautions[1].startswith("The study is of 2 models")
    assert [block.kind for block in card.blocks] == ["caution"] * 2 + ["line"] * 4


def test_the_picture_has_points_with_intervals_ceilings_as_ticks_and_two_lines(tmp_path):
    table = ANCHORED
    report = report_of(stored(tmp_path), table)
    (figure,) = (b for b in report.sections[0].blocks if type(b).__name__ == "Figure")
    ax = Figure().add_subplot()
    figure.draw(ax)
    drawn = {line.get_label(): line.get_xydata() for line in ax.lines}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cp 4, n = 3", "markov 64, n = 3"]
    np.testing.assert_allclose(ax.containers[0][0].get_xydata(), [[2.2 / 1.2, 0], [2.1 / 1.2, 1]])
    bars = ax.collections[0].get_segments()
    np.testing.assert_allclose(bars, [[(1.5, 0), (2.5 / 1.2, 0)], [(1.7 / 1.2, 1), (2.0, 1)]])
    # Only form cp has ceilings in this study: 3 - 0.4 / 4 tokens in a call of 12 ms.
    np.testing.assert_allclose(drawn["ceiling"], [(2.9 / 1.2, 0)], atol=0.01)
    assert set(drawn["plain decoding"][:, 0]) == {1.0}
    np.testing.assert_allclose(drawn["prompt lookup"][:, 0], 1.2 / 1.1)
    assert "1.83 (1.50 to 2.08)" in figure.words and "lookup 1.09" in figure.words


@pytest.mark.parametrize("other", [dict(anchored=False), dict(temperature=0.5), dict(top_k=8)])
def test_ceilings_of_another_kind_are_not_held_against_heads(tmp_path, other):
    report = report_of(stored(tmp_path), ANCHORED.assign(**other))
    (figure,) = (b for b in report.sections[0].blocks if type(b).__name__ == "Figure")
    ax = Figure().add_subplot()
    figure.draw(ax)
    assert "ceiling" not in {line.get_label() for line in ax.lines}


def test_a_forecast_of_elsewhere_is_read_with_its_step_times_and_nothing_is_refused(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    fields = {"plain_step": 0.01, "base": 0.01, "per_position": 0.001, "per_component": 0.0001}
    (stored(there) / "latency.json").write_text(json.dumps(fields))
    extras = read_extras(tmp_path, forecast=there)
    assert extras.heads is not None and extras.latency is not None
    assert read_extras(tmp_path) == ReportExtras()
    with pytest.raises(ValueError, match=r"no forecast .*cpmtp forecast --out"):
        read_extras(tmp_path, forecast=tmp_path)
    (there / "forecast.json").write_text("{}")
    with pytest.raises(ValueError, match="no forecast"):
        HeadsForecast.read(there)


def test_where_there_was_not_enough_to_forecast_from_the_study_answers(tmp_path):
    told = {"settings": {}, "status": "not enough", "shapes": {"groups": []}}
    pd.DataFrame().to_parquet(tmp_path / "forecast.parquet")
    (tmp_path / "forecast.json").write_text(json.dumps(told))
    assert read_extras(tmp_path).heads is None


def test_lines_of_the_picture_end_above_its_legend():
    heads = pd.DataFrame(dict(label=["a", "b"], speedup=[1.2, 1.1], ceiling=[1.5, np.nan]))
    figure = Figure()
    ax = figure.add_subplot()
    plots.plot_head_forecast(heads, ax, lookup=0.9)
    box = ax.get_legend().get_window_extent(FigureCanvasAgg(figure).get_renderer())
    below = ax.transData.inverted().transform((0, box.y1))[1]
    assert max(line.get_ydata().max() for line in ax.lines) < below
