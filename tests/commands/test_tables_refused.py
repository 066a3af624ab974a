"""Tables that cannot be understood: one line that says what, where and what to do, and nothing is written."""

from __future__ import annotations

import shutil

import pytest

TINY = ("--width", "8", "--num-layers", "1", "--max-epochs", "1")
DAYS = [f"2024-01-{day:02d}" for day in range(1, 31)]


def table(header="date,y", rows=None, **changed):
    """Thirty daily rows; ``row7="..."`` puts another text in the place of row 7, as a spreadsheet counts."""
    lines = [header, *(rows or [f"{day},{index}" for index, day in enumerate(DAYS)])]
    for key, line in changed.items():
        lines[int(key.removeprefix("row")) - 1] = line
    return "\n".join(lines) + "\n"


REFUSED = {
    "empty": ("", ["is empty"]),
    "blank": ("\n \n", ["is empty"]),
    "header only": ("date,y\n", ["a header but no rows"]),
    "no time column": (table("a,b", [f"{i},{i}" for i in range(30)]), ["no column holds dates", "--time", "'a', 'b'"]),
    "two time columns": (
        table("start,end,y", [f"{day},{day},{i}" for i, day in enumerate(DAYS)]),
        ["'start' and 'end' both hold dates", "--time"],
    ),
    "no such day": (table(row7="2024-01-45,3"), ["row 7", "column 'date'", "'2024-01-45'", "is not a date"]),
    "no date": (table(row9="yesterday,3"), ["row 9", "column 'date'", "'yesterday'", "is not a date"]),
    "time missing": (table(row9=",3"), ["row 9", "column 'date'", "the time is missing"]),
    "ambiguous order": (
        table(rows=[f"{d:02d}/{m:02d}/2024,1{d}" for d, m in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 6))]),
        ["row 2", "can be day/month or month/day", "--day-first true or false"],
    ),
    "stamp with two values": (
        table(row8="2024-01-06,99"),
        ["row 7 and row 8", "2024-01-06", "occurs twice", "with different values"],
    ),
    "word among numbers": (table(row5="2024-01-04,closed"), ["row 5", "column 'y'", "'closed'", "is not a number"]),
    "infinity": (table(row6="2024-01-05,inf"), ["row 6", "column 'y'", "'inf'", "is infinite"]),
    "all missing": (
        table("date,y,z", [f"{day},{i}," for i, day in enumerate(DAYS)]),
        ["column 'z' has no values at all", "--target"],
    ),
    "row too long": (table(row12="2024-01-11,1,2"), ["row 12", "expected 2 columns, found 3"]),
    "row too short": (table(row12="2024-01-11"), ["row 12", "expected 2 columns, found 1"]),
    "two columns of one name": (
        table("date,y,y", [f"{day},1,2" for day in DAYS]),
        ["two columns are called 'y'", "rename"],
    ),
    "no numbers": (table("date,name", [f"{day},x{i}" for i, day in enumerate(DAYS)]), ["no column holds numbers"]),
    "no regular calendar": (
        table(rows=[f"2024-01-{d:02d},{d}" for d in (1, 2, 4, 7, 11, 16, 22, 29)]),
        ["no regular grid", "--freq"],
    ),
    "too short": (table(rows=[f"{day},{i}" for i, day in enumerate(DAYS[:3])]), ["3 rows", "bring more rows"]),
    "workbook": ("PK\x03\x04 and so on", ["workbook or zip archive", "save the table as CSV"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_refuses(refused, folder, name):
    text, expected = REFUSED[name]
    (folder / "table.csv").write_text(text)
    line = refused("train", "table.csv", *TINY)
    assert line.startswith("trellis train: error: table.csv")
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("column", "row", "value", "expected"),
    [
        (0, 50, "someday", "row 50, column 'date': 'someday' is not a date"),
        (0, 50, "2024-01-01 00:00:00", "row 2 and row 50: 2024-01-01T00:00:00 occurs twice"),
        (1, 50, "broken", "row 50, column 'load': 'broken' is not a number"),
        (2, 3, "-inf", "row 3, column 'heat': '-inf' is infinite"),
        (2, 3, "1,2", "row 3: expected 3 columns, found 4"),
    ],
)
@pytest.mark.parametrize("command", ["forecast", "evaluate"])
def test_using_a_model_refuses(refused, folder, wide, wide_model, command, column, row, value, expected):
    lines = wide.read_text().splitlines()
    cells = lines[row - 1].split(",")
    cells[column] = value
    lines[row - 1] = ",".join(cells)
    wide.write_text("\n".join(lines) + "\n")
    assert expected in refused(command, wide_model, "wide.csv", *(["-o", "out.csv"] if command == "forecast" else []))


@pytest.mark.parametrize("command", ["train", "forecast", "evaluate"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wide.cvs", "there is no such file; did you mean wide.csv?"),
        ("nowhere/wide.csv", "there is no such file"),
        ("wide", "is neither a file nor a data set"),
        ("wether", "did you mean Weather?"),
        ("table.xlsx", "not a kind of file that is read here"),
    ],
)
def test_data_that_are_not_there(refused, folder, wide, wide_model, command, name, expected):
    (folder / "table.xlsx").write_text("x")
    arguments = [name, "-o", "model"] if command == "train" else [wide_model, name]
    assert expected in refused(command, *arguments)


def test_a_folder_is_no_table(refused, folder, wide):
    (folder / "tables").mkdir()
    shutil.copy(wide, folder / "tables" / "first.csv")
    assert "this is a folder; give one CSV or Parquet file, like tables/first.csv" in refused("train", "./tables")


def test_a_truncated_archive_and_a_damaged_parquet_file(refused, folder, make_wide):
    import gzip

    packed = gzip.compress(make_wide().to_csv(index=False).encode())
    (folder / "table.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "table.csv.gz: cannot be read" in refused("train", "table.csv.gz")
    (folder / "table.parquet").write_bytes(b"PAR1 is not enough")
    assert "table.parquet: not a readable Parquet file" in refused("train", "table.parquet")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--context-length", "100"],
            "context_length=100 and prediction_length=16 exceed the 88 rows of split 'train'",
        ),
        (["--prediction-length", "60"], "too few to learn to predict 60 steps"),
        (["--context-length", "8", "--patch-length", "9"], "patch_length=9 exceeds context_length=8"),
        (["--patch-length", "6", "--patch-stride", "7"], "patch_stride=7 exceeds patch_length=6"),
        (["--test-size", "118"], "too few to learn to predict"),
        (["--target", "laod"], "there is no column 'laod'; did you mean 'load'?"),
        (["--time", "when"], "there is no column 'when'; name one with --time"),
        (["--id", "load", "--target", "load"], "column 'load' is named for two roles"),
        (["--freq", "D"], "row 3, column 'date': 2024-01-01T01:00:00 is not on the calendar 'D'"),
        (["--target", "date"], "no column holds dates; say which column holds the times with --time NAME"),
        (["--patch-length", "80"], "88 training rows do not hold a patch of 80 and a horizon of 16"),
    ],
)
def test_settings_that_do_not_fit_the_table(refused, wide, options, expected):
    base = [] if "--prediction-length" in options else ["--prediction-length", "16"]
    assert expected in refused("train", "wide.csv", *TINY, *base, *options)


