"""Pictures of forecasts, legible in print and to the colour-blind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Black and blue of the Okabe-Ito palette: they also differ in lightness and line style, so grey print keeps them apart.
_HISTORY_COLOUR, _FORECAST_COLOUR, _BAND_COLOUR = "#000000", "#0072B2", "#56B4E9"
_MOST_PANELS = 12


@dataclass(frozen=True, eq=False)
class ForecastPicture:
    """What is drawn for one series: history, forecast and the band between two quantiles.

    ``band`` holds the lower and the upper edge; ``band_label`` says which. Times are ``datetime64``.
    """

    title: str
    history_time: NDArray[np.datetime64]
    history: NDArray[np.float64]
    time: NDArray[np.datetime64]
    point: NDArray[np.float64]
    band: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    band_label: str = ""


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
    if picture.band is not None:
        lower, upper = picture.band
        axis.fill_between(
            picture.time,
            lower,
            upper,
            color=_BAND_COLOUR,
            alpha=0.4,
            linewidth=0,
            label=picture.band_label,
        )
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
