"""What is fuzzed: every door through which a file comes in, and files to start from.

A target takes the bytes of a file and a folder to work in. It may return or raise a ``TrellisError``; anything else is
a finding.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from trellis_ts.checkpoints import Checkpoint, DataRecord, SeriesRecord, build_model, load_checkpoint
from trellis_ts.commands.configuration import read_config
from trellis_ts.commands.feed import LineReader
from trellis_ts.config import CovariateShape, ExperimentConfig, ModelConfig, TrainingConfig, WindowShape
from trellis_ts.datasets.readers import add_future, read_rows, read_table
from trellis_ts.errors import DataError
from trellis_ts.streaming.forecaster import StreamingForecaster

GOLDEN = Path(__file__).parent.parent / "golden"


class Target(NamedTuple):
    """One door: how to try bytes, what to start from, and words its files are made of."""

    run: Callable[[bytes, Path], object]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]


def _csv(data: bytes, folder: Path) -> object:
    """The first byte chooses the options."""
    option, content = (data[0] if data else 0) % 6, data[1:]
    path = folder / ("table.tsv" if option == 1 else "table.csv")
    path.write_bytes(content)
    if option == 2:
        return read_table(path, regularize=True)
    if option == 3:
        return read_table(path, freq="D", day_first=True)
    if option == 4:  # known covariates over the horizon
        history = folder / "history.csv"
        history.write_bytes(_wide())
        return add_future(read_table(history, target=["a"], known_covariates=["b"]), path, 7)
    if option == 5:
        return read_rows(path)
    return read_table(path)


def _gzip(data: bytes, folder: Path) -> object:
    path = folder / "table.csv.gz"
    path.write_bytes(data)
    return read_table(path)


def _parquet(data: bytes, folder: Path) -> object:
    path = folder / "table.parquet"
    path.write_bytes(data)
    return read_table(path)


def _config(data: bytes, folder: Path) -> object:
    path = folder / "config.yaml"
    path.write_bytes(data)
    return read_config(str(path))


_MODEL_FILES = ("config.json", "data.json", "model.safetensors", "calibration.json")


def _model(data: bytes, folder: Path) -> object:
    """The first byte chooses the file that is replaced, and whether its checksum is forged too."""
    choice, content = (data[0] if data else 0), data[1:]
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(GOLDEN / "model", model)
    (model / _MODEL_FILES[choice % 4]).write_bytes(content)
    if choice < 128:
        forge(model)
    return load_checkpoint(model)


def forge(model: Path) -> None:
    """Makes the checksums of a model directory right, as whoever made the files would."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_bytes())
        config["sha256"] = {
            name: hashlib.sha256((model / name).read_bytes()).hexdigest()
            for name in _MODEL_FILES[1:]
            if (model / name).is_file()
        }
        path.write_text(json.dumps(config), encoding="utf-8")
    except (ValueError, TypeError, RecursionError):
        pass  # no JSON object: its checksums are beside the point


@cache
def _streaming_model() -> Checkpoint:
    """Random weights, a calendar and a season: everything a state can hold."""
    network = ModelConfig(mode="streaming", width=8, num_heads=2, num_slots=4, num_layers=2, seasonal_cycle=True)
    experiment = ExperimentConfig(model=network, training=TrainingConfig(quantile_levels=(0.1, 0.25, 0.5, 0.75, 0.9)))
    model = build_model(experiment, WindowShape(16, 5, 4, 4, 7, 2, CovariateShape(cycles=("day",)))).eval()
    series = SeriesRecord("a", (40.0, 1.0), (2.0, 0.5), None)
    return Checkpoint(model, experiment, DataRecord("time", "id", ("y0", "y1"), "h", None, None, (series,)))


def _follow(live: StreamingForecaster, folder: Path) -> None:
    """What a state that was taken has to stand: going on with it."""
    for name in live.series[:3]:
        for _ in range(6):
            with contextlib.suppress(DataError):  # the calendar may have come to its end
                live.update([41.0, 1.5], series=name)
            live.forecast(name)
        live.drift(name), live.counts(name), live.last_time(name)
    live.snapshot(folder / "again.state")


