"""The benchmark in two pictures: error against look-back, and beside published results."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from trellis_ts.benchmark.published import published
from trellis_ts.benchmark.results import of_track
from trellis_ts.plots import LINES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from trellis_ts.benchmark.results import Entry, Spread

_MARKERS = "osD^v<>P"
_PUBLISHED_COLOUR = "#999999"
# Without the version of the library, the same results give the same bytes.
_METADATA = {"Software": None}


def plot_by_look_back(entries: Sequence[Entry], path: Path) -> None:
    """MSE, averaged over the horizons, against the look-back: one chart per data set, one line per contestant."""
    datasets = list(dict.fromkeys(entry.dataset for entry in entries))
    labels = list(dict.fromkeys(entry.label for entry in entries))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = _grid(len(datasets))
        for axis, dataset in zip(axes, datasets, strict=True):
            lines: dict[str, list[Entry]] = defaultdict(list)
            for entry in entries:
                if entry.dataset == dataset:
                    lines[entry.label].append(entry)
            for label, points in lines.items():
                colour, dashes = LINES[labels.index(label) % len(LINES)]
                marker = _MARKERS[labels.index(label) % len(_MARKERS)]
                means, errors = _errors([point.mse_average for point in points])
                axis.errorbar(
                    [point.look_back for point in points],
                    means,
                    yerr=errors,
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markersize=4,
                    capsize=2,
                    label=label,
                )
            look_backs = sorted({entry.look_back for entry in entries if entry.dataset == dataset})
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator(look_backs))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_title(dataset, loc="left")
            axis.set_xlabel("look-back, steps")
            axis.set_ylabel("MSE")
        _legend(figure, axes)
        figure.savefig(path, dpi=150, metadata=_METADATA)


def plot_published(entries: Sequence[Entry], path: Path) -> None:
    """MSE, averaged over the horizons, beside published results that are known to be of all test windows.

    At look-back 96 or, where nothing was run at it, at the chosen one.
    """
    chosen = of_track(entries, "96")
    track = "96" if chosen else "free"
    chosen = chosen or of_track(entries, "free") or [(entry, ()) for entry in entries]
    datasets = list(dict.fromkeys(entry.dataset for entry, _ in chosen))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = _grid(len(datasets), height=3.6)
        for axis, dataset in zip(axes, datasets, strict=True):
            ours = [(entry.label, entry.mse_average) for entry, _ in chosen if entry.dataset == dataset]
            others = sorted(
                (each.average[dataset][0], each.label)
                for each in published()
                if each.track == track and each.test_windows == "all" and dataset in each.average
            )
            means, errors = _errors([spread for _, spread in ours])
            names = [label for label, _ in ours] + [label for _, label in others]
            places = list(range(len(names)))[::-1]
            axis.errorbar(
                means,
                places[: len(ours)],
                xerr=errors,
                linestyle="",
                marker="o",
                color=LINES[0][0],
                capsize=2,
                label="ours",
            )
            axis.plot(
                [mse for mse, _ in others],
                places[len(ours) :],
                linestyle="",
                marker="D",
                markersize=4,
                color=_PUBLISHED_COLOUR,
                label="published",
            )
            axis.set_yticks(places, names)
            axis.set_title(dataset, loc="left")
            axis.set_xlabel(f"average MSE, {'look-back 96' if track == '96' else 'chosen look-back'}")
            axis.grid(axis="x", linewidth=0.4)
        _legend(figure, axes)
        figure.savefig(path, dpi=150, metadata=_METADATA)


def _errors(spreads: Sequence[Spread]) -> tuple[list[float], list[float]]:
    """Means and standard deviations, the latter 0 for a single seed."""
    return [each.mean for each in spreads], [each.std or 0.0 for each in spreads]


def _grid(count: int, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.0, 4.4 * columns), 0.6 + height * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in list(axes.flat)[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat)[:count]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
