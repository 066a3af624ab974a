"""The picture of an explanation: what moved one forecast, and what the memory holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from trellis_ts.explanations import Explanation, MemoryRecord

# Of the Okabe-Ito palette, as in the other pictures.
_HISTORY, _FORECAST, _BAND, _MOVED = "#000000", "#0072B2", "#56B4E9", "#D55E00"
_MOST_COVARIATES = 12
_COLOURS = "cividis"  # readable in grey print and to the colour-blind


def plot_explanation(
    explanation: Explanation,
    path: Path,
    *,
    series: int,
    channel: int,
    history: NDArray[np.float64],
    point: NDArray[np.float64],
    band: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    band_label: str = "",
    title: str,
) -> None:
    """Draws one forecast's explanation and writes the image (format by the file's ending).

    Args:
        explanation: of all series.
        path: the file.
        series: which of the series.
        channel: which of the channels.
        history: ``[context]``, the context it was forecast from, NaN where missing.
        point: ``[horizon]``, the forecast.
        band: its lower and upper edge.
        band_label: what the band is.
        title: above it all.
    """
    num_layers = len(explanation.memory)
    has_covariates = len(explanation.covariates) > 0
    heights = [3.0, 1.4, *([0.5 + 0.28 * min(_MOST_COVARIATES, len(explanation.covariates))] if has_covariates else [])]
    heights += [1.7] * num_layers
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11.0, 0.9 + sum(heights) * 1.12), layout="constrained")
        grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
        top = figure.add_subplot(grid[0, :])
        _draw_context(top, explanation, series, channel, history)
        ahead = np.arange(len(point))
        if band is not None:
            top.fill_between(ahead, *band, color=_BAND, alpha=0.5, linewidth=0, label=band_label)
        top.plot(ahead, point, color=_FORECAST, linewidth=1.4, linestyle=(0, (4, 1)), label="forecast")
        top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
        top.margins(x=0.01)
        bars = figure.add_subplot(grid[1, :], sharex=top)
        _draw_importance(bars, explanation, series, channel)
        if has_covariates:
            _draw_covariates(figure.add_subplot(grid[2, :]), explanation, series, channel)
        for layer, record in enumerate(explanation.memory):
            row = len(heights) - num_layers + layer
            axes = [figure.add_subplot(grid[row, column]) for column in range(3)]
            _draw_memory(figure, axes, record, layer, series, channel)
        figure.suptitle(title, parse_math=False)
        figure.savefig(path, dpi=130)


def _shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the largest, 0 where there is none."""
    shares: NDArray[np.float64] = values / max(float(values.max(initial=0.0)), 1e-300)
    return shares


def _draw_context(
    axis: Axes, explanation: Explanation, series: int, channel: int, history: NDArray[np.float64]
) -> None:
    steps = np.arange(-len(history), 0)
    shares = _shares(explanation.importance[series, channel])
    for (start, stop), share in zip(explanation.patches, shares, strict=True):
        first = start - len(history) - 0.5
        axis.axvspan(first, first + stop - start, color=_MOVED, alpha=0.45 * float(share), linewidth=0)
    axis.plot(steps, history, color=_HISTORY, linewidth=1.0, label="context")
    axis.set_title("the darker a patch, the more the forecast would change without it", loc="left", fontsize=9)


def _draw_importance(axis: Axes, explanation: Explanation, series: int, channel: int) -> None:
    context = explanation.patches[-1][1]
    middles = [(start + stop - 1) / 2 - context for start, stop in explanation.patches]
    widths = [0.9 * (stop - start) for start, stop in explanation.patches]
    axis.bar(middles, explanation.importance[series, channel], width=widths, color=_MOVED)
    axis.set_ylabel("mean change\nof the forecast")
    axis.set_xlabel("steps from the forecast's origin")


def _draw_covariates(axis: Axes, explanation: Explanation, series: int, channel: int) -> None:
    values = explanation.covariate_importance[series, channel]
    order = np.argsort(values)[-_MOST_COVARIATES:]
    axis.barh([explanation.covariates[index] for index in order], values[order], color=_MOVED, height=0.7)
    axis.set_xlabel("mean change of the forecast without the covariate")


def _draw_memory(figure: Any, axes: list[Axes], record: MemoryRecord, layer: int, series: int, channel: int) -> None:
    """Head by patch twice, then head by slot."""
    left = record.written[series, channel] * record.kept[series, channel]
    pictures = (
        (record.forget_gate[series, channel], "forget gate (1 keeps all)", "patch"),
        (left, "written and still there at the end", "patch"),
        (record.slot_usage[series, channel], "share of reading per slot", "slot"),
    )
    for axis, (values, what, across) in zip(axes, pictures, strict=True):
        image = axis.imshow(values, aspect="auto", cmap=_COLOURS, interpolation="nearest")
        axis.set_title(f"layer {layer + 1}: {what}", loc="left", fontsize=9)
        axis.set_xlabel(across)
        axis.set_ylabel("head")
        axis.set_yticks(range(len(values)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axis, pad=0.02)
