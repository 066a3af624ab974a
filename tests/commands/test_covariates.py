"""Covariates on the command line: named once, when a model is trained, and found again by its record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

_LENGTHS = ("--context-length", "14", "--patch-length", "7", "--prediction-length", "7")
_NAMES = ("--known-covariates", "promo,price", "--past-covariates", "visits", "--static", "size", "--target", "sold")


def make_table(rows: int = 90, future: int = 10) -> pd.DataFrame:
    """Two shops of two items each; the last rows are the future."""
    parts = []
    for number, (shop, item) in enumerate([(shop, item) for shop in ("north", "south") for item in (1, 2)]):
        rng = np.random.default_rng(number)
        total = rows + future
        frame = pd.DataFrame(
            {
                "shop": shop,
                "item": item,
                "day": pd.date_range("2024-01-01", periods=total).strftime("%Y-%m-%d"),
                "sold": (10 + rng.normal(size=total)).round(2),
                "promo": rng.choice(["yes", "no"], total),
                "price": rng.normal(5, 1, total).round(2),
                "visits": rng.integers(0, 99, total).astype(float),
                "size": 1.0 + number,
            }
        )
        frame.loc[rows:, ["sold", "visits"]] = np.nan
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def model(folder, trellis, tiny) -> Path:
    """A model with every kind of covariate; ``table.csv`` holds its table."""
    make_table().to_csv("table.csv", index=False)
    small = tiny[: tiny.index("--context-length")]
    trellis("train", "table.csv", "-o", "model", "--quiet", "--id", "shop,item", *_NAMES, *small, *_LENGTHS)
    return folder / "model"


def test_from_a_table_to_a_forecast(trellis, folder, model):
    record = json.loads((model / "data.json").read_text())
    assert record["id_column"] == "shop,item"
    assert [(each["name"], each["role"]) for each in record["covariates"]] == [
        ("visits", "past"),
        ("promo", "known"),
        ("price", "known"),
        ("size", "static"),
    ]
    assert set(record["covariates"][1]["categories"]) == {"yes", "no"}
    trellis("forecast", model, "table.csv", "-o", "all.csv")
    frame = pd.read_csv("all.csv")
    assert list(frame.columns) == ["shop", "item", "ds", "forecast", "q0.1", "q0.5", "q0.9"]
    assert len(frame) == 4 * 7
    assert frame["ds"].min() == "2024-03-31"
    table = make_table()
    table[table["sold"].notna()].to_csv("history.csv", index=False)
    columns = ["shop", "item", "day", "promo", "price"]
    table[table["sold"].isna()][columns].sample(frac=1, random_state=0).to_csv("future.csv", index=False)
    trellis("forecast", model, "history.csv", "--future", "future.csv", "-o", "apart.csv")
    assert (folder / "apart.csv").read_bytes() == (folder / "all.csv").read_bytes()
    assert "visits (past); promo (known); price (known); size (static)" in trellis("info", model).out
    scores = trellis("evaluate", model, "table.csv", "--json").data
    assert scores["num_windows"] == 4 * (9 - 7 + 1)


def test_distributions_paths_and_scores_take_them_too(trellis, refused, folder, tiny):
    table = make_table()
    table["sold"] = table["sold"].round()
    table.to_csv("table.csv", index=False)
    table[table["sold"].notna()].to_csv("history.csv", index=False)
    table[table["sold"].isna()][["shop", "item", "day", "promo", "price"]].to_csv("future.csv", index=False)
    small = tiny[: tiny.index("--context-length")]
    options = ("--loss", "negative_binomial", "--id", "shop,item", *_NAMES, *small, *_LENGTHS)
    trellis("train", "table.csv", "-o", "model", "--quiet", *options)
    info = trellis("info", "model", "--json").data
    assert info["settings"]["loss"] == "negative_binomial"
    assert info["calibration"]["num_windows"] == 4 * (9 - 7 + 1)
    assert info["covariates"][0] == "visits (past)"
    samples = ("--samples", "3", "--seed", "1")
    result = trellis("forecast", "model", "history.csv", "--future", "future.csv", "-o", "paths.csv", *samples)
    assert "wrote 84 rows (4 series, 1 channel, 3 samples, 7 steps)" in result.err + result.out
    frame = pd.read_csv("paths.csv")
    assert list(frame.columns) == ["shop", "item", "ds", "sample", "value"]
    assert (frame["value"] == frame["value"].round()).all()
    trellis("forecast", "model", "table.csv", "-o", "again.csv", *samples)
    assert (folder / "again.csv").read_bytes() == (folder / "paths.csv").read_bytes()
    assert "known covariates (promo, price) are missing" in refused("forecast", "model", "history.csv", *samples)
    levels = ("--quantile-levels", "0.2,0.8", "--prediction-length", "10", "--no-calibration")
    trellis("forecast", "model", "history.csv", "--future", "future.csv", "-o", "bands.csv", *levels)
    frame = pd.read_csv("bands.csv")
    assert list(frame.columns) == ["shop", "item", "ds", "forecast", "q0.2", "q0.8"]
    assert len(frame) == 4 * 10
    scores = trellis("evaluate", "model", "table.csv", "--json", "--baselines", "naive,drift").data
    assert scores["num_windows"] == 4 * (9 - 7 + 1)
    assert scores["model"]["mae"] > 0
    plain = trellis("evaluate", "model", "table.csv", "--json", "--baselines", "naive,drift", "--no-calibration").data
    assert all(plain[name] == scores[name] for name in ("naive", "drift"))
    assert plain["model"]["mae"] == scores["model"]["mae"]
    assert plain["model"]["crps"] != scores["model"]["crps"]


def test_a_series_of_known_covariates_alone_is_refused(refused, trellis, folder, model):
    table = make_table()
    table.loc[(table["shop"] == "south") & (table["item"] == 2), "sold"] = np.nan
    table.to_csv("new.csv", index=False)
    for command in ("forecast", "evaluate"):
        line = refused(command, model, "new.csv")
        assert "row 302: series 'south/2' has rows of known covariates and no value of sold" in line


def test_what_is_missing_of_the_future_is_named(refused, folder, model):
    table = make_table()
    history, future = table[table["sold"].notna()], table[table["sold"].isna()]
    history.to_csv("history.csv", index=False)

    def refusal(frame: pd.DataFrame, *options: str) -> str:
        frame.to_csv("future.csv", index=False)
        return refused("forecast", model, "history.csv", "--quiet", "--future", "future.csv", *options)

    line = refused("forecast", model, "history.csv", "--quiet")
    assert "known covariates (promo, price) are missing from 2024-03-31 on of series 'north/1'" in line
    assert "--future FILE" in line
    assert "no row for 2024-04-02 of series 'south/1'" in refusal(
        future[(future["shop"] != "south") | (future["day"] != "2024-04-02")]
    )
    assert "no row of series 'south/2'" in refusal(future[(future["shop"] != "south") | (future["item"] != 2)])
    assert "there is no column 'price'" in refusal(future.drop(columns="price"))
    assert "no row for 2024-04-10 of series 'north/1'; the 12 steps after 2024-03-30" in refusal(
        future, "--prediction-length", "12"
    )
    assert "no such file" in refused("forecast", model, "history.csv", "--quiet", "--future", "fture.csv")
    assert "is the table of --future itself" in refusal(future, "-o", "future.csv")


def test_a_table_without_a_covariate_is_refused(refused, folder, model):
    make_table().drop(columns="visits").to_csv("fewer.csv", index=False)
    for command in ("forecast", "evaluate"):
        line = refused(command, model, "fewer.csv")
        assert "there is no column 'visits'" in line
        assert "covariates visits promo price size" in line
    make_table().assign(price="dear").to_csv("words.csv", index=False)
    assert "'price' held numbers when the model was trained, and holds 'dear' now" in refused(
        "forecast", model, "words.csv", "--quiet"
    )


def test_an_unseen_category_is_noted_once(trellis, folder, model):
    table = make_table()
    table.loc[table["sold"].isna(), "promo"] = "mega"
    table.to_csv("new.csv", index=False)
    note = "covariate 'promo': 'mega' not seen in training, read as unknown"
    assert trellis("forecast", model, "new.csv", "-o", "out.csv").err.count(note) == 1
    table[table["sold"].notna()].to_csv("history.csv", index=False)
    result = trellis("forecast", model, "history.csv", "--future", "new.csv", "-o", "out.csv")
    assert result.err.count(note) == 1


def test_a_future_for_a_model_that_reads_none_is_refused(refused, folder, wide, wide_model):
    assert "no covariates are known in the future" in refused("forecast", wide_model, wide, "--future", wide)


def test_settings_go_through_a_file(trellis, folder):
    result = trellis("train", "--print-config", "--known-covariates", "promo", "price", "--regularize", "true")
    printed = yaml.safe_load(result.out)
    assert printed["known_covariates"] == ["promo", "price"]
    assert printed["past_covariates"] == printed["static"] == printed["categorical"] == []
    assert printed["regularize"] is True
    assert printed["calendar_features"] is None
    (folder / "my.yaml").write_text("known_covariates: promo\nstatic: [size]\n")
    again = yaml.safe_load(trellis("train", "--print-config", "--config", "my.yaml").out)
    assert (again["known_covariates"], again["static"]) == (["promo"], ["size"])


def test_a_data_set_has_no_covariates(refused):
    assert "data set 'co2' has no covariates" in refused("train", "co2", "--static", "size")


def test_the_calendar_is_read_where_the_data_hold_two_cycles(trellis, folder, tiny):
    stamps = pd.date_range("2024-01-01", periods=24 * 25, freq="h")
    pd.DataFrame({"date": stamps, "load": np.arange(len(stamps)) % 24.0}).to_csv("hourly.csv", index=False)
    result = trellis("train", "hourly.csv", "-o", "model", *tiny)
    assert "; calendar of day, week" in result.err
    shape = json.loads((folder / "model" / "config.json").read_text())["shape"]
    assert shape["covariates"]["cycles"] == ["day", "week"]
    trellis("forecast", "model", "hourly.csv", "-o", "out.csv", "--prediction-length", "20")
    assert len(pd.read_csv("out.csv")) == 20
    result = trellis("train", "hourly.csv", "-o", "other", "--calendar-features", "false", *tiny)
    assert "calendar of" not in result.err


def test_irregular_stamps_are_averaged_on_request(trellis, refused, folder, tiny):
    rng = np.random.default_rng(0)
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 150 * 3600, 400)), unit="s")
    pd.DataFrame({"date": stamps, "load": rng.normal(size=400).round(3)}).to_csv("sensor.csv", index=False)
    assert "--freq" in refused("train", "sensor.csv", "--quiet", *tiny)
    result = trellis("train", "sensor.csv", "-o", "model", "--regularize", "true", "--freq", "h", *tiny)
    assert "regularized onto steps of 'h': 400 of 400 rows were moved or averaged" in result.err
    result = trellis("forecast", "model", "sensor.csv", "-o", "out.csv")
    assert "regularized onto steps of 'h'" in result.err
    assert pd.read_csv("out.csv")["ds"].iloc[0] == "2024-01-07T06:00:00"
