"""The table of benchmarks, their splits, and the published files where ``TRELLIS_DATA`` has them."""

import functools
import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.datasets.checksums import sha256_of
from trellis_ts.datasets.locations import data_folder, find_local
from trellis_ts.datasets.long_horizon import (
    BenchmarkSpec,
    benchmark_names,
    borders,
    find_benchmark,
    load_benchmark,
    read_benchmark,
    suggest,
)
from trellis_ts.errors import DataError
from trellis_ts.types import Borders, Panel


def spec_of(name: str) -> BenchmarkSpec:
    spec = find_benchmark(name)
    assert spec is not None
    return spec


SPECS = [spec_of(name) for name in benchmark_names()]
PUBLISHED_OT = {  # mean and population standard deviation over the training rows
    "ETTh1": (8640, 17.128262, 9.176491),
    "ETTh2": (8640, 26.872023, 11.584719),
    "ETTm1": (34560, 17.124950, 9.173035),
    "ETTm2": (34560, 26.872427, 11.580746),
    "Weather": (36887, 411.054342, 383.957098),
    "Exchange": (5311, 0.604825, 0.095299),
    "ILI": (676, 493629.372781, 228807.407993),
}


# ---- the table ----


def test_names_are_unique_in_any_case() -> None:
    assert len({name.lower() for name in benchmark_names()}) == len(benchmark_names()) == 10


@pytest.mark.parametrize("name", benchmark_names())
def test_a_name_is_found_in_any_case(name: str) -> None:
    assert spec_of(name.lower()) == spec_of(name.upper()) == spec_of(name)
    assert spec_of(name).name == name


def test_an_unknown_name_is_not_found() -> None:
    assert find_benchmark("ETTh3") is None
    assert find_benchmark("") is None


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_entries_are_consistent(spec: BenchmarkSpec) -> None:
    pd.tseries.frequencies.to_offset(spec.freq)
    assert all(url.startswith("https://") for url in spec.urls)
    assert spec.homepage.startswith("https://")
    assert len({url.endswith(".gz") for url in spec.urls}) == 1
    assert all(len(digest) == 64 and int(digest, 16) for digest in spec.sha256s)
    assert len(set(spec.sha256s)) == len(spec.sha256s)
    assert list(spec.horizons) == sorted(spec.horizons)
    start, stop = borders(spec, spec.num_rows).test
    assert max(spec.horizons) < stop - start


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ETTh3", {"ETTh1", "ETTh2"}),
        ("wether", {"Weather"}),
        ("exchange_rate", {"Exchange"}),
        ("illness", {"ILI"}),
        ("solar_AL", {"Solar"}),
        ("ELECTRICTY", {"Electricity"}),
        ("sales.csv", {None}),
        ("", {None}),
    ],
)
def test_suggestions(name: str, expected: set[str | None]) -> None:
    assert suggest(name) in expected


def test_an_unknown_benchmark_is_refused_with_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"no benchmark 'wether'; did you mean Weather\?.*Traffic, Solar"):
        load_benchmark("wether")
    with pytest.raises(DataError, match="no benchmark 'sales'; There are"):
        load_benchmark("sales")


# ---- splits ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ETTh1", Borders((0, 8640), (8640, 11520), (11520, 14400))),
        ("ETTm2", Borders((0, 34560), (34560, 46080), (46080, 57600))),
        ("Weather", Borders((0, 36887), (36887, 42157), (42157, 52696))),
        ("Exchange", Borders((0, 5311), (5311, 6071), (6071, 7588))),
        ("ILI", Borders((0, 676), (676, 773), (773, 966))),
    ],
)
def test_published_borders(name: str, expected: Borders) -> None:
    assert borders(spec_of(name), spec_of(name).num_rows) == expected


def test_the_number_of_test_windows_is_the_published_one() -> None:
    start, stop = borders(spec_of("ETTh1"), 17420).test
    assert stop - start - 96 + 1 == 2785


@given(num_rows=st.integers(5, 10**6))
def test_splits_by_share_follow_each_other_and_cover_every_row(num_rows: int) -> None:
    parts = borders(spec_of("Weather"), num_rows)
    assert parts.train[0] == 0
    assert parts.train[1] == parts.validation[0]
    assert parts.validation[1] == parts.test[0]
    assert parts.test[1] == num_rows
    assert all(start < stop for start, stop in (parts.train, parts.validation, parts.test))


@given(num_rows=st.integers(14400, 10**6))
def test_the_splits_of_ett_do_not_depend_on_later_rows(num_rows: int) -> None:
    assert borders(spec_of("ETTh1"), num_rows) == borders(spec_of("ETTh1"), 14400)


@pytest.mark.parametrize(("name", "num_rows"), [("ETTh1", 14399), ("ETTm1", 57599), ("Weather", 4), ("ILI", 0)])
def test_too_few_rows(name: str, num_rows: int) -> None:
    with pytest.raises(DataError, match=f"{name} has {num_rows} rows, too few"):
        borders(spec_of(name), num_rows)


