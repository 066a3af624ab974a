"""Which windows a backtest scores: those whose future the model has not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trellis_ts.datasets.long_horizon import borders, find_benchmark
from trellis_ts.datasets.windows import first_origin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trellis_ts.checkpoints import DataRecord
    from trellis_ts.config import WindowShape
    from trellis_ts.types import Panel


def unseen_ranges(panel: Panel, data: DataRecord) -> list[tuple[int, int]]:
    """Rows of each series the model has not seen: a benchmark's test split, else all after what training knew.

    A series training never saw is evaluated as a whole.
    """
    if panel.dataset is not None and (spec := find_benchmark(panel.dataset)) is not None:
        return [borders(spec, len(panel.series[0])).test]
    known_until = {each.name: each.known_until for each in data.series}
    ranges = []
    for series in panel.series:
        known = known_until.get(series.name)
        start = 0 if known is None else int(np.searchsorted(series.time, np.datetime64(known, "ns"), side="right"))
        ranges.append((start, len(series)))
    return ranges


class RollingOrigins:
    """The windows of a backtest: every ``step``-th row of each series that a future may start at.

    Counted back from the last one, so that the newest rows are always scored, and ``step=prediction_length`` gives
    futures that do not overlap. Nothing is stored per window but the different stamps.
    """

    def __init__(
        self, panel: Panel, shape: WindowShape, data: DataRecord, *, step: int = 1, max_origins: int | None = None
    ) -> None:
        self._panel, self.step = panel, step
        first, last = [], []
        for start, stop in unseen_ranges(panel, data):
            last.append(stop - shape.prediction_length)
            first.append(start or first_origin(last[-1], shape.context_length, shape.patch_length))
        self.first = np.array(first, dtype=np.int64)
        """First origin of each series at a step of 1: what lies before it is known to every forecast."""
        self._last = np.array(last, dtype=np.int64)
        count = np.maximum(0, (self._last - self.first) // step + 1)
        self._count = count if max_origins is None else np.minimum(count, max_origins)
        self._ends = np.cumsum(self._count)
        self.stamps, self.ends = self._stamps(shape.prediction_length)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def of(self, series: int) -> NDArray[np.int64]:
        """Origins of one series."""
        last: int = self._last[series]
        return last - self.step * np.arange(self._count[series] - 1, -1, -1)

    def locate(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Series and origin of the given windows."""
        series = np.searchsorted(self._ends, index, side="right")
        return series, self._last[series] - self.step * (self._ends[series] - 1 - index)

    def stamp_index(self, series: NDArray[np.int64], origins: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the different stamps each window starts at."""
        starts = [self._panel.series[each].time[origin] for each, origin in zip(series, origins, strict=True)]
        return np.searchsorted(self.stamps, np.array(starts, dtype="datetime64[ns]"))

    def _stamps(self, prediction_length: int) -> tuple[NDArray[np.datetime64], NDArray[np.datetime64]]:
        """The different stamps in order, and the last stamp of a horizon that begins at each."""
        pieces = [
            (each.time[origins], each.time[origins + prediction_length - 1])
            for index, each in enumerate(self._panel.series)
            if len(origins := self.of(index))
        ]
        if not pieces:
            return (np.array([], dtype="datetime64[ns]"),) * 2
        starts, where = np.unique(np.concatenate([each[0] for each in pieces]), return_index=True)
        return starts, np.concatenate([each[1] for each in pieces])[where]
