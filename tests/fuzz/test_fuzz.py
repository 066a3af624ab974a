"""Broken files end in one line of a ``TrellisError``: those that once did not, and some new ones every run."""

from __future__ import annotations

import gzip
import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trellis_ts.commands import configuration
from trellis_ts.commands.configuration import read_config
from trellis_ts.datasets import readers
from trellis_ts.datasets.readers import read_table
from trellis_ts.errors import ConfigError, DataError

HERE = Path(__file__).parent
NAMES = ("csv", "gzip", "parquet", "config", "model", "snapshot", "store", "lines")


@pytest.fixture(scope="session")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_program", HERE / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def targets(fuzz):
    return fuzz.load_targets().TARGETS


def test_every_target_is_tried_here(targets):
    assert set(targets) == set(NAMES)


@pytest.mark.parametrize("name", sorted(path.name for path in (HERE / "corpus").iterdir()))
def test_what_was_found_once(fuzz, targets, tmp_path, name):
    assert fuzz.try_case(targets[name.split("-")[0]], (HERE / "corpus" / name).read_bytes(), tmp_path) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # what libraries say of broken files
def test_mutated_seeds(fuzz, targets, tmp_path, name):
    target, generator = targets[name], random.Random(0)
    for number in range(60):
        data = fuzz.mutate(generator.choice(target.seeds), target, generator)
        problem = fuzz.try_case(target, data, tmp_path)
        assert problem is None, f"case {number}: {problem}\n{data[:300]!r}"


CELLS = st.sampled_from(
    [
        "2024-01-01",
        "2024-01-02",
        "01/02/2024",
        "1",
        "-2.5",
        "1e5",
        "nan",
        "",
        "inf",
        "x",
        '"q"',
        "1,5",
        "2024-01-01T00:00Z",
    ]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    header=st.lists(st.sampled_from(["date", "time", "ds", "y", "unique_id", "a", "", "2024-01-01"]), max_size=4),
    rows=st.lists(st.lists(CELLS, max_size=4), max_size=6),
    separator=st.sampled_from([",", ";", "\t"]),
)
def test_small_tables_of_plausible_cells(fuzz, targets, tmp_path, header, rows, separator):
    text = "\n".join(separator.join(row) for row in [header, *rows])
    assert fuzz.try_case(targets["csv"], b"\x00" + text.encode(), tmp_path) is None


def test_a_small_file_cannot_stand_for_endless_text(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LARGEST_TEXT_BYTES", 1 << 20)
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b"date,a\n" + b"2024-01-01,1\n" * 100_000))
    with pytest.raises(DataError, match=r"more than .* of text"):
        read_table(path)


def test_a_small_parquet_file_cannot_stand_for_endless_rows(targets, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST_PARQUET_CELLS", 20)
    path = tmp_path / "bomb.parquet"
    path.write_bytes(targets["parquet"].seeds[0])
    with pytest.raises(DataError, match="cells read at once"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("width: " + "[" * 5000 + "]" * 5000, "line 1: nested too deeply"),
        ("width:\n  - &a [x, x]\n  - [*a, *a]\n", r"line 3: aliases such as \*a"),
        ("# " + "x" * 100, "larger than"),
    ],
)
def test_a_small_configuration_cannot_stand_for_endless_work(tmp_path, monkeypatch, text, complaint):
    if complaint == "larger than":
        monkeypatch.setattr(configuration, "_LARGEST_FILE_BYTES", 50)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_config(str(path))


def test_thousands_of_columns_are_read_in_time_linear_in_their_number(tmp_path, monkeypatch):
    asked = []
    looks_like_dates = readers.looks_like_dates

    def count(*arguments, **options):
        asked.append(1)
        return looks_like_dates(*arguments, **options)

    monkeypatch.setattr(readers, "looks_like_dates", count)
    names = [f"sensor{number}" for number in range(1000)]
    rows = [f"2024-01-{day:02d}," + ",".join("1" for _ in names) for day in range(1, 4)]
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(["date," + ",".join(names), *rows]))
    assert len(read_table(path).channels) == 1000
    assert len(asked) <= 4  # once for each number of digits
