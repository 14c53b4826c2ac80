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
from stored_forecast import LOAD, not_enough, stored, told_anew

from cpmtp.report import plots
from cpmtp.report.document import Report, read_extras
from cpmtp.report.findings.forecast import ceilings_beside
from cpmtp.report.first_screen.stored_forecast import HeadsForecast
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
    assert lines["Train"] == (
        "a cp head of rank 4, horizon 3, trained on 1 million positions of text (twice as many "
        "would add less than 1 %)."
    )
    brings = "1.50 to 2.08 times the speed of plain decoding (90 % range, "
    assert lines["Brings"].startswith(brings)
    assert "1.83 expected" in lines["Brings"]
    # 2.5 a device-hour over 2.2 tokens of two requests in 12 ms.
    cheap, dear, plain = (
        2.5 / 3600 * 1e6 * s / t / LOAD for s, t in ((0.012, 2.5), (0.012, 1.8), (0.01, 1))
    )
    assert (
        f"; {cheap:.2f} to {dear:.2f} per million tokens instead of {plain:.2f}" in lines["Brings"]
    )
    assert "from 1.80 to 2.50 tokens per call instead of 1;" in lines["Brings"]
    assert "Costs 0.5 device-hours of training and 2.8 MB of memory beside" in lines["Brings"]
    assert lines["How sure"].startswith(
        "98 % likely faster than plain decoding; 95 % likely the fastest of what was tried, too "
        "close to tell from markov 64 (horizon 3). "
    )
    assert "Could change it: 4 million positions or more (markov 64)" in lines["How sure"]
    assert lines["Next"].startswith("(1) `cpmtp train-head --model m --form cp --horizon 3 ")
    assert lines["Next"].endswith("--rank 4 --positions 1000000` (2) the pilot plan at the end.")
    assert report.sections[0].title == "Forecast of trained heads"
    assert report.summary.splitlines()[1] == "  Train: " + lines["Train"]


def test_beside_a_forecast_ceilings_recommend_nothing(tmp_path):
    report = report_of(stored(tmp_path))
    text = report.write_markdown(tmp_path / "r.md").read_text("utf-8").replace("\\", "")
    own = text[text.index("## Diagnosis: m · contexts from d") :]
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
        (dict(pays=0.9), "Pilot first"),
        (dict(ties=["plain decoding"]), "Pilot first"),
        (dict(best="lookup"), "Do not train"),
        (dict(best="plain decoding"), "Do not train"),
    ],
)
def test_what_is_not_sure_or_not_faster_is_not_to_be_trained(tmp_path, changes, expected):
    report = report_of(stored(tmp_path, **changes))
    assert next(iter(lines_of(report))) == expected
    page = report.write_html(tmp_path / "r.html").read_text("utf-8")
    assert ("No head to pilot" in page) == (expected == "Do not train")


@pytest.mark.parametrize(
    ("changes", "may_not"),
    [
        (dict(), False),
        (dict(sure=0.5), False),
        (dict(low=1.1), True),
        (dict(pays=0.94), True),
        (dict(ties=["cp 4 (n = 2)", "plain decoding"]), True),
    ],
)
def test_that_a_head_may_not_beat_plain_decoding_stands_in_the_verdict(tmp_path, changes, may_not):
    (label, verdict), *_ = lines_of(report_of(stored(tmp_path, **changes))).items()
    assert ("; it may not beat plain decoding." in verdict) == may_not
    assert not may_not or label == "Pilot first"


def test_the_steps_of_a_pilot_stand_in_their_order(tmp_path):
    following = lines_of(report_of(stored(tmp_path, sure=0.5)))["Next"]
    places = [following.index(step) for step in ("(1) longer probes", "(2) `cpmtp tr", "(3) the p")]
    assert places == sorted(places) and following.startswith("(1) ")


@pytest.mark.parametrize(("ahead", "first"), [(8.0, True), (6.0, False)])
def test_longer_probes_are_advised_where_they_take_less_than_the_training(tmp_path, ahead, first):
    folder = stored(tmp_path, sure=0.5)
    # Two heads, each at twice the longest budget, at that and at half of it: seven times it.
    told_anew(folder, shapes=dict(groups=list("abcde"), ahead=ahead, farthest=16.0))
    following = lines_of(report_of(folder))["Next"]
    assert following.startswith("(1) longer probes" if first else "(1) `cpmtp train-head")


def test_a_gain_in_speed_is_said_to_leave_the_output_as_it_is(tmp_path):
    assert "at the same output distribution" in lines_of(report_of(stored(tmp_path)))["Brings"]


def test_an_older_forecast_without_the_chance_to_pay_or_memory_claims_neither(tmp_path):
    folder = stored(tmp_path)
    told = json.loads((folder / "forecast.json").read_text())
    del told["choices"][0]["pays"]
    told_anew(folder, choices=told["choices"])
    table = pd.read_parquet(folder / "forecast.parquet")
    table.drop(columns="weight_bytes").to_parquet(folder / "forecast.parquet")
    lines = lines_of(report_of(folder))
    assert lines["How sure"].startswith("its range is above plain decoding; 95 % likely the fast")
    assert lines["Brings"].endswith("Costs 0.5 device-hours of training.")


