"""What ``trellis forecast`` writes, where, and what happens when it cannot."""

from __future__ import annotations

import errno
import gzip
import io
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from trellis_ts.__main__ import main
from trellis_ts.plots import plot_forecasts

QUANTILES = ["q0.1", "q0.5", "q0.9"]


def test_a_wide_table_gives_one_row_per_channel_and_stamp(trellis, wide, wide_model):
    found = pd.read_csv(io.StringIO(trellis("forecast", wide_model, "wide.csv").out))
    assert list(found) == ["unique_id", "ds", "forecast", *QUANTILES]
    assert found["unique_id"].tolist() == ["load"] * 6 + ["heat"] * 6
    assert found["ds"].tolist() == [f"2024-01-06T{hour:02d}:00:00" for hour in range(6)] * 2
    assert (found["q0.1"] <= found["q0.5"]).all()
    assert (found["q0.5"] <= found["q0.9"]).all()
    np.testing.assert_array_equal(found["forecast"], found["q0.5"])
    # On the scale of the data, not of the standardised training rows.
    assert found.loc[:5, "forecast"].between(0, 20).all()
    assert found.loc[6:, "forecast"].between(900, 1200).all()


def test_a_long_table_keeps_the_names_its_user_gave(trellis, long, long_model):
    result = trellis("forecast", long_model, "long.csv", "-o", "out.csv")
    assert result.out == "wrote 14 rows (2 series, 1 channel, 7 steps) to out.csv\n"
    found = pd.read_csv("out.csv")
    assert list(found) == ["shop", "day", "forecast", *QUANTILES]
    assert found["shop"].tolist() == ["north"] * 7 + ["south"] * 7
    assert found["day"].tolist() == [f"2023-04-{day:02d}" for day in range(1, 8)] * 2


def test_names_given_when_forecasting_come_first(trellis, folder, long, long_model):
    renamed = pd.read_csv(long).rename(columns={"shop": "store", "day": "on"})
    renamed.to_csv("renamed.csv", index=False)
    result = trellis("forecast", long_model, "renamed.csv", "--time", "on", "--id", "store")
    assert result.out.splitlines()[0] == "store,on,forecast,q0.1,q0.5,q0.9"


def test_every_kind_of_output_holds_the_same(trellis, folder, wide, wide_model):
    printed = trellis("forecast", wide_model, "wide.csv").out
    for name in ("out.csv", "out.csv.gz", "out.parquet", "OUT.CSV"):
        trellis("forecast", wide_model, "wide.csv", "-o", name)
    assert (folder / "out.csv").read_text() == (folder / "OUT.CSV").read_text() == printed
    assert gzip.decompress((folder / "out.csv.gz").read_bytes()).decode() == printed
    frame = pd.read_parquet("out.parquet")
    assert list(frame) == printed.splitlines()[0].split(",")
    assert frame["ds"].dtype.kind == "M"
    np.testing.assert_allclose(frame["forecast"], pd.read_csv(io.StringIO(printed))["forecast"], rtol=1e-9)


