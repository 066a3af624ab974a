"""Tables that are untidy but clear: read with a note, to the same numbers as a tidy one."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


def forecast(trellis, model, path, *options):
    """The forecast as a frame, and what was said on the way."""
    result = trellis("forecast", model, path, *options)
    return pd.read_csv(io.StringIO(result.out)), result.err


def text_of(frame, **options):
    return frame.to_csv(index=False, **options)


def untidy(frame):
    """Files by what is untidy in them, with what the note about it says. All hold the same numbers."""
    tidy = text_of(frame)
    german = frame.assign(date=frame["date"].dt.strftime("%d.%m.%Y %H:%M"))
    return {
        "unsorted": (text_of(frame.sample(frac=1, random_state=1)), "were sorted"),
        "exact duplicates": (
            text_of(pd.concat([frame, frame.iloc[[7, 7, 30]]]).sort_index()),
            "3 exact duplicate rows are dropped",
        ),
        "byte-order mark": (tidy.encode("utf-8-sig"), "starts with a UTF-8 byte-order mark"),
        "UTF-16": (tidy.encode("utf-16"), "the file is UTF-16"),
        "semicolons": (text_of(frame, sep=";"), "separated by semicolons"),
        "tabs": (text_of(frame, sep="\t"), "separated by tabs"),
        "decimal commas": (text_of(german, sep=";", decimal=","), "written with decimal commas"),
        "text columns": (text_of(frame.assign(weather="fair", who="me")), ""),
        "other order of columns": (text_of(frame[["heat", "date", "load"]]), ""),
        "CRLF": (tidy.replace("\n", "\r\n"), ""),
        "blank rows at the end": (tidy + ",,\n,,\n", "2 blank rows were left out"),
        "quoted": (text_of(frame, quoting=1), ""),
        "day first": (text_of(german), "read with the day before month: only so are they regular"),
    }


NAMES = list(untidy(pd.DataFrame({"date": pd.date_range("2024", periods=60, freq="h"), "load": 1.5, "heat": 2.5})))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_give_the_same_forecast(trellis, folder, make_wide, wide, wide_model, name):
    content, note = untidy(make_wide())[name]
    (folder / "untidy.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    expected, nothing = forecast(trellis, wide_model, "wide.csv")
    assert nothing == ""
    found, said = forecast(trellis, wide_model, "untidy.csv")
    pd.testing.assert_frame_equal(found, expected)
    assert note in said
    assert all(line.startswith("note: untidy.csv: ") for line in said.splitlines())
    assert bool(said) == bool(note)


@pytest.mark.parametrize("name", ["unsorted", "decimal commas", "UTF-16"])
def test_training_on_them_gives_the_same_model(trellis, folder, make_wide, wide, tiny, wide_model, name):
    content, note = untidy(make_wide())[name]
    (folder / "untidy.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = trellis("train", "untidy.csv", "-o", "model", *tiny).err
    assert f"note: untidy.csv: {'rows' if name == 'unsorted' else ''}" in said
    assert note in said
    weights = [(each / "model.safetensors").read_bytes() for each in (folder / "model", wide_model)]
    assert weights[0] == weights[1]
    record, expected = (json.loads((each / "data.json").read_bytes()) for each in (folder / "model", wide_model))
    # All that is kept of the spelling is the order of its dates.
    assert record == expected | {"day_first": True if name == "decimal commas" else None}


@pytest.mark.parametrize("ending", [".csv.gz", ".parquet", ".tsv"])
def test_other_kinds_of_files(trellis, folder, make_wide, wide, wide_model, ending):
    frame, path = make_wide(), f"other{ending}"
    if ending == ".parquet":
        frame.to_parquet(path)
    elif ending == ".tsv":
        Path(path).write_text(text_of(frame, sep="\t"))
    else:
        Path(path).write_bytes(gzip.compress(text_of(frame).encode()))
    pd.testing.assert_frame_equal(forecast(trellis, wide_model, path)[0], forecast(trellis, wide_model, "wide.csv")[0])


def test_gaps_and_missing_values_are_counted_and_kept(trellis, folder, make_wide, tiny):
    frame = make_wide().drop(index=[40, 41, 90])
    frame.loc[50, "load"] = np.nan
    (folder / "gaps.csv").write_text(text_of(frame))
    said = trellis("train", "gaps.csv", "-o", "model", *tiny).err
    assert "3 steps are absent from the calendar 'h' and kept as missing" in said
    assert "1 value is missing" in said
    found, said = forecast(trellis, "model", "gaps.csv")
    assert found["ds"].tolist()[:2] == ["2024-01-06T00:00:00", "2024-01-06T01:00:00"]
    assert found["forecast"].notna().all()
    assert "3 steps are absent" in said


def test_constant_columns_are_forecast_as_such(trellis, folder, make_wide, tiny):
    (folder / "flat.csv").write_text(text_of(make_wide().assign(heat=7.25)))
    assert "note: flat.csv: column 'heat' is constant: 7.25" in trellis("train", "flat.csv", "-o", "m", *tiny).err
    found = forecast(trellis, "m", "flat.csv")[0]
    assert np.isfinite(found.loc[found["unique_id"] == "heat", "forecast"]).all()
    trellis("evaluate", "m", "flat.csv")


def test_text_columns_without_a_role_are_left_out(trellis, folder, make_wide, tiny):
    (folder / "text.csv").write_text(text_of(make_wide().assign(comment="all well", weather="fair")))
    said = trellis("train", "text.csv", "-o", "m", *tiny).err
    assert "left out because they hold no numbers: 'comment', 'weather'" in said
    assert trellis("info", "m", "--json").data["channels"] == ["load", "heat"]


def test_a_series_shorter_than_the_context(trellis, folder, make_wide, wide_model):
    (folder / "short.csv").write_text(text_of(make_wide(10)))
    found, said = forecast(trellis, wide_model, "short.csv")
    assert said == "note: 1 series shorter than the context of 24; padded as unobserved\n"
    assert found["ds"].tolist()[:2] == ["2024-01-01T10:00:00", "2024-01-01T11:00:00"]
    (folder / "one.csv").write_text(text_of(make_wide(1)))
    assert forecast(trellis, wide_model, "one.csv")[0]["ds"].tolist()[0] == "2024-01-01T01:00:00"


def test_a_horizon_beyond_the_trained_one(trellis, folder, wide, wide_model):
    short, said = forecast(trellis, wide_model, "wide.csv")
    assert said == ""
    found, said = forecast(trellis, wide_model, "wide.csv", "--prediction-length", "15")
    assert "15 steps are beyond the trained 6: forecasts were fed back" in said
    load = found[found["unique_id"] == "load"].reset_index(drop=True)
    assert len(load) == 15
    assert pd.to_datetime(load["ds"]).diff().dropna().unique() == [pd.Timedelta("1h")]
    pd.testing.assert_frame_equal(load[:6], short[short["unique_id"] == "load"].reset_index(drop=True))
    shorter, said = forecast(trellis, wide_model, "wide.csv", "--prediction-length", "2")
    assert (len(shorter), said) == (4, "")


def test_a_new_series_and_one_that_has_grown(trellis, folder, long, long_model):
    grown = long.read_text() + "".join(f"west,2023-01-{day:02d},{day}\n" for day in range(1, 31))
    long.write_text(grown)
    found, said = forecast(trellis, long_model, "long.csv")
    assert "1 series the model was not trained on; scaled by their own history" in said
    assert found["shop"].unique().tolist() == ["north", "south", "west"]
    assert found.loc[found["shop"] == "west", "day"].iloc[0] == "2023-01-31"


def test_columns_of_other_names_stand_for_the_trained_ones(trellis, folder, make_wide, wide, wide_model):
    other = make_wide().rename(columns={"load": "Last", "heat": "Wärme", "date": "Zeit"})
    (folder / "other.csv").write_text(text_of(other), encoding="utf-8")
    found, said = forecast(trellis, wide_model, "other.csv", "--time", "Zeit", "--target", "Last", "Wärme")
    assert said == "note: other.csv: read Last for load, Wärme for heat\n"
    expected = forecast(trellis, wide_model, "wide.csv")[0]
    assert list(found) == ["unique_id", "Zeit", "forecast", "q0.1", "q0.5", "q0.9"]
    np.testing.assert_array_equal(found["forecast"], expected["forecast"])


def test_coarser_rows_where_the_user_insists(trellis, folder, make_wide, wide_model):
    (folder / "sparse.csv").write_text(text_of(make_wide(60)[::3]))
    assert (
        "trained on steps of h, the data has steps of 3h" in trellis("forecast", wide_model, "sparse.csv", code=2).err
    )
    found, said = forecast(trellis, wide_model, "sparse.csv", "--freq", "h")
    assert "absent from the calendar 'h'" in said
    assert found["ds"].iloc[0] == "2024-01-03T10:00:00"
