"""Pictures: of studies, of heads, and of a draft's components. Nothing else touches matplotlib."""

from cpmtp.report.plots.components import plot_components
from cpmtp.report.plots.heads import (
    plot_forecast,
    plot_head_forecast,
    plot_losses_by_head,
    plot_losses_over_rank,
    plot_speed_by_budget,
    plot_step_times,
    plot_waterfall,
)
from cpmtp.report.plots.study import (
    COLOURS,
    figure_svg,
    framed,
    house_style,
    plot_against_entropy,
    plot_contexts,
    plot_error_against_rank,
    plot_lines_over_rank,
    plot_speedup,
    plot_survival,
    plot_tokens_per_call,
)

__all__ = [
    "COLOURS",
    "figure_svg",
    "framed",
    "house_style",
    "plot_against_entropy",
    "plot_components",
    "plot_contexts",
    "plot_error_against_rank",
    "plot_forecast",
    "plot_head_forecast",
    "plot_lines_over_rank",
    "plot_losses_by_head",
    "plot_losses_over_rank",
    "plot_speed_by_budget",
    "plot_speedup",
    "plot_step_times",
    "plot_survival",
    "plot_tokens_per_call",
    "plot_waterfall",
]