@pytest.mark.parametrize(
    ("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("jpg", b"\xff\xd8")]
)
def test_pictures(trellis, folder, wide, wide_model, ending, magic):
    trellis("forecast", wide_model, "wide.csv", "--plot", f"out.{ending}")
    assert (folder / f"out.{ending}").read_bytes().startswith(magic)
    assert sorted(each.name for each in folder.iterdir()) == [f"out.{ending}", "wide.csv"]


def test_json_is_one_document(trellis, wide, wide_model):
    data = trellis("forecast", wide_model, "wide.csv", "--json").data
    assert set(data) == {"rows", "output", "plot", "forecast"}
    assert (data["rows"], data["output"], data["plot"], len(data["forecast"])) == (12, None, None, 12)
    assert list(data["forecast"][0]) == ["unique_id", "ds", "forecast", *QUANTILES]
    assert data["forecast"][0]["ds"] == "2024-01-06T00:00:00"
    data = trellis("forecast", wide_model, "wide.csv", "--json", "-o", "out.csv", "--plot", "out.png").data
    assert data == {"rows": 12, "output": "out.csv", "plot": "out.png"}


@pytest.mark.parametrize("levels", [["0.05,0.5,0.95"], ["0.95", "0.05", "0.5"]])
def test_any_levels(trellis, wide, wide_model, levels):
    found = pd.read_csv(io.StringIO(trellis("forecast", wide_model, "wide.csv", "--quantile-levels", *levels).out))
    assert list(found) == ["unique_id", "ds", "forecast", "q0.05", "q0.5", "q0.95"]
    trained = pd.read_csv(io.StringIO(trellis("forecast", wide_model, "wide.csv").out))
    assert (found["q0.05"] < trained["q0.1"]).all()
    assert (found["q0.95"] > trained["q0.9"]).all()
    np.testing.assert_array_equal(found["q0.5"], trained["q0.5"])


def test_calibration_moves_bands_and_not_points(trellis, wide, wide_model):
    calibrated, plain = (
        pd.read_csv(io.StringIO(trellis("forecast", wide_model, "wide.csv", *options).out))
        for options in ((), ("--no-calibration",))
    )
    np.testing.assert_array_equal(calibrated["forecast"], plain["forecast"])
    assert (calibrated["q0.9"] != plain["q0.9"]).all()


def test_samples(trellis, folder, long, long_model):
    out = trellis("forecast", long_model, "long.csv", "--samples", "5", "--seed", "3", "-o", "out.csv").out
    assert out == "wrote 70 rows (2 series, 1 channel, 5 samples, 7 steps) to out.csv\n"
    found = pd.read_csv("out.csv")
    assert list(found) == ["shop", "day", "sample", "value"]
    assert found["sample"].tolist() == [number for _ in range(2) for number in range(5) for _ in range(7)]
    assert found["day"].tolist() == [f"2023-04-{day:02d}" for day in range(1, 8)] * 10
    printed = trellis("forecast", long_model, "long.csv", "--samples", "5", "--seed", "3").out
    assert (folder / "out.csv").read_text() == printed
    assert printed != trellis("forecast", long_model, "long.csv", "--samples", "5").out


@pytest.mark.parametrize(
    ("freq", "start", "expected"),
    [
        ("ME", "2015-01-31", ["2025-01-31", "2025-02-28", "2025-03-31"]),
        ("B", "2024-01-01", ["2024-06-17", "2024-06-18", "2024-06-19"]),
        ("W-SUN", "2022-01-02", ["2024-04-21", "2024-04-28", "2024-05-05"]),
        ("QE-DEC", "1990-03-31", ["2020-03-31", "2020-06-30", "2020-09-30"]),
        ("15min", "2024-01-01", ["2024-01-02T06:00:00", "2024-01-02T06:15:00", "2024-01-02T06:30:00"]),
    ],
)
def test_stamps_go_on_with_the_calendar(trellis, folder, make_wide, tiny, freq, start, expected):
    make_wide(120, start=start, freq=freq).to_csv("table.csv", index=False)
    trellis("train", "table.csv", "-o", "m", "--quiet", *tiny)
    found = pd.read_csv(io.StringIO(trellis("forecast", "m", "table.csv").out))
    assert found["ds"].tolist()[:3] == expected


def test_stamps_with_an_offset_keep_it(trellis, folder, make_wide, tiny):
    frame = make_wide()
    frame["date"] = frame["date"].dt.strftime("%Y-%m-%dT%H:%M:%S+05:30")
    frame.to_csv("table.csv", index=False)
    trellis("train", "table.csv", "-o", "m", "--quiet", *tiny)
    found = pd.read_csv(io.StringIO(trellis("forecast", "m", "table.csv").out))
    assert found["ds"].tolist()[:2] == ["2024-01-06T00:00:00+05:30", "2024-01-06T01:00:00+05:30"]


def test_a_time_zone_by_name_changes_the_clocks(trellis, folder, make_wide, tiny):
    frame = make_wide(start="2024-03-26")
    frame["date"] = frame["date"].dt.tz_localize("Europe/Berlin")
    frame.to_parquet("table.parquet")
    trellis("train", "table.parquet", "-o", "m", "--quiet", *tiny)
    trellis("forecast", "m", "table.parquet", "-o", "out.parquet")
    later = trellis("forecast", "m", "table.parquet", "--prediction-length", "5").out.splitlines()
    assert [line.split(",")[1] for line in later[1:3]] == ["2024-03-31T00:00:00+01:00", "2024-03-31T01:00:00+01:00"]
    assert later[3].split(",")[1] == "2024-03-31T03:00:00+02:00"
    assert str(pd.read_parquet("out.parquet")["ds"].dtype.tz) == "Europe/Berlin"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-o", "out.xlsx"], "--output 'out.xlsx': unknown ending; use one of .csv, .csv.gz, .parquet"),
        (["-o", "out.gz"], "unknown ending"),
        (["-o", "out"], "unknown ending"),
        (["--plot", "out.bmp"], "--plot 'out.bmp': unknown ending; use one of .png, .pdf, .svg, .jpg"),
        (["-o", "there.csv"], "cannot write there.csv: it is a directory"),
        (["-o", "nowhere/out.csv"], "cannot write nowhere/out.csv: nowhere does not exist; create it first"),
        (["--plot", "wide.csv/out.png"], "wide.csv is no directory"),
        (["-o", "wide.csv"], "--output wide.csv is DATA itself"),
        (["-o", "./there.csv/../wide.csv"], "is DATA itself"),
        (["--prediction-length", "0"], "prediction_length=0 must be at least 1"),
        (["--prediction-length", "99999999999"], "prediction_length=99999999999 must lie between"),
        (["--quantile-levels", "0.5,1.5"], "quantile level 1.5 must lie between 0 and 1"),
        (["--quantile-levels", "0.5,high"], "--quantile-levels 0.5,high: expected numbers such as 0.05,0.5,0.95"),
        (["--quantile-levels", ","], "--quantile-levels is empty"),
        (["--samples", "0"], "num_samples=0 must be at least 1"),
        (["--samples", "x"], "--samples: expected a whole number, got 'x'"),
        (["--samples", "2", "--seed", "-1"], "seed=-1 must lie between"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--time", "load"], "column 'load'"),
    ],
)
def test_what_cannot_be_written_or_done(refused, folder, wide, wide_model, options, expected):
    (folder / "there.csv").mkdir()
    assert expected in refused("forecast", wide_model, "wide.csv", *options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refused, folder, wide, wide_model):
    (folder / "locked").mkdir(mode=0o500)
    assert "permission denied" in refused("forecast", wide_model, "wide.csv", "-o", "locked/out.csv")


