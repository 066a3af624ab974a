"""Tables: what is refused, what is accepted with a note, and that nothing else is changed."""

from __future__ import annotations

import gzip
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_ts.datasets.readers import panel_from_frame, read_rows, read_table
from trellis_ts.errors import DataError

DAYS = [f"2024-01-{day:02d}" for day in range(1, 11)]


def lines(*rows, header="date,load"):
    return "\n".join((header, *rows)) + "\n"


def daily(**changes):
    """Ten days of loads, with some rows replaced."""
    rows = [f"{day},{i}.5" for i, day in enumerate(DAYS)]
    for position, row in changes.items():
        rows[int(position.removeprefix("row")) - 2] = row
    return lines(*rows)


def long_table(second=DAYS, header="id,date,load"):
    """Two series, a and b."""
    return lines(
        *(f"a,{day},{i}" for i, day in enumerate(DAYS)),
        *(f"b,{day},{i + 50}" for i, day in enumerate(second)),
        header=header,
    )


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, **options):
    with pytest.raises(DataError) as error:
        read_table(path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


TWO_DATES = lines(*(f"{day},{day},{i}" for i, day in enumerate(DAYS)), header="Time,Date,load")
AMBIGUOUS = lines(*(f"{i:02d}/01/2024,{i}" for i in range(1, 11)))
REFUSED = {
    "header only": ("date,load\n", {}, ["there is a header but no rows", "add rows"]),
    "no time column": (
        lines("a,1", "b,2", header="name,load"),
        {},
        ["no column holds dates", "--time NAME", "'name', 'load'"],
    ),
    "two time columns": (TWO_DATES, {}, ["columns 'Time' and 'Date' both hold dates", "--time Time"]),
    "not a date": (daily(row7="soon,1"), {}, ["row 7", "column 'date'", "'soon'", "mend it or remove the row"]),
    "no such day": (daily(row7="2024-02-30,1"), {}, ["row 7", "column 'date'", "'2024-02-30'", "no such day"]),
    "missing time": (daily(row7=",1"), {}, ["row 7", "column 'date'", "the time is missing", "fill it in"]),
    "integers for dates": (
        lines("1,5", "2,6", header="ds,y"),
        {},
        ["row 2", "'ds'", "'1' is not a date", "2024-03-31"],
    ),
    "dates too early": (daily(row2="1066-10-14,1"), {}, ["row 2", "'1066-10-14'", "outside the years 1678 to 2261"]),
    "ambiguous order": (
        AMBIGUOUS,
        {},
        ["row 3", "'date'", "'02/01/2024'", "day/month or month/day", "--day-first true"],
    ),
    "wrong order given": (
        lines("13/01/2024,1", "14/01/2024,2", "15/01/2024,3"),
        {"day_first": False},
        ["row 2", "'13/01/2024'", "month/day", "--day-first true"],
    ),
    "two orders": (
        lines("13/01/2024,1", "14/01/2024,2", "01/15/2024,3"),
        {},
        ["row 4", "'01/15/2024'", "day/month of the others"],
    ),
    "repeated stamp": (
        daily(row7="2024-01-02,9"),
        {},
        ["row 3 and row 7", "2024-01-02T00:00:00", "different values", "--id"],
    ),
    "repeated stamp in a series": (
        long_table([*DAYS[:8], DAYS[0], DAYS[9]]),
        {},
        ["row 12 and row 20", "2024-01-01T00:00:00", "in series 'b'", "keep one of the rows"],
    ),
    "month in a column of its own": (
        lines(
            *(f"{year},{month},{year + month}.5" for year in range(1990, 1995) for month in range(1, 13)),
            header="year,month,y",
        ),
        {},
        ["row 2 and row 3", "1990-01-01T00:00:00 occurs twice", "--id NAME"],
    ),
    "not a number below blank lines": ("\n\n" + daily(row7="2024-01-06,abc"), {}, ["row 9", "'abc' is not a number"]),
    "not a number": (
        daily(row7="2024-01-06,abc"),
        {},
        ["row 7", "column 'load'", "'abc' is not a number", "empty the cell"],
    ),
    "text as target": (
        lines(*(f"{day},x,{i}" for i, day in enumerate(DAYS)), header="date,kind,load"),
        {"target": ["kind"]},
        ["row 2", "column 'kind'", "'x' is not a number", "--target"],
    ),
    "infinite": (
        daily(row7="2024-01-06,inf"),
        {},
        ["row 7", "column 'load'", "'inf' is infinite", "leave the cell empty"],
    ),
    "too large": (daily(row7="2024-01-06,-1e999"), {}, ["row 7", "column 'load'", "'-1e999' is infinite", "finite"]),
    "column without values": (
        lines(*(f"{day},{i}," for i, day in enumerate(DAYS)), header="date,load,wind"),
        {},
        ["column 'wind' has no values", "--target"],
    ),
    "no numbers": (lines(*(f"{day},x" for day in DAYS)), {}, ["no column holds numbers", "'date', 'load'", "--target"]),
    "short row": (daily(row7="2024-01-06"), {}, ["row 7", "expected 2 columns, found 1", "separator"]),
    "long row": (daily(row7="2024-01-06,5,6"), {}, ["row 7", "expected 2 columns, found 3", "separator"]),
    "long row after a blank line": (daily(row5="", row7="a,5,6"), {}, ["row 7", "expected 2 columns, found 3"]),
    "two columns of one name": (
        lines("2024-01-01,1,2", header="date,load,load"),
        {},
        ["two columns are called 'load'", "rename"],
    ),
    "irregular": (daily(row7="2024-01-06 07:00,5"), {}, ["row 7", "no regular grid", "2024-01-06T07:00:00", "--freq"]),
    "irregular series": (
        long_table([*DAYS[:5], "2024-01-06 07:00", *DAYS[6:]]),
        {},
        ["row 17", "in series 'b'", "2024-01-06T07:00:00", "--freq"],
    ),
    "off the freq given": (daily(), {"freq": "W"}, ["row 2", "2024-01-01T00:00:00", "'W-SUN'", "--freq D"]),
    "too few rows": (lines("2024-01-01,1", "2024-01-02,2"), {}, ["2 stamps are too few", "give --freq"]),
    "unknown time": (daily(), {"time": "dat"}, ["no column 'dat'", "did you mean 'date'?", "'date', 'load'"]),
    "unknown id": (daily(), {"id": "shop"}, ["no column 'shop'", "--id", "'date', 'load'"]),
    "unknown target": (daily(), {"target": ["Laod"]}, ["no column 'Laod'", "did you mean 'load'?"]),
    "one column in two roles": (daily(), {"target": ["date"], "time": "date"}, ["'date' is named for two roles"]),
    "two id columns": (
        lines(*(f"{s},{s * 2},{day},{i}.5" for s in "ab" for i, day in enumerate(DAYS)), header="shop,city,date,load"),
        {},
        ["columns 'shop' and 'city' could each name the series", "--id shop"],
    ),
    "missing id": (long_table().replace("b,2024-01-03", ",2024-01-03"), {}, ["row 14", "column 'id'", "is missing"]),
    "two calendars": (
        long_table([f"2024-01-01 {hour:02d}:00" for hour in range(24)]),
        {},
        ["series 'a' has steps of 'D' and series 'b' of 'h'", "--freq"],
    ),
    "aware and naive": (
        daily(row7="2024-01-06 00:00+01:00,1"),
        {},
        ["row 7", "'2024-01-06 00:00+01:00'", "UTC offset"],
    ),
    "no header": (
        lines(*daily().splitlines()[2:], header="2024-01-01,5"),
        {},
        ["row 1", "'2024-01-01'", "add a header row"],
    ),
    "times run across": (lines("a,1,2", header="name,2024-01-01,2024-01-02"), {}, ["run across", "one time per row"]),
    "absurd extent": (daily(row2="1900-01-01 00:00:01,1"), {"freq": "s"}, ["would fill a calendar", "coarser --freq"]),
    "workbook": (b"PK\x03\x04abc", {}, ["workbook", "save the table as CSV"]),
    "empty": ("", {}, ["the file is empty"]),
    "blank": (" \n\n", {}, ["the file is empty"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, write):
    content, options, parts = REFUSED[case]
    message = refusal(write(content), **options)
    for part in parts:
        assert part in message


def test_missing_file_suggests_the_nearest(write):
    path = write(daily(), "sales_2024.csv")
    message = refusal(path.with_name("sale_2024.csv"))
    assert f"did you mean {path}?" in message
    assert "benchmark" in message


def test_folder_and_unknown_kind_of_file_are_refused(write, tmp_path):
    path = write(daily())
    assert f"give one CSV or Parquet file, like {path}" in refusal(tmp_path)
    assert "save the table as one of .csv" in refusal(write(b"", "data.xlsx"))


def test_unreadable_files_are_refused(write):
    assert "not a readable Parquet file" in refusal(write(b"not parquet at all", "data.parquet"))
    assert "cannot be read" in refusal(write(gzip.compress(daily().encode())[:-20], "data.csv.gz"))


def spread(text):
    return text.replace(",", ";").replace(".", ",")


OFFSETS = [f"2024-03-{day}T00:00:00+0{1 if day < 31 else 2}:00" for day in (29, 30, 31)]
ACCEPTED = {
    "plain": (daily(), {}, []),
    "unsorted": (
        lines(*reversed(daily().splitlines()[1:])),
        {},
        ["rows were not in the order of time and were sorted"],
    ),
    "gap": (daily(row7=""), {}, ["1 step is absent from the calendar 'D' and kept as missing"]),
    "duplicate rows": (daily() + "2024-01-10,9.5\n2024-01-10,9.5\n", {}, ["2 exact duplicate rows are dropped"]),
    "byte-order mark": (b"\xef\xbb\xbf" + daily().encode(), {}, ["the file starts with a UTF-8 byte-order mark"]),
    "UTF-16": (daily().encode("utf-16"), {}, ["the file is UTF-16"]),
    "Latin-1": (
        lines(*(f"{row},é" for row in daily().splitlines()[1:]), header="date,load,ort").encode("latin-1"),
        {},
        ["the file is not UTF-8 and was read as Latin-1", "left out because they hold no numbers: 'ort'"],
    ),
    "semicolons and decimal commas": (
        spread(daily()),
        {},
        ["columns are separated by semicolons", "numbers are written with decimal commas"],
    ),
    "tabs": (daily().replace(",", "\t"), {}, ["columns are separated by tabs"]),
    "bars": (daily().replace(",", "|"), {}, ["columns are separated by vertical bars"]),
    "text column": (
        lines(*(f"{row},TRUE" for row in daily().splitlines()[1:]), header="date,load,Holiday"),
        {},
        ["left out because they hold no numbers: 'Holiday'"],
    ),
    "row numbers": (
        lines(*(f"{i},{row}" for i, row in enumerate(daily().splitlines()[1:])), header=",date,load"),
        {},
        ["left out because they only count the rows: 'column 1'"],
    ),
    "blank rows": (daily() + ",\n,\n", {}, ["2 blank rows were left out"]),
    "missing value": (daily(row4="2024-01-03,N/A"), {}, ["1 value is missing"]),
    "blank lines above": ("\r\n\n" + daily(), {}, []),
    "empty unnamed column": (daily().replace("\n", ",\n"), {}, []),
    "Windows line ends": (daily().replace("\n", "\r\n"), {}, []),
    "quoted": ('"date","load"\n' + "\n".join(f'"{d}","{i}.5"' for i, d in enumerate(DAYS)), {}, []),
    "compressed": (gzip.compress(daily().encode()), {}, []),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case, write):
    content, options, notes = ACCEPTED[case]
    path = write(content)
    panel = read_table(path, **options)
    assert list(panel.notes) == notes
    assert (panel.freq, panel.timezone, panel.channels, panel.is_wide) == ("D", None, ("load",), True)
    assert panel.source == str(path)
    (series,) = panel.series
    assert series.name == ""
    np.testing.assert_array_equal(series.time, np.array(DAYS, dtype="datetime64[ns]"))
    expected = np.arange(10) + 0.5
    expected[[5] if case == "gap" else [2] if case == "missing value" else []] = np.nan
    np.testing.assert_array_equal(series.values[:, 0], expected)
    assert series.values.dtype == np.float64


@pytest.mark.parametrize(
    "missing", ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-", ".", "?", "#N/A", " NA "]
)
def test_spellings_of_missing(missing, write):
    panel = read_table(write(daily(row4=f"2024-01-03,{missing}")))
    assert np.isnan(panel.series[0].values[2, 0])
    assert panel.notes == ("1 value is missing",)


def test_constant_column_is_accepted_with_a_note(write):
    panel = read_table(write(lines(*(f"{day},{i},7" for i, day in enumerate(DAYS)), header="date,load,wind")))
    assert panel.channels == ("load", "wind")
    assert panel.notes == ("column 'wind' is constant: 7",)


def test_decimal_commas_with_points_for_thousands(write):
    rows = [f"{day};1.234,{i};1.50{i}" for i, day in enumerate(DAYS)]
    panel = read_table(write(lines(*rows, header="date;load;count")))
    np.testing.assert_array_equal(panel.series[0].values[:, 0], 1234 + np.arange(10) / 10)
    np.testing.assert_array_equal(panel.series[0].values[:, 1], 1500 + np.arange(10))


def test_offsets_that_change_are_converted_to_utc(write):
    rows = [f"2024-03-31T{hour:02d}:30:00{'+01:00' if hour < 2 else '+02:00'},{hour}" for hour in (0, 1, 3, 4)]
    panel = read_table(write(lines(*rows)))
    assert (panel.timezone, panel.freq) == ("UTC", "h")
    assert "stamps with different UTC offsets were converted to UTC" in panel.notes
    assert panel.series[0].time[0] == np.datetime64("2024-03-30T23:30")
    message = refusal(write(lines(*(f"{stamp},1" for stamp in OFFSETS * 1), "2024-04-01T00:00:00+02:00,1")))
    assert "can hold a time zone by name" in message


@pytest.mark.parametrize(
    ("offset", "timezone"), [("Z", "UTC"), ("+00:00", "UTC"), ("+01:00", "+01:00"), ("-0330", "-03:30")]
)
def test_one_offset_is_the_time_zone(offset, timezone, write):
    panel = read_table(write(lines(*(f"{day}T00:00:00{offset},{i}" for i, day in enumerate(DAYS)))))
    assert (panel.timezone, panel.freq) == (timezone, "D")


def test_only_one_order_of_day_and_month_is_regular(write):
    rows = [f"01/{month:02d}/{year},{month}" for year in (2020, 2021, 2022) for month in range(1, 13)]
    panel = read_table(write(lines(*rows)))
    assert panel.freq == "MS"
    assert panel.notes == ("dates were read with the day before month: only so are they regular",)
    assert panel.day_first is True
    panel = read_table(write(AMBIGUOUS), day_first=True)
    assert (panel.freq, panel.notes) == ("D", ())
    assert read_table(write(AMBIGUOUS), day_first=False).freq == "MS"


@pytest.mark.parametrize(
    ("header", "stamps", "freq"),
    [
        ("year", [str(year) for year in range(1949, 1959)], "YS-JAN"),
        ("Month", [f"1949-{month:02d}" for month in range(1, 11)], "MS"),
        ("date", [f"202401{day:02d}" for day in range(1, 11)], "D"),
        ("period", [f"2020Q{i % 4 + 1}" if i < 4 else f"202{i // 4}Q{i % 4 + 1}" for i in range(10)], "QS-JAN"),
        ("When", [f"{day:02d}.01.2024 06:00" for day in range(8, 18)], "D"),
        ("timestamp", [str(1704067200 + 3600 * i) for i in range(10)], "h"),
        ("ds", [f"Jan {day}, 2024" for day in range(1, 11)], "D"),
    ],
)
def test_layouts_of_dates(header, stamps, freq, write):
    rows = [f'"{stamp}",{i}' for i, stamp in enumerate(stamps)]
    panel = read_table(write(lines(*rows, header=f"{header},load")))
    assert panel.freq == freq
    assert panel.columns.time == header
    np.testing.assert_array_equal(panel.series[0].values[:, 0], np.arange(10))


def test_long_table(write):
    panel = read_table(write(long_table(DAYS[3:9]).replace("a,", "00123,").replace("b,", "NA,")))
    assert panel.columns == type(panel.columns)("date", "id", ("load",))
    assert [series.name for series in panel.series] == ["00123", "NA"]
    assert [len(series) for series in panel.series] == [10, 6]
    assert panel.series[1].time[0] == np.datetime64(DAYS[3])
    np.testing.assert_array_equal(panel.series[1].values[:, 0], np.arange(50, 56))


@pytest.mark.parametrize("ids", [("85123A", "22423"), ("1", "2"), ("north", "south")])
def test_id_column_is_found_where_stamps_repeat(ids, write):
    rows = [f"{id},{day},{i}.5,{i % 3}" for id in ids for i, day in enumerate(DAYS)]
    panel = read_table(write(lines(rows[0], *rows, header="code,date,load,wind")))
    assert panel.columns.id == "code"
    assert tuple(series.name for series in panel.series) == ids
    assert panel.channels == ("load", "wind")
    assert panel.notes == ("1 exact duplicate row is dropped",)


def test_long_table_with_a_target_by_name(write):
    rows = [f"{id},{day},{i},{i * 2}" for id in "ab" for i, day in enumerate(DAYS)]
    path = write(lines(*rows, header="unique_id,ds,y,price"))
    panel = read_table(path)
    assert panel.channels == ("y",)
    assert panel.notes == ("only column 'y' is read; left out: 'price'; choose others with --target",)
    assert read_table(path, target=["price", "y"]).channels == ("price", "y")


def test_ds_wins_over_another_date(write):
    rows = [f"{day},{day},{i}" for i, day in enumerate(DAYS)]
    assert read_table(write(lines(*rows, header="launch,ds,y"))).columns.time == "ds"


def test_booleans_as_target(write):
    rows = [f"{day},{'TRUE' if i % 2 else 'FALSE'}" for i, day in enumerate(DAYS)]
    panel = read_table(write(lines(*rows, header="date,open")), target=["open"])
    np.testing.assert_array_equal(panel.series[0].values[:, 0], np.arange(10) % 2)


def test_weeks_that_begin_on_different_days_share_a_calendar(write):
    weeks = [[f"2024-0{month}-{day:02d}" for month, day in pairs] for pairs in (
        [(1, 1), (1, 8), (1, 15), (1, 22), (1, 29)], [(1, 2), (1, 9), (1, 16), (1, 23), (1, 30)]
    )]  # fmt: skip
    rows = [f"{name},{day},{i}" for name, stamps in zip("ab", weeks, strict=True) for i, day in enumerate(stamps)]
    assert read_table(write(lines(*rows, header="id,date,load"))).freq == "7D"


def test_sparse_series_take_the_calendar_of_the_others(write):
    panel = read_table(write(long_table([DAYS[0], DAYS[4], DAYS[9]])))
    assert [len(series) for series in panel.series] == [10, 10]
    assert panel.notes == ("7 steps are absent from the calendar 'D' and kept as missing",)


def frame():
    return pd.DataFrame({"ds": pd.to_datetime(DAYS), "y": np.arange(10.0), "text": list("abcdefghij")})


def test_frame_is_not_changed_and_reads_like_a_file(write):
    table = frame().sample(frac=1, random_state=0)
    before = table.copy(deep=True)
    panel = panel_from_frame(table)
    pd.testing.assert_frame_equal(table, before)
    assert panel.source == "<frame>"
    path = write(b"", "data.parquet")
    table.to_parquet(path)
    for other in (read_table(path), read_table(write(table.to_csv(index=False)))):
        assert (other.columns, other.freq, other.notes) == (panel.columns, panel.freq, panel.notes)
        np.testing.assert_array_equal(other.series[0].time, panel.series[0].time)
        np.testing.assert_array_equal(other.series[0].values, panel.series[0].values)


def test_values_of_a_panel_are_not_those_of_the_frame():
    table = frame()
    panel_from_frame(table).series[0].values[:] = -1
    assert (table["y"] == np.arange(10.0)).all()


def test_index_of_a_frame_may_hold_times_and_ids():
    table = frame()[["ds", "y"]]
    assert panel_from_frame(table.set_index("ds")).columns.time == "ds"
    assert panel_from_frame(table.set_index("ds").rename_axis(None)).columns.time == "time"
    assert panel_from_frame(table.set_index(pd.period_range("2024-01", periods=10, freq="M"))[["y"]]).freq == "MS"
    both = pd.concat([table.assign(shop=shop) for shop in (7, 3)]).set_index(["shop", "ds"])
    panel = panel_from_frame(both)
    assert panel.columns.id == "shop"
    assert [series.name for series in panel.series] == ["7", "3"]


def test_frame_with_a_time_zone_keeps_its_name(write):
    table = frame()[["ds", "y"]].assign(ds=pd.date_range("2024-03-26", periods=10, tz="Europe/Paris"))
    path = write(b"", "data.parquet")
    table.to_parquet(path)
    for panel in (panel_from_frame(table), read_table(path)):
        assert (panel.timezone, panel.freq) == ("Europe/Paris", "D")
        assert panel.series[0].time[-1] == np.datetime64("2024-04-03T22:00")


def test_frame_of_mixed_and_categorical_cells():
    shops = pd.Series(["POST", 22423] * 10, dtype=object)
    table = pd.DataFrame({"shop": shops, "day": np.repeat(pd.to_datetime(DAYS), 2), "load": range(20)})
    for column in (table["shop"], table["shop"].astype(str).astype("category")):
        assert [series.name for series in panel_from_frame(table.assign(shop=column)).series] == ["POST", "22423"]


def test_frame_refusals_name_the_position():
    table = frame()
    table.loc[3, "y"] = np.inf
    with pytest.raises(DataError, match=r"^sales, row 3 \(counted from 0\), column 'y': 'inf' is infinite"):
        panel_from_frame(table, source="sales")
    with pytest.raises(DataError, match="expected a frame, found Series"):
        panel_from_frame(frame()["y"])
    with pytest.raises(DataError, match=r"row 4 .*column 'ds': the time is missing"):
        panel_from_frame(frame().assign(ds=frame()["ds"].mask(np.arange(10) == 4)))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=False, width=64), min_size=12, max_size=40),
    st.sampled_from(["h", "D", "MS", "15min", "W-MON"]),
    st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read(tmp_path_factory, numbers, freq, seed):
    random = np.random.default_rng(seed)
    values = np.column_stack([numbers, np.arange(len(numbers))])
    time = pd.date_range("2020-02-03", periods=len(values), freq=freq)
    kept = np.r_[0, 1 + np.sort(random.permutation(len(values) - 2)[: int(0.8 * len(values))]), len(values) - 1]
    table = pd.DataFrame({"date": time, "load": values[:, 0], "wind": values[:, 1]}).iloc[random.permutation(kept)]
    table.loc[table.index[-1], "load"] = values[table.index[-1], 0] = 1.0
    path = tmp_path_factory.mktemp("round") / "data.csv"
    table.to_csv(path, index=False)
    expected = np.full_like(values, np.nan)
    expected[kept] = values[kept]
    for panel in (read_table(path), panel_from_frame(table)):
        np.testing.assert_array_equal(panel.series[0].time, time.to_numpy(dtype="datetime64[ns]"))
        np.testing.assert_array_equal(panel.series[0].values, expected)


def test_read_rows_keeps_every_row(write):
    rows = ["1990/1/1 0:00,1,2", "1990/1/3 0:00,3,", "1990/1/2 0:00,5,6", "1990/1/2 0:00,5,6"]
    time, values, names = read_rows(write(lines(*rows, header="date,PAR (\ufffdmol),OT")))
    assert names == ("PAR (\ufffdmol)", "OT")
    assert time.astype("datetime64[D]").astype(str).tolist() == ["1990-01-01", "1990-01-03", "1990-01-02", "1990-01-02"]
    np.testing.assert_array_equal(values, [[1, 2], [3, np.nan], [5, 6], [5, 6]])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lines("2024-01-01,1", header="Date,OT"), ["first column is 'date'", "'Date', 'OT'"]),
        (lines("2024-01-01,x"), ["row 2", "column 'load'", "'x' is not a number"]),
        (lines("2024-01-01,1", "soon,2"), ["row 3", "column 'date'", "'soon'"]),
        (lines("2024-01-01,1", ",2"), ["row 3", "column 'date'"]),
        (lines(), ["but no rows"]),
    ],
)
def test_read_rows_refuses_other_tables(content, parts, write):
    with pytest.raises(DataError) as error:
        read_rows(write(content))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("dates", "day_first"),
    [
        (["11/03/2024", "12/03/2024", "13/03/2024"], True),
        (["03/11/2024", "03/12/2024", "03/13/2024"], False),
        (["2024-03-11", "2024-03-12", "2024-03-13"], None),
    ],
)
def test_the_order_of_day_and_month_is_kept(write, dates, day_first):
    rows = "".join(f"{date},{number}\n" for number, date in enumerate(dates))
    assert read_table(write("date,load\n" + rows)).day_first is day_first


