"""Pictures: what is on them, and that odd data draws without a complaint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image, rcParams
from matplotlib.figure import Figure

from trellis_ts.evaluation import backtest
from trellis_ts.forecaster import Forecaster
from trellis_ts.plots import ForecastPicture, plot_evaluation, plot_forecasts


def picture(title="a", history=20, steps=5, band=True, value=None):
    time = np.datetime64("2024-01-01", "ns") + np.arange(history + steps) * np.timedelta64(1, "D")
    numbers = np.sin(np.arange(history + steps)) if value is None else np.full(history + steps, value)
    point = numbers[history:]
    return ForecastPicture(
        title=title,
        history_time=time[:history],
        history=numbers[:history],
        time=time[history:],
        point=point,
        band=(point - 1, point + 1) if band else None,
        band_label="80 %" if band else "",
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, which still are."""
    seen, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        seen.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (3, 3), (4, 4), (14, 12)])
def test_one_panel_per_series(tmp_path, figures, count, drawn):
    path = tmp_path / "forecast.png"
    assert plot_forecasts([picture(f"series {index}") for index in range(count)], path, title="all") == drawn
    panels = [axis for axis in figures[0].axes if axis.axison]
    assert [axis.get_title(loc="left") for axis in panels] == [f"series {index}" for index in range(drawn)]
    assert image.imread(path)[..., :3].std() > 0.05


def test_an_inner_band_is_drawn_inside_the_outer(tmp_path, figures):
    whole = picture()
    inner = (whole.point - 0.5, whole.point + 0.5)
    plot_forecasts([replace(whole, inner_band=inner, inner_band_label="50 %")], tmp_path / "forecast.png")
    outer, drawn = (each.get_paths()[0].vertices[:, 1] for each in figures[0].axes[0].collections)
    assert outer.min() < drawn.min() < drawn.max() < outer.max()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["history", "80 %", "50 %", "forecast"]


def test_a_panel_shows_history_forecast_and_band(tmp_path, figures):
    plot_forecasts([picture()], tmp_path / "forecast.png")
    axis = figures[0].axes[0]
    history, forecast = axis.lines
    np.testing.assert_array_equal(history.get_ydata(), picture().history)
    np.testing.assert_array_equal(forecast.get_ydata(), picture().point)
    assert forecast.get_xdata()[0] == picture().time[0]
    assert len(axis.collections) == 1
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["history", "80 %", "forecast"]


def test_points_have_no_band(tmp_path, figures):
    plot_forecasts([picture(band=False)], tmp_path / "forecast.png")
    assert not figures[0].axes[0].collections
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["history", "forecast"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_ending_is_the_format(tmp_path, ending):
    path = tmp_path / f"forecast.{ending}"
    plot_forecasts([picture()], path)
    assert path.read_bytes().lstrip()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


@pytest.mark.parametrize(
    "odd",
    [
        picture(value=0.0),
        picture(value=np.nan),
        picture(value=1e300),
        picture(history=1, steps=1),
        picture(history=300, steps=100),
        picture(title="_hidden"),
        picture(title=r"$\frac{$ 5 & 3 \% of $x^$"),
        picture(title="long " * 40),
    ],
    ids=["constant", "missing", "huge", "short", "long", "underscore", "dollars", "title"],
)
def test_odd_series_are_drawn(tmp_path, odd):
    assert plot_forecasts([odd, picture()], tmp_path / "forecast.png", title=odd.title) == 2


def test_global_settings_are_left_alone(tmp_path):
    before = dict(rcParams)
    plot_forecasts([picture()], tmp_path / "forecast.png")
    assert dict(rcParams) == before


@pytest.fixture(scope="module")
def evaluation(make_panel, make_checkpoint):
    panel = make_panel((60,), channels=2)
    return backtest(Forecaster(make_checkpoint(panel, known=30)), panel, baselines=("naive", "seasonal_naive"))


def test_an_evaluation_shows_error_coverage_and_calibration(tmp_path, figures, evaluation):
    plot_evaluation(evaluation, tmp_path / "scores.png")
    error, coverage, pit = figures[0].axes
    for axis, metric in ((error, "mae"), (coverage, "coverage")):
        for line, name in zip(axis.lines, evaluation.forecasters, strict=False):
            expected = [getattr(each, metric) for each in evaluation.by_step[name]]
            np.testing.assert_array_equal(line.get_ydata(), expected)
    found = evaluation.calibration["model"]
    assert [bar.get_height() for bar in pit.patches[:4]] == pytest.approx(
        [share / width for share, width in zip(found.pit, found.pit_expected, strict=True)]
    )
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["model", "naive", "seasonal naive"]
    styles = {(line.get_color(), str(line.get_linestyle())) for line in error.lines}
    assert len(styles) == 3


def test_an_evaluation_of_points_shows_the_error_only(tmp_path, figures, make_panel, make_checkpoint):
    panel = make_panel((40,))
    points = Forecaster(make_checkpoint(panel, known=30, loss="mse"))
    plot_evaluation(backtest(points, panel), tmp_path / "scores.png")
    assert len(figures[0].axes) == 1