def _snapshot(data: bytes, folder: Path) -> object:
    path = folder / "live.state"
    path.write_bytes(data)
    live = StreamingForecaster(_streaming_model())
    live.restore(path)
    return _follow(live, folder)


def _store(data: bytes, folder: Path) -> object:
    path = folder / "states.sqlite"
    for each in folder.glob("states.sqlite*"):  # a write-ahead log of the case before belongs to another database
        each.unlink()
    path.write_bytes(data)
    live = StreamingForecaster(_streaming_model(), store=path)
    try:
        return _follow(live, folder)
    finally:
        _close(live)


def _close(live: StreamingForecaster) -> None:
    if live._store is not None:
        live._store.close()


def _lines(data: bytes, folder: Path) -> object:
    """Lines of a stream, each of which may be refused for itself."""
    checkpoint = _streaming_model()
    live, reader = StreamingForecaster(checkpoint), LineReader(checkpoint.data)
    lines = data.splitlines(keepends=True) or [b""]
    for line in lines if reader.begin(lines[0]) else lines[1:]:
        with contextlib.suppress(DataError):
            found = reader.parse(line)
            live.update(found.values, found.time, series=found.series)
            live.forecast(found.series)
    return live


def _state_seeds() -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Snapshots, and a store."""
    with tempfile.TemporaryDirectory() as folder:
        live = StreamingForecaster(_streaming_model(), store=Path(folder) / "store")
        live.snapshot(Path(folder) / "empty")
        for name in ("a", "b"):
            live.update(np.sin(np.arange(60)).reshape(30, 2), "2024-03-01T05:00", series=name)
            for _ in range(12):
                live.update([0.5, 40.0], series=name)
                live.forecast(name)
        live.snapshot(Path(folder) / "full", extra={"offset": "400"})
        live.flush()
        _close(live)
        return tuple((Path(folder) / name).read_bytes() for name in ("full", "empty")), (
            (Path(folder) / "store").read_bytes(),
        )


def _wide(separator: str = ",", decimal: str = ".") -> bytes:
    rows = [f"2024-01-{day:02d}{separator}{day}{decimal}5{separator}{-day}" for day in range(1, 29)]
    return "\n".join([separator.join(("date", "a", "b")), *rows, ""]).encode()


def _long() -> bytes:
    rows = [f"{name},{day:02d}/03/2024 10:00,{day * 2},x" for name in ("p", "q") for day in range(1, 15)]
    return "\n".join(["unique_id,ds,y,note", *rows, ""]).encode()


def _parquet_seed(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _parquet_seeds() -> tuple[bytes, ...]:
    stamps = np.arange("2024-01-01", "2024-02-20", dtype="datetime64[D]").astype("datetime64[ns]")
    values = np.arange(len(stamps), dtype=float)
    text = [str(each)[:10] for each in stamps]
    return (
        _parquet_seed(time=stamps, load=values),
        _parquet_seed(day=text, y=values.astype(int), id=["a"] * len(text)),
        _parquet_seed(ds=pa.array(stamps).cast(pa.timestamp("us", "Europe/Berlin")), y=values),
    )


def _model_seeds() -> tuple[bytes, ...]:
    return tuple(
        bytes([index]) + (GOLDEN / "model" / name).read_bytes()
        for index, name in enumerate(_MODEL_FILES)
        if (GOLDEN / "model" / name).is_file()
    )


_YAML = b"""context_length: 96
width: 32
target: [a, b]
loss: mae
learning_rate: 1e-3
quantile_levels: [0.1, 0.5, 0.9]
max_time: 2m
regularize: false
"""

_LINES = (
    b"id,time,y0,y1\n" + b"".join(b"a,2024-03-01T%02d:00,%d,1.5\n" % (hour, 40 + hour) for hour in range(20)),
    b"".join(b'{"id":"b","time":"2024-03-%02d 05:00","y0":1,"y1":null}\n' % day for day in range(1, 20)),
    b"".join(b'{"id":"b","y0":%d,"y1":2}\n' % day for day in range(1, 20)),
)
_SNAPSHOTS, _STORES = _state_seeds()

TARGETS = {
    "csv": Target(
        _csv,
        (
            b"\x00" + _wide(),
            b"\x00" + _wide(";", ","),
            b"\x01" + _wide("\t"),
            b"\x00\xef\xbb\xbf" + _wide(),
            b"\x00" + _wide().decode().encode("utf-16"),
            b"\x00" + _long(),
            b"\x02" + _long(),
            b"\x03" + _long(),
            b"\x04" + _wide().replace(b"2024-01", b"2024-02"),
            b"\x00" + (GOLDEN / "input.csv").read_bytes()[:2000],
            b"\x05" + _wide(),
            b"\x00"
            + b'month,"#p"\n'
            + b"".join(b'"194%d-%02d",%d\n' % (y, m, y * m) for y in (8, 9) for m in range(1, 13)),
        ),
        (
            b",",
            b";",
            b"\t",
            b'"',
            b"\n",
            b"\r\n",
            b"\x00",
            b"NaN",
            b"inf",
            b"1e400",
            b"-",
            b"NA",
            b"date",
            b"unique_id",
            b"9999-12-31",
            b"0001-01-01",
            b"2024-02-30",
            b"1677-09-21",
            b"2262-04-12",
            b"1e18",
            b"2024-03-31 02:30:00+01:00",
            b"\xff\xfe",
            b"24:00",
            b"12/13/2024",
            b"1700000000000000000",
            b"=1+1",
            b"\xc3\x28",
        ),
    ),
    "gzip": Target(
        _gzip,
        (gzip.compress(_wide(), mtime=0), gzip.compress(_wide() * 50, mtime=0), _wide()),
        (b"\x1f\x8b\x08", b"\x00" * 8, b"\xff" * 4),
    ),
    "parquet": Target(_parquet, _parquet_seeds(), (b"PAR1", b"\x00" * 4, b"\xff" * 8, b"\x80\x80\x80\x80\x08", b"UTC")),
    "config": Target(
        _config,
        (_YAML, b"a: &x [1, 2]\nwidth: *x\n", b"{width: 3, loss: mse}\n", b"width: !!python/object:os.system x\n"),
        (
            b"&a",
            b"*a",
            b"!!binary",
            b"!!python/name:os.system",
            b"? ",
            b": ",
            b"- ",
            b"[",
            b"{",
            b"<<: ",
            b"---\n",
            b"width",
            b"target",
            b"1e999",
            b".nan",
            b"0x7fffffffffffffff",
            b"9" * 400,
            b"|",
            b">",
            b"'",
            b'"',
            b"\t",
            b"\x00",
            b"2001-01-01",
            b"190:20:30",
        ),
    ),
    "model": Target(
        _model,
        _model_seeds(),
        (
            b"null",
            b"true",
            b"-1",
            b"1e999",
            b"NaN",
            b"99999999999999999999",
            b"{}",
            b"[]",
            b'""',
            b"..",
            b"/etc/passwd",
            b'"F64"',
            b'"shape"',
            b"[[",
            b"\\ud800",
            b"1048576",
            b"0",
            b"0.0",
        ),
    ),
    "snapshot": Target(
        _snapshot,
        _SNAPSHOTS,
        (
            b"\xff" * 8,
            b"\x00" * 8,
            b"\x7f" * 8,
            b"\x80" + b"\x00" * 7,
            b"\x00\x00\xf0\x7f",
            b"\x00\x00\x80\x7f",
            b'"data_offsets"',
            b'"I8"',
            b"[[[",
            b'\\"a\\"',
            b"18446744073709551615",
            b"0",
            b"-1",
        ),
    ),
    "store": Target(
        _store, _STORES, (b"SQLite format 3\x00", b"\xff" * 8, b"\x00" * 8, b"VIEW", b"TRIGGER", b"series")
    ),
    "lines": Target(
        _lines,
        _LINES,
        (
            b"\n",
            b"{",
            b"}",
            b'"y0":',
            b"1e308",
            b"-1e308",
            b"1e400",
            b"NaN",
            b"null",
            b"true",
            b'"time":"9999-12-31"',
            b"0001-01-01",
            b"2262-04-11T23:00",
            b"1677-09-22",
            b"2024-03-01T05:00+14:00",
            b"5,",
            b'"',
            b"\x00",
            b"\xff",
            b"[" * 2000,
        ),
    ),
}
