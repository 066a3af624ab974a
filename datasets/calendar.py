"""Calendars: which grid a set of stamps lies on, how it goes on, and how far into its season a stamp is.

Stamps are ``datetime64[ns]``: wall-clock time where ``timezone`` is None, otherwise instants in UTC. A step of a day or
more keeps the local time of day across a change of the clocks; a shorter step is a fixed number of nanoseconds.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Stamps = NDArray[np.datetime64]
    Whole = NDArray[np.int64]
    Mask = NDArray[np.bool_]

_SECOND = 10**9
_MINUTE, _HOUR, _DAY = 60 * _SECOND, 3600 * _SECOND, 86400 * _SECOND
_TICKS = {"h": _HOUR, "min": _MINUTE, "s": _SECOND, "ms": 10**6, "us": 10**3, "ns": 1}
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_MONTH_UNITS = {"M": 1, "Q": 3, "Y": 12}
# Day numbers count from 1970-01-01, a Thursday; adding 3 makes them count from a Monday.
_MONDAY_SHIFT = 3

_RENAMED = {"H": "h", "T": "min", "MIN": "min", "S": "s", "L": "ms", "U": "us", "N": "ns", "d": "D", "b": "B", "w": "W"}
_RENAMED |= {"M": "ME", "Q": "QE", "A": "YE", "Y": "YE", "AS": "YS", "q": "QE", "y": "YE"}
_RENAMED |= {"BM": "BME", "BQ": "BQE", "BA": "BYE", "BY": "BYE", "BAS": "BYS"}
_WORDS = {"m": "min or ME", "hour": "h", "hourly": "h", "minute": "min", "minutely": "min"}
_WORDS |= {"second": "s", "sec": "s", "day": "D", "daily": "D", "business": "B", "week": "W", "weekly": "W"}
_WORDS |= {"month": "MS or ME", "monthly": "MS or ME", "quarter": "QS or QE", "quarterly": "QS or QE"}
_WORDS |= {"year": "YS or YE", "yearly": "YS or YE", "annual": "YS or YE"}
_KNOWN = ("YE", "YS", "QE", "QS", "ME", "MS", "BME", "BMS", "W", "B", "D", *_TICKS)

_TIMEZONE = re.compile(r"(?!dateutil/|pytz/)[A-Za-z][\w+-]*(/[\w+-]+)*|[+-]\d\d:\d\d(:\d\d)?|UTC[+-]\d\d:\d\d")

# A grid far longer than the stamps on it is a wrong date or a wrong step, and would fill the memory.
_MOST_EMPTY_ROWS = 2_000_000


class _Step(NamedTuple):
    """One step of a calendar: ``length`` is in ns for ticks, else in units of ``kind``."""

    kind: Literal["tick", "day", "week", "business", "month"]
    length: int
    anchor: int = 0
    """Weekday of a week (Monday is 0), month of a quarter or a year (January is 0)."""
    unit_months: int = 1
    rule: str = ""
    """Day of the month: S first, E last, BS and BE the same among business days."""


class FoundFreq(NamedTuple):
    """What a search for the calendar found: an alias, or None with the reason and the stamp that shows it."""

    freq: str | None
    problem: str = ""
    offender: int | None = None


def normalize_freq(freq: str) -> str:
    """Today's pandas spelling (2.2 and later) of an offset alias, old or new: ``"15T"`` is ``"15min"``.

    Raises:
        DataError: no such alias, or a calendar that is not supported.
    """
    return _parse(freq)[0]


def infer_freq(time: Stamps, timezone: str | None = None) -> str:
    """The coarsest calendar on which every stamp lies and most neighbours are one step apart.

    The stamps may be in any order and may have gaps.

    Raises:
        DataError: fewer than three stamps, or no regular calendar.
    """
    stamps = np.unique(np.asarray(time, dtype="datetime64[ns]"))
    found = search_freq(stamps, np.ones(max(len(stamps) - 1, 0), dtype=bool), timezone)
    if found.freq is None:
        raise DataError(f"{found.problem}; give --freq, or put the rows on a regular calendar first")
    return found.freq


def search_freq(time: Stamps, joined: Mask, timezone: str | None) -> FoundFreq:
    """The calendar that several series share.

    Args:
        time: Stamps of one series after the other, ascending and without repeats within each.
        joined: True where a stamp and the next belong to one series; one shorter than ``time``.
        timezone: Time zone of the stamps, None for wall-clock time.
    """
    if joined.sum() < 2:
        stamps = "1 stamp is" if len(time) == 1 else f"{len(time)} stamps are"
        return FoundFreq(None, f"{stamps} too few to tell the frequency")
    days = _days_at_one_time(time, joined, timezone)
    distances = _distances(time.astype(np.int64))[joined]
    if days is not None:
        freq = _month_freq(days, joined) or _day_freq(days, joined)
        if freq:
            return FoundFreq(freq)
    step, share = _most_common(distances)
    off = np.flatnonzero(distances % step)
    if not len(off) and share >= 0.5:
        return FoundFreq(_tick_name(step))
    if share < 0.5:
        off = np.flatnonzero(distances != step)
    offender = int(np.flatnonzero(joined)[off[0]]) + 1
    stamp = format_times(time[offender : offender + 1], "ns", timezone)[0]
    if share < 0.5:
        why = f"the most common distance is {_spell(step)}, but only {share:.0%} are, and {stamp} is not"
    else:
        why = f"most are {_spell(step)} apart but {stamp} is off it"
    return FoundFreq(None, f"the stamps follow no regular grid: {why}", offender)


def to_grid(time: Stamps, freq: str, timezone: str | None = None) -> tuple[Stamps, Whole]:
    """All stamps of the calendar from the first to the last of ``time``, and where among them each of ``time`` is.

    Raises:
        DataError: a stamp is not on the calendar, or the calendar would be absurdly longer than the stamps.
    """
    grid, positions, off = _place(np.asarray(time, dtype="datetime64[ns]"), freq, timezone)
    if off.any():
        stamp = format_times(time[off].min(keepdims=True), "ns", timezone)[0]
        raise DataError(f"{stamp} is not on the calendar {normalize_freq(freq)!r}; give another --freq")
    return grid, positions


def grid_positions(time: Stamps, starts: Whole, freq: str, timezone: str | None = None) -> Whole | None:
    """Where each stamp is on the grid of its own series, for many series at once.

    Args:
        time: stamps of one series after the other, ascending within each.
        starts: where each series starts.
        freq: the calendar.
        timezone: time zone of the stamps, None for wall-clock time.

    Returns:
        None where one is off the calendar, or has to be looked at more closely with ``to_grid``.
    """
    step = _parse(freq)[1]
    lengths = np.diff(starts, append=len(time))
    if step.kind == "tick":
        ordinals = time.astype(np.int64)
    else:
        days, time_of_day = _split_days(to_local(time, timezone))
        ordinals, exact = _ordinals(days, step)
        if timezone not in (None, "UTC") or not exact.all() or (time_of_day != time_of_day[0]).any():
            return None
    positions, rest = np.divmod(ordinals - np.repeat(ordinals[starts], lengths), step.length)
    last = positions[starts + lengths - 1] + 1
    if rest.any() or (last > np.maximum(_MOST_EMPTY_ROWS, 100 * lengths)).any():
        return None
    return positions


def first_off_grid(time: Stamps, freq: str, timezone: str | None = None) -> int | None:
    """Index of the earliest stamp that is not on the calendar, None where all are."""
    off = np.flatnonzero(_place(time, freq, timezone)[2])
    return int(off[np.argmin(time[off])]) if len(off) else None


def step_numbers(time: Stamps, freq: str, timezone: str | None = None) -> Whole:
    """Numbers whose differences are the steps between stamps of one calendar."""
    step = _parse(freq)[1]
    if step.kind == "tick":
        numbers: Whole = time.astype(np.int64)
    else:
        numbers = _ordinals(_split_days(to_local(time, timezone))[0], step)[0]
    return numbers // step.length


def snap(time: Stamps, freq: str, timezone: str | None = None) -> Stamps:
    """The stamp that stands for the step each stamp falls in: for hours the full hour before it, for days midnight, for
    month ends the last day of its month, for business days the Monday after a weekend."""
    step = _parse(freq)[1]
    if not len(time):
        return time
    if step.kind == "tick":
        whole, first = time.astype(np.int64), time.min(keepdims=True)
        # A fixed step does not follow the clocks: the offset of the first stamp holds for all.
        shift = int(to_local(first, timezone).astype(np.int64)[0] - first.astype(np.int64)[0])
        return _stamps_of(whole - (whole + shift) % step.length)
    ordinals = _ordinals(_split_days(to_local(time, timezone))[0], step)[0]
    ordinals -= (ordinals - ordinals.min()) % step.length
    return _stamps(ordinals, step, 0, timezone)


def future_times(last: np.datetime64, freq: str, steps: int, timezone: str | None = None) -> Stamps:
    """The ``steps`` stamps after ``last``, which has to lie on the calendar.

    Raises:
        DataError: ``last`` is not on the calendar, or the calendar leaves the years 1678 to 2261.
    """
    future: Stamps = future_grid(np.atleast_1d(np.asarray(last, dtype="datetime64[ns]")), freq, steps, timezone)[0]
    return future


def future_grid(last: Stamps, freq: str, steps: int, timezone: str | None = None) -> Stamps:
    """The stamps after each of several, ``[stamp, step]``.

    Raises:
        DataError: as for ``future_times``.
    """
    alias, step = _parse(freq)
    ahead = np.arange(1, steps + 1, dtype=np.int64)
    if step.kind == "tick":
        future = _stamps_of(last.astype(np.int64)[:, None] + ahead * step.length)
    else:
        days, time_of_day = _split_days(to_local(last, timezone))
        ordinals, exact = _ordinals(days, step)
        if not exact.all():
            off = last[~exact][:1]
            raise DataError(f"{format_times(off, 'ns', timezone)[0]} is not on the calendar {alias!r}")
        ordinals = (ordinals[:, None] + ahead * step.length).ravel()
        future = _stamps(ordinals, step, np.repeat(time_of_day, steps), timezone).reshape(len(last), steps)
    if steps and (future[:, -1] < last).any():
        raise DataError(f"{steps} steps of {alias!r} run past the year 2261; ask for fewer")
    return future


def season_length(freq: str) -> int:
    """The usual season in steps: a day for hours and minutes, a week for days, a year for anything longer.

    Seconds have a minute; where a step fits no season a whole number of times, the answer is 1: no season.
    """
    step = _parse(freq)[1]
    if step.kind == "tick":
        whole = 1 if step.length < _SECOND else _MINUTE if step.length < _MINUTE else _DAY
        return max(whole // step.length, 1) if whole % step.length == 0 else 1
    if step.kind == "day":
        if step.length % 7 == 0:
            return season_length(f"{step.length // 7}W")
        return 7 if step.length == 1 else 1
    size = step.length * step.unit_months if step.kind == "month" else step.length
    whole = {"business": 5, "week": 52, "month": 12}[step.kind]
    return whole // size if size < whole and whole % size == 0 else 1


def season_candidates(freq: str) -> tuple[int, ...]:
    """Lengths in steps that a season of such data may have, shortest first: minute and hour, day and week, year.

    None below two steps; fractions of a step do not count.
    """
    step = _parse(freq)[1]
    if step.kind == "tick":
        cycles = (_MINUTE, _HOUR, _DAY, 7 * _DAY) if step.length < _MINUTE else (_DAY, 7 * _DAY)
        lengths = [cycle // step.length for cycle in cycles if cycle % step.length == 0]
    elif step.kind == "day" and step.length == 1:
        lengths = [7, 365]
    else:
        lengths = [season_length(freq)]
        lengths += [260] if step.kind == "business" and step.length == 1 else []
    return tuple(length for length in lengths if length > 1)


def default_prediction_length(freq: str) -> int:
    """How many steps are forecast where the user does not say: a day of minutes, two of hours, two weeks of days."""
    step = _parse(freq)[1]
    if step.kind == "tick":
        if step.length < _MINUTE:
            return 60
        if step.length == _HOUR:
            return 48
        return int(np.clip(_DAY // step.length, 24, 288)) if step.length < _DAY else 14
    if step.kind == "month":
        months = step.length * step.unit_months
        return 12 if months < 3 else 8 if months < 12 else 6
    if step.kind == "day":
        return 14 if step.length < 7 else 13
    return {"business": 10, "week": 13}[step.kind]


def season_position(first: np.datetime64, freq: str, season_length: int, timezone: str | None = None) -> int:
    """How many steps into its season a stamp is: hour of the day, weekday from Monday, month from January.

    The same for every series of the calendar, and counted in local time where a time zone is given.
    """
    stamps = np.atleast_1d(np.asarray(first, dtype="datetime64[ns]"))
    return int(season_positions(stamps, freq, season_length, timezone)[0])


def season_positions(first: Stamps, freq: str, season_length: int, timezone: str | None = None) -> Whole:
    """The same for several stamps."""
    step = _parse(freq)[1]
    local = to_local(first, timezone)
    if step.kind == "tick":
        return (local.astype(np.int64) + _MONDAY_SHIFT * _DAY) // step.length % season_length
    ordinals, _ = _ordinals(_split_days(local)[0], step)
    return ordinals // step.length % season_length


def format_times(times: Stamps, freq: str, timezone: str | None = None) -> list[str]:
    """ISO 8601: a bare date for wall-clock calendars of a day or longer, the UTC offset where there is a time zone.

    All have as many digits below the second as the finest needs.
    """
    stamps = np.asarray(times, dtype="datetime64[ns]")
    local = to_local(stamps, timezone)
    whole = local.astype(np.int64)
    if timezone is None and _parse(freq)[1].kind != "tick" and not (whole % _DAY).any():
        return [str(text) for text in np.datetime_as_string(local, unit="D")]
    unit = next((unit for unit in ("s", "ms", "us") if not (whole % _TICKS[unit]).any()), "ns")
    texts = [str(text) for text in np.datetime_as_string(local, unit=unit)]  # type: ignore[call-overload]
    if timezone is None:
        return texts
    offsets = (whole - stamps.astype(np.int64)) // _SECOND
    suffix = {int(offset): spell_offset(int(offset)) for offset in np.unique(offsets)}
    return [text + suffix[int(offset)] for text, offset in zip(texts, offsets, strict=True)]


def spell_offset(seconds: int) -> str:
    """A UTC offset as ISO 8601 has it, ``+01:00``."""
    minutes, rest = divmod(abs(seconds), 60)
    spelled = f"{'-' if seconds < 0 else '+'}{minutes // 60:02d}:{minutes % 60:02d}"
    return f"{spelled}:{rest:02d}" if rest else spelled


def to_local(time: Stamps, timezone: str | None) -> Stamps:
    """Wall-clock time of instants in UTC; without a time zone the stamps as they are."""
    if timezone in (None, "UTC"):
        return time
    local = _utc_index(time, timezone).tz_localize(None)
    return local.to_numpy(dtype="datetime64[ns]")


def to_utc(local: Stamps, timezone: str | None) -> Stamps:
    """Instants of wall-clock times: the first of two where the clocks went back, the next there is where they jump."""
    if timezone is None or timezone == "UTC":
        return local
    check_timezone(timezone)
    index = pd.DatetimeIndex(local).tz_localize(
        timezone, ambiguous=np.ones(len(local), dtype=bool), nonexistent="shift_forward"
    )
    return index.tz_convert("UTC").tz_localize(None).to_numpy(dtype="datetime64[ns]")


def check_timezone(timezone: str) -> None:
    """Refuses what is no name or offset of a time zone; for some, such as dateutil/ with a path, pandas reads a file.

    Raises:
        DataError: it is none.
    """
    if not _TIMEZONE.fullmatch(timezone):
        raise DataError(f"'{timezone:.80}' is not a time zone; use a name like 'Europe/Paris' or '+01:00'")


def _utc_index(time: Stamps, timezone: str | None) -> pd.DatetimeIndex:
    if timezone is not None:
        check_timezone(timezone)
    try:
        return pd.DatetimeIndex(time).tz_localize("UTC").tz_convert(timezone)
    except (KeyError, ValueError) as error:
        raise DataError(f"{timezone!r} is not a time zone; use a name like 'Europe/Paris' or '+01:00'") from error


@lru_cache(maxsize=256)
def _parse(freq: str) -> tuple[str, _Step]:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)?\s*([A-Za-z]+)(?:-([A-Za-z]{3}))?\s*", freq)
    if not match:
        raise _unknown_freq(freq)
    number, name, anchor = match[1] or "1", match[2], (match[3] or "").upper()
    name = _RENAMED.get(name, name)
    if float(number) == 0:
        raise DataError(f"frequency {freq!r} has steps of length zero; give one like '15min', 'h', 'D' or 'MS'")
    if name in _TICKS or (name == "D" and "." in number):
        nanoseconds = float(number) * _TICKS.get(name, _DAY)
        if anchor or nanoseconds < 1 or nanoseconds != round(nanoseconds):
            raise _unknown_freq(freq)
        return _tick_name(int(nanoseconds)), _Step("tick", int(nanoseconds))
    if "." in number:
        raise _unknown_freq(freq)
    count = int(number)
    prefix = str(count) if count > 1 else ""
    if name in ("D", "B") and not anchor:
        return prefix + name, _Step("day" if name == "D" else "business", count)
    if name == "W" and anchor in ("", *_WEEKDAYS):
        anchor = anchor or "SUN"
        return f"{prefix}W-{anchor}", _Step("week", count, _WEEKDAYS.index(anchor))
    months = re.fullmatch(r"(B?)([MQY])([SE])", name)
    if not months or (anchor and (anchor not in _MONTHS or months[2] == "M")):
        raise _unknown_freq(freq)
    unit = _MONTH_UNITS[months[2]]
    anchor = anchor or ("JAN" if months[3] == "S" else "DEC")
    step = _Step("month", count, _MONTHS.index(anchor) % unit, unit, months[1] + months[3])
    return prefix + name + (f"-{anchor}" if unit > 1 else ""), step


def _unknown_freq(freq: str) -> DataError:
    name = re.sub(r"^[\d.\s]+|-.*$|\s", "", freq)
    near = difflib.get_close_matches(name.upper(), [known.upper() for known in _KNOWN], n=1, cutoff=0.5)
    nearest = _WORDS.get(name) or _WORDS.get(name.lower().removesuffix("s"))
    nearest = nearest or next((known for known in _KNOWN if near and known.upper() == near[0]), None)
    nearest = "W-MON" if nearest == "W" else nearest
    hint = f"did you mean {nearest}?" if nearest else "use one like '15min', 'h', 'D', 'B', 'W-MON', 'MS' or 'ME'"
    return DataError(f"frequency {freq!r} is not one this package knows; {hint}")


def _tick_name(nanoseconds: int) -> str:
    unit = next(unit for unit, size in _TICKS.items() if nanoseconds % size == 0)
    count = nanoseconds // _TICKS[unit]
    return f"{count}{unit}" if count > 1 else unit


def _spell(nanoseconds: int) -> str:
    if nanoseconds % _DAY == 0:
        days = nanoseconds // _DAY
        return "1 day" if days == 1 else f"{days} days"
    unit = next(unit for unit, size in _TICKS.items() if nanoseconds % size == 0)
    return f"{nanoseconds // _TICKS[unit]} {unit}"


def _days_at_one_time(time: Stamps, joined: Mask, timezone: str | None) -> Whole | None:
    """The local days of stamps that all have one time of day, as those of a calendar of days or longer have."""
    days, time_of_day = _split_days(to_local(time, timezone))
    if not np.diff(time_of_day)[joined].any():
        return days
    usual = _most_common(time_of_day)[0]
    # Where the clocks skip midnight, that day's stamp is the next there is.
    if timezone is not None and (to_utc(_stamps_of(days * _DAY + usual), timezone) == time).all():
        return days
    return None


def _most_common(distances: Whole) -> tuple[int, float]:
    """The most common distance (the smallest of equals) and its share."""
    sizes, counts = np.unique(distances, return_counts=True)
    return int(sizes[np.argmax(counts)]), float(counts.max() / len(distances))


def _regular_step(ordinals: Whole, joined: Mask) -> int | None:
    distances = _distances(ordinals)[joined]
    step, share = _most_common(distances)
    regular = step > 0 and share >= 0.5 and distances.min() > 0 and not (distances % step).any()
    return step if regular else None


def _month_freq(days: Whole, joined: Mask) -> str | None:
    months = _month_of(days)
    for rule in ("E", "S", "BE", "BS"):
        if (_day_of_month(months, rule) != days).any():
            continue
        step = _regular_step(months, joined)
        if step is None:
            return None
        unit = next((name for name in "YQ" if step % _MONTH_UNITS[name] == 0), "M")
        phases = np.unique(months % _MONTH_UNITS[unit])
        unit = unit if len(phases) == 1 else "M"
        count = step // _MONTH_UNITS[unit]
        # The quarters' usual names: QS-JAN to QS-MAR for starts, QE-OCT to QE-DEC for ends.
        phase = int(phases[0]) + (9 if unit == "Q" and rule.endswith("E") else 0)
        name = rule[:-1] + unit + rule[-1] + ("" if unit == "M" else f"-{_MONTHS[phase]}")
        return f"{count}{name}" if count > 1 else name
    return None


def _day_freq(days: Whole, joined: Mask) -> str | None:
    weekdays = (days + _MONDAY_SHIFT) % 7
    if (weekdays < 5).all():
        business, _ = _ordinals(days, _Step("business", 1))
        weekend = (np.diff(days) == 3) & (np.diff(business) == 1) & joined
        if weekend.any() and _regular_step(business, joined) == 1:
            return "B"
    step = _regular_step(days, joined)
    if step is None:
        return None
    if step % 7 == 0 and len(np.unique(weekdays)) == 1:
        count, name = step // 7, f"W-{_WEEKDAYS[int(weekdays[0])]}"
    else:
        count, name = step, "D"
    return f"{count}{name}" if count > 1 else name


def _place(time: Stamps, freq: str, timezone: str | None) -> tuple[Stamps, Whole, Mask]:
    """The grid, the position of each stamp on it, and True where a stamp is off it."""
    alias, step = _parse(freq)
    if step.kind == "tick":
        whole = time.astype(np.int64)
        first = whole.min()
        positions, rest = np.divmod(whole - first, step.length)
        _check_extent(int(positions.max()) + 1, time, alias)
        grid = _stamps_of(first + np.arange(positions.max() + 1) * step.length)
        return grid, positions, rest != 0
    days, time_of_day = _split_days(to_local(time, timezone))
    ordinals, exact = _ordinals(days, step)
    first = ordinals.min()
    positions, rest = np.divmod(ordinals - first, step.length)
    _check_extent(int(positions.max()) + 1, time, alias)
    usual = _most_common(time_of_day)[0]
    grid = _stamps(first + np.arange(positions.max() + 1) * step.length, step, usual, timezone)
    # Comparing with the rebuilt stamps admits a day whose midnight the clocks skipped.
    return grid, positions, ~exact | (rest != 0) | (grid[positions] != time)


def _check_extent(length: int, time: Stamps, alias: str) -> None:
    if length > max(_MOST_EMPTY_ROWS, 100 * len(time)):
        first, last = (str(np.datetime_as_string(stamp, unit="s")) for stamp in (time.min(), time.max()))
        raise DataError(
            f"{len(time)} stamps from {first} to {last} would fill a calendar of {length} steps of {alias!r}; "
            "give a coarser --freq or mend the stamp that is far away"
        )


def _ordinals(days: Whole, step: _Step) -> tuple[Whole, Mask]:
    """Number of the unit each day falls in, and whether the day is the one that stands for it."""
    if step.kind == "day":
        return days + _MONDAY_SHIFT, np.ones(len(days), dtype=bool)
    if step.kind == "week":
        weeks, rest = np.divmod(days + _MONDAY_SHIFT - step.anchor, 7)
        return weeks, rest == 0
    if step.kind == "business":
        weeks, weekday = np.divmod(days + _MONDAY_SHIFT, 7)
        return weeks * 5 + np.minimum(weekday, 5), weekday < 5
    months = _month_of(days)
    units, rest = np.divmod(months - step.anchor, step.unit_months)
    return units, (rest == 0) & (_day_of_month(months, step.rule) == days)


def _stamps(ordinals: Whole, step: _Step, time_of_day: int | Whole, timezone: str | None) -> Stamps:
    """The inverse of ``_ordinals``: the stamp that stands for each unit."""
    if step.kind == "day":
        days = ordinals - _MONDAY_SHIFT
    elif step.kind == "week":
        days = ordinals * 7 - _MONDAY_SHIFT + step.anchor
    elif step.kind == "business":
        days = ordinals // 5 * 7 + ordinals % 5 - _MONDAY_SHIFT
    else:
        days = _day_of_month(ordinals * step.unit_months + step.anchor, step.rule)
    return to_utc(_stamps_of(days * _DAY + time_of_day), timezone)


def _month_of(days: Whole) -> Whole:
    return days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)


def _day_of_month(months: Whole, rule: str) -> Whole:
    """Day number that stands for each month under the rule S, E, BS or BE."""
    days: Whole = (months + rule.endswith("E")).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    days = days - rule.endswith("E")
    weekday = (days + _MONDAY_SHIFT) % 7
    if rule == "BS":
        return days + np.where(weekday >= 5, 7 - weekday, 0)
    return days - np.maximum(weekday - 4, 0) if rule == "BE" else days


def _split_days(local: Stamps) -> tuple[Whole, Whole]:
    days, time_of_day = np.divmod(local.astype(np.int64), _DAY)
    return days, time_of_day


def _stamps_of(nanoseconds: Whole) -> Stamps:
    return nanoseconds.astype("datetime64[ns]")


def _distances(whole: Whole) -> Whole:
    return whole[1:] - whole[:-1]
