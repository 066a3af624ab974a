"""Rows to series: ordered by time, without repeats, on a calendar without gaps."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trellis_ts.datasets.calendar import (
    first_off_grid,
    format_times,
    grid_positions,
    normalize_freq,
    search_freq,
    step_numbers,
    to_grid,
)
from trellis_ts.datasets.columns import shorten
from trellis_ts.datasets.resample import resample
from trellis_ts.errors import DataError
from trellis_ts.types import Columns, Panel, Series

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from trellis_ts.datasets.columns import Table
    from trellis_ts.datasets.roles import Roles

    Stamps = NDArray[np.datetime64]

# Dates read in the wrong order of day and month can still lie on a calendar, but leave it nearly empty.
_LEAST_FILLED = 0.5
# A series this long whose own calendar differs is of another kind, not one that happens to have gaps.
_TELLING_LENGTH = 8


class _Ordered(NamedTuple):
    """Rows of one series after the other, ascending in time and without repeats."""

    rows: NDArray[np.int64]
    """Which row of the table each was."""
    time: Stamps
    codes: NDArray[np.int64]
    joined: NDArray[np.bool_]
    """True where a row and the next belong to one series."""
    was_sorted: bool
    num_repeats: int

    def starts(self) -> NDArray[np.int64]:
        """First row of each series."""
        return np.concatenate(([0], np.flatnonzero(~self.joined) + 1))

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Half-open rows of each series."""
        return pairwise([*self.starts().tolist(), len(self.time)])


def build_panel(table: Table, roles: Roles, freq: str | None, *, regularize: bool = False) -> Panel:
    """The panel of a table whose columns have been converted.

    With known covariates, a series ends at its last value; later rows are the future of the covariates.

    Args:
        table: the table, for messages.
        roles: its columns.
        freq: the calendar; found if not given.
        regularize: bring stamps that are on no calendar, or occur several times, onto one.

    Raises:
        DataError: a stamp occurs twice with different values, the stamps lie on no common calendar, or a series with
            known covariates has no value.
    """
    notes = [*table.notes, *roles.notes]
    if regularize:
        table, roles, freq, resampled = resample(table, roles, freq)
        notes += resampled
    if roles.dates.swapped is None:
        ordered, freq = _calendar(table, roles, roles.dates.stamps, freq)
        day_first = roles.dates.day_first
    else:
        ordered, freq, day_first = _choose_order(table, roles, freq)
        order = "day before month" if day_first else "month before day"
        notes.append(f"dates were read with the {order}: only so are they regular")
    series, num_gaps, num_missing = _regular_series(table, roles, ordered, freq)
    if not ordered.was_sorted:
        notes.append("rows were not in the order of time and were sorted")
    if ordered.num_repeats:
        notes.append(f"{_count(ordered.num_repeats, 'exact duplicate row')} dropped")
    if num_gaps:
        notes.append(f"{_count(num_gaps, 'step')} absent from the calendar {freq!r} and kept as missing")
    if num_missing:
        notes.append(f"{_count(num_missing, 'value')} missing")
    notes += _covariate_notes(roles, ordered, series)
    columns = Columns(roles.time, roles.id, roles.channels, roles.keys, roles.covariates)
    return Panel(series, columns, freq, roles.dates.timezone, tuple(notes), table.source, day_first=day_first)