def test_a_column_of_ours_steps_aside_for_one_of_the_table(trellis, folder, make_wide, wide_model):
    for name, columns in (
        ("forecast", ["unique_id", "forecast", "forecast_", "q0.1", "q0.5", "q0.9"]),
        ("unique_id", ["unique_id_", "unique_id", "forecast", "q0.1", "q0.5", "q0.9"]),
        ("q0.1", ["unique_id", "q0.1", "forecast", "q0.1_", "q0.5", "q0.9"]),
    ):
        make_wide().rename(columns={"date": name}).to_csv("table.csv", index=False)
        trellis("forecast", wide_model, "table.csv", "--time", name, "-o", "out.csv")
        frame = pd.read_csv("out.csv")
        assert list(frame.columns) == columns
        assert frame[name].iloc[0].startswith("2024-01-06") is (name in frame)


def test_an_existing_output_survives_what_fails(refused, folder, wide, wide_model, monkeypatch):
    (folder / "out.csv").write_text("precious\n")
    (folder / "out.png").write_text("precious too\n")
    outputs = ("-o", "out.csv", "--plot", "out.png")
    refused("forecast", wide_model, "wide.csv", *outputs, "--prediction-length", "0")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trellis_ts.plots.plot_forecasts", full)
    assert "cannot write out.png: the disk is full" in refused("forecast", wide_model, "wide.csv", *outputs)
    monkeypatch.setattr("trellis_ts.plots.plot_forecasts", plot_forecasts)
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert "cannot write out.csv: the disk is full" in refused("forecast", wide_model, "wide.csv", *outputs)
    assert (folder / "out.csv").read_text() == "precious\n"


def test_an_output_is_replaced_whole_and_a_link_stays_one(trellis, folder, wide, wide_model):
    (folder / "real").mkdir()
    (folder / "real" / "out.csv").write_text("old\n" * 1000)
    (folder / "link.csv").symlink_to("real/out.csv")
    trellis("forecast", wide_model, "wide.csv", "-o", "link.csv")
    assert (folder / "link.csv").is_symlink()
    assert (folder / "real" / "out.csv").read_text().startswith("unique_id,ds,forecast")
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "real" / "out.csv").stat().st_mode & 0o777 == 0o666 & ~umask


def test_quiet_says_nothing(trellis, folder, make_wide, wide_model):
    make_wide(10).sample(frac=1, random_state=0).to_csv("untidy.csv", index=False)
    assert trellis("forecast", wide_model, "untidy.csv").err.count("note:") == 2
    result = trellis("forecast", wide_model, "untidy.csv", "--quiet", "--prediction-length", "20")
    assert result.err == ""
    assert result.out.startswith("unique_id,")


def shell(command):
    """A shell line in which ``trellis`` is this package."""
    line = command.replace("trellis ", f"{sys.executable} -m trellis_ts ")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


def test_a_reader_that_leaves_and_a_full_disk_behind_the_pipe(folder, wide, wide_model):
    result = shell(
        f"trellis forecast {wide_model} wide.csv --prediction-length 3000 | head -1; echo ${{PIPESTATUS[0]}}"
    )
    assert result.stdout == "unique_id,ds,forecast,q0.1,q0.5,q0.9\n0\n"
    assert "Error" not in result.stderr
    assert len(result.stderr.splitlines()) == 1  # the note about the horizon
    result = shell(f"trellis forecast {wide_model} wide.csv > /dev/full")
    assert result.returncode == 2
    assert result.stderr == "trellis forecast: error: cannot write the output: no space left on device\n"
    result = shell("trellis --help | true")
    assert (result.returncode, result.stderr) == (0, "")


def test_text_that_the_output_cannot_hold(folder, long, long_model, monkeypatch, capsys):
    long.write_text(long.read_text().replace("north", "nørth"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as exit_:
        main(["forecast", str(long_model), "long.csv", "--quiet"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the output cannot be written as ascii; set PYTHONIOENCODING=utf-8" in err