def test_no_more_training_is_advised_than_pays(tmp_path):
    folder = stored(tmp_path)
    choice = json.loads((folder / "forecast.json").read_text())["choices"][0]
    table = pd.read_parquet(folder / "forecast.parquet")
    own = (table["option"] == "cp 4") & (table["horizon"] == 3) & (table["budget"] < 1e6)
    table.loc[own, "tokens_per_call"] = 2.2 / 1.03
    table.to_parquet(folder / "forecast.parquet")
    worth = choice | dict(budget=5e5, stop=5e5, device_hours=0.25)
    told_anew(folder, worth=[worth], shapes=dict(groups=list("abcde"), ahead=8.0, farthest=4.0))
    report = report_of(folder)
    (card,) = report.answers
    lines = lines_of(report)
    assert (
        "trained on 500 thousand positions of text (twice as many would add 3 %)" in lines["Train"]
    )
    assert "0.25 device-hours" in lines["Brings"] and "--positions 500000`" in lines["Next"]
    # Half of what was asked for is four times the longest probe, as far as was tried.
    assert not [block for block in card.blocks if block.kind == "caution"]
    conditions = report.sections[0].blocks[0].text
    assert "After 500 thousand positions of training of the 1 million positions that were" in (
        conditions
    )


def test_few_groups_and_an_unnamed_model_are_cautioned_of(tmp_path):
    table = ANCHORED
    both = pd.concat([table, table.assign(model="n")], ignore_index=True)
    (card,) = report_of(stored(tmp_path, groups=2), both).answers
    cautions = [block.text for block in card.blocks if block.kind == "caution"]
    assert cautions[0].startswith("Forecasts were compared with real training on 2 kinds of")
    assert cautions[1].startswith("The study is of 2 models")
    assert [block.kind for block in card.blocks] == ["caution"] * 2 + ["line"] * 4


@pytest.mark.parametrize(("ahead", "cautioned"), [(8.0, True), (4.0, False)])
def test_a_budget_beyond_what_forecasts_were_checked_at_is_cautioned_of(tmp_path, ahead, cautioned):
    told_anew(stored(tmp_path), shapes=dict(groups=list("abcde"), ahead=ahead, farthest=4.0))
    (card,) = report_of(tmp_path).answers
    cautions = [block.text for block in card.blocks if block.kind == "caution"]
    wanted = (
        "The answer is for a training 8 times as long as the longest probe; forecasts were "
        "compared with real training up to 4 times only."
    )
    (label, verdict), *_ = lines_of(report_of(tmp_path)).items()
    assert (label == "Pilot first") == cautioned
    assert ("; no forecast was checked so far ahead." in verdict) == cautioned
    assert [text.startswith(wanted) for text in cautions] == [True] * cautioned


def test_a_tie_with_plain_decoding_is_said_first(tmp_path):
    choice = json.loads((stored(tmp_path) / "forecast.json").read_text())["choices"][0]
    ties = ["markov 64 (n = 3)", "cp 4 (n = 2)", "plain decoding"]
    told_anew(tmp_path, choices=[choice | dict(ties=ties, overtaken=None)])
    sure = lines_of(report_of(tmp_path))["How sure"]
    said = "too close to tell from plain decoding, markov 64 (horizon 3) and 1 more. Could change"
    assert said in sure


def test_each_model_has_the_pictures_of_its_own_forecast(tmp_path):
    both = pd.concat([ANCHORED, ANCHORED.assign(model="n")], ignore_index=True)
    for place, (name, low) in enumerate((("m", 1.8), ("n", 1.3))):
        folder = tmp_path / "forecast" / f"{place}"
        folder.mkdir(parents=True)
        told_anew(stored(folder, low=low), studied_as=name)
    report = report_of(tmp_path, both)
    assert [card.title for card in report.answers] == [
        f"{name} · forecast of trained heads" for name in "mn"
    ]
    drawings = {name: svg for name, svg in report.drawings.items() if "each head" in name}
    assert len(drawings) == 2 and len(set(drawings.values())) == 2
    figures = [b for s in report.sections for b in s.blocks if type(b).__name__ == "Figure"]
    assert len({figure.name for figure in figures}) == len(figures)


def test_budgets_with_the_same_winner_are_one_row_and_a_single_load_is_a_sentence(tmp_path):
    report = report_of(stored(tmp_path))
    section = next(s for s in report.sections if s.title == "By load and budget")
    text, table = section.blocks
    assert text.text.startswith("One load was forecast, 2 requests decoded together")
    assert table.rows == (("500 thousand to 2 million", "cp 4", "3", "1.83", "2.20", "0.5"),)