@pytest.mark.parametrize("name", ["small.csv", "small.csv.gz"])
def test_room_is_made_for_what_a_file_holds_only(tmp_path, name):
    text = b"time,load\n2024-01-01,1\n2024-01-02,2\n2024-01-03,3\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    read_table(tmp_path / name)  # imports and caches are not to count
    tracemalloc.start()
    read_table(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


def test_a_lone_carriage_return_ends_a_line_as_well(tmp_path):
    file = tmp_path / "table.csv"
    file.write_bytes(b"time,load\n2024-01-01,1\n\n2024-01-02,2\r2024-01-03,3\r2024-01-04,4,5\n")
    with pytest.raises(DataError, match=r"table\.csv, row 6: expected 2 columns, found 3"):
        read_table(file)


@pytest.mark.parametrize(("id", "kind"), [([b"\xfa"] * 4, "binary"), ([[1], [2]] * 2, "list<")])
def test_names_of_series_that_are_no_text(tmp_path, id, kind):
    frame = pd.DataFrame({"day": pd.date_range("2024-01-01", periods=4), "y": np.arange(4.0), "id": id})
    frame.to_parquet(tmp_path / "table.parquet")
    with pytest.raises(DataError, match=rf"table\.parquet: column 'id' holds {kind}.* that cannot be read as text"):
        read_table(tmp_path / "table.parquet", id="id")
