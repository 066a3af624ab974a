"""``trellis evaluate``: what is printed, what is written, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from trellis_ts import evaluation
from trellis_ts.commands.console import Terminal

SCORES = {
    *("mse", "mae", "rmse_original", "mae_original", "smape", "mase", "rmsse", "quantile_loss"),
    *("weighted_quantile_loss", "crps", "interval_score", "coverage"),
}
HEAD = {
    *("num_windows", "num_series", "num_values", "num_origins", "prediction_length", "season_length", "step", "band"),
    *("by_series", "by_step", "calibration", "comparisons", "fallbacks"),
}


def test_the_table(trellis, wide, wide_model):
    result = trellis("evaluate", wide_model, "wide.csv")
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == "7 windows of 6 steps, 1 series, 84 values"
    assert lines[1].split() == ["model", "seasonal", "naive", "difference"]
    labels = [line.split("  ")[0] for line in lines[3:15]]
    assert labels[:4] == ["MSE", "MAE", "RMSE, data units", "MAE, data units"]
    assert labels[-1] == "coverage of 80 % band"
    assert lines[15].startswith("quantile loss beside seasonal naive: ")
    assert lines[15].endswith("; too few origins to test")


def test_everything_as_json(trellis, wide, wide_model):
    data = trellis("evaluate", wide_model, "wide.csv", "--json").data
    assert set(data) == HEAD | {"model", "seasonal_naive"}
    assert set(data["model"]) == set(data["seasonal_naive"]) == SCORES
    assert (data["num_windows"], data["num_values"], data["band"], data["num_origins"]) == (7, 84, 0.8, 7)
    assert data["model"]["mse"] > 0
    assert [each["channel"] for each in data["by_series"]] == ["load", "heat"]
    assert [each["step"] for each in data["by_step"]] == [1, 2, 3, 4, 5, 6]
    average = np.mean([each["model"]["mse"] for each in data["by_step"]])
    assert data["model"]["mse"] == pytest.approx(average)
    assert {each["loss"] for each in data["comparisons"]} == {"mae", "mse", "quantile_loss"}


def test_calibration_can_be_left_out(trellis, wide, wide_model):
    calibrated, plain = (
        trellis("evaluate", wide_model, "wide.csv", "--json", *options).data["model"]
        for options in ((), ("--no-calibration",))
    )
    assert calibrated["mse"] == plain["mse"]
    assert calibrated["quantile_loss"] != plain["quantile_loss"]


def test_a_long_table(trellis, long, long_model):
    data = trellis("evaluate", long_model, "long.csv", "--json").data
    assert data["num_series"] == 2
    assert [each["series"] for each in data["by_series"]] == ["north", "south"]


def test_baselines_and_step(trellis, wide, wide_model):
    data = trellis(
        "evaluate", wide_model, "wide.csv", "--json", "--step", "3", "--baselines", "naive, drift", "--max-origins", "2"
    ).data
    assert set(data) == HEAD | {"model", "naive", "drift"}
    assert (data["num_windows"], data["step"]) == (2, 3)
    text = trellis("evaluate", wide_model, "wide.csv", "--baselines", "none", "--step", "3").out
    assert text.startswith("3 windows of 6 steps, 3 rows apart, 1 series, 36 values\n")
    assert "naive" not in text


@pytest.mark.parametrize(("by", "rows"), [("series", ["heat", "load"]), ("step", ["1", "2", "3", "4", "5", "6"])])
def test_by(trellis, wide, wide_model, by, rows):
    plain = trellis("evaluate", wide_model, "wide.csv").out
    lines = trellis("evaluate", wide_model, "wide.csv", "--by", by).out.removeprefix(plain).splitlines()
    assert lines[0] == ""
    assert lines[1].split() == [by, "MAE", "model", "MAE", "seasonal", "naive", "coverage"]
    found = [line.split()[0] for line in lines[3:]]
    assert sorted(found) == sorted(rows)
    if by == "series":
        errors = [float(line.split()[1]) for line in lines[3:]]
        assert errors == sorted(errors, reverse=True)


def test_the_same_as_a_file(trellis, wide, wide_model, folder):
    result = trellis("evaluate", wide_model, "wide.csv", "--output", "scores.json")
    assert result.out.endswith("\nwrote scores.json\n")
    assert (
        json.loads((folder / "scores.json").read_text()) == trellis("evaluate", wide_model, "wide.csv", "--json").data
    )


def test_a_tidy_table(trellis, wide, wide_model, folder):
    data = trellis("evaluate", wide_model, "wide.csv", "-o", "scores.csv", "--json").data
    frame = pd.read_csv(folder / "scores.csv")
    assert list(frame.columns) == ["forecaster", "scope", "series", "channel", "step", "metric", "value"]
    assert len(frame) == 2 * (1 + 2 + 6) * len(SCORES)
    chosen = frame[(frame.forecaster == "model") & (frame.scope == "series") & (frame.channel == "heat")]
    assert dict(zip(chosen.metric, chosen.value, strict=True)) == pytest.approx(
        {name: data["by_series"][1]["model"][name] for name in SCORES}
    )
    overall = frame[(frame.scope == "overall") & (frame.metric == "crps")]
    assert overall[["series", "channel", "step"]].isna().all(axis=None)
    assert overall.value.tolist() == pytest.approx([data["model"]["crps"], data["seasonal_naive"]["crps"]])


def test_a_picture(trellis, wide, wide_model, folder):
    trellis("evaluate", wide_model, "wide.csv", "-o", "scores.png")
    assert image.imread(folder / "scores.png")[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "0"], "step=0 must be at least 1"),
        (["--max-origins", "0"], "max_origins=0 must be at least 1"),
        (["--baselines", "prophet"], "unknown baseline 'prophet'; choose from naive, seasonal_naive, drift, auto_ets"),
        (["--by", "channel"], "--by: expected series or step, got 'channel'"),
        (["-o", "scores.txt"], "--output 'scores.txt': unknown ending; use one of .json, .csv, .png"),
        (["-o", "wide.csv"], "is DATA itself"),
    ],
)
def test_options_that_cannot_be_used(refused, wide, wide_model, options, message):
    assert message in refused("evaluate", wide_model, "wide.csv", *options)


def test_a_baseline_that_is_not_installed(refused, wide, wide_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    line = refused("evaluate", wide_model, "wide.csv", "--baselines", "auto_ets", "-o", "scores.json")
    assert "pip install 'trellis-ts[baselines]'" in line


def test_nothing_left_to_evaluate(refused, folder, make_wide, wide_model):
    make_wide(105).to_csv("table.csv", index=False)
    line = refused("evaluate", wide_model, "table.csv")
    assert "no window of 6 steps lies after the rows the model was trained on" in line


def test_a_failed_fit_is_noted(trellis, wide, wide_model, monkeypatch):
    class Failing:
        def forecast(self, y, h, *, level=None):
            raise RuntimeError

    monkeypatch.setattr("trellis_ts.evaluation.load_model", lambda name, season_length: Failing())
    result = trellis("evaluate", wide_model, "wide.csv", "--step", "6", "--baselines", "mstl")
    assert result.err == "note: mstl could not be fitted for 4 forecasts; seasonal naive stands in\n"


def test_forecasts_that_are_no_number_are_noted(trellis, wide, wide_model, monkeypatch):
    real = evaluation.naive_forecast

    def broken(*args, **options):
        found = real(*args, **options)
        return replace(found, point=found.point * float("nan"))

    monkeypatch.setattr(evaluation, "naive_forecast", broken)
    result = trellis("evaluate", wide_model, "wide.csv", "--json")
    assert result.err == "note: some forecasts of seasonal naive are no number, hence neither are its scores\n"
    assert result.data["seasonal_naive"]["mse"] is None


def test_on_a_terminal_tables_are_drawn(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("TERM", "xterm")
    Terminal(quiet=False, as_json=False).tables(["[head]", [["", "a"], ["x [b]", "1"]]], {})
    drawn = sys.stdout.getvalue()
    assert "[head]" in drawn
    assert "x [b]" in drawn
    assert "─" in drawn


def test_adaptive_bands(trellis, wide, wide_model):
    static = trellis("evaluate", wide_model, "wide.csv", "--json").data
    adaptive = trellis("evaluate", wide_model, "wide.csv", "--json", "--adaptive").data
    assert adaptive["model"]["mae"] == pytest.approx(static["model"]["mae"], rel=1e-6), "points stay"
    assert adaptive["model"]["interval_score"] != pytest.approx(static["model"]["interval_score"], rel=1e-5)
    assert adaptive["seasonal_naive"] == pytest.approx(static["seasonal_naive"], rel=1e-5)
    assert static["calibration"]["model"]["bands"] == [0.8]
    assert static["calibration"]["model"]["coverage"] == [static["model"]["coverage"]]
