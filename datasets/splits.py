"""Chronological splits, and the scaler that sees training rows only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trellis_ts.datasets.covariates import CovariateScaler
from trellis_ts.errors import DataError
from trellis_ts.types import Borders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.types import Panel


_ROWS_AT_ONCE = 8192


def held_out_rows(size: float, num_rows: int, prediction_length: int) -> int:
    """Rows a split of this size takes: a fraction below 1 or a count, at least one horizon unless it is 0."""
    if size == 0:
        return 0
    rows = round(size * num_rows) if size < 1 else int(size)
    return max(rows, prediction_length)


def split_borders(num_rows: int, *, validation_size: float, test_size: float, prediction_length: int) -> Borders:
    """Training rows first, then validation, then test; training may come out empty for a short series."""
    test = held_out_rows(test_size, num_rows, prediction_length)
    validation = held_out_rows(validation_size, num_rows, prediction_length)
    test_start = max(0, num_rows - test)
    validation_start = max(0, test_start - validation)
    return Borders(train=(0, validation_start), validation=(validation_start, test_start), test=(test_start, num_rows))


@dataclass(frozen=True, eq=False)
class Scaler:
    """Mean and standard deviation of each series and channel, both ``[series, channel]``.

    A constant channel has standard deviation 1, one without a single number also mean 0. Covariates have statistics of
    their own, which all series share.
    """

    names: tuple[str, ...]
    loc: NDArray[np.float64]
    scale: NDArray[np.float64]
    covariates: CovariateScaler = field(default_factory=CovariateScaler)

    @classmethod
    def fit(cls, panel: Panel, rows: Sequence[tuple[int, int]]) -> Scaler:
        """Statistics of the given half-open rows of each series (population standard deviation), NaN left out."""
        loc = np.zeros((len(panel.series), panel.num_channels))
        scale = np.ones_like(loc)
        for index, (series, (start, stop)) in enumerate(zip(panel.series, rows, strict=True)):
            loc[index], scale[index] = _statistics(series.values[start:stop])
        return cls(tuple(series.name for series in panel.series), loc, scale, CovariateScaler.fit(panel, rows))

    def of(self, panel: Panel, rows: Sequence[tuple[int, int]] | None = None) -> Scaler:
        """The statistics for the series of another panel, by name; a series never seen gets those of its own rows.

        Args:
            panel: the other panel.
            rows: half-open rows per series that a never-seen one may use; all unless given. A backtest gives those
                before the first origin, for what is to be forecast must not be in the scale.
        """
        known = {name: index for index, name in enumerate(self.names)}
        loc = np.zeros((len(panel.series), panel.num_channels))
        scale = np.ones_like(loc)
        for index, series in enumerate(panel.series):
            if series.name in known:
                loc[index], scale[index] = self.loc[known[series.name]], self.scale[known[series.name]]
            else:
                start, stop = (0, len(series)) if rows is None else rows[index]
                loc[index], scale[index] = _statistics(series.values[start:stop])
        return Scaler(tuple(series.name for series in panel.series), loc, scale, self.covariates)


def _statistics(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Some thousand rows at a time, so that no second copy of a long series is ever held."""
    blocks = [values[start : start + _ROWS_AT_ONCE] for start in range(0, len(values), _ROWS_AT_ONCE)]
    count, total, squares = np.zeros((3, values.shape[1]))
    for block in blocks:
        missing = np.isnan(block)
        count += len(block) - missing.sum(axis=0)
        total += np.where(missing, 0.0, block).sum(axis=0)
    loc = total / np.maximum(count, 1)
    for block in blocks:
        distance = np.where(np.isnan(block), 0.0, block - loc)
        squares += (distance * distance).sum(axis=0)
    scale = np.sqrt(squares / np.maximum(count, 1))
    # The relative bound tells a constant from rounding: 0.1 repeated has a computed deviation of about 1e-17.
    is_constant = ~(scale > 1e-12 * np.maximum(1e-300, np.abs(loc)))
    return loc, np.where(is_constant, 1.0, scale)


@dataclass(frozen=True, eq=False)
class Splits:
    """A panel with the rows each split may predict, and the scaler of its training rows."""

    panel: Panel
    borders: tuple[Borders, ...]
    scaler: Scaler

    @classmethod
    def chronological(
        cls,
        panel: Panel,
        *,
        validation_size: float,
        test_size: float,
        prediction_length: int,
    ) -> Splits:
        """Holds out the end of every series.

        Raises:
            DataError: no series is long enough for a horizon of training after the held-out rows.
        """
        borders = tuple(
            split_borders(
                len(series),
                validation_size=validation_size,
                test_size=test_size,
                prediction_length=prediction_length,
            )
            for series in panel.series
        )
        longest = max(len(series) for series in panel.series)
        if max(each.train[1] for each in borders) <= prediction_length:
            held_out = longest - max(each.train[1] for each in borders)
            raise DataError(
                f"{panel.source}: the longest series has {longest} rows, of which {held_out} are held out; that leaves "
                f"too few to learn to predict {prediction_length} steps. Lower --prediction-length, --validation-size "
                "or --test-size, or bring more rows"
            )
        return cls.of(panel, borders)

    @classmethod
    def of(cls, panel: Panel, borders: Sequence[Borders]) -> Splits:
        """Borders given by the caller, with the scaler of their training rows."""
        # The scale of less than two rows is none: a series too short to train on takes that of its validation rows.
        rows = [each.train if each.train[1] > 1 else (0, each.validation[1]) for each in borders]
        return cls(panel, tuple(borders), Scaler.fit(panel, rows))

    @classmethod
    def fixed(cls, panel: Panel, borders: Borders) -> Splits:
        """The published borders of a benchmark, which has one series."""
        return cls(panel, (borders,), Scaler.fit(panel, [borders.train]))
