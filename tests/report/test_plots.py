"""Figures: axes in, axes out."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from cpmtp.report import plots

SUMMARY = pd.DataFrame(
    dict(
        method=["als", "als", "em", "em"],
        rank=[1, 4, 1, 4],
        kl_nats=[0.5, 0.2, 0.4, 0.0],
        kl_nats_low=[0.4, 0.1, 0.3, 0.0],
        kl_nats_high=[0.6, 0.3, 0.5, 0.01],
    )
)
CHOICE = pd.DataFrame(
    dict(
        rank=[1, 2, 8],
        tokens_per_call=[2.0, 2.4, 2.6],
        tokens_per_call_low=[1.9, 2.3, 2.5],
        tokens_per_call_high=[2.1, 2.5, 2.8],
    )
)
SURVIVAL = pd.DataFrame(
    dict(rank=[1, 1, 4, 4], position=[1, 2, 1, 2], survival=[1.0, 0.5, 1.0, 0.8])
)
CEILING = SURVIVAL.assign(survival=[1.0, 0.6, 1.0, 0.9])
CELLS = pd.DataFrame(
    dict(
        horizon=[2, 2, 3, 3],
        rank=[1, 2, 1, 2],
        speedup=[1.5, 1.6, 1.8, 2.0],
        fastest_frequency=[0, 0, 0.04, 0.96],
    )
)
CONTEXTS = pd.DataFrame({1: [1.0, 2.0, 3.0, 1.5, 2.5], 4: [2.0, 3.0, 2.4, 2.8, np.nan]})
ENTROPIES = pd.DataFrame(
    dict(rank=[4, 1, 4], joint_entropy_nats=[1.0, 2.0, 3.0], tokens_per_call=[2.9, 2.0, 2.5])
)
LINES = pd.DataFrame(
    [("prose", 1, 0.1), ("prose", 2, 0.2), ("code", 1, 0.3), ("code", 2, 0.5)],
    columns=["domain", "rank", "gain"],
).assign(gain_low=[0.0, 0.1, 0.2, 0.4], gain_high=[0.2, 0.3, 0.4, 0.6])
LOSSES = pd.DataFrame(
    dict(
        rank=[4, 1],
        exact_limit=3.0,
        acceptance_fit=[2.8, 2.4],
        em_fit=[2.7, 2.3],
        learned=[2.1, 1.9],
        learned_low=[2.0, 1.7],
        learned_high=[2.4, 2.0],
    )
)
FORECASTS = pd.DataFrame(
    [
        (1, 1.5, 1.4, 1.7, 1.6, 1.5, 1.65),
        (8, 2.0, 1.9, 2.1, 2.2, 2.1, 2.5),
        (8, 2.6, 2.3, 2.7, 2.4, 2.3, 2.9),
    ],
    columns=["rank", *(n + e for n in ("forecast", "measured") for e in ("", "_low", "_high"))],
)
STEPS = pd.DataFrame(
    dict(label=["rank 1", "rank 8"], target_seconds=[0.01, 0.02], draft_seconds=[0.001, 0.003])
)
HEADS = pd.DataFrame(
    dict(
        label=["markov_mixture 4x64, n = 4", "cp 1, n = 2"],
        speedup=[1.4, 1.2],
        speedup_low=[1.1, 0.9],
        speedup_high=[1.8, 1.3],
        ceiling=[np.nan, 1.6],
    )
)
COMPONENTS = pd.DataFrame(
    [(c, 0.7 - 0.4 * c, p, t, 0.5) for c in (0, 1) for p in (1, 2) for t in ("a", " the")],
    columns=["component", "weight", "position", "token", "probability"],
)
PARTED = pd.DataFrame(
    dict(label=["cp 1", "markov"], tokens_per_call=2.0, horizon=3, ceiling=[2.6, np.nan])
)
BUDGETS = pd.DataFrame(dict(option="cp 1", budget=[1e5, 1e6], speedup=[1.1, 1.2]))
BUDGETS = BUDGETS.assign(speedup_low=BUDGETS["speedup"] - 0.2, speedup_high=1.5)
# Every function with what it draws.
PLOTS = {
    plots.plot_error_against_rank: (SUMMARY, {}),
    plots.plot_tokens_per_call: (CHOICE, dict(recommended=2, horizon=3)),
    plots.plot_survival: (SURVIVAL, dict(ceiling=CEILING)),
    plots.plot_speedup: (CELLS, {}),
    plots.plot_contexts: (CONTEXTS, {}),
    plots.plot_against_entropy: (ENTROPIES, {}),
    plots.plot_lines_over_rank: (LINES, dict(by="domain", value="gain", label="gain per doubling")),
    plots.plot_waterfall: (LOSSES.iloc[0], {}),
    plots.plot_losses_over_rank: (LOSSES, {}),
    plots.plot_forecast: (FORECASTS, {}),
    plots.plot_step_times: (STEPS, {}),
    plots.plot_components: (COMPONENTS, {}),
    plots.plot_head_forecast: (HEADS, dict(lookup=1.1)),
    plots.plot_losses_by_head: (PARTED, {}),
    plots.plot_speed_by_budget: (BUDGETS, dict(budget=1e6)),
}


def drawn(function, table=None, **changes):
    """The axes that a function drew on."""
    usual, options = PLOTS[function]
    ax = Figure().add_subplot()
    assert function(usual if table is None else table, ax, **(options | changes)) is ax
    return ax


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    """The points of every labelled line."""
    return {
        line.get_label(): list(map(tuple, line.get_xydata().tolist()))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def bands(ax) -> list[dict[float, tuple[float, float]]]:
    """Of every filled band the lowest and highest value at each of its places."""
    found = []
    for band in ax.collections:
        corners = band.get_paths()[0].vertices
        at = {x: corners[corners[:, 0] == x, 1] for x in np.unique(corners[:, 0]).tolist()}
        found.append({x: (y.min(), y.max()) for x, y in at.items()})
    return found


def boxes(ax) -> list[tuple[float, float, float, float]]:
    """Left, bottom, width and height of every bar or cell."""
    return [tuple(map(float, patch.get_bbox().bounds)) for patch in ax.patches]


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis) -> dict[float, str]:
    places = axis.get_major_locator().locs if hasattr(axis.get_major_locator(), "locs") else []
    names = [text.get_text() for text in axis.get_ticklabels()]
    return dict(zip(map(float, places), names, strict=True))


def test_every_plot_draws_on_the_axes_it_is_given_and_says_what_they_are():
    named = inspect.getmembers(plots, inspect.isfunction)
    assert {f for name, f in named if name.startswith("plot_")} == set(PLOTS)
    for function in PLOTS:
        ax = drawn(function)
        assert ax.has_data() and (ax.get_xlabel() or len(ax.get_xticks())), function
        assert ax.get_ylabel() or len(ax.get_yticks()), function
        assert plots.figure_svg(lambda ax, f=function: _again(f, ax), "a title").startswith("<svg")


def _again(function, ax):
    table, options = PLOTS[function]
    return function(table, ax, **options)


def test_errors_are_a_line_of_medians_and_a_band_of_quartiles_per_method():
    ax = drawn(plots.plot_error_against_rank)
    floor = 1e-6  # where a logarithmic axis ends
    assert lines(ax) == {"als": [(1, 0.5), (4, 0.2)], "em": [(1, 0.4), (4, floor)]}
    assert bands(ax) == [{1: (0.4, 0.6), 4: (0.1, 0.3)}, {1: (0.3, 0.5), 4: (floor, 0.01)}]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert legend(ax) == ["als", "em"] and ticks(ax.xaxis) == {1: "1", 4: "4"}
    assert "KL" in ax.get_ylabel() and ax.get_xlabel() == "rank"


@pytest.mark.parametrize("function", PLOTS, ids=lambda function: function.__name__)
def test_nothing_is_cut_off_and_no_line_crosses_a_legend(function):
    table, options = PLOTS[function]
    with plots.house_style():
        figure = plots.framed(lambda ax: function(table, ax, **options), "A title of usual length")
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
    (ax,) = figure.axes
    drawn, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height
    if ax.get_legend() is not None:
        box = ax.get_legend().get_window_extent(renderer)
        for line in ax.lines:
            if line.get_linestyle() != "None":
                path = line.get_transform().transform_path(line.get_path())
                assert not path.intersects_bbox(box, filled=False), line.get_label()


@pytest.mark.parametrize("shape", [[2.0, 2.0, 2.0], [2.6, 2.4, 1.0], [1.0, 2.0, 1.0]])
def test_whatever_the_ceilings_the_legend_is_below_them(shape):
    table = CHOICE.assign(tokens_per_call=shape, tokens_per_call_low=shape)
    ax = drawn(plots.plot_tokens_per_call, table, recommended=8)
    box = ax.get_legend().get_window_extent(FigureCanvasAgg(ax.figure).get_renderer())
    assert ax.transData.inverted().transform((0, box.y1))[1] < min(shape)


def test_tokens_per_call_lie_in_their_band_between_the_ceiling_and_the_recommended_rank():
    ax = drawn(plots.plot_tokens_per_call)
    found = lines(ax)
    assert found.pop("best fit (mean, 95 % band)") == [(1, 2.0), (2, 2.4), (8, 2.6)]
    assert {y for _, y in found.pop("exact draft")} == {3}
    assert {x for x, _ in found.pop("recommended rank 2")} == {2} and not found
    assert bands(ax) == [{1: (1.9, 2.1), 2: (2.3, 2.5), 8: (2.5, 2.8)}]
    assert ticks(ax.xaxis) == {1: "1", 2: "2", 8: "8"}
    other = lines(drawn(plots.plot_tokens_per_call, recommended=8, horizon=4))
    assert {x for x, _ in other["recommended rank 8"]} == {8}
    assert {y for _, y in other["exact draft"]} == {4}


def test_survival_is_a_line_per_rank_under_its_dotted_ceiling():
    ax = drawn(plots.plot_survival)
    found = lines(ax)
    assert found["rank 1"] == [(1, 1.0), (2, 0.5)] and found["rank 4"] == [(1, 1.0), (2, 0.8)]
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [line.get_ydata().tolist() for line in dotted] == [[1.0, 0.6], [1.0, 0.9]]
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert legend(ax) == ["rank 1", "coupling ceiling", "rank 4"]
    assert list(lines(drawn(plots.plot_survival, ceiling=None))) == ["rank 1", "rank 4"]
    assert ax.get_xticks().tolist() == [1, 2]


def test_a_cell_is_where_its_rank_and_horizon_are_and_darker_the_faster():
    ax = drawn(plots.plot_speedup)
    cells = [patch for patch in ax.patches if patch.get_fill()]
    assert [cell.get_bbox().intervalx.mean() for cell in cells] == [0, 1, 0, 1]
    assert [cell.get_bbox().intervaly.mean() for cell in cells] == [0, 0, 1, 1]
    tints = [cell.get_alpha() for cell in cells]
    assert tints == sorted(tints) and len(set(tints)) == 4
    assert [(t.get_position(), t.get_text()) for t in ax.texts] == [
        ((0, 0), "1.50"),
        ((1, 0), "1.60"),
        ((0, 1), "1.80"),
        ((1, 1), "2.00"),
    ]
    assert ticks(ax.xaxis) == {0: "1", 1: "2"} and ticks(ax.yaxis) == {0: "2", 1: "3"}
    (outlined,) = (patch for patch in ax.patches if not patch.get_fill())
    assert (outlined.get_bbox().intervalx.mean(), outlined.get_bbox().intervaly.mean()) == (1, 1)
    both = drawn(plots.plot_speedup, confident=0.04)
    assert sum(not patch.get_fill() for patch in both.patches) == 2


def test_equally_fast_cells_are_drawn_too():
    ax = drawn(plots.plot_speedup, CELLS.assign(speedup=1.0))
    assert len({patch.get_alpha() for patch in ax.patches if patch.get_fill()}) == 1


def test_contexts_are_points_with_their_median_and_quartiles_beside():
    ax = drawn(plots.plot_contexts)
    points, quartiles, median = ax.lines[:3]
    assert sorted(points.get_ydata().tolist()) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert quartiles.get_ydata().tolist() == [1.5, 2.5] and median.get_ydata().tolist() == [2.0]
    # NaN is no context: four are left, between which quartiles are interpolated.
    assert ax.lines[4].get_ydata().tolist() == pytest.approx([2.3, 2.85])
    assert ax.lines[5].get_ydata().tolist() == pytest.approx([2.6])
    for i, line in enumerate(ax.lines):
        assert (np.round(line.get_xdata()) == i // 3).all()
    assert ticks(ax.xaxis) == {0: "1", 1: "4"}


def test_of_many_contexts_some_hundred_are_drawn_and_all_are_counted():
    values = np.arange(1000.0)
    ax = drawn(plots.plot_contexts, pd.DataFrame({2: np.random.default_rng(0).permutation(values)}))
    points, quartiles, median = ax.lines
    assert 100 <= len(points.get_ydata()) <= 200 and (np.diff(points.get_ydata()) > 0).all()
    assert median.get_ydata().tolist() == [np.median(values)]
    assert quartiles.get_ydata().tolist() == np.percentile(values, [25, 75]).tolist()


def test_entropy_is_across_and_tokens_are_up_with_a_marker_per_rank():
    ax = drawn(plots.plot_against_entropy)
    assert lines(ax) == {"rank 1": [(2.0, 2.0)], "rank 4": [(1.0, 2.9), (3.0, 2.5)]}
    assert all(line.get_linestyle() == "None" for line in ax.lines)
    assert len({line.get_marker() for line in ax.lines}) == 2
    assert "entropy" in ax.get_xlabel() and ax.get_ylabel() == "tokens per call"


def test_lines_over_rank_keep_the_tables_order_and_have_bands_where_it_has_ends():
    ax = drawn(plots.plot_lines_over_rank)
    assert list(lines(ax).items()) == [
        ("prose", [(1, 0.1), (2, 0.2)]),
        ("code", [(1, 0.3), (2, 0.5)]),
    ]
    assert bands(ax) == [{1: (0.0, 0.2), 2: (0.1, 0.3)}, {1: (0.2, 0.4), 2: (0.4, 0.6)}]
    assert ax.get_ylabel() == "gain per doubling" and legend(ax) == ["prose", "code"]
    bare = drawn(plots.plot_lines_over_rank, LINES.drop(columns=["gain_low", "gain_high"]))
    assert not bare.collections and lines(bare) == lines(ax)


def test_a_waterfall_falls_from_the_exact_draft_to_where_the_head_is():
    ax = drawn(plots.plot_waterfall)
    found = boxes(ax)
    np.testing.assert_allclose(
        [(bottom, bottom + height) for _, bottom, _, height in found],
        [(0, 3.0), (2.8, 3.0), (2.7, 2.8), (2.1, 2.7), (0, 2.1)],
    )
    np.testing.assert_allclose([left + width / 2 for left, _, width, _ in found], range(5))
    assert [text.get_text() for text in ax.texts] == ["-0.20", "-0.10", "-0.60", "3.00", "2.10"]
    names = [name.replace("\n", " ") for name in ticks(ax.xaxis).values()]
    assert names == [
        "exact draft",
        "lost to rank",
        "lost to objective",
        "lost to learning",
        "learned head",
    ]
    assert error_bars(ax) == [((4, 2.0), (4, 2.4))]
    assert not error_bars(drawn(plots.plot_waterfall, LOSSES.iloc[0].drop(["learned_low"])))


def test_a_step_that_gains_is_hatched_and_written_with_a_plus():
    above = dict(learned=2.75, learned_low=2.7, learned_high=2.8)
    ax = drawn(plots.plot_waterfall, LOSSES.assign(**above).iloc[0])
    assert [patch.get_hatch() for patch in ax.patches] == [None, None, None, "//", None]
    assert ax.texts[2].get_text() == "+0.05"


def error_bars(ax) -> list[tuple[tuple[float, float], ...]]:
    """Both ends of every bar of an interval."""
    return [
        tuple(map(tuple, segment.tolist()))
        for lines in ax.collections
        for segment in lines.get_segments()
    ]


def test_losses_over_ranks_stack_up_to_the_exact_draft():
    ax = drawn(plots.plot_losses_over_rank)
    assert ticks(ax.xaxis) == {0: "1", 1: "4"}
    stacked = np.array([[(b.get_y(), b.get_y() + b.get_height()) for b in c] for c in bars_of(ax)])
    # Learned, then what is lost to learning, objective and rank: each begins where the last ended.
    np.testing.assert_allclose(stacked[0], [(0, 1.9), (0, 2.1)])
    np.testing.assert_allclose(stacked[1], [(1.9, 2.3), (2.1, 2.7)])
    np.testing.assert_allclose(stacked[2], [(2.3, 2.4), (2.7, 2.8)])
    np.testing.assert_allclose(stacked[3], [(2.4, 3.0), (2.8, 3.0)])
    assert set(legend(ax)) == {
        "learned head",
        "lost to learning",
        "lost to objective",
        "lost to rank",
    }
    np.testing.assert_allclose(error_bars(ax), [((0, 1.7), (0, 2.0)), ((1, 2.0), (1, 2.4))])


def bars_of(ax):
    return [container for container in ax.containers if isinstance(container, BarContainer)]


def test_a_head_above_its_fit_loses_nothing_to_learning():
    ax = drawn(plots.plot_losses_over_rank, LOSSES.assign(learned=[2.75, 1.9]))
    learning = bars_of(ax)[1]
    assert learning[1].get_height() == 0 and learning[0].get_height() > 0
    np.testing.assert_allclose(sum(bars[1].get_height() for bars in bars_of(ax)), 3.0)


def test_measured_is_drawn_over_forecast_with_both_intervals_and_equality():
    ax = drawn(plots.plot_forecast)
    assert lines(ax)["equal"] == [(1.5, 1.5), (2.6, 2.6)]
    assert legend(ax) == ["equal", "rank 1", "rank 8"]
    points = [container[0].get_xydata().tolist() for container in ax.containers]
    assert points == [[[1.5, 1.6]], [[2.0, 2.2], [2.6, 2.4]]]
    np.testing.assert_allclose(
        error_bars(ax),
        [
            ((1.4, 1.6), (1.7, 1.6)),
            ((1.5, 1.5), (1.5, 1.65)),
            ((1.9, 2.2), (2.1, 2.2)),
            ((2.3, 2.4), (2.7, 2.4)),
            ((2.0, 2.1), (2.0, 2.5)),
            ((2.6, 2.3), (2.6, 2.9)),
        ],
    )
    assert ax.get_xlabel().startswith("forecast") and ax.get_ylabel().startswith("measured")


def test_a_forecast_without_ranks_or_intervals_is_drawn_as_points():
    ax = drawn(plots.plot_forecast, FORECASTS[["forecast", "measured"]])
    (points,) = (container[0].get_xydata().tolist() for container in ax.containers)
    assert points == [[1.5, 1.6], [2.0, 2.2], [2.6, 2.4]]
    assert all(start == end for start, end in error_bars(ax))


def test_step_times_are_stacked_in_milliseconds():
    ax = drawn(plots.plot_step_times)
    np.testing.assert_allclose(
        [(left, width) for left, _, width, _ in boxes(ax)],
        [(0, 10), (0, 20), (10, 1), (20, 3)],
    )
    assert legend(ax) == ["target", "draft"]
    assert ticks(ax.yaxis) == {0: "rank 1", 1: "rank 8"}
    assert ax.get_xlabel() == "milliseconds per call" and ax.get_xlim()[1] > 23
