"""Windows as an index into the series: nothing is unfolded, a batch is gathered when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from trellis_ts.datasets.calendar import season_positions
from trellis_ts.datasets.covariates import check_covariates
from trellis_ts.datasets.features import places_by_series, static_features, step_features
from trellis_ts.types import Batch, Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.datasets.splits import Scaler
    from trellis_ts.types import Panel


class ScaledPanel:
    """All series of a panel on the scale of the training rows, put there when a window is gathered.

    The panel's own numbers are read: no copy of them is made, and the windows of every split share them.

    Args:
        panel: the series.
        scaler: statistics of the same series, and the covariates to gather.
        season_length: steps in a season.
        future_length: steps after each series' last row for which known covariates are kept.

    Raises:
        DataError: the panel lacks a covariate of the scaler's, or one is of another kind.
    """

    def __init__(self, panel: Panel, scaler: Scaler, season_length: int, *, future_length: int = 0) -> None:
        self.num_series = len(panel.series)
        self.num_channels = panel.num_channels
        self._values = tuple(np.ascontiguousarray(series.values) for series in panel.series)
        self._loc, self._scale = np.ascontiguousarray(scaler.loc), np.ascontiguousarray(scaler.scale)
        self.season_length = season_length
        first = np.array([series.time[0] for series in panel.series], dtype="datetime64[ns]")
        self.phases = season_positions(first, panel.freq, season_length, panel.timezone)
        """Position in the season of each series' first row."""
        check_covariates(panel, scaler.covariates.covariates)
        self._past = step_features(panel, scaler.covariates, "past")
        self._known = step_features(panel, scaler.covariates, "known", future_length)
        self._static = static_features(panel, scaler.covariates)

    def gather(
        self,
        series: NDArray[np.int64],
        origins: NDArray[np.int64],
        context_length: int,
        prediction_length: int,
        future_length: int | None = None,
    ) -> Batch:
        """The windows of the given series whose futures start at the given rows of theirs, in float32.

        Steps before a series' first row, and past its last, come out as unobserved. Past covariates end at the origin.

        Args:
            series: ``[batch]``, which series.
            origins: ``[batch]``, first future row, counted from the series' own start.
            context_length: steps before the origin.
            prediction_length: steps from the origin on; 0 when there is no future to look at.
            future_length: steps from the origin on for known covariates; ``prediction_length`` unless given.
        """
        from trellis_ts.datasets.gathering import scaled_windows

        starts = origins - context_length
        shape = (len(series), context_length + prediction_length, self.num_channels)
        window, mask = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=bool)
        copy = scaled_windows()
        for index, places in places_by_series(series):
            copy(self._values[index], self._loc[index], self._scale[index], starts[places], places, window, mask)
        values, observed = torch.from_numpy(window), torch.from_numpy(mask)
        known_length = context_length + (prediction_length if future_length is None else future_length)
        static = None
        if self._static is not None:
            static = Features(*(each[torch.from_numpy(series)] for each in self._static))
        return Batch(
            context=values[:, :context_length],
            observed=observed[:, :context_length],
            phase=torch.from_numpy((self.phases[series] + starts) % self.season_length),
            series=torch.from_numpy(series),
            future=values[:, context_length:] if prediction_length else None,
            future_observed=observed[:, context_length:] if prediction_length else None,
            past=None if self._past is None else self._past.gather(series, starts, context_length),
            known=None if self._known is None else self._known.gather(series, starts, known_length),
            static=static,
            loc=torch.from_numpy(self._loc[series][:, None]),
            scale=torch.from_numpy(self._scale[series][:, None]),
            origin=torch.from_numpy(origins),
        )


def first_origin(last: int, context_length: int, min_context: int) -> int:
    """First future row in a series read from its own start, the last being ``last``.

    Full contexts where there are any; else the second half of the rows, with contexts that grow.
    """
    return context_length if last >= context_length else max(min_context, last // 2)


class WindowDataset(Dataset[Batch]):
    """Every window, at stride 1, whose future lies inside the given rows of its series.

    Contexts may reach back before those rows. Where fewer rows than a context lie before a future, the context is
    padded on the left; a range that starts a series begins with full contexts if it holds any.

    Args:
        panel: the scaled series.
        ranges: half-open rows ``[start, stop)`` per series in which the futures lie.
        context_length: steps the model reads.
        prediction_length: steps to predict.
        min_context: fewest context rows of a window in a series too short for full ones.
        max_windows: where there are more, this many, evenly spread.
    """

    def __init__(
        self,
        panel: ScaledPanel,
        ranges: Sequence[tuple[int, int]],
        *,
        context_length: int,
        prediction_length: int,
        min_context: int,
        max_windows: int | None = None,
    ) -> None:
        self.panel = panel
        self.context_length, self.prediction_length = context_length, prediction_length
        first, count = [], []
        for start, stop in ranges:
            last = stop - prediction_length
            origin = start or first_origin(last, context_length, min_context)
            first.append(origin)
            count.append(max(0, last - origin + 1))
        self._first_origin = np.array(first, dtype=np.int64)
        self._ends = np.cumsum(np.array(count, dtype=np.int64))
        total = int(self._ends[-1])
        self._chosen = (
            np.linspace(0, total - 1, max_windows).round().astype(np.int64)
            if max_windows is not None and total > max_windows
            else None
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._chosen is None else len(self._chosen)

    def locate(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Series and first future row of the given windows.

        Raises:
            IndexError: there is no such window; numbers are not counted from the end.
        """
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}, not {index.min()} to {index.max()}")
        if self._chosen is not None:
            index = self._chosen[index]
        series = np.searchsorted(self._ends, index, side="right")
        before = np.where(series > 0, self._ends[series - 1], 0)
        return series, self._first_origin[series] + index - before

    def __getitem__(self, index: int) -> Batch:
        """One window, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Many windows at once: what a ``DataLoader`` calls for a batch."""
        series, origins = self.locate(indices)
        return self.panel.gather(series, origins, self.context_length, self.prediction_length)
