"""Windows: each is the slice it says it is, none looks where it may not, and none is stored."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.datasets.calendar import season_position
from trellis_ts.datasets.long_horizon import borders, find_benchmark, load_benchmark
from trellis_ts.datasets.splits import Scaler, Splits
from trellis_ts.datasets.windows import ScaledPanel, WindowDataset

LENGTHS = (40, 7, 25, 13)


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel(LENGTHS, channels=2, missing=0.15)


@pytest.fixture(scope="module")
def scaler(panel):
    return Scaler.fit(panel, [(0, length // 2) for length in LENGTHS])


@pytest.fixture(scope="module")
def scaled(panel, scaler):
    scaled = ScaledPanel(panel, scaler, 7)
    scaled.gather(np.array([0]), np.array([6]), 6, 0)  # compiles, which no example's deadline allows for
    return scaled


def make(scaled, ranges=None, *, context=6, horizon=3, min_context=2, max_windows=None):
    return WindowDataset(
        scaled,
        ranges or [(0, length) for length in LENGTHS],
        context_length=context,
        prediction_length=horizon,
        min_context=min_context,
        max_windows=max_windows,
    )


def test_one_window_per_step(scaled):
    windows = make(scaled)
    series, origins = windows.locate(range(len(windows)))
    expected = [
        # A series shorter than a context and a horizon starts in the second half of the rows before its last future.
        (index, origin)
        for index, length in enumerate(LENGTHS)
        for origin in range(6 if length >= 9 else max(2, (length - 3) // 2), length - 3 + 1)
    ]
    assert list(zip(series.tolist(), origins.tolist(), strict=True)) == expected


@given(data=st.data(), context=st.integers(1, 30), horizon=st.integers(1, 12), cut=st.floats(0, 1))
def test_a_window_is_the_slice_it_says(panel, scaler, scaled, data, context, horizon, cut):
    ranges = [(round(cut * length), length) for length in LENGTHS]
    windows = make(scaled, ranges, context=context, horizon=horizon)
    if len(windows) == 0:
        assert all(stop - max(start, 1) < horizon for start, stop in ranges if stop >= horizon + 2)
        return
    number = data.draw(st.integers(0, len(windows) - 1))
    (index,), (origin,) = windows.locate([number])
    start, stop = ranges[index]
    assert start <= origin
    assert origin + horizon <= stop
    assert origin > 0
    values = (panel.series[index].values - scaler.loc[index]) / scaler.scale[index]
    padded = np.concatenate((np.full((context, 2), np.nan), values))
    expected = padded[origin : origin + context + horizon]
    batch = windows[number]
    for part, seen, truth in (
        (batch.context, batch.observed, expected[:context]),
        (batch.future, batch.future_observed, expected[context:]),
    ):
        np.testing.assert_array_equal(seen[0].numpy(), ~np.isnan(truth))
        np.testing.assert_allclose(part[0].numpy(), np.nan_to_num(truth), rtol=1e-6, atol=1e-6)
    assert batch.series.tolist() == [index]


def test_a_context_reaches_back_across_the_border(panel, scaler, scaled):
    windows = make(scaled, [(30, 40), (7, 7), (25, 25), (13, 13)])
    assert len(windows) == 8
    first = windows[0]
    expected = torch.from_numpy(np.nan_to_num((panel.series[0].values[24:30] - scaler.loc[0]) / scaler.scale[0]))
    assert torch.equal(first.context[0], expected.float())
    assert first.observed.any()


def test_windows_never_cross_into_another_series(scaled):
    """The rows of all series lie end to end; a short series is padded, not filled with its neighbour's rows."""
    batch = scaled.gather(np.array([1, 1]), np.array([2, 6]), 6, 3)
    assert not batch.observed[0, :4].any()
    assert not batch.future_observed[1, 1:].any()
    assert (batch.context[0, :4] == 0).all()
    assert (batch.future[1, 1:] == 0).all()


def test_a_batch_is_its_windows_one_by_one(scaled):
    windows = make(scaled)
    chosen = [0, 33, 5, 34, len(windows) - 1]
    batch = windows.__getitems__(chosen)
    for row, number in enumerate(chosen):
        for whole, single in zip(batch[:6], windows[number][:6], strict=True):
            assert torch.equal(whole[row : row + 1], single)


@pytest.mark.parametrize("count", [1, 2, 10, 50])
def test_fewer_windows_are_evenly_spread(scaled, count):
    everything, some = make(scaled), make(scaled, max_windows=count)
    assert len(some) == min(count, len(everything))
    places = np.linspace(0, len(everything) - 1, count).round().astype(int) if count < 51 else None
    for number in range(len(some)):
        assert some.locate([number]) == everything.locate([places[number]])
    gaps = np.diff(places)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert len(make(scaled, max_windows=10**6)) == len(everything)


