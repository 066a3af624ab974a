"""Data sets by name: listed, found in the user's folder, checked; and the demo. Never the network."""

from __future__ import annotations

import urllib.request

import pandas as pd
import pytest

import trellis_ts.commands.demo as demo_module
from trellis_ts.datasets.long_horizon import benchmark_names


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)


def test_the_list(trellis, folder):
    (folder.parent / "data" / "ETTh1.csv").write_text("x")
    result = trellis("datasets")
    assert result.out == trellis("datasets", "list").out
    for name in (*benchmark_names(), "co2"):
        assert f"\n{name} " in result.out
    data = trellis("datasets", "list", "--json").data["datasets"]
    assert [set(each) for each in data] == [{"name", "rows", "channels", "freq", "path"}] * (len(benchmark_names()) + 1)
    paths = {each["name"]: each["path"] for each in data}
    assert paths["ETTh1"] == str(folder.parent / "data" / "ETTh1.csv")
    assert paths["co2"] is None


def test_get_what_comes_along(trellis):
    assert trellis("datasets", "get", "co2", "--quiet").out == (
        "co2: 2,284 rows, 1 channel, every W-SAT: comes with statsmodels\n"
    )
    assert trellis("datasets", "get", "CO2", "--json").data == {
        "name": "co2",
        "rows": 2284,
        "channels": 1,
        "freq": "W-SAT",
        "path": None,
    }


@pytest.mark.parametrize("command", [["datasets", "get"], ["train"]])
def test_a_wrong_file_in_the_users_folder(refused, folder, command):
    (folder.parent / "data" / "ETTh1.csv").write_text("date,OT\n2016-07-01 00:00:00,1\n")
    line = refused(*command, "ETTh1")
    assert "ETTh1.csv" in line
    assert "get the published one" in line
    assert "TRELLIS_DATA" in line


def test_a_folder_of_data_that_does_not_exist(refused, monkeypatch):
    monkeypatch.setenv("TRELLIS_DATA", "nowhere")
    assert "TRELLIS_DATA is 'nowhere', which is not a folder" in refused("train", "ETTh1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ETTh3", "did you mean ETTh"), ("wether", "did you mean Weather?"), ("zzz", "data sets: co2")],
)
def test_unknown_names(refused, name, expected):
    for command in (["datasets", "get"], ["train"]):
        assert expected in refused(*command, name)


@pytest.fixture
def short_demo(tmp_path, monkeypatch, tiny):
    path = tmp_path / "demo.yaml"
    path.write_text(
        "test_size: 52\nvalidation_size: 104\ncontext_length: 52\nprediction_length: 52\npatch_length: 13\n"
        "width: 8\nnum_heads: 2\nnum_layers: 1\nmax_epochs: 1\n"
    )
    monkeypatch.setattr(demo_module, "packaged_path", lambda name: str(path))


def test_the_demo(trellis, refused, folder, short_demo):
    result = trellis("demo")
    assert "the last year, which the model has not seen:" in result.out
    assert sorted(each.name for each in (folder / "demo").iterdir()) == [
        *("evaluation.json", "forecast.csv", "forecast.png", "model")
    ]
    forecast = pd.read_csv("demo/forecast.csv")
    assert (list(forecast)[:2], len(forecast)) == (["unique_id", "ds"], 52)
    assert forecast["ds"].iloc[0] == "2002-01-05"
    data = trellis("demo", "--json", "--quiet").data  # once more, in the same folder
    assert set(data) == {"model", "forecast", "plot", "evaluation"}
    assert (data["model"], data["evaluation"]["num_windows"]) == ("demo/model", 1)
    trellis("forecast", "demo/model", "co2")


def test_a_demo_never_replaces_what_is_no_model(refused, folder, short_demo):
    (folder / "demo" / "model").mkdir(parents=True)
    (folder / "demo" / "model" / "aircraft.stl").write_text("mine")
    assert "holds other files than a model's" in refused("demo")
    assert "aircraft.stl is a file; name a directory" in refused("demo", "-o", "demo/model/aircraft.stl")