def test_context_longer_than_the_training_rows_of_a_short_file(refused, folder, make_wide, tiny):
    make_wide(40).to_csv(folder / "short.csv", index=False)
    line = refused("train", "short.csv", *tiny, "--context-length", "30")
    assert "context_length=30 and prediction_length=6 exceed the" in line


@pytest.mark.parametrize("command", ["forecast", "evaluate"])
def test_a_model_of_other_columns(refused, wide, long, wide_model, long_model, command):
    line = refused(command, wide_model, "long.csv")
    assert "there is no column 'date'" in line
    assert "trained on --time date, --target load heat" in line
    line = refused(command, long_model, "wide.csv")
    assert "trained on --time day, --id shop, --target sold" in line
    assert "trained on column(s) load, heat" in refused(command, wide_model, "wide.csv", "--target", "load")


@pytest.mark.parametrize("command", ["forecast", "evaluate"])
def test_a_model_of_another_frequency(refused, folder, make_wide, wide_model, long_model, command):
    make_wide(freq="D").to_csv(folder / "daily.csv", index=False)
    assert "trained on steps of h, the data has steps of D" in refused(command, wide_model, "daily.csv")
    make_wide().rename(columns={"date": "day", "load": "sold"}).assign(shop="a").to_csv(
        folder / "hours.csv", index=False
    )
    assert "is not on the calendar 'D'" in refused(command, long_model, "hours.csv")


def test_dates_beyond_the_calendar(refused, folder, make_wide, wide_model):
    make_wide(60, start="2261-12-25").to_csv(folder / "late.csv", index=False)
    line = refused("forecast", wide_model, "late.csv", "--prediction-length", "100000")
    assert "run past the year 2261" in line