@pytest.mark.parametrize("number", [-1, -100, 10**6])
def test_no_window_outside_the_range(scaled, number):
    for windows in (make(scaled), make(scaled, max_windows=5)):
        with pytest.raises(IndexError):
            windows[number]


@pytest.mark.parametrize(
    ("freq", "start", "timezone", "season_length"),
    [
        ("D", "2024-01-03", None, 7),
        ("h", "2024-03-30 05:00", None, 24),
        ("h", "2024-03-30 05:00", "Europe/Paris", 24),
        ("15min", "2024-02-28 23:45", None, 96),
        ("MS", "2023-11-01", None, 12),
        ("B", "2024-01-04", None, 5),
    ],
)
def test_the_phase_is_that_of_the_first_context_step(make_panel, freq, start, timezone, season_length):
    panel = make_panel((20,), freq=freq, start=start, timezone=timezone)
    scaled = ScaledPanel(panel, Scaler.fit(panel, [(0, 20)]), season_length)
    for origin in (6, 7, 20):
        batch = scaled.gather(np.array([0]), np.array([origin]), 6, 0)
        first = panel.series[0].time[origin - 6]
        assert batch.phase.tolist() == [season_position(first, freq, season_length, timezone)]
    before_the_start = scaled.gather(np.array([0]), np.array([1]), 6, 0).phase
    assert int(before_the_start + 5) % season_length == season_position(
        panel.series[0].time[0], freq, season_length, timezone
    )


def test_without_a_future_there_is_none(scaled):
    batch = scaled.gather(np.array([0]), np.array([40]), 6, 0)
    assert batch.future is None
    assert batch.future_observed is None
    assert batch.context.shape == (1, 6, 2)


def numbers_held(owner):
    """How many numbers the arrays and tensors of an object have, those of the panel it shares left out."""
    held = 0
    for value in vars(owner).values():
        if isinstance(value, (np.ndarray, torch.Tensor)):
            base = value.untyped_storage() if isinstance(value, torch.Tensor) else value
            held += base.nbytes() // value.element_size() if isinstance(value, torch.Tensor) else base.size
        assert not isinstance(value, (list, dict, set)) or len(value) < 100
    return held


def test_no_window_is_stored(make_panel):
    panel = make_panel((5000, 3000))
    scaled = ScaledPanel(panel, Scaler.fit(panel, [(0, 100)] * 2), 7)
    windows = make(scaled, [(0, 5000), (0, 3000)], context=500, horizon=100)
    assert len(windows) == 4401 + 2401
    assert numbers_held(scaled) <= 2 * 6  # a few per series
    assert all(own is series.values for own, series in zip(scaled._values, panel.series, strict=True))
    assert numbers_held(windows) <= 10


def test_the_panel_is_not_changed(panel, scaler):
    before = [series.values.copy() for series in panel.series]
    windows = make(ScaledPanel(panel, scaler, 7))
    windows[0].context.fill_(99.0)
    for series, values in zip(panel.series, before, strict=True):
        np.testing.assert_array_equal(series.values, values)
    assert not (windows[0].context == 99.0).any()


def test_poisoning_the_future_does_not_change_a_context(panel, scaler, scaled):
    first = panel.series[0]
    values = first.values.copy()
    values[30:] = 1e6
    poisoned = ScaledPanel(replace(panel, series=(replace(first, values=values), *panel.series[1:])), scaler, 7)
    for origin in (6, 20, 30):
        clean, dirty = (each.gather(np.array([0]), np.array([origin]), 6, 3) for each in (scaled, poisoned))
        assert torch.equal(clean.context, dirty.context)
        assert torch.equal(clean.observed, dirty.observed)


@pytest.fixture(scope="module")
def etth1():
    if "TRELLIS_DATA" not in os.environ:
        pytest.skip("TRELLIS_DATA names no folder of data files")
    if not list(Path(os.environ["TRELLIS_DATA"]).glob("**/ETTh1.csv*")):
        pytest.skip("ETTh1 is not in the folder named by TRELLIS_DATA")
    return load_benchmark("ETTh1", allow_download=False)


def test_etth1_has_the_published_windows_and_statistics(etth1):
    split = borders(find_benchmark("ETTh1"), len(etth1.series[0]))
    splits = Splits.fixed(etth1, split)
    scaled = ScaledPanel(etth1, splits.scaler, 24)
    counts = [
        len(WindowDataset(scaled, [split.of(name)], context_length=96, prediction_length=96, min_context=1))
        for name in ("train", "validation", "test")
    ]
    assert counts == [8449, 2785, 2785]
    oil = etth1.channels.index("OT")
    assert splits.scaler.loc[0, oil] == pytest.approx(17.128262, abs=1e-6)
    assert splits.scaler.scale[0, oil] == pytest.approx(9.176491, abs=1e-6)
