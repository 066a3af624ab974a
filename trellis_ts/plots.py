"""Pictures of forecasts, legible in print and to the colour-blind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from trellis_ts.scores import Evaluation

# Black and blue of the Okabe-Ito palette: they also differ in lightness and line style, so grey print keeps them apart.
_HISTORY_COLOUR, _FORECAST_COLOUR, _BAND_COLOUR = "#000000", "#0072B2", "#56B4E9"
_MOST_PANELS = 12
# The model's line first; the others differ in colour, in lightness and in dashes.
LINES: tuple[tuple[str, str | tuple[float, tuple[float, ...]]], ...] = (
    (_FORECAST_COLOUR, "-"),
    ("#000000", (0, (4, 2))),
    ("#D55E00", (0, (1, 1.5))),
    ("#009E73", (0, (6, 1, 1, 1))),
    ("#CC79A7", (0, (3, 1))),
    ("#E69F00", (0, (8, 2))),
    ("#666666", (0, (1, 3))),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
)


@dataclass(frozen=True, eq=False)
class ForecastPicture:
    """What is drawn for one series: history, forecast, the band between two quantiles and, darker, one inside it.

    A band holds the lower and the upper edge; its label says which. Times are ``datetime64``.
    """

    title: str
    history_time: NDArray[np.datetime64]
    history: NDArray[np.float64]
    time: NDArray[np.datetime64]
    point: NDArray[np.float64]
    band: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    band_label: str = ""
    inner_band: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    inner_band_label: str = ""


def plot_forecasts(pictures: Sequence[ForecastPicture], path: Path, *, title: str = "") -> int:
    """Draws one small chart per series, at most twelve, and writes the image (format by the file's ending).

    Returns:
        How many of the series were drawn.
    """
    shown = pictures[:_MOST_PANELS]
    columns = 1 if len(shown) <= 3 else 2 if len(shown) <= 8 else 3
    rows = -(-len(shown) // columns)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.0 if columns == 1 else 6.0 * columns, 0.8 + 3.0 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, picture in zip(axes.flat, shown, strict=False):
            _draw(axis, picture)
        for axis in list(axes.flat)[len(shown) :]:
            axis.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        if title:
            figure.suptitle(title, parse_math=False)
        figure.savefig(path, dpi=150)
    return len(shown)


def _draw(axis: Axes, picture: ForecastPicture) -> None:
    axis.plot(picture.history_time, picture.history, color=_HISTORY_COLOUR, linewidth=1.0, label="history")
    for band, alpha, label in (
        (picture.band, 0.35, picture.band_label),
        (picture.inner_band, 0.45, picture.inner_band_label),
    ):
        if band is not None:
            axis.fill_between(picture.time, *band, color=_BAND_COLOUR, alpha=alpha, linewidth=0, label=label)
    axis.plot(
        picture.time,
        picture.point,
        color=_FORECAST_COLOUR,
        linewidth=1.8,
        linestyle=(0, (4, 1)),
        marker="o" if len(picture.time) <= 24 else None,
        markersize=3,
        label="forecast",
    )
    axis.set_title(picture.title, loc="left", fontsize=10, parse_math=False)  # a dollar sign is money here
    locator = AutoDateLocator(maxticks=8)  # type: ignore[no-untyped-call]
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axis.margins(x=0.01)
    axis.grid(axis="y", color="#cccccc", linewidth=0.5)


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Draws the error per step ahead and, where there are quantiles, the band's coverage per step and the PIT.

    The image's format is that of the file's ending.
    """
    has_band = evaluation.band is not None
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14.0 if has_band else 7.0, 4.6), layout="constrained")
        axes = figure.subplots(1, 3 if has_band else 1, squeeze=False)[0]
        _draw_steps(axes[0], evaluation, "mae", "mean absolute error (standardised)")
        axes[0].set_ylim(bottom=0)
        handles, labels = axes[0].get_legend_handles_labels()
        if has_band:
            _draw_coverage(axes[1], evaluation)
            _draw_pit(axes[2], evaluation)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
        windows = f"{evaluation.num_windows:,} window" + ("s" if evaluation.num_windows > 1 else "")
        figure.suptitle(f"{windows}, {evaluation.num_values:,} values", fontsize=11)
        figure.savefig(path, dpi=150)


def _draw_steps(axis: Axes, evaluation: Evaluation, metric: str, title: str) -> None:
    steps = np.arange(1, evaluation.prediction_length + 1)
    for (colour, dashes), name in zip(LINES, evaluation.forecasters, strict=False):
        values = [getattr(each, metric) for each in evaluation.by_step[name]]
        axis.plot(
            steps,
            values,
            color=colour,
            linestyle=dashes,
            linewidth=2.2 if name == evaluation.forecasters[0] else 1.5,
            marker="o" if len(steps) <= 24 else None,
            markersize=3,
            label=name.replace("_", " "),
        )
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("step ahead")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="#cccccc", linewidth=0.5)


def _draw_coverage(axis: Axes, evaluation: Evaluation) -> None:
    band = evaluation.band or 0.0
    _draw_steps(axis, evaluation, "coverage", f"coverage of the {100 * band:.0f} % band")
    axis.axhline(band, color="#999999", linewidth=1.0, zorder=0)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.0}
    axis.annotate(
        "nominal",
        (1.0, band),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color="#666666",
        bbox=paper,
    )
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_pit(axis: Axes, evaluation: Evaluation) -> None:
    """Density of each bin between quantiles: 1 everywhere under calibration."""
    for (colour, dashes), name in zip(LINES, evaluation.forecasters, strict=False):
        found = evaluation.calibration[name]
        density = np.array(found.pit) / np.array(found.pit_expected)
        edges = np.array([0.0, *found.levels, 1.0])
        if name == evaluation.forecasters[0]:
            axis.bar(edges[:-1], density, np.diff(edges), align="edge", color=_BAND_COLOUR, alpha=0.4, linewidth=0)
        axis.stairs(density, edges, color=colour, linestyle=dashes, linewidth=1.5, baseline=None)
    axis.axhline(1.0, color="#999999", linewidth=1.0, zorder=0)
    axis.set_title("truths between quantiles, relative to calibration (PIT)", loc="left", fontsize=10)
    axis.set_xlabel("quantile level")
    axis.set_xticks([0.0, *evaluation.calibration[evaluation.forecasters[0]].levels, 1.0])
    axis.tick_params(axis="x", labelrotation=45 if len(axis.get_xticks()) > 7 else 0)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
