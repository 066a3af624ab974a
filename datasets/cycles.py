"""The calendar as features: where a stamp lies in its hour, day, week and year, as sines and cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trellis_ts.datasets.calendar import to_local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import Cycle
    from trellis_ts.types import Panel

_SECOND = 10**9
_DAY = 86400 * _SECOND
# Length in nanoseconds, positions told apart, and how many pairs of sine and cosine: three are all a week has.
_CYCLES: dict[Cycle, tuple[int, int, int]] = {
    "minute": (60 * _SECOND, 60, 2),
    "hour": (3600 * _SECOND, 60, 2),
    "day": (_DAY, 1440, 3),
    "week": (7 * _DAY, 7, 3),
    "year": (365 * _DAY, 366, 2),
}
# A cycle seen less often than this in the training rows would be learnt by heart.
_LEAST_SEEN = 2


def useful_cycles(panel: Panel, rows: Sequence[tuple[int, int]]) -> tuple[Cycle, ...]:
    """The cycles of more than two steps of which the longest series holds at least two in its training rows."""
    index = max(range(len(rows)), key=lambda index: rows[index][1] - rows[index][0])
    start, stop = rows[index]
    time = panel.series[index].time[start:stop].astype(np.int64)
    if len(time) < 2:
        return ()
    step, span = float(np.median(np.diff(time))), float(time[-1] - time[0])
    return tuple(name for name, (length, _, _) in _CYCLES.items() if length > 2 * step and span >= _LEAST_SEEN * length)


def num_features(cycles: Sequence[Cycle]) -> int:
    """How many numbers describe a stamp."""
    return sum(2 * _CYCLES[name][2] for name in cycles)


def positions(time: NDArray[np.datetime64], cycles: Sequence[Cycle], timezone: str | None = None) -> NDArray[np.int16]:
    """``[stamp, cycle]``: where in each cycle stamps are, in local time where there is a time zone."""
    local = to_local(time, timezone).astype("datetime64[ns]")
    whole = local.astype(np.int64)
    days = whole // _DAY
    year_starts = local.astype("datetime64[Y]").astype("datetime64[D]").astype(np.int64)
    found = {
        "minute": whole // _SECOND % 60,
        "hour": whole // (60 * _SECOND) % 60,
        "day": whole // (60 * _SECOND) % 1440,
        "week": (days + 3) % 7,  # day 0 was a Thursday; weeks start on Monday
        "year": days - year_starts,
    }
    columns = [found[name] for name in cycles]
    return np.stack(columns, axis=1).astype(np.int16) if columns else np.empty((len(time), 0), dtype=np.int16)


def waves(cycle: Cycle) -> NDArray[np.float32]:
    """``[position, feature]``: sines and cosines of one cycle and its fractions."""
    _, size, pairs = _CYCLES[cycle]
    angles = 2 * np.pi * np.arange(size)[:, None] / size * np.arange(1, pairs + 1)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1).astype(np.float32)
