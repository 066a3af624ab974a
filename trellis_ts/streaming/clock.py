"""Which step of its calendar an observation belongs to."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from trellis_ts.datasets import calendar
from trellis_ts.datasets.cycles import positions, waves
from trellis_ts.datasets.dates import UnreadableDateError, parse_dates
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import Cycle

    Stamp = datetime | np.datetime64 | str

UNKNOWN = np.iinfo(np.int64).min
"""The stamp of a series that was never given one."""
_TICKS = ("h", "min", "s", "ms", "us", "ns")


class Clock:
    """The calendar of a model: stamps as nanoseconds since 1970 in UTC, or wall-clock time where it has no time zone.

    Args:
        freq: pandas offset alias of a step.
        timezone: of the model's data.
        season_length: steps in a season.
        cycles: what the model reads of the calendar.
        day_first: whether 02/03/2024 is the 2nd of March; such a date is refused for None.
    """

    def __init__(
        self,
        freq: str,
        timezone: str | None,
        season_length: int,
        cycles: Sequence[Cycle],
        *,
        day_first: bool | None = None,
    ) -> None:
        self._day_first = day_first
        self.freq, self.timezone, self.season_length = freq, timezone, season_length
        self._cycles, self._waves = tuple(cycles), [waves(each) for each in cycles]
        # Hours and shorter are so many nanoseconds; days and longer may not be.
        self._step: int | None = None
        if freq.lstrip("0123456789") in _TICKS:
            first = np.datetime64(0, "ns")
            self._step = int(calendar.future_times(first, freq, 1)[0].astype(np.int64))

    def read(self, time: Stamp) -> int:
        """A stamp as a number.

        Raises:
            DataError: it is no date, or has a time zone where the model has none.
        """
        if isinstance(time, str):
            text = time.strip()
            try:
                time = datetime.fromisoformat(text)
            except ValueError:
                return self._read_as_tables_are(text)
        if isinstance(time, datetime) and time.tzinfo is not None:
            if self.timezone is None:
                raise DataError(f"{time} has a time zone and the model's data have none; leave it out")
            offset = time.utcoffset()
            local = np.datetime64(time.replace(tzinfo=None), "ns")
            return int((local - np.timedelta64(offset)).astype(np.int64))
        stamp = np.asarray(time, dtype="datetime64[ns]")[()]
        if np.isnat(stamp):
            raise DataError("a time is missing; give every observation its own, or none of them")
        if self.timezone is not None and isinstance(time, datetime):
            stamp = calendar.to_utc(np.array([stamp]), self.timezone)[0]
        return int(stamp.astype(np.int64))

    def _read_as_tables_are(self, text: str) -> int:
        """A date in any of the layouts a table may have; slower than ISO 8601."""
        try:
            found = parse_dates(pa.array([text]), self._day_first)
        except UnreadableDateError:
            raise DataError(f"'{text}' is not a date; write dates like 2024-03-31 or 2024-03-31T18:00") from None
        if found.swapped is not None and found.swapped[0] != found.stamps[0]:
            raise DataError(f"'{text}' may mean two days; write dates like 2024-03-31")
        if found.timezone is not None and self.timezone is None:
            raise DataError(f"{text} has a time zone and the model's data have none; leave it out")
        stamps = calendar.to_utc(found.stamps, self.timezone) if found.timezone is None else found.stamps
        return int(stamps.astype("datetime64[ns]").astype(np.int64)[0])

    def steps_between(self, last: int, time: int) -> int:
        """How many steps a stamp lies after another: 1 for the next, 0 or less for one that is late.

        Raises:
            DataError: it is not on the calendar.
        """
        if self._step is not None:
            steps, rest = divmod(time - last, self._step)
            if rest:
                raise self._off(last, time)
            return steps
        both = np.array(sorted((last, time))).astype("datetime64[ns]")
        if last != time and calendar.first_off_grid(both, self.freq, self.timezone) is not None:
            raise self._off(last, time)
        numbers = calendar.step_numbers(both, self.freq, self.timezone)
        steps = int(numbers[-1] - numbers[0])
        return steps if time >= last else -steps

    def after(self, last: int, steps: int) -> int:
        """The stamp so many steps later."""
        if last == UNKNOWN or steps == 0:
            return last
        if self._step is not None:
            return last + steps * self._step
        stamp = np.datetime64(last, "ns")
        return int(calendar.future_times(stamp, self.freq, steps, self.timezone)[-1].astype(np.int64))

    def advance(self, times: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """The stamps so many steps later; unknown ones stay unknown."""
        if self._step is not None:
            return np.where(times == UNKNOWN, UNKNOWN, times + steps * self._step)
        return np.array([self.after(int(time), int(step)) for time, step in zip(times, steps, strict=True)])

    def season_position(self, time: int) -> int:
        """How many steps into its season a stamp is."""
        return calendar.season_position(np.datetime64(time, "ns"), self.freq, self.season_length, self.timezone)

    def features(self, time: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """``[stamp, feature]`` as the model reads the calendar; None for one that does not."""
        if not self._cycles:
            return None
        where = positions(time.astype("datetime64[ns]"), self._cycles, self.timezone)
        return np.concatenate([table[where[:, index]] for index, table in enumerate(self._waves)], axis=1)

    def spell(self, time: int) -> str:
        """A stamp as text."""
        return calendar.format_times(np.array([time]).astype("datetime64[ns]"), self.freq, self.timezone)[0]

    def _off(self, last: int, time: int) -> DataError:
        return DataError(
            f"{self.spell(time)} is not on the calendar of {self.freq} steps that {self.spell(last)} lies on; bring "
            "stamps of the model's frequency"
        )
