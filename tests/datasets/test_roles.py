"""Several columns that name the series together, and names of columns joined by commas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from trellis_ts.datasets.columns import MissingColumnError, Table
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.datasets.roles import split_names
from trellis_ts.errors import DataError

DAYS = pd.date_range("2024-01-01", periods=12)


def make_table() -> pd.DataFrame:
    """Two shops of two items each."""
    parts = [
        pd.DataFrame({"shop": shop, "day": DAYS, "y": np.arange(12.0) + level, "item": item})
        for item in ("a/b", "c")
        for level, shop in ((0, "north"), (100, "south"))
    ]
    return pd.concat(parts, ignore_index=True)


def test_several_columns_name_the_series():
    panel = panel_from_frame(make_table(), id="shop,item", target=["y"])
    assert panel.columns.keys == ("shop", "item")
    assert panel.columns.id == "shop,item"
    assert [each.key for each in panel.series] == [
        ("north", "a/b"),
        ("south", "a/b"),
        ("north", "c"),
        ("south", "c"),
    ]
    assert len({each.name for each in panel.series}) == 4


def test_no_two_series_share_a_name():
    days = pd.DataFrame({"day": DAYS[:3], "y": [1.0, 2, 3]})
    pairs = [("a/b", "c"), ("a", "b/c"), ("a\\", "b/c"), ("a\\/b", "c")]
    frame = pd.concat([days.assign(p=one, q=two) for one, two in pairs])
    assert len({each.name for each in panel_from_frame(frame, id="p,q").series}) == 4


def test_a_repeat_says_what_to_do():
    with pytest.raises(DataError, match=r"2024-01-01T00:00:00 occurs twice.*\(or columns, as a,b\)"):
        panel_from_frame(make_table().assign(y=np.arange(48.0)), id="shop", target=["y"])


def test_a_missing_part_is_refused():
    frame = make_table()
    frame.loc[7, "item"] = None
    with pytest.raises(DataError, match=r"row 7 .*column 'item': the name of the series is missing"):
        panel_from_frame(frame, id="shop,item", target=["y"])


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["a"], ("a",)),
        (["a,b"], ("a", "b")),
        (["a, b", "c"], ("a", "b", "c")),
        (["b,c"], ("b,c",)),
        (["a,b,c"], ("a", "b,c")),
        ([], ()),
    ],
)
def test_the_longest_name_there_is_wins(given, found):
    names = ("a", "b", "c", "b,c")
    table = Table("data.csv", names, tuple(pa.array([1]) for _ in names))
    assert split_names(table, "--id", given) == found
    for wrong in ("d", "a,d", "a,,b", ""):
        with pytest.raises(MissingColumnError, match=r"data.csv: there is no column '(d|)'"):
            split_names(table, "--id", [wrong])