# ---- reading, with small files of the same layouts ----

WIDE = b"date,a,OT\n2020-01-01 00:00:00,1,2\n2020-01-01 01:00:00,3,-9999\n2020-01-01 01:00:00,5,6\n"
BARE = b"0.0,1.5,2.0\n3,4,5e-1\n"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    own, cache = tmp_path / "own", tmp_path / "cache"
    own.mkdir()
    monkeypatch.setenv("TRELLIS_DATA", str(own))
    monkeypatch.setenv("TRELLIS_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return own, cache


@pytest.fixture
def wide_spec() -> BenchmarkSpec:
    digest = hashlib.sha256(WIDE).hexdigest()
    return replace(spec_of("Weather"), sha256s=(digest,), num_rows=3, num_channels=2, freq="h", urls=())


@pytest.fixture
def bare_spec() -> BenchmarkSpec:
    digest = hashlib.sha256(BARE).hexdigest()
    return replace(spec_of("Solar"), sha256s=(digest,), num_rows=2, num_channels=3, urls=())


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which its files can be had."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_rows_are_kept_as_they_are(folders: tuple[Path, Path], wide_spec: BenchmarkSpec) -> None:
    (folders[0] / "weather.csv").write_bytes(WIDE)
    panel = read_benchmark(wide_spec)
    assert [series.name for series in panel.series] == [""]
    np.testing.assert_array_equal(panel.series[0].values, [[1, 2], [3, -9999], [5, 6]])
    stamps = np.array(["2020-01-01T00", "2020-01-01T01", "2020-01-01T01"], dtype="datetime64[ns]")
    np.testing.assert_array_equal(panel.series[0].time, stamps)
    assert panel.columns.time == "date"
    assert panel.channels == ("a", "OT")
    assert panel.is_wide
    assert (panel.freq, panel.timezone, panel.dataset) == ("h", None, "Weather")
    assert panel.source == str(folders[0] / "weather.csv")
    assert any("-9999" in note for note in panel.notes)
    assert not any("verified" in note for note in panel.notes)


@pytest.mark.parametrize("packed", [False, True])
def test_bare_numbers_get_the_stamps_of_their_source(
    folders: tuple[Path, Path], bare_spec: BenchmarkSpec, packed: bool
) -> None:
    name, body = ("solar_AL.txt.gz", gzip.compress(BARE)) if packed else ("solar_AL.txt", BARE)
    (folders[0] / name).write_bytes(body)
    panel = read_benchmark(bare_spec)
    np.testing.assert_array_equal(panel.series[0].values, [[0, 1.5, 2], [3, 4, 0.5]])
    stamps = np.array(["2006-01-01T00:00", "2006-01-01T00:10"], dtype="datetime64[ns]")
    np.testing.assert_array_equal(panel.series[0].time, stamps)
    assert panel.series[0].time.dtype == stamps.dtype
    assert panel.channels == ("0", "1", "2")
    assert any("no dates" in note for note in panel.notes)


def test_the_stamps_of_solar_are_those_of_its_year() -> None:
    spec = spec_of("Solar")
    stamps = pd.date_range(spec.first_stamp, periods=spec.num_rows, freq=spec.freq)
    assert str(stamps[-1]) == "2006-12-31 23:50:00"


@pytest.mark.parametrize("body", [b"a,b,c\n1,2,3\n", b"1,2,3\n4,5\n", b"", b"\xff\xfe\x00", b"<html>"])
def test_something_else_than_bare_numbers(folders: tuple[Path, Path], bare_spec: BenchmarkSpec, body: bytes) -> None:
    (folders[0] / "solar_AL.txt").write_bytes(body)
    with pytest.raises(DataError, match=r"solar_AL\.txt is not a table"):
        read_benchmark(replace(bare_spec, sha256s=()))


def test_a_file_of_another_size_is_refused(folders: tuple[Path, Path], bare_spec: BenchmarkSpec) -> None:
    (folders[0] / "solar_AL.txt").write_bytes(BARE + b"6,7,8\n")
    with pytest.raises(DataError, match="3 rows and 3 channels, where Solar has 2 and 3"):
        read_benchmark(replace(bare_spec, sha256s=()))


def test_an_unverified_file_says_so(folders: tuple[Path, Path], bare_spec: BenchmarkSpec) -> None:
    (folders[0] / "solar_AL.txt").write_bytes(BARE)
    assert "was not verified" in read_benchmark(replace(bare_spec, sha256s=())).notes[-1]


def test_a_file_that_is_not_the_published_one_is_refused(folders: tuple[Path, Path], wide_spec: BenchmarkSpec) -> None:
    (folders[0] / "weather.csv").write_bytes(WIDE + b"2020-01-01 02:00:00,7,8\n")
    with pytest.raises(DataError, match=wide_spec.sha256s[0]):
        read_benchmark(wide_spec)


@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_file_is_downloaded_once(
    folders: tuple[Path, Path], served: tuple[Path, str], bare_spec: BenchmarkSpec, packed: bool
) -> None:
    name, body = ("solar_AL.txt.gz", gzip.compress(BARE)) if packed else ("solar_AL.txt", BARE)
    (served[0] / name).write_bytes(body)
    spec = replace(bare_spec, urls=(f"{served[1]}/{name}",))
    seen: list[int] = []
    first = read_benchmark(spec, progress=lambda done, _: seen.append(done))
    assert seen[-1] == len(body)
    assert first.source == str(folders[1] / name)
    (served[0] / name).unlink()
    again = read_benchmark(spec, allow_download=False)
    np.testing.assert_array_equal(again.series[0].values, first.series[0].values)


def test_a_download_that_is_not_allowed_or_fails_says_what_to_do(
    folders: tuple[Path, Path], served: tuple[Path, str], wide_spec: BenchmarkSpec
) -> None:
    spec = replace(wide_spec, urls=(f"{served[1]}/nothing.csv",))
    for allowed in (False, True):
        with pytest.raises(DataError, match=r"weather\.csv.*by hand from https://.*TRELLIS_DATA"):
            read_benchmark(spec, allow_download=allowed)


# ---- the published files ----


@functools.cache
def published(name: str) -> Panel:
    return load_benchmark(name, allow_download=False)


def source_of(name: str) -> Path:
    """The published file, where there is one."""
    if data_folder() is None:
        pytest.skip("TRELLIS_DATA is not set")
    path = find_local(spec_of(name).file_names)
    if path is None:
        pytest.skip(f"TRELLIS_DATA has no {spec_of(name).file_names[0]}")
    return path


@pytest.mark.parametrize("name", benchmark_names())
def test_published_files_have_the_published_size(name: str) -> None:
    source_of(name)
    spec, panel = spec_of(name), published(name)
    (series,) = panel.series
    assert series.values.shape == (spec.num_rows, spec.num_channels)
    assert series.time.dtype == np.dtype("datetime64[ns]")
    assert len(series.time) == spec.num_rows
    assert np.isfinite(series.values).all()
    assert panel.dataset == name
    step = pd.Series(series.time).diff().mode()[0]
    assert pd.Timestamp("2020-01-07") + pd.tseries.frequencies.to_offset(spec.freq) == pd.Timestamp("2020-01-07") + step


@pytest.mark.parametrize("name", PUBLISHED_OT)
def test_published_files_have_the_published_statistics(name: str) -> None:
    source_of(name)
    panel = published(name)
    num_rows, mean, deviation = PUBLISHED_OT[name]
    start, stop = borders(spec_of(name), len(panel.series[0])).train
    assert stop - start == num_rows
    assert panel.channels[-1] == "OT"
    values = panel.series[0].values[start:stop, -1]
    assert values.mean() == pytest.approx(mean, abs=1e-6)
    assert values.std() == pytest.approx(deviation, abs=1e-6)


@pytest.mark.parametrize("name", ["ETTh1", "ETTh2", "ETTm1", "ETTm2", "Weather", "Exchange", "ILI"])
@pytest.mark.parametrize("packed", [False, True])
def test_either_line_end_and_packing_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packed: bool
) -> None:
    source = source_of(name)
    expected = published(name)
    body = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    lines = body.replace(b"\r\n", b"\n")
    for digest, content in zip(spec_of(name).sha256s, (lines, lines.replace(b"\n", b"\r\n")), strict=True):
        copy = tmp_path / (source.name.removesuffix(".gz") + (".gz" if packed else ""))
        copy.write_bytes(gzip.compress(content, 1) if packed else content)
        assert sha256_of(copy) == digest
        panel = load_benchmark(name.lower(), allow_download=False)
        assert panel.source == str(copy)
        assert panel.channels == expected.channels
        np.testing.assert_array_equal(panel.series[0].values, expected.series[0].values)
        np.testing.assert_array_equal(panel.series[0].time, expected.series[0].time)


def test_weather_keeps_its_sentinels_and_its_irregular_stamps() -> None:
    source_of("Weather")
    (series,) = published("Weather").series
    assert (series.values == -9999).sum() == 81
    assert series.time[19043] == series.time[19044]


def test_a_changed_published_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = gzip.decompress(source_of("ILI").read_bytes())
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path))
    (tmp_path / "national_illness.csv").write_bytes(body.replace(b"176569", b"176570"))
    with pytest.raises(DataError, match=r"national_illness\.csv has sha256 .*, expected 8594cecb.* or 93601f64"):
        load_benchmark("ILI", allow_download=False)
