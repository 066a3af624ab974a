"""pandas indices as this package's calendars."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from trellis_ts.datasets import calendar
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Steps that are only counted lie on a calendar of hours, which is regular and long enough.
_COUNTED_FREQ, _STEP = "h", np.timedelta64(1, "h")
_PERIOD_UNITS = {"M": "MS", "Q": "QS", "Y": "YS", "A": "YS"}


class Stamps(NamedTuple):
    """An index on a calendar."""

    time: NDArray[np.datetime64]
    """``[T]``, as in ``trellis_ts.types.Series``."""
    freq: str
    timezone: str | None = None
    is_counted: bool = False
    """Whether the index only counts, so that hours and days mean nothing."""

    @property
    def settings(self) -> dict[str, object]:
        """What training has to know of steps that are only counted."""
        return {"calendar_features": False, "season_length": 1} if self.is_counted else {}


def stamps_of(index: pd.Index, freq: str | None = None, *, is_regular: bool = True) -> Stamps:
    """The stamps of an index.

    Periods stand for their first moment, those of weeks for their last day. Whole numbers count steps.

    Args:
        index: of times, periods or whole numbers, rising.
        freq: offset alias, for times that do not tell.
        is_regular: whether steps left out are refused.

    Raises:
        DataError: the index is none of these, is not regular, or does not tell its frequency.
    """
    if isinstance(index, pd.PeriodIndex):
        stamps = _of_periods(index)
        if is_regular:
            _check_regular(stamps.time, stamps.freq, None)
        return stamps
    if isinstance(index, pd.DatetimeIndex):
        timezone = None if index.tz is None else str(index.tz)
        times = index if index.tz is None else index.tz_convert("UTC").tz_localize(None)
        time = times.to_numpy().astype("datetime64[ns]")
        alias = calendar.normalize_freq(freq or index.freqstr or calendar.infer_freq(time, timezone))
        if is_regular:
            _check_regular(time, alias, timezone)
        return Stamps(time, alias, timezone)
    if pd.api.types.is_integer_dtype(index):
        numbers = index.to_numpy().astype(np.int64)
        time = np.datetime64(0, "ns") + numbers * _STEP
        if is_regular:
            _check_regular(time, _COUNTED_FREQ, None)
        return Stamps(time, _COUNTED_FREQ, None, is_counted=True)
    raise DataError(f"the index holds {index.dtype}; it must hold times, periods or whole numbers that count steps")


def _of_periods(index: pd.PeriodIndex) -> Stamps:
    match = re.fullmatch(r"(\d*)([A-Za-z]+)(?:-([A-Z]{3}))?", index.freqstr)
    number, unit, anchor = match.groups() if match else ("", index.freqstr, None)
    if unit == "W":
        last_day = index.to_timestamp(how="end").normalize()
        return Stamps(last_day.to_numpy().astype("datetime64[ns]"), calendar.normalize_freq(f"{number}W-{anchor}"))
    alias = index.freqstr
    if unit in _PERIOD_UNITS:
        # A period is named after its last month, the calendar of its first days after its first.
        first_month = "" if anchor is None else f"-{_month_after(anchor)}"
        alias = f"{number}{_PERIOD_UNITS[unit]}{first_month}"
    time = index.to_timestamp(how="start").to_numpy().astype("datetime64[ns]")
    return Stamps(time, calendar.normalize_freq(alias))


def _month_after(month: str) -> str:
    names = pd.date_range("2000-01-01", periods=12, freq="MS").strftime("%b").str.upper().tolist()
    return str(names[(names.index(month) + 1) % 12])


def _check_regular(time: NDArray[np.datetime64], freq: str, timezone: str | None) -> None:
    steps = np.diff(calendar.step_numbers(time, freq, timezone)) if len(time) > 1 else np.ones(0)
    if (steps != 1).any():
        row = int(np.argmax(steps != 1))
        raise DataError(
            f"the index is not regular: row {row + 2} comes {int(steps[row])} steps of {freq} after row {row + 1}; "
            f"reindex it to every step (series.asfreq('{freq}')), missing values may stay missing"
        )
