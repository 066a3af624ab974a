"""Folders of Parquet files: blocks of whole series, whatever way the rows lie."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trellis_ts.datasets import partitions
from trellis_ts.datasets.mapped import read_folder
from trellis_ts.datasets.partitions import ParquetFolder
from trellis_ts.datasets.readers import read_table
from trellis_ts.datasets.sources import is_partitioned, load_data
from trellis_ts.datasets.spreading import distinct_series, num_buckets, spread
from trellis_ts.errors import DataError

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
COLUMNS = ("shop", "day", "sold")
DAYS, SHOPS = 50, 12


def table(*, shops: int = SHOPS, days: int = DAYS) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    day = pd.date_range("2024-01-01", periods=days)
    parts = [
        pd.DataFrame({"shop": f"s{shop:02d}", "day": day, "sold": rng.normal(shop, 1, days)}) for shop in range(shops)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of about 150 rows, three of the shops."""
    monkeypatch.setattr(partitions, "CELLS_PER_BLOCK", 450)


@pytest.fixture
def by_shop(tmp_path):
    """Sorted by shop over three files, in row groups that end in the midst of a series."""
    folder = tmp_path / "by-shop"
    folder.mkdir()
    for number in range(3):
        part = table().iloc[number * 200 : (number + 1) * 200]
        part.to_parquet(folder / f"{number}.parquet", index=False, row_group_size=70)
    return folder


@pytest.fixture
def by_day(tmp_path):
    """A file for every ten days, each with all shops."""
    folder = tmp_path / "by-day"
    folder.mkdir()
    frame = table()
    for number in range(5):
        start = pd.Timestamp("2024-01-01") + pd.Timedelta(days=10 * number)
        part = frame[(frame.day >= start) & (frame.day < start + pd.Timedelta(days=10))]
        part.to_parquet(folder / f"{number}.parquet", index=False)
    return folder


def keys_of(blocks):
    return [set(block.read().column("shop").to_pylist()) for block in blocks]


def check_whole(blocks, frame):
    """Every row is in one block, and no series in two."""
    assert sum(len(block.read()) for block in blocks) == len(frame)
    found = keys_of(blocks)
    assert sum(map(len, found)) == len(set.union(*found)) == frame.shop.nunique()


def test_blocks_of_files_in_the_order_of_series_are_ranges_of_keys(by_shop, small_blocks):
    folder = ParquetFolder(str(by_shop))
    blocks = folder.blocks(["shop"], COLUMNS)
    assert len(blocks) > 2
    check_whole(blocks, table())
    again = pickle.loads(pickle.dumps(blocks[1])).read()
    assert again.equals(blocks[1].read())


def test_rows_that_lie_apart_are_spread_by_series(by_day, small_blocks, tmp_path):
    folder = ParquetFolder(str(by_day))
    assert folder.blocks(["shop"], COLUMNS) is None
    (tmp_path / "spread").mkdir()
    done = []
    blocks = spread(folder, ["shop"], COLUMNS, str(tmp_path / "spread"), lambda now, total: done.append((now, total)))
    assert done[-1] == (600, 600)
    assert 1 < len(blocks) <= num_buckets(folder, COLUMNS) == 4
    check_whole(blocks, table())
    rows = pa.concat_tables(block.read() for block in blocks).to_pandas().sort_values(["shop", "day"])
    pd.testing.assert_frame_equal(rows.reset_index(drop=True), table(), check_dtype=False)


def test_a_row_group_larger_than_a_block_is_spread(tmp_path, small_blocks):
    table(days=300).to_parquet(tmp_path / "one.parquet", index=False)
    assert ParquetFolder(str(tmp_path)).blocks(["shop"], COLUMNS) is None


def test_few_rows_are_one_block_however_they_lie(by_day):
    [block] = ParquetFolder(str(by_day)).blocks(["shop"], COLUMNS)
    check_whole([block], table())


def test_rows_without_a_key_are_refused_and_not_lost(tmp_path, small_blocks):
    frame = table()
    frame.loc[333, "shop"] = None
    frame.to_parquet(tmp_path / "one.parquet", index=False, row_group_size=50)
    folder = ParquetFolder(str(tmp_path))
    assert folder.blocks(["shop"], COLUMNS) is None  # a range of keys would pass them over
    (tmp_path / "spread").mkdir()
    with pytest.raises(DataError, match="column 'shop': the name of the series is missing"):
        spread(folder, ["shop"], COLUMNS, str(tmp_path / "spread"))


@pytest.mark.parametrize("kind", ["int64", "string", "float64"])
def test_keys_of_any_type(tmp_path, small_blocks, kind):
    frame = table()
    frame["shop"] = frame.shop.str[1:].astype(int)
    frame["shop"] = frame.shop.astype(str) if kind == "string" else frame.shop.astype(kind)
    frame.to_parquet(tmp_path / "one.parquet", index=False, row_group_size=50)
    folder = ParquetFolder(str(tmp_path))
    blocks = folder.blocks(["shop"], COLUMNS)
    assert (blocks is None) == (kind == "float64")  # its statistics leave out NaN
    if blocks is not None:
        check_whole(blocks, frame)
    assert len(distinct_series(folder, ["shop"])) == SHOPS


def test_two_columns_that_name_a_series_tell_apart_what_they_would_together(tmp_path):
    frame = pd.DataFrame({"a": ["x", "xy", "y"], "b": ["yz", "z", "x"]})
    frame = pd.concat([frame, frame.rename(columns={"a": "b", "b": "a"})])
    frame.to_parquet(tmp_path / "one.parquet")
    assert len(distinct_series(ParquetFolder(str(tmp_path)), ["a", "b"])) == len(frame.drop_duplicates())