def test_where_tokens_are_lost_stands_by_form_and_adds_up(tmp_path):
    report = report_of(stored(tmp_path))
    section = next(s for s in report.sections if s.title.startswith("Where tokens are lost"))
    _, table, figure = section.blocks
    rows = {row[0]: row[1:] for row in table.rows}
    exact, to_rank, to_learning, trained = map(float, rows["cp 4"])
    assert exact == 3 and exact - to_rank - to_learning == pytest.approx(trained, abs=0.011)
    assert trained == 2.2
    assert rows["markov 64"] == ("3", "not fitted", "", "2.10")
    assert "n = 3" in figure.title


def test_the_parts_of_a_bar_are_earned_and_lost_and_what_is_not_known_is_one(tmp_path):
    report = report_of(stored(tmp_path))
    section = next(s for s in report.sections if s.title.startswith("Where tokens are lost"))
    ax = Figure().add_subplot()
    section.blocks[-1].draw(ax)
    names = [t.get_text() for t in ax.get_yticklabels()]
    parts = {name: [] for name in names}
    for left, bottom, width, _ in (patch.get_bbox().bounds for patch in ax.patches):
        if width > 0:
            parts[names[round(bottom + 0.4)]].append((left, width))
    np.testing.assert_allclose(parts["cp 4"], [(0, 2.2), (2.2, 0.7), (2.9, 0.1)], atol=0.01)
    np.testing.assert_allclose(parts["markov 64"], [(0, 2.1), (2.1, 0.9)])


def test_speed_by_budget_is_a_line_per_head_with_the_range_of_the_fastest(tmp_path):
    report = report_of(stored(tmp_path))
    _, figure = (b for b in report.sections[0].blocks if type(b).__name__ == "Figure")
    ax = Figure().add_subplot()
    figure.draw(ax)
    found = {line.get_label(): line.get_xydata() for line in ax.lines}
    assert list(found)[:2] == ["cp 4", "markov 64"]  # the fastest first
    np.testing.assert_allclose(found["cp 4"], [(b, 2.2 / 1.2) for b in (5e5, 1e6, 2e6)])
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose((heights.min(), heights.max()), (1.5, 2.5 / 1.2))


def test_a_studys_forms_have_ceilings_of_their_own_and_domains_count_alike(tmp_path):
    markov = ANCHORED[ANCHORED["rank"] == 1].assign(
        form="markov", transition_rank=64, tokens_per_call_block_target=2.5
    )
    table = pd.concat([ANCHORED.assign(form="cp", transition_rank=0), markov], ignore_index=True)
    there = table.assign(domain="e")
    there["tokens_per_call_block_target"] = there["tokens_per_call_block_target"] - 0.2
    # Twice as many contexts of one domain than of the other.
    there = there[there["context"] % 2 == 0]
    heads = HeadsForecast.read(stored(tmp_path))
    found = ceilings_beside(heads, pd.concat([table, there], ignore_index=True), "m")
    own = found[(found["form"] == "markov") & (found["transition_rank"] == 64)]
    np.testing.assert_allclose(own["ceiling"], 2.4)
    assert ceilings_beside(heads, table, "another model") is None


def test_beside_a_forecast_no_speed_is_made_from_ceilings(tmp_path):
    page = report_of(stored(tmp_path)).write_html(tmp_path / "r.html").read_text("utf-8")
    own = page[page.index('">Diagnosis: m · contexts from d</h2>') :]
    for said in ("times the speed", "fastest in", "Predicted speedup", "assuming a trained head"):
        assert said not in own[: own.index("Pilot plan</h2>")], said


def test_the_picture_has_points_with_intervals_ceilings_as_ticks_and_two_lines(tmp_path):
    table = ANCHORED
    report = report_of(stored(tmp_path), table)
    figure, _ = (b for b in report.sections[0].blocks if type(b).__name__ == "Figure")
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
    figure, _ = (b for b in report.sections[0].blocks if type(b).__name__ == "Figure")
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


def test_a_forecast_that_had_not_enough_is_not_passed_over(tmp_path):
    folder = not_enough(tmp_path)
    for report in (report_of(folder), report_of(tmp_path / "nothing", forecast=folder)):
        lines = lines_of(report)
        assert list(lines) == ["Undecided", "Why", "Next"] and "`cpmtp study" in lines["Next"]


def test_lines_of_the_picture_end_above_its_legend():
    heads = pd.DataFrame(dict(label=["a", "b"], speedup=[1.2, 1.1], ceiling=[1.5, np.nan]))
    figure = Figure()
    ax = figure.add_subplot()
    plots.plot_head_forecast(heads, ax, lookup=0.9)
    box = ax.get_legend().get_window_extent(FigureCanvasAgg(figure).get_renderer())
    below = ax.transData.inverted().transform((0, box.y1))[1]
    assert max(line.get_ydata().max() for line in ax.lines) < below
