"""Columns of a table: its cells as numbers and texts, and how messages speak of them.

A table is text, as from a CSV file, or typed, as from Parquet or a frame; both are read by the same rules. Every
refusal names the source, the row and the column.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Stamps = NDArray[np.datetime64]
    Values = NDArray[np.float64]
    Mask = NDArray[np.bool_]

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "null", "NULL", "None", "NaT", "-", ".", "?")
NUMBER = r"^[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|(?i:inf(?:inity)?))$"
COMMA_NUMBER = r"^[+-]?(?:\d+|\d{1,3}(?:\.\d{3})+)(?:,\d+)?(?:[eE][+-]?\d+)?$"
_DECIMAL_COMMA = r"^[+-]?[\d.]*\d,\d+(?:[eE][+-]?\d+)?$"


class MissingColumnError(DataError):
    """A column that was asked for is not in the table."""


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length as they were read, and how to speak of them."""

    source: str
    names: tuple[str, ...]
    columns: tuple[Any, ...]
    """Arrow arrays, one per name."""
    rows: NDArray[np.int64] | None = None
    """Row numbers as a spreadsheet counts them; None for typed tables, which have positions."""
    decimal_comma: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    def column(self, name: str) -> Any:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        """The columns; of two with one name the first."""
        return dict(zip(reversed(self.names), reversed(self.columns), strict=True))

    def row(self, index: int) -> str:
        """How a message names a row."""
        return f"row {index} (counted from 0)" if self.rows is None else f"row {self.rows[index]}"

    def cell(self, index: int, name: str) -> str:
        """How a message names a cell and what is in it."""
        value = self.column(name)[index].as_py()
        return f"{self.source}, {self.row(index)}, column {name!r}: {shorten(str(value))}"

    def take(self, rows: NDArray[np.int64]) -> Table:
        """The same table with some of its rows, in the order given."""
        chosen = pa.array(rows)
        numbers = np.arange(len(self), dtype=np.int64) if self.rows is None else self.rows
        columns = tuple(column.take(chosen) for column in self.columns)
        return Table(self.source, self.names, columns, numbers[rows], self.decimal_comma, self.notes)

    def keep(self, mask: Mask, note: str) -> Table:
        """The same table with fewer rows."""
        chosen = pa.array(mask)
        columns = tuple(column.filter(chosen) for column in self.columns)
        rows = np.arange(len(self), dtype=np.int64) if self.rows is None else self.rows
        return Table(self.source, self.names, columns, rows[mask], self.decimal_comma, (*self.notes, note))


def shorten(text: str) -> str:
    """A value as messages quote it: on one line and not too long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def quote(names: Iterable[str], most: int = 12) -> str:
    """Column names as messages list them."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The most similar of some names, upper and lower case being alike."""
    folded = {other.lower(): other for other in reversed(known)}
    near = difflib.get_close_matches(name.lower(), list(folded), n=1)
    return folded[near[0]] if near else None


def decode_names(schema: Any) -> None:
    """Meet every name in an Arrow schema once: of a forged file they may hold no text, which shows on asking only.

    Raises:
        UnicodeDecodeError: a column's or a time zone's name is no UTF-8.
    """
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        _ = field.name, getattr(kind, "tz", None)


def has_decimal_commas(columns: Iterable[Any]) -> bool:
    """Whether some text column holds numbers written with a comma, like 3,14."""
    for column in columns:
        texts, missing = cell_texts(column)
        texts = texts.filter(pa.array(~missing)).slice(0, 1000)
        fits = pc.match_substring_regex(texts, COMMA_NUMBER).to_numpy(zero_copy_only=False)
        if len(fits) and fits.mean() >= 0.5 and pc.any(pc.match_substring_regex(texts, _DECIMAL_COMMA)).as_py():
            return True
    return False


def read_numbers(
    table: Table, name: str, required: bool = False, hint: str = "name other columns with --target"
) -> Values | None:
    """A column as numbers, NaN where missing; None for a column of text.

    Args:
        table: The table.
        name: Which column.
        required: Refuse the first cell that is no number even where most are not, and read TRUE and FALSE as 1 and 0.
        hint: What a refusal says that one can do beside mending the cell.

    Raises:
        DataError: a cell is no number although half of them are, or is infinite.
    """
    column = table.column(name)
    if pa.types.is_string(column.type):
        values = _numbers_of_texts(table, name, required, hint)
    elif pa.types.is_boolean(column.type) and not required:
        return None
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        values = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    elif required:
        raise DataError(f"{table.source}: column {name!r} holds {column.type}, not numbers; {hint}")
    else:
        return None
    if values is None:
        return None
    infinite = np.isinf(values)
    if infinite.any():
        where = table.cell(int(np.argmax(infinite)), name)
        raise DataError(f"{where} is infinite; write a finite number or leave the cell empty")
    return values


def as_texts(column: Any, source: str, name: str) -> Any:
    """An Arrow array as text, whatever it holds.

    Raises:
        DataError: it cannot be written as text: bytes that are none, or lists.
    """
    try:
        return column if pa.types.is_string(column.type) else pc.cast(column, pa.string())
    except pa.ArrowException as error:
        kind = str(column.type)
        hint = "write it as text, or leave it out"
        raise DataError(f"{source}: column {name!r} holds {kind} that cannot be read as text; {hint}") from error


def cell_texts(column: Any) -> tuple[Any, Mask]:
    """The cells of a text column without white space around them, and True where one is missing."""
    texts = pc.utf8_trim_whitespace(column)
    missing = pc.is_in(texts, value_set=pa.array([*MISSING, None], pa.string()))
    return texts, missing.to_numpy(zero_copy_only=False)


def _numbers_of_texts(table: Table, name: str, required: bool, hint: str) -> Values | None:
    if not table.decimal_comma:
        try:
            return _floats(table.column(name))  # the usual case: complete, and nothing to be replaced
        except pa.ArrowInvalid:
            pass
    texts, missing = cell_texts(table.column(name))
    if missing.all():
        return np.full(len(texts), np.nan)
    texts = pc.if_else(pa.array(missing), None, texts)
    if table.decimal_comma and pc.all(pc.match_substring_regex(texts, COMMA_NUMBER)).as_py():
        texts = pc.replace_substring(pc.replace_substring(texts, ".", ""), ",", ".")
    if required:
        lower = pc.utf8_lower(texts)
        if pc.all(pc.is_in(lower, value_set=pa.array(["true", "false", None], pa.string()))).as_py():
            texts = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.is_valid(lower), "0", None))
    try:
        return _floats(texts)
    except pa.ArrowInvalid:
        numeric = pc.match_substring_regex(texts, NUMBER).fill_null(True).to_numpy(zero_copy_only=False)
    if not required and (numeric & ~missing).sum() * 2 < (~missing).sum():
        return None
    where = table.cell(int(np.argmin(numeric)), name)
    raise DataError(f"{where} is not a number; mend or empty the cell, or {hint}")


def _floats(texts: Any) -> Values:
    floats: Values = pc.cast(texts, pa.float64()).to_numpy(zero_copy_only=False)
    return floats
