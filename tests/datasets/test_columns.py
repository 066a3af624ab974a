"""Cells to numbers and dates, and columns to roles, where the readers' tests do not reach."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from trellis_ts.datasets.columns import Table, read_numbers
from trellis_ts.datasets.dates import UnreadableDateError, looks_like_dates, parse_dates
from trellis_ts.datasets.roles import find_roles
from trellis_ts.errors import DataError


def table(**columns):
    arrays = tuple(pa.array(cells) for cells in columns.values())
    return Table("data.csv", tuple(columns), arrays, np.arange(len(arrays[0])) + 2)


@pytest.mark.parametrize(
    ("text", "stamp"),
    [
        ("2024-03-31", "2024-03-31"),
        ("2024/3/1 0:00", "2024-03-01"),
        ("2024-03-31T18:05:07.25", "2024-03-31T18:05:07.250"),
        ("2024-03-31 18:05:07.123456789", "2024-03-31T18:05:07.123456789"),
        ("2024-03-31 24:00", "2024-04-01"),
        ("2024-03", "2024-03-01"),
        ("1949M11", "1949-11-01"),
        ("11/1949", "1949-11-01"),
        ("31.03.2024 18:05", "2024-03-31T18:05"),
        ("3/31/2024 6:05 PM", "2024-03-31T18:05"),
        ("3/31/2024 12:05 am", "2024-03-31T00:05"),
        ("31/3/24", "2024-03-31"),
        ("31/3/70", "1970-03-31"),
        ("31 March 2024", "2024-03-31"),
        ("31-Mar-24", "2024-03-31"),
        ("31-Mar-2024 18:05", "2024-03-31T18:05"),
        ("Sunday, 31st March 2024", "2024-03-31"),
        ("Mar 31, 2024", "2024-03-31"),
        ("Sept-2024", "2024-09-01"),
        ("2024Q3", "2024-07-01"),
        ("Q3 2024", "2024-07-01"),
        ("20240331T1805Z", "2024-03-31T18:05"),
    ],
)
def test_texts_that_are_dates(text, stamp):
    assert looks_like_dates(pa.array([text]), numbers_too=False)
    assert parse_dates(pa.array([text]), None).stamps[0] == np.datetime64(stamp)


@pytest.mark.parametrize(
    "text",
    ["1949", "20240331", "12", "1.5", "item2001", "A1-2024", "18:05", "2024-13-01", "2024Q5", "", "10.1.1.1", "H1"],
)
def test_texts_that_are_no_dates_by_themselves(text):
    assert not looks_like_dates(pa.array([text]), numbers_too=False)


@pytest.mark.parametrize(
    ("text", "stamp"), [("1949", "1949-01-01"), ("194911", "1949-11-01"), ("20240331", "2024-03-31")]
)
def test_numbers_are_dates_where_the_column_says_so(text, stamp):
    assert looks_like_dates(pa.array([text]), numbers_too=True)
    assert parse_dates(pa.array([text]), None).stamps[0] == np.datetime64(stamp)


@pytest.mark.parametrize(
    "text", ["2023-02-29", "2024-04-31", "2024-01-01 25:00", "2024-01-01 24:01", "2024-01-01 10:60"]
)
def test_days_and_times_there_are_not(text):
    with pytest.raises(UnreadableDateError, match="no such day or time") as error:
        parse_dates(pa.array(["2024-01-01", "2024-01-02", text]), None)
    assert error.value.index == 2


def test_offsets_are_taken_off():
    dates = parse_dates(pa.array(["2024-01-01 00:00:00+05:30", "2024-01-01T06:00+0530"]), None)
    assert dates.timezone == "+05:30"
    assert dates.stamps.tolist() == np.array(["2023-12-31T18:30", "2024-01-01T00:30"], "datetime64[ns]").tolist()


def test_half_of_the_cells_make_a_column_of_numbers():
    assert read_numbers(table(load=["1", "x", "y", "NA"]), "load") is None
    with pytest.raises(DataError, match=r"data.csv, row 3, column 'load': 'x' is not a number"):
        read_numbers(table(load=["1", "x", "NA"]), "load")
    with pytest.raises(DataError, match=r"data.csv, row 3, column 'load': 'x' is not a number"):
        read_numbers(table(load=["1", "x", "y"]), "load", required=True)


@pytest.mark.parametrize("cell", ["+5", " 5 ", "5.", "5e0", "0.5E+1", "05"])
def test_spellings_of_a_number(cell):
    values = read_numbers(table(load=["1", cell]), "load")
    assert values is not None
    np.testing.assert_array_equal(values, [1, 5])


def test_messages_quote_long_and_broken_cells_on_one_line():
    with pytest.raises(DataError) as error:
        read_numbers(table(load=["1", "2", "x\n" + "y" * 100]), "load")
    assert "'x\\nyyy" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_a_measurement_is_no_id():
    days = ["2024-01-01", "2024-01-02"] * 3
    roles = find_roles(
        table(date=days, shop=[*"aabbcc"], load=["1", "2", "3", "4", "5", "6"], open=["TRUE", "FALSE"] * 3),
        None, None, None, None,
    )  # fmt: skip
    assert (roles.time, roles.id, roles.channels, roles.ids) == ("date", "shop", ("load",), ("a", "b", "c"))


def test_an_id_that_differs_in_every_row_is_no_id():
    roles = find_roles(table(id=["7", "9"], date=["2024-01-01", "2024-01-02"], load=[1.0, 2.0]), None, None, None, None)
    assert roles.id is None
