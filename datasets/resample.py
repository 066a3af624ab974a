"""Irregular or repeated stamps onto a calendar, on request: every step gets the mean of the rows that fall into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trellis_ts.datasets.calendar import normalize_freq, search_freq, snap
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trellis_ts.datasets.columns import Table
    from trellis_ts.datasets.roles import Roles

    Whole = NDArray[np.int64]
    Values = NDArray[np.float64]

_SECOND = 10**9
_MINUTE, _HOUR, _DAY = 60 * _SECOND, 3600 * _SECOND, 86400 * _SECOND
# Steps people measure in: an irregular table gets the one nearest to its usual distance.
_USUAL_STEPS = {_SECOND: "s", 10 * _SECOND: "10s", 30 * _SECOND: "30s"}
_USUAL_STEPS |= {minutes * _MINUTE: f"{minutes}min" if minutes > 1 else "min" for minutes in (1, 5, 10, 15, 30)}
_USUAL_STEPS |= {hours * _HOUR: f"{hours}h" if hours > 1 else "h" for hours in (1, 3, 6, 12)}
_USUAL_STEPS |= {_DAY: "D", 7 * _DAY: "W-MON", 30 * _DAY: "MS", 91 * _DAY: "QS-JAN", 365 * _DAY: "YS-JAN"}


def resample(table: Table, roles: Roles, freq: str | None) -> tuple[Table, Roles, str, list[str]]:
    """One row per series and step that any row falls into: the mean of its values, the last of its categories.

    Args:
        table: the table.
        roles: its columns.
        freq: the calendar; if not given the one the stamps are on, else the usual step nearest to their median
            distance.

    Returns:
        Table and columns with one row per series and step, the calendar, and a note unless nothing changed.

    Raises:
        DataError: the stamps can be read in two ways, or are too few to tell a calendar.
    """
    if roles.dates.swapped is not None:
        raise DataError(
            f"{table.source}: the dates can be day/month or month/day, which only a regular calendar tells apart; "
            "give --day-first true or false"
        )
    stamps, timezone = roles.dates.stamps, roles.dates.timezone
    order = np.lexsort((np.arange(len(stamps)), stamps, roles.codes))
    freq = _choose_freq(table, roles, order) if freq is None else normalize_freq(freq)
    on_grid = snap(stamps, freq, timezone)
    cells = np.column_stack((roles.codes[order], on_grid[order].astype(np.int64)))
    starts = np.flatnonzero(np.append(True, (np.diff(cells, axis=0) != 0).any(axis=1)))
    counts = np.diff(np.append(starts, len(order)))
    touched = (on_grid != stamps)[order] | np.repeat(counts > 1, counts)
    if not touched.any():
        return table, roles, freq, []
    rows = order[starts]
    extras = None
    if roles.extras is not None:
        is_number = [each.categories is None for each in roles.covariates]
        means, lasts = _means(roles.extras[order], starts), _lasts(roles.extras[order], starts)
        extras = np.where(is_number, means, lasts)
    reduced = roles._replace(
        dates=type(roles.dates)(on_grid[rows], timezone, None, roles.dates.notes),
        codes=roles.codes[rows],
        values=_means(roles.values[order], starts),
        extras=extras,
    )
    note = (
        f"regularized onto steps of {freq!r}: {int(touched.sum())} of {len(order)} rows were moved or averaged, "
        f"{len(rows)} steps have values"
    )
    return table.take(rows), reduced, freq, [note]


def _choose_freq(table: Table, roles: Roles, order: Whole) -> str:
    time, codes = roles.dates.stamps[order], roles.codes[order]
    fresh = np.append(True, (np.diff(codes) != 0) | (np.diff(time.astype(np.int64)) != 0))
    time, codes = time[fresh], codes[fresh]
    joined = np.diff(codes) == 0
    found = search_freq(time, joined, roles.dates.timezone).freq
    if found is not None:
        return found
    distances = np.diff(time.astype(np.int64))[joined]
    if not len(distances):
        raise DataError(f"{table.source}: too few different stamps to tell a calendar; give --freq")
    median = float(np.median(distances))
    if median < _SECOND / 2:
        raise DataError(f"{table.source}: the stamps are less than a second apart and irregular; give --freq")
    return _USUAL_STEPS[min(_USUAL_STEPS, key=lambda step: abs(np.log(step / median)))]


def _means(values: Values, starts: Whole) -> Values:
    """Mean of what is there in each run of rows, NaN where nothing is."""
    there = ~np.isnan(values)
    sums = np.add.reduceat(np.where(there, values, 0.0), starts, axis=0)
    counts = np.add.reduceat(there.astype(np.int64), starts, axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is wanted
        means: Values = sums / counts
    return means


def _lasts(values: Values, starts: Whole) -> Values:
    """The last of what is there in each run of rows, NaN where nothing is."""
    position = np.where(np.isnan(values), -1, np.arange(len(values))[:, None])
    last = np.maximum.reduceat(position, starts, axis=0)
    found: Values = np.where(last < 0, np.nan, np.take_along_axis(values, np.maximum(last, 0), axis=0))
    return found
