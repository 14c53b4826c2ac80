"""Pictures: of studies, and of a draft's components. Nothing else touches matplotlib."""

from cpmtp.report.plots.components import plot_components
from cpmtp.report.plots.study import (
    COLOURS,
    figure_svg,
    house_style,
    plot_against_entropy,
    plot_contexts,
    plot_error_against_rank,
    plot_forecast,
    plot_lines_over_rank,
    plot_losses_over_rank,
    plot_speedup,
    plot_step_times,
    plot_survival,
    plot_tokens_per_call,
    plot_waterfall,
)

__all__ = [
    "COLOURS",
    "figure_svg",
    "house_style",
    "plot_against_entropy",
    "plot_components",
    "plot_contexts",
    "plot_error_against_rank",
    "plot_forecast",
    "plot_lines_over_rank",
    "plot_losses_over_rank",
    "plot_speedup",
    "plot_step_times",
    "plot_survival",
    "plot_tokens_per_call",
    "plot_waterfall",
]
