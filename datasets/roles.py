"""What each column of a table is for: times, ids, what is to be forecast. Found by name and by what the cells are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from trellis_ts.datasets.columns import (
    COMMA_NUMBER,
    NUMBER,
    MissingColumnError,
    as_texts,
    cell_texts,
    nearest,
    quote,
    read_numbers,
)
from trellis_ts.datasets.dates import Dates, UnreadableDateError, looks_like_dates, parse_dates
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.datasets.columns import Table
    from trellis_ts.types import Covariate

    Stamps = NDArray[np.datetime64]
    Values = NDArray[np.float64]
    Mask = NDArray[np.bool_]

_TIME_NAMES = {
    "ds",
    "date",
    "dates",
    "time",
    "times",
    "timestamp",
    "datetime",
    "day",
    "month",
    "year",
    "week",
    "quarter",
}
_TIME_NAMES |= {"period", "invoicedate", "datum", "utc"}
_ID_NAMES = {"uniqueid", "itemid", "seriesid", "id", "series", "tsid", "seriesname", "item"}
# Parts of a date in columns of their own would tell the rows of one series apart.
_DATE_PARTS = {"year", "month", "day", "week", "quarter", "hour", "minute", "weekday", "time", "season"}
_COUNTER_NAMES = {"id", "index", "row", "rownumber", "no", "nr", "unnamed0", "column1"}
_TARGET_NAMES = ("y", "target", "value")
# Stamps repeat in a table of several series; a few repeats in a table of one are a mistake in it.
_REPEATS_OF_A_LONG_TABLE = 0.1
_TIME_HINT = "say which column holds the times with --time NAME"


class Roles(NamedTuple):
    """What the columns of a table were found to be, with the cells converted."""

    time: str
    id: str | None
    channels: tuple[str, ...]
    dates: Dates
    codes: NDArray[np.int64]
    """Which series each row belongs to."""
    ids: tuple[str, ...]
    values: Values
    notes: tuple[str, ...]
    keys: tuple[str, ...] = ()
    """The columns that name the series together; ``id`` is their names joined by commas."""
    key_values: tuple[tuple[str, ...], ...] = ()
    """What they hold, for each of ``ids``."""
    covariates: tuple[Covariate, ...] = ()
    extras: Values | None = None
    """``[row, covariate]``: numbers and positions among the categories, NaN where missing."""


def find_roles(
    table: Table,
    time: str | None,
    target: Sequence[str] | None,
    id: str | None,
    day_first: bool | None,
    reserved: Sequence[str] = (),
) -> Roles:
    """Decide which column holds times, ids and channels, by name and by what the cells are, and convert them.

    Columns in ``reserved`` have a role already.

    Raises:
        DataError: a column named is absent, a role has no column or several, or a cell cannot be converted.
    """
    if time is not None and time not in table.names:
        raise _missing_column(table, "--time", time)
    keys = () if id is None else split_names(table, "--id", [id])
    asked = split_names(table, "--target", [target] if isinstance(target, str) else target or ())
    given = [name for name in (time, *keys, *asked, *reserved) if name is not None]
    if len(set(given)) < len(given):
        repeated = next(name for name in given if given.count(name) > 1)
        raise DataError(f"{table.source}: column {repeated!r} is named for two roles; give it one of them")
    time = time or _find_time(table, [name for name in table.names if name not in given])
    dates = _read_dates(table, time, day_first)
    others = [name for name in table.names if name != time and name not in reserved]
    if not keys and (found := _find_id(table, [name for name in others if name not in asked], dates.stamps)):
        keys = (found,)
    id = ",".join(keys) or None
    codes, ids, key_values = _read_ids(table, keys)
    channels, values, notes = _read_channels(table, [name for name in others if name not in keys], list(asked), id)
    roles = Roles(time, id, channels, dates, codes, ids, values, (*dates.notes, *notes))
    return roles._replace(keys=keys, key_values=key_values) if len(keys) > 1 else roles


def stamp_roles(table: Table, time: str, keys: Sequence[str], day_first: bool | None) -> Roles:
    """The times and series of a table in which nothing is to be forecast.

    Raises:
        DataError: one of the columns is absent, or a cell cannot be converted.
    """
    for option, name in (("--time", time), *(("--id", name) for name in keys)):
        if name not in table.names:
            raise _missing_column(table, option, name)
    dates = _read_dates(table, time, day_first)
    codes, ids, key_values = _read_ids(table, keys)
    empty = np.empty((len(table), 0))
    return Roles(time, ",".join(keys) or None, (), dates, codes, ids, empty, dates.notes, tuple(keys), key_values)


def split_names(table: Table, option: str, given: Sequence[str]) -> tuple[str, ...]:
    """Names of columns, of which one text may hold several: ``store,item``, unless a column is called so.

    Raises:
        MissingColumnError: there is no such column.
    """
    names: list[str] = []
    for text in given:
        parts = text.split(",")
        while parts:
            # The longest beginning that is a column's name, as names may hold commas themselves.
            ends = (end for end in range(len(parts), 0, -1) if ",".join(parts[:end]).strip() in table.names)
            end = next(ends, None)
            if end is None:
                raise _missing_column(table, option, parts[0].strip())
            names.append(",".join(parts[:end]).strip())
            parts = parts[end:]
    return tuple(names)


def _missing_column(table: Table, option: str, name: str) -> MissingColumnError:
    near = nearest(name, table.names)
    hint = f"did you mean {near!r}? columns are" if near else f"name one with {option}:"
    return MissingColumnError(f"{table.source}: there is no column {name!r}; {hint} {quote(table.names)}")


def _named_like(name: str, known: set[str]) -> bool:
    return re.sub(r"[^a-z0-9]", "", name.lower()) in known


def _could_be_dates(table: Table, name: str, numbers_too: bool) -> bool:
    column = table.column(name)
    if pa.types.is_timestamp(column.type):
        return True
    if pa.types.is_integer(column.type) and numbers_too:
        column = pc.cast(column.drop_null(), pa.string())
    elif not pa.types.is_string(column.type):
        return False
    sample = pa.concat_arrays([column.slice(0, 200), column.slice(max(len(column) - 50, 0))])
    texts, missing = cell_texts(sample)
    return looks_like_dates(texts.filter(pa.array(~missing)), numbers_too)


def _find_time(table: Table, names: list[str]) -> str:
    candidates = [name for name in names if _could_be_dates(table, name, numbers_too=False)]
    named = [name for name in names if _named_like(name, _TIME_NAMES)]
    candidates = candidates or [name for name in named if _could_be_dates(table, name, numbers_too=True)]
    if len(candidates) > 1:
        usual = [name for name in candidates if name == "ds"]
        if usual and {"unique_id", "y"} & set(table.names):
            return "ds"
        hold = "both hold dates" if len(candidates) == 2 else "all hold dates"
        listed = f"{quote(candidates[:-1])} and {candidates[-1]!r}"
        raise DataError(f"{table.source}: columns {listed} {hold}; say which with --time {_shell(candidates[0])}")
    if candidates:
        return candidates[0]
    if len(named) == 1:
        return named[0]  # its cells are refused by row
    raise DataError(f"{table.source}: no column holds dates; {_TIME_HINT} (columns are {quote(table.names)})")


def _shell(name: str) -> str:
    return name if re.fullmatch(r"[\w.#%-]+", name) else f'"{name}"'


def _read_dates(table: Table, name: str, day_first: bool | None) -> Dates:
    column = table.column(name)
    if pa.types.is_floating(column.type):
        column = _whole_as_text(column)
    if pa.types.is_timestamp(column.type):
        missing = pc.is_null(column).to_numpy(zero_copy_only=False)
    elif pa.types.is_string(column.type) or pa.types.is_integer(column.type):
        column, missing = cell_texts(pc.cast(column, pa.string()))
    else:
        raise DataError(f"{table.source}: column {name!r} holds {column.type}, not dates; {_TIME_HINT}")
    if missing.any():
        where = f"{table.source}, {table.row(int(np.argmax(missing)))}, column {name!r}"
        raise DataError(f"{where}: the time is missing; fill it in or remove the row")
    if pa.types.is_timestamp(column.type):
        return _typed_dates(table, name, column)
    # Times repeat in a long table: each is parsed once.
    encoded = column.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    try:
        dates = parse_dates(encoded.dictionary, day_first)
    except UnreadableDateError as error:
        where = table.cell(int(np.argmax(codes == error.index)), name)
        raise DataError(f"{where} {error}, or {_TIME_HINT}") from error
    swapped = None if dates.swapped is None else dates.swapped[codes]
    return Dates(dates.stamps[codes], dates.timezone, swapped, dates.notes, dates.day_first)


def _whole_as_text(column: Any) -> Any:
    """Years like 1949.0 as text; a column of numbers with a missing one is floating in a frame."""
    try:
        return pc.cast(pc.cast(column, pa.int64()), pa.string())
    except pa.ArrowInvalid:
        return pc.cast(column, pa.string())


def _typed_dates(table: Table, name: str, column: Any) -> Dates:
    try:
        stamps = pc.cast(column, pa.timestamp("ns", column.type.tz)).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"{table.source}: column {name!r} has times outside the years 1678 to 2261") from error
    timezone = "UTC" if column.type.tz in ("Etc/UTC", "GMT", "Z", "+00:00") else column.type.tz
    return Dates(stamps.astype("datetime64[ns]"), timezone)


def _find_id(table: Table, names: list[str], stamps: Stamps) -> str | None:
    distinct, stamp_codes = np.unique(stamps, return_inverse=True)
    named = [name for name in names if _named_like(name, _ID_NAMES)]
    named = [name for name in named if len(distinct) < len(stamps) or _num_distinct(table, name) * 2 <= len(stamps)]
    if "unique_id" in named:
        return "unique_id"
    if len(named) == 1 or len(stamps) - len(distinct) <= _REPEATS_OF_A_LONG_TABLE * len(stamps):
        return _only(table, named)
    if not named:
        # A repeated row would keep any column from telling the series apart.
        keep = _first_of_repeats(table)
        kinds = {name: _kind(table, name) for name in names if not _named_like(name, _DATE_PARTS)}
        for kind in ("text", "integer"):
            likely = [name for name in kinds if kinds[name] == kind]
            named = named or [name for name in likely if _tells_apart(table.column(name), stamp_codes, keep)]
    return _only(table, named)


def _only(table: Table, candidates: list[str]) -> str | None:
    if len(candidates) > 1:
        listed = f"{quote(candidates[:-1])} and {candidates[-1]!r}"
        hint = f"say which with --id {_shell(candidates[0])}"
        raise DataError(f"{table.source}: columns {listed} could each name the series; {hint}")
    return candidates[0] if candidates else None


def _kind(table: Table, name: str) -> str:
    """``integer`` or ``text`` for a column that could name series, else an empty string."""
    column = table.column(name)
    if pa.types.is_integer(column.type):
        return "integer"
    if not pa.types.is_string(column.type):
        return ""
    texts, missing = cell_texts(column)
    present = texts.filter(pa.array(~missing))
    if not len(present) or pc.all(pc.match_substring_regex(pc.utf8_lower(present), "^(?:true|false)$")).as_py():
        return ""
    if pc.all(pc.match_substring_regex(present, r"^\d+$")).as_py():
        return "integer"
    numeric = pc.mean(pc.match_substring_regex(present, COMMA_NUMBER if table.decimal_comma else NUMBER)).as_py()
    # Codes like 85123A among plain digits name series; 1.5 among them is a measurement with mistakes.
    codes = pc.all(pc.match_substring_regex(present, r"^[\w -]+$")).as_py()
    return "text" if numeric < 0.5 or (codes and numeric < 1) else ""


def _codes(column: Any) -> NDArray[np.int64]:
    encoded = column.dictionary_encode(null_encoding="encode")
    codes: NDArray[np.int64] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _num_distinct(table: Table, name: str) -> int:
    return int(_codes(table.column(name)).max()) + 1


def _first_of_repeats(table: Table) -> Mask:
    rows = np.zeros(len(table), dtype=np.int64)
    for column in table.columns:
        codes = _codes(column)
        rows = np.unique(rows * (codes.max() + 1) + codes, return_inverse=True)[1].astype(np.int64)
    keep = np.zeros(len(table), dtype=bool)
    keep[np.unique(rows, return_index=True)[1]] = True
    return keep


def _tells_apart(column: Any, stamp_codes: NDArray[np.int64], keep: Mask) -> bool:
    codes = _codes(column)[keep]
    distinct = int(codes.max()) + 1
    pairs = stamp_codes[keep] * distinct + codes
    return distinct * 2 <= len(codes) and len(np.unique(pairs)) == len(codes)


def _read_ids(
    table: Table, names: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The series each row belongs to, the names of the series, and what each column holds for them."""
    if not names:
        return np.zeros(len(table), dtype=np.int64), ("",), ()
    columns = [_id_texts(table, name) for name in names]
    if len(columns) == 1:
        return _codes(columns[0]), tuple(pc.unique(columns[0]).to_pylist()), ()
    combined = np.zeros(len(table), dtype=np.int64)
    for column in columns:
        codes = _codes(column)
        combined = np.unique(combined * (int(codes.max()) + 1) + codes, return_inverse=True)[1].astype(np.int64)
    _, first, codes = np.unique(combined, return_index=True, return_inverse=True)
    order = np.argsort(first)  # series in the order of their first rows
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    parts = [column.take(pa.array(first[order])).to_pylist() for column in columns]
    key_values = tuple(zip(*parts, strict=True))
    return rank[codes], tuple(join_key(values) for values in key_values), key_values


