"""Any way of cutting a history into updates gives the forecast of one pass over the whole of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trellis_ts import Forecaster
from trellis_ts.streaming.forecaster import StreamingForecaster

START = np.datetime64("2024-03-01T05", "ns")
HOUR = np.timedelta64(1, "h")
OPTIONS = {
    "plain": {},
    "calendar": {"cycles": ("day", "week"), "calibrated": True},
    "season": {"seasonal_cycle": True, "conv_width": 1, "initial_memory": "learned", "linear_skip": False},
    "points": {"loss": "mae", "calibrated": True, "channels": 1},
    "distribution": {"loss": "student_t", "calibrated": True, "channels": 1},
}


def close(actual, expected):
    """To 1e-5 of the forecast's own spread of values, and NaN where it is NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    known = expected[~expected.isnan()]
    if len(known):
        scale = known.square().mean().sqrt()
        assert ((actual - expected).nan_to_num().abs() / scale).max() < 1e-5


@pytest.fixture(scope="module", params=list(OPTIONS))
def live(request, make_live):
    return make_live(**OPTIONS[request.param], options={"adaptive": False})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streaming_equals_batch(live, make_values, as_panel, data, tmp_path_factory):
    length = data.draw(st.integers(1, 130), "steps")
    missing = data.draw(st.sampled_from([0.0, 0.2, 0.9]), "share missing")
    values = make_values(length, channels=len(live.channels), missing=missing, seed=data.draw(st.integers(0, 9)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6), "cuts"))
    restarts = data.draw(st.sets(st.sampled_from(cuts or [0])), "restarts")
    name = data.draw(st.sampled_from(["a", "never seen"]), "name")
    path = tmp_path_factory.mktemp("state") / "live.state"
    follower = StreamingForecaster(live.checkpoint, adaptive=False)
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        if start < stop:
            follower.update(values[start:stop], START + start * HOUR, series=name)
        if stop in restarts:
            follower.forecast(name)  # asking leaves no trace
            follower.snapshot(path)
            follower = StreamingForecaster(live.checkpoint, adaptive=False)
            follower.restore(path)
    if name != "a":
        # As the batch does it, which takes the scale of a new series from its own rows; it matters to calibration only.
        follower._live.calibration = follower._live.bands._offsets = None
    whole = Forecaster(live.checkpoint, calibrated=name == "a")
    panel = as_panel(values, name)
    try:
        expected = whole.forecast(panel)
    except ValueError:  # nothing but NaN to draw a distribution from
        assert np.isnan(values).sum() > len(values) - 8
        return
    actual = follower.forecast(name)
    close(actual.point, expected.point)
    if expected.quantiles is not None:
        assert actual.quantile_levels == expected.quantile_levels
        close(actual.quantiles, expected.quantiles)


def test_many_series_side_by_side_are_as_each_alone(make_live, make_values):
    many = make_live(channels=1, cycles=("day",), calibrated=True)
    names = [f"s{index}" for index in range(150)]
    lengths = np.random.default_rng(0).integers(20, 60, len(names))
    histories = [make_values(length + 9, channels=1, seed=index) for index, length in enumerate(lengths)]
    for name, length, history in zip(names, lengths, histories, strict=True):
        many.update(history[:length, 0], START, series=name)
    for step in range(9):
        values = [history[length + step, 0] for length, history in zip(lengths, histories, strict=True)]
        many.update(values, [START + (length + step) * HOUR for length in lengths], series=names)
    together = many.forecast(names)
    for index in (0, 63, 64, 149):
        alone = make_live(channels=1, cycles=("day",), calibrated=True)
        alone.update(histories[index], START, series=names[index])
        close(together.quantiles[index : index + 1], alone.forecast(names[index]).quantiles)


@pytest.mark.parametrize("gap", [1, 3, 17, 40, 1001, 100_003])
def test_a_gap_is_as_many_missing_steps(make_live, make_values, gap):
    jumped, filled = (make_live(seasonal_cycle=True, cycles=("day",)) for _ in range(2))
    values = make_values(90, seed=3)
    for each in (jumped, filled):
        each.update(values[:50], START)
    jumped.update(values[50:], START + (50 + gap) * HOUR)
    filled.update(np.full((gap, 2), np.nan))
    filled.update(values[50:])
    close(jumped.forecast().quantiles, filled.forecast().quantiles)
    assert jumped.last_time() == filled.last_time() == START + (89 + gap) * HOUR
    assert jumped.counts() == {"steps": 90 + gap, "gaps": gap, "late": 0}