def test_folders_named_after_values_are_a_column(tmp_path, small_blocks):
    for shop, part in table().groupby("shop"):
        (tmp_path / "in" / f"shop={shop}").mkdir(parents=True)
        part.drop(columns="shop").to_parquet(tmp_path / "in" / f"shop={shop}" / "0.parquet", index=False)
    folder = ParquetFolder(str(tmp_path / "in"))
    blocks = folder.blocks(["shop"], COLUMNS)
    assert len(blocks) == 4
    check_whole(blocks, table())


def test_files_may_differ_in_the_width_of_numbers(by_shop):
    first = pd.read_parquet(by_shop / "0.parquet")
    first["sold"] = first.sold.round().astype("int32")
    first[["sold", "day", "shop"]].to_parquet(by_shop / "0.parquet", index=False)
    [block] = ParquetFolder(str(by_shop)).blocks(["shop"], COLUMNS)
    rows = block.read().to_pandas()
    assert rows.sold.dtype == "float64"
    assert len(rows) == 600
    np.testing.assert_array_equal(rows.sold[:200], first.sold)
    np.testing.assert_array_equal(rows.sold[200:], table().sold[200:])


def test_files_with_other_columns_are_refused(by_shop):
    table().rename(columns={"sold": "units"}).to_parquet(by_shop / "9.parquet", index=False)
    with pytest.raises(DataError, match=r"9\.parquet has columns .*'units'"):
        ParquetFolder(str(by_shop))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"PAR1 and nothing more", "cannot be read as Parquet"),
        ("a.parquet", (CORPUS / "parquet-zone-that-is-no-text").read_bytes(), "cannot be read as Parquet"),
        ("readme.txt", b"hello", "no Parquet files lie in this folder"),
        ("_part.parquet", b"hidden", "no Parquet files lie in this folder"),
    ],
)
def test_what_is_no_folder_of_parquet_files_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        ParquetFolder(str(tmp_path))


def test_addresses_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        ParquetFolder(str(tmp_path / "none"))
    with pytest.raises(DataError, match="Protocol not known: carrier-pigeon"):
        ParquetFolder("carrier-pigeon://loft/data")
    with pytest.raises(DataError, match="there is no such file or folder"):
        ParquetFolder("memory://nowhere/at-all")


def test_a_store_of_fsspec_is_read_as_a_folder(by_shop, small_blocks):
    store = fsspec.filesystem("memory")
    store.put(str(by_shop), "/shops", recursive=True)
    folder = ParquetFolder("memory://shops")
    assert folder.num_rows == 600
    check_whole(folder.blocks(["shop"], COLUMNS), table())
    store.rm("/shops", recursive=True)


def test_a_change_of_a_file_changes_the_fingerprint(by_shop):
    before = ParquetFolder(str(by_shop)).fingerprint
    assert ParquetFolder(str(by_shop)).fingerprint == before
    table().iloc[:199].to_parquet(by_shop / "0.parquet", index=False)
    assert ParquetFolder(str(by_shop)).fingerprint != before


def same(panel, other):
    """Panels with the same series, in whatever order."""
    assert (panel.columns, panel.freq, panel.timezone) == (other.columns, other.freq, other.timezone)
    theirs = {each.name: each for each in other.series}
    assert {each.name for each in panel.series} == set(theirs)
    for each in panel.series:
        for field in fields(each):
            ours, wanted = getattr(each, field.name), getattr(theirs[each.name], field.name)
            if isinstance(ours, np.ndarray):
                np.testing.assert_array_equal(ours, wanted, err_msg=field.name)
            else:
                assert ours == wanted, field.name


@pytest.mark.parametrize("layout", ["by_shop", "by_day"])
def test_a_folder_as_a_panel_holds_what_one_table_would(layout, request, small_blocks, tmp_path):
    folder = request.getfixturevalue(layout)
    table().to_parquet(tmp_path / "all.parquet", index=False)
    panel = load_data(str(folder))
    same(panel, read_table(tmp_path / "all.parquet"))
    assert panel.notes[-1] == "600 rows are kept in temporary files, not in memory"


def test_covariates_and_categories_of_many_blocks(tmp_path, small_blocks):
    frame = table()
    rng = np.random.default_rng(0)
    # Every block has categories of its own, so that each counts them differently.
    frame["state"] = [f"{shop}-{rng.integers(3)}" for shop in frame.shop.str[:2]]
    frame["price"] = rng.normal(size=len(frame))
    frame["size"] = frame.shop.str[1:].astype(int) * 1.5
    frame.to_parquet(tmp_path / "all.parquet", index=False, row_group_size=40)
    (tmp_path / "in").mkdir()
    frame.to_parquet(tmp_path / "in" / "0.parquet", index=False, row_group_size=40)
    roles = {"past_covariates": ["state"], "known_covariates": ["price"], "static": ["size"]}
    panel, whole = read_folder(str(tmp_path / "in"), **roles), read_table(tmp_path / "all.parquet", **roles)

    def texts(panel):
        [state] = panel.covariates("past")
        return {each.name: [state.categories[int(code)] for code in each.past[:, 0]] for each in panel.series}

    assert texts(panel) == texts(whole)
    for each, other in zip(panel.series, whole.series, strict=True):
        np.testing.assert_array_equal(each.known, other.known)
        np.testing.assert_array_equal(each.static, other.static)


def test_what_counts_as_a_folder_of_data(tmp_path, by_shop, monkeypatch):
    assert is_partitioned(str(by_shop))
    assert is_partitioned("s3://bucket/data")
    assert not is_partitioned(str(by_shop / "0.parquet"))
    (tmp_path / "empty").mkdir()
    assert not is_partitioned(str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ETTh1").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "ETTh1" / "a.parquet")
    assert not is_partitioned("ETTh1")  # a folder may be called like a data set
