"""Covariates from tables: what is a number and what a category, where the future lies, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from trellis_ts.datasets.covariates import CovariateScaler, check_covariates, recode, unseen_categories
from trellis_ts.datasets.readers import add_future, panel_from_frame, read_table
from trellis_ts.errors import DataError
from trellis_ts.types import Covariate

DAYS = pd.date_range("2024-01-01", periods=12)


def make_long(future: int = 3) -> pd.DataFrame:
    """Two shops, the last rows without a value of y."""
    parts = []
    for number, shop in enumerate(("north", "south")):
        frame = pd.DataFrame(
            {
                "shop": shop,
                "day": DAYS,
                "y": np.arange(12.0) + 100 * number,
                "promo": ["yes", "no", "no"] * 4,
                "price": np.arange(12) * 0.5,
                "size": 10 * (number + 1),
                "visits": np.arange(12.0) ** 2,
            }
        )
        frame.loc[12 - future :, ["y", "visits"]] = np.nan
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


OPTIONS = {"past_covariates": ["visits"], "known_covariates": ["promo", "price"], "static": ["size"]}


def read(frame: pd.DataFrame, **options):
    return panel_from_frame(frame, **(OPTIONS | options))


def test_each_covariate_is_where_it_belongs():
    panel = read(make_long())
    north, south = panel.series
    assert panel.channels == ("y",)
    assert [(each.name, each.role, each.categories) for each in panel.columns.covariates] == [
        ("visits", "past", None),
        ("promo", "known", ("yes", "no")),
        ("price", "known", None),
        ("size", "static", None),
    ]
    assert len(north) == len(south) == 9
    np.testing.assert_array_equal(north.past[:, 0], np.arange(9.0) ** 2)
    np.testing.assert_array_equal(south.known[:, 0], [0, 1, 1] * 4)
    np.testing.assert_array_equal(south.known[:, 1], np.arange(12) * 0.5)
    assert (north.static.tolist(), south.static.tolist()) == ([10.0], [20.0])
    assert panel.notes[-1] == "6 steps after the last values are read as the future of the known covariates"


def test_without_known_covariates_empty_rows_are_missing_values():
    panel = read(make_long(), known_covariates=[])
    assert [len(each) for each in panel.series] == [12, 12]
    assert np.isnan(panel.series[0].values[9:]).all()
    assert "6 values are missing" in panel.notes


def test_a_series_without_any_value_has_no_origin(tmp_path):
    frame = make_long()
    frame.loc[frame["shop"] == "south", "y"] = np.nan
    frame.to_csv(tmp_path / "table.csv", index=False)
    message = (
        r"table\.csv, row 14: series 'south' has rows of known covariates and no value of y, so nothing says where its "
        r"forecast begins; give it values or leave the series out$"
    )
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "table.csv", **OPTIONS)
    # Where nothing is known of the future it is a series of missing values, as ever.
    assert len(panel_from_frame(frame, target=["y"], past_covariates=["visits"]).series) == 2


def test_a_file_reads_as_the_frame(tmp_path):
    path = tmp_path / "table.csv"
    frame = make_long().sample(frac=1, random_state=0)
    frame.to_csv(path, index=False)
    frame.to_parquet(tmp_path / "table.parquet")
    expected = read(make_long())
    for name in ("table.csv", "table.parquet"):
        panel = read_table(tmp_path / name, **OPTIONS)
        for one, other in zip(sorted(panel.series, key=lambda each: each.name), expected.series, strict=True):
            np.testing.assert_array_equal(one.past, other.past)
            np.testing.assert_array_equal(one.known[:, 1], other.known[:, 1])
            codes = [
                [each.categories[int(code)] for code in series.known[:, 0]]
                for each, series in ((panel.columns.covariates[1], one), (expected.columns.covariates[1], other))
            ]
            assert codes[0] == codes[1]


@pytest.mark.parametrize(
    ("cells", "categorical", "categories"),
    [
        ([True, False, True, False], False, ("true", "false")),
        (["TRUE", "False", "true", ""], False, ("true", "false")),
        (["a", " a ", "b", "NA"], False, ("a", "b")),
        ([1, 2, 1, 2], False, None),
        ([1, 2, 1, 2], True, ("1", "2")),
        ([1.0, 2.0, np.nan, 2.5], True, ("1", "2", "2.5")),
        (["1.0", "2", "007", "2"], True, ("1", "2", "007")),
    ],
)
def test_numbers_and_categories(cells, categorical, categories):
    frame = pd.DataFrame({"day": DAYS[:4], "y": [1.0, 2, 3, 4], "x": cells})
    panel = panel_from_frame(frame, past_covariates=["x"], categorical=["x"] if categorical else [])
    assert panel.columns.covariates[0].categories == categories


def test_a_pandas_category_is_one():
    frame = pd.DataFrame({"day": DAYS[:4], "y": [1.0, 2, 3, 4], "x": pd.Categorical(["u", "v", None, "u"])})
    panel = panel_from_frame(frame, past_covariates=["x"])
    assert panel.columns.covariates[0].categories == ("u", "v")
    np.testing.assert_array_equal(panel.series[0].past[:, 0], [0, 1, np.nan, 0])


def test_missing_cells_are_masked_and_counted():
    frame = make_long()
    frame.loc[[2, 3], "price"] = np.nan
    panel = read(frame)
    assert "2 values of covariate 'price' missing, which is masked" in panel.notes
    assert np.isnan(panel.series[0].known[[2, 3], 1]).all()


def test_names_may_be_joined_by_commas_or_hold_them():
    frame = make_long().rename(columns={"promo": "promo, big", "price": "x"})
    panel = read(frame, known_covariates="promo, big,x")
    assert [each.name for each in panel.covariates("known")] == ["promo, big", "x"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"past_covariates": ["vsits"]}, "no column 'vsits'; did you mean 'visits'"),
        ({}, {"past_covariates": ["y"], "target": ["y"]}, "'y' is named for two roles"),
        ({}, {"categorical": ["day"]}, "--categorical column 'day' is no covariate"),
        ({"size": 1}, {}, "row 1 .* but row 0 .* has '10'; a static attribute has one value per series"),
        ({"price": "dear"}, {}, "column 'price': 'dear' is not a number; .*--categorical"),
    ],
)
def test_refusals(change, options, message):
    frame = make_long().astype({"price": object})
    for name, value in change.items():
        frame.loc[1, name] = value
    with pytest.raises(DataError, match=message):
        read(frame, **options)


def test_dates_are_no_covariate_unless_one_insists():
    for since in ("2020-01-31", pd.Timestamp("2020-01-31")):
        frame = make_long().assign(since=since)
        with pytest.raises(DataError, match="'since' holds dates, which are neither numbers nor categories"):
            read(frame, past_covariates=["since"])
        panel = read(frame, past_covariates=["since"], categorical=["since"])
        assert len(panel.covariates("past")[0].categories) == 1


def test_static_needs_several_series():
    frame = make_long().query("shop == 'north'").drop(columns="shop")
    with pytest.raises(DataError, match="static attributes tell series apart"):
        panel_from_frame(frame, static=["size"])


def test_repeated_rows_that_differ_in_a_covariate_are_refused():
    frame = make_long()
    again = frame.iloc[[4]].assign(price=9.0)
    with pytest.raises(DataError, match="2024-01-05T00:00:00 occurs twice in series 'north' with different values"):
        read(pd.concat([frame, again]), id="shop")
    assert len(read(pd.concat([frame, frame.iloc[[4]]]), id="shop").series[0]) == 9


class TestFuture:
    def history(self):
        return read(make_long().query("y == y"))

    def test_it_goes_on_where_the_series_end(self):
        panel = self.history()
        assert [len(each.known) for each in panel.series] == [9, 9]
        table = make_long()[["shop", "day", "promo", "price"]]
        full = add_future(panel, table.sample(frac=1, random_state=3), 3)
        for one, other in zip(full.series, read(make_long()).series, strict=True):
            np.testing.assert_array_equal(one.known, other.known)

    def test_a_new_category_is_added(self):
        table = make_long()[["shop", "day", "promo", "price"]].assign(promo="mega")
        panel = add_future(self.history(), table, 2)
        assert panel.covariates("known")[0].categories == ("yes", "no", "mega")
        assert panel.series[0].known[:, 0].tolist() == [0, 1, 1] * 3 + [2, 2]

    def test_the_order_of_day_and_month_is_that_of_the_history(self):
        table = make_long().assign(day=lambda frame: frame["day"].dt.strftime("%d/%m/%Y"))
        assert len(add_future(self.history(), table[table["day"] < "13"], 3).series[0].known) == 12

    @pytest.mark.parametrize(
        ("query", "columns", "message"),
        [
            ("shop != 'south'", None, "no row of series 'south'; add the 3 steps after 2024-01-09"),
            ("not (shop == 'south' and day.dt.day == 11)", None, "no row for 2024-01-11 of series 'south'"),
            ("shop == shop", ["shop", "day", "promo"], "no column 'price'"),
            ("shop == shop", ["day", "promo", "price"], "no column 'shop'"),
        ],
    )
    def test_what_is_missing_is_named(self, query, columns, message):
        table = make_long().query(query)
        with pytest.raises(DataError, match=message):
            add_future(self.history(), table[columns or list(table)], 3)

    def test_it_is_refused_where_nothing_is_known(self):
        with pytest.raises(DataError, match="no covariates are known in the future"):
            add_future(read(make_long(), known_covariates=[]), make_long(), 3)

    def test_words_for_numbers_are_refused(self):
        with pytest.raises(DataError, match="'price' holds categories, in the history numbers"):
            add_future(self.history(), make_long().assign(price="dear"), 3)

    def test_one_stamp_with_two_values_is_refused(self):
        table = pd.concat([make_long(), make_long().iloc[[10]].assign(price=7.0)])
        with pytest.raises(DataError, match="2024-01-11 occurs twice of series 'north' with different values"):
            add_future(self.history(), table, 3)


def test_statistics_are_of_training_rows_only():
    panel = read(make_long())
    scaler = CovariateScaler.fit(panel, [(0, 4), (0, 4)])
    poisoned = tuple(
        replace(
            each,
            past=np.concatenate((each.past[:4], np.full_like(each.past[4:], 1e9))),
            known=np.concatenate((each.known[:4], np.full_like(each.known[4:], 0))),
        )
        for each in panel.series
    )
    assert CovariateScaler.fit(replace(panel, series=poisoned), [(0, 4), (0, 4)]) == scaler
    visits, promo, price, size = scaler.covariates
    assert (visits.loc, price.loc, size.loc, size.scale) == (3.5, 0.75, 15.0, 5.0)
    assert promo.categories == ("yes", "no")
    assert CovariateScaler.fit(panel, [(0, 1), (0, 1)]).covariates[1].categories == ("yes",)


def test_unseen_categories_are_named_once():
    panel = read(make_long())
    known = (Covariate("promo", "known", ("no",)), Covariate("price", "known"))
    assert unseen_categories(panel, known) == ["covariate 'promo': 'yes' not seen in training, read as unknown"]
    assert unseen_categories(panel, (Covariate("promo", "known", ("no", "yes")),)) == []


def test_a_model_refuses_what_it_cannot_read():
    panel = read(make_long())
    with pytest.raises(DataError, match=r"reads covariate 'sun' \(past\), which the data lack"):
        check_covariates(panel, [Covariate("sun", "past")])
    with pytest.raises(DataError, match="'promo' held numbers when the model was trained, and holds 'yes' now"):
        check_covariates(panel, [Covariate("promo", "known")])
    with pytest.raises(DataError, match="'price' held categories"):
        check_covariates(panel, [Covariate("price", "known", ("1", "2"))])


def test_recoding():
    values = np.array([0.0, 1.0, np.nan, 2.0])
    np.testing.assert_array_equal(recode(values, "abc", "ca"), [1.0, np.nan, np.nan, 0.0])


class TestLibraries:
    def test_all_give_the_same_panel(self):
        polars, pyarrow = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
        frame = make_long()
        expected = read(frame)
        arrow = pyarrow.Table.from_pandas(frame)
        for other in (arrow, polars.from_arrow(arrow)):
            panel = read(other)
            assert panel.columns == expected.columns
            assert panel.notes == expected.notes
            for one, two in zip(panel.series, expected.series, strict=True):
                for name in ("time", "values", "past", "known", "static"):
                    np.testing.assert_array_equal(getattr(one, name), getattr(two, name))

    def test_a_lazy_frame_is_refused(self):
        polars = pytest.importorskip("polars")
        with pytest.raises(DataError, match=r"expected a frame, found LazyFrame; .*collect"):
            panel_from_frame(polars.LazyFrame({"ds": ["2024-01-01"], "y": [1.0]}))

    def test_the_callers_frame_stays_as_it_is(self):
        frame = make_long().sample(frac=1, random_state=1)
        before = frame.copy(deep=True)
        add_future(read(frame), frame, 3)
        panel_from_frame(frame, regularize=True, freq="2D", id="shop", target=["y"])
        pd.testing.assert_frame_equal(frame, before)


def test_categories_that_are_no_text_are_refused():
    frame = make_long().assign(promo=b"\xfa")
    with pytest.raises(DataError, match=r"column 'promo' holds binary that cannot be read as text"):
        read(frame)
