"""One door to all data: files first, then names, and help with a misspelt one."""

from __future__ import annotations

import numpy as np
import pytest

import trellis_ts.datasets.sources as module
from trellis_ts.datasets.sources import load_data, load_demo
from trellis_ts.errors import DataError

TABLE = "date,load\n" + "".join(f"2024-01-{day:02d},{day}\n" for day in range(1, 11))


@pytest.mark.parametrize("name", ["co2", "CO2"])
def test_the_demo_needs_no_network(name):
    panel = load_data(name)
    assert (panel.source, panel.freq, panel.channels) == ("co2", "W-SAT", ("co2",))
    values = panel.series[0].values
    assert len(values) == 2284
    assert int(np.isnan(values).sum()) == 59
    assert np.nanmin(values) == pytest.approx(313.0)
    assert str(panel.series[0].time[0])[:10] == "1958-03-29"


def test_the_demo_is_the_same_every_time():
    np.testing.assert_array_equal(load_demo().series[0].values, load_demo().series[0].values)


def test_a_file_comes_before_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "co2").mkdir()
    assert load_data("co2").channels == ("co2",)
    monkeypatch.setattr(module, "DEMO_NAME", "co2.csv")
    (tmp_path / "co2.csv").write_text(TABLE)
    assert load_data("co2.csv").channels == ("load",)


def test_column_options_reach_the_reader(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("when,id,load,temperature\n" + "".join(f"{d:02d}/02/2024,a,{d},0\n" for d in range(1, 11)))
    panel = load_data(str(path), time="when", target=["load"], id="id", freq="D", day_first=True)
    assert (panel.columns.time, panel.columns.id, panel.channels) == ("when", "id", ("load",))
    assert str(panel.series[0].time[-1])[:10] == "2024-02-10"


@pytest.mark.parametrize("name", ["etth1", "ETTh1", "weather"])
def test_a_benchmark_by_name_in_any_case(monkeypatch, name):
    asked = []
    monkeypatch.setattr(module, "load_benchmark", lambda name, progress: asked.append((name, progress)))
    load_data(name, progress=print)
    assert asked == [(name, print)]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(DataError, match=r"'wether' is neither a file nor a data set; did you mean Weather\?.*co2"):
        load_data("wether")
    with pytest.raises(DataError, match=r"'zzz' is neither a file nor a data set \(data sets: co2, "):
        load_data("zzz")


@pytest.mark.parametrize("path", ["nowhere.csv", "folder/etth1"])
def test_a_missing_path_is_refused_as_a_path(path):
    with pytest.raises(DataError, match=path) as error:
        load_data(path)
    assert "data set" not in str(error.value)