def join_key(values: Sequence[str]) -> str:
    """One name for a series that several columns name; no two series share it."""
    return "/".join(value.replace("\\", "\\\\").replace("/", "\\/") for value in values)


def _id_texts(table: Table, name: str) -> Any:
    column = as_texts(table.column(name), table.source, name)
    # Only an empty cell is missing here: NA is a country.
    missing = pc.fill_null(pc.equal(column, ""), True).to_numpy(zero_copy_only=False)
    if missing.any():
        where = f"{table.source}, {table.row(int(np.argmax(missing)))}, column {name!r}"
        raise DataError(f"{where}: the name of the series is missing; fill it in or remove the row")
    return column


def _counts_rows(name: str, values: Values | None) -> bool:
    """Whether a column is the row number that frames and spreadsheets write along."""
    if values is None or len(values) < 2 or not _named_like(name, _COUNTER_NAMES):
        return False
    return values[0] in (0, 1) and bool((np.diff(values) == 1).all())


def _read_channels(
    table: Table, names: list[str], asked: list[str], id: str | None
) -> tuple[tuple[str, ...], Values, list[str]]:
    notes: list[str] = []
    wanted = asked or names
    usual = [name for known in _TARGET_NAMES for name in names if name.lower() == known]
    if id is not None and not asked and usual and read_numbers(table, usual[0]) is not None:
        wanted = usual[:1]
        if len(names) > 1:
            left_out = quote(name for name in names if name != usual[0])
            notes.append(f"only column {usual[0]!r} is read; left out: {left_out}; choose others with --target")
    columns = {name: read_numbers(table, name, required=name in asked) for name in wanted}
    counters = [name for name, values in columns.items() if name not in asked and _counts_rows(name, values)]
    if counters:
        notes.append(f"left out because they only count the rows: {quote(counters)}")
        columns = {name: values for name, values in columns.items() if name not in counters}
    numbers = {name: values for name, values in columns.items() if values is not None}
    texts = [name for name in columns if name not in numbers]
    if texts:
        notes.append(f"left out because they hold no numbers: {quote(texts)}")
    if not numbers:
        raise DataError(f"{table.source}: no column holds numbers; columns are {quote(table.names)}; see --target")
    for name, values in numbers.items():
        present = values[~np.isnan(values)]
        if not len(present):
            raise DataError(f"{table.source}: column {name!r} has no values at all; leave it out with --target OTHERS")
        if len(values) > 1 and present.min() == present.max():
            notes.append(f"column {name!r} is constant: {present[0]:g}")
    return tuple(numbers), np.column_stack(list(numbers.values())), notes