def _count(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"


def _calendar(table: Table, roles: Roles, stamps: Stamps, freq: str | None) -> tuple[_Ordered, str]:
    ordered = _order(table, roles, stamps)
    if freq is None:
        return ordered, _shared_freq(table, roles, ordered)
    freq = normalize_freq(freq)
    _check_freq(table, roles, ordered, freq)
    return ordered, freq


def _choose_order(table: Table, roles: Roles, freq: str | None) -> tuple[_Ordered, str, bool]:
    """Whether the day is first, where every date allows both: the order that gives a calendar, if only one does."""
    regular = {}
    for day_first, stamps in ((True, roles.dates.stamps), (False, roles.dates.swapped)):
        assert stamps is not None
        try:
            ordered, found = _calendar(table, roles, stamps, freq)
            parts = (to_grid(ordered.time[a:b], found, roles.dates.timezone)[0] for a, b in ordered.bounds())
            length = sum(len(part) for part in parts)
        except DataError:
            continue
        if len(ordered.time) >= _LEAST_FILLED * length:
            regular[day_first] = (ordered, found)
    if len(regular) == 1:
        day_first, (ordered, found) = regular.popitem()
        return ordered, found, day_first
    where = table.cell(int(np.argmax(roles.dates.stamps != roles.dates.swapped)), roles.time)
    raise DataError(f"{where} can be day/month or month/day, as can all others; give --day-first true or false")


def _order(table: Table, roles: Roles, stamps: Stamps) -> _Ordered:
    rows = np.argsort(roles.codes, kind="stable")
    joined = np.diff(roles.codes[rows]) == 0
    distances = np.diff(stamps[rows].astype(np.int64))
    was_sorted = not (joined & (distances < 0)).any()
    if not was_sorted:
        rows = np.lexsort((stamps, roles.codes))
        distances = np.diff(stamps[rows].astype(np.int64))
    repeated = np.flatnonzero(joined & (distances == 0))
    first, second = _all_cells(roles, rows[repeated]), _all_cells(roles, rows[repeated + 1])
    differ = ((first != second) & ~(np.isnan(first) & np.isnan(second))).any(axis=1)
    if differ.any():
        pair = repeated[int(np.argmax(differ))]
        _refuse_repeat(table, roles, stamps, int(rows[pair]), int(rows[pair + 1]))
    if len(repeated):
        rows = np.delete(rows, repeated + 1)
    codes = roles.codes[rows]
    return _Ordered(rows, stamps[rows], codes, np.diff(codes) == 0, was_sorted, len(repeated))


def _all_cells(roles: Roles, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Values and covariates of some rows of the table, side by side."""
    return roles.values[rows] if roles.extras is None else np.hstack((roles.values[rows], roles.extras[rows]))


def _refuse_repeat(table: Table, roles: Roles, stamps: Stamps, first: int, second: int) -> None:
    stamp = format_times(stamps[first : first + 1], "ns", roles.dates.timezone)[0]
    rows = f"{table.row(first)} and {table.row(second)}"
    hint = "keep one of the rows, average them with --regularize true, or name the column (or columns, as a,b) that "
    hint += "tells several series apart with --id NAME"
    of_series = _of_series(roles, first)
    raise DataError(f"{table.source}, {rows}: {stamp} occurs twice{of_series} with different values; {hint}")


def _of_series(roles: Roles, row: int) -> str:
    return "" if roles.id is None else f" in series {shorten(roles.ids[roles.codes[row]])}"


@contextmanager
def _told_where(table: Table, roles: Roles, row: int) -> Iterator[None]:
    """Put the table and the series before what a calendar, which knows neither, has to say."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{table.source}{_of_series(roles, row)}: {error}") from error


def _shared_freq(table: Table, roles: Roles, ordered: _Ordered) -> str:
    """The calendar of all series; a long enough one with a calendar of its own is refused."""
    found = search_freq(ordered.time, ordered.joined, roles.dates.timezone)
    _check_agreement(table, roles, ordered, found.freq)
    if found.freq is None:
        if found.offender is None:
            raise DataError(f"{table.source}: {found.problem}; give --freq")
        row = int(ordered.rows[found.offender])
        where = f"{table.source}, {table.row(row)}{_of_series(roles, row)}"
        hint = "mend or remove such rows, give --freq, or average them with --regularize true"
        if roles.dates.timezone == "UTC" and roles.dates.notes:
            hint += " (a Parquet file or frame can hold a time zone by name)"
        raise DataError(f"{where}: {found.problem}; {hint}")
    return found.freq


def _check_agreement(table: Table, roles: Roles, ordered: _Ordered, shared: str | None) -> None:
    """Refuse two series that each have a calendar, but not the same."""
    bounds = list(ordered.bounds())
    telling = np.array([stop - start >= _TELLING_LENGTH for start, stop in bounds])
    usual: tuple[str, int] | None = None
    if shared is not None:
        numbers = step_numbers(ordered.time, shared, roles.dates.timezone)
        single = np.append(~ordered.joined | (np.diff(numbers) == 1), True)
        edges = np.array([start for start, _ in bounds])
        shares = np.add.reduceat(single, edges, dtype=np.int64) / np.diff([*edges, len(ordered.time)])
        usual = (shared, bounds[int(np.argmax(shares))][0])
        telling &= shares <= 0.5
    for start, stop in (bounds[i] for i in np.flatnonzero(telling)):
        own = search_freq(ordered.time[start:stop], ordered.joined[start : stop - 1], roles.dates.timezone).freq
        if own is None:
            continue
        if usual is not None and own != usual[0]:
            pair = sorted([(usual[1], usual[0]), (start, own)])
            one, other = (f"series {shorten(roles.ids[ordered.codes[at]])}" for at, _ in pair)
            raise DataError(
                f"{table.source}: {one} has steps of {pair[0][1]!r} and {other} of {pair[1][1]!r}; "
                "keep series of one calendar in a table, or give --freq"
            )
        usual = usual or (own, start)


def _check_freq(table: Table, roles: Roles, ordered: _Ordered, freq: str) -> None:
    if grid_positions(ordered.time, ordered.starts(), freq, roles.dates.timezone) is not None:
        return
    for start, stop in ordered.bounds():
        with _told_where(table, roles, int(ordered.rows[start])):
            off = first_off_grid(ordered.time[start:stop], freq, roles.dates.timezone)
        if off is None:
            continue
        row = int(ordered.rows[start + off])
        stamp = format_times(ordered.time[start + off :][:1], "ns", roles.dates.timezone)[0]
        likely = search_freq(ordered.time, ordered.joined, roles.dates.timezone).freq
        hint = f"the stamps look like --freq {likely}" if likely else "give another --freq or mend the stamp"
        where = f"{table.source}, {table.row(row)}, column {roles.time!r}"
        raise DataError(f"{where}: {stamp}{_of_series(roles, row)} is not on the calendar {freq!r}; {hint}")


def _regular_series(table: Table, roles: Roles, ordered: _Ordered, freq: str) -> tuple[tuple[Series, ...], int, int]:
    """The series, how many steps of theirs no row was for, and how many values are missing in the others."""
    roles_of = [each.role for each in roles.covariates]
    past, known, static = (
        [column for column, role in enumerate(roles_of) if role == wanted] for wanted in ("past", "known", "static")
    )
    series, num_gaps, num_missing = [], 0, 0
    all_values = _in_order(roles.values, ordered.rows)
    all_extras = None if roles.extras is None else _in_order(roles.extras, ordered.rows)
    missing = np.concatenate(([0], np.cumsum(np.isnan(all_values).sum(axis=1))))
    is_whole = _without_gaps(ordered, freq, roles.dates.timezone)
    for index, (start, stop) in enumerate(ordered.bounds()):
        rows, code = ordered.rows[start:stop], int(ordered.codes[start])
        values, extras = all_values[start:stop], None if all_extras is None else all_extras[start:stop]
        grid = ordered.time[start:stop]
        num_rows = len(grid)
        if not is_whole[index]:
            with _told_where(table, roles, int(rows[0])):
                grid, positions = to_grid(grid, freq, roles.dates.timezone)
            values = _on_grid(values, positions, len(grid))
            extras = None if extras is None else _on_grid(extras, positions, len(grid))
        end = _last_observed(values) if known else len(grid)
        if end == 0:
            raise DataError(
                f"{table.source}, {table.row(int(rows[0]))}: series {shorten(roles.ids[code])} has rows of known "
                f"covariates and no value of {', '.join(roles.channels)}, so nothing says where its forecast begins; "
                "give it values or leave the series out"
            )
        num_gaps += len(grid) - num_rows
        kept = num_rows if end == len(grid) else int(np.searchsorted(ordered.time[start:stop], grid[end - 1], "right"))
        num_missing += int(missing[start + kept] - missing[start])
        series.append(
            Series(
                roles.ids[code],
                grid[:end],
                values[:end],
                np.take(extras[:end], past, axis=1) if extras is not None and past else None,
                np.take(extras, known, axis=1) if extras is not None and known else None,
                _static_values(table, roles, rows, static) if static else None,
                roles.key_values[code] if roles.key_values else (),
            )
        )
    return tuple(series), num_gaps, num_missing


def _in_order(values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The given rows, which are most often all as they stand; these are not copied."""
    return values if np.array_equal(rows, np.arange(len(values))) else values[rows]


def _without_gaps(ordered: _Ordered, freq: str, timezone: str | None) -> NDArray[np.bool_]:
    """Which series have a row at every step; where that takes a closer look, none is said to."""
    starts = ordered.starts()
    lengths = np.diff(starts, append=len(ordered.time))
    positions = grid_positions(ordered.time, starts, freq, timezone)
    if positions is None:
        return np.zeros(len(starts), dtype=bool)
    whole: NDArray[np.bool_] = positions[starts + lengths - 1] + 1 == lengths
    return whole


def _on_grid(values: NDArray[np.float64], positions: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    filled = np.full((length, values.shape[1]), np.nan)
    filled[positions] = values
    return filled


def _last_observed(values: NDArray[np.float64]) -> int:
    """Rows up to the last with a value; 0 where there is none."""
    observed = np.flatnonzero(~np.isnan(values).all(axis=1))
    return int(observed[-1]) + 1 if len(observed) else 0


def _static_values(table: Table, roles: Roles, rows: NDArray[np.int64], columns: list[int]) -> NDArray[np.float64]:
    """The one value of each attribute in a series' rows, NaN where they have none."""
    assert roles.extras is not None
    found = np.full(len(columns), np.nan)
    for index, column in enumerate(columns):
        values = roles.extras[rows, column]
        present = np.flatnonzero(~np.isnan(values))
        if not len(present):
            continue
        found[index] = values[present[0]]
        other = np.flatnonzero(values[present] != found[index])
        if len(other):
            name = roles.covariates[column].name
            first, second = int(rows[present[0]]), int(rows[present[other[0]]])
            raise DataError(
                f"{table.cell(second, name)}{_of_series(roles, second)}, but {table.row(first)} has "
                f"{shorten(str(table.column(name)[first].as_py()))}; a static attribute has one value per series, so "
                "mend it or make it a covariate"
            )
    return found


def _covariate_notes(roles: Roles, ordered: _Ordered, series: tuple[Series, ...]) -> list[str]:
    if roles.extras is None:
        return []
    notes = []
    num_future = sum(len(each.known) - len(each) for each in series if each.known is not None)
    if num_future:
        steps = "1 step after the last value is" if num_future == 1 else f"{num_future} steps after the last values are"
        notes.append(f"{steps} read as the future of the known covariates")
    missing = np.isnan(roles.extras[ordered.rows])
    is_future = np.concatenate(
        [ordered.time[a:b] > each.time[-1] for (a, b), each in zip(ordered.bounds(), series, strict=True)]
    )
    for covariate, column in zip(roles.covariates, missing.T, strict=True):
        absent = column[~is_future] if covariate.role == "past" else column
        if absent.all():
            notes.append(f"covariate {covariate.name!r} has no values at all")
        elif absent.any():
            values = "1 value" if absent.sum() == 1 else f"{absent.sum()} values"
            notes.append(f"{values} of covariate {covariate.name!r} missing, which is masked")
    return notes
