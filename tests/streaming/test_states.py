"""The rules of live series: what is late, what is refused, what is kept, and that a state belongs to one model."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch

from trellis_ts import CheckpointError, ConfigError, DataError, Forecaster
from trellis_ts.streaming.forecaster import StreamingForecaster
from trellis_ts.streaming.snapshots import write_state
from trellis_ts.streaming.table import COUNT, PHASE, TIME

START = np.datetime64("2024-03-01T05", "ns")
HOUR = np.timedelta64(1, "h")


def same(one, other):
    return torch.equal(one.quantiles.nan_to_num(7e9), other.quantiles.nan_to_num(7e9))


def test_late_observations_are_counted_and_change_nothing(make_live, make_values):
    live, values = make_live(), make_values(40)
    assert live.update(values[:30], START) == 0
    before = live.forecast()
    assert live.update(values[:2], START + 3 * HOUR) == 2
    assert live.update(values[0] + 100, START + 29 * HOUR) == 1  # the last step once more
    assert same(live.forecast(), before)
    assert live.counts() == {"steps": 30, "gaps": 0, "late": 3}
    # Of a piece that overlaps, what is new is taken in.
    assert live.update(values[25:40], START + 25 * HOUR) == 5
    straight = make_live()
    straight.update(values, START)
    # Its bands have learnt from the forecast that was asked for; the middle is the same.
    torch.testing.assert_close(live.forecast().point, straight.forecast().point, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("values", "time", "words"),
    [
        ([[1.0, 2.0, 3.0]], None, r"shape \[1, 3\] do not fit 1 series of 2 channel"),
        ([1.0, np.inf], None, "infinite"),
        (["x", 2], None, "not all numbers"),
        ([1.0, 2.0], "yesterday", "'yesterday' is not a date"),
        ([1.0, 2.0], "2024-03-01T05:30", "is not on the calendar of h steps"),
        ([1.0, 2.0], "2024-03-09T05:00+02:00", "has a time zone"),
        ([1.0, 2.0], np.datetime64("NaT"), "a time is missing"),
    ],
)
def test_what_cannot_be_understood_is_refused_and_leaves_no_trace(make_live, make_values, values, time, words):
    live = make_live()
    live.update(make_values(30), START)
    before = live.forecast()
    with pytest.raises(DataError, match=words):
        live.update(values, time)
    assert same(live.forecast(), before)
    assert live.counts() == {"steps": 30, "gaps": 0, "late": 0}


def test_one_bad_stamp_among_many_series_leaves_all_as_they_were(make_live):
    live = make_live(channels=1)
    names = [f"s{index}" for index in range(100)]
    live.update(np.ones(100), START, series=names)
    stamps = [START + HOUR] * 99 + [START + np.timedelta64(30, "m")]
    with pytest.raises(DataError, match="calendar"):
        live.update(np.ones(100), stamps, series=names)
    assert {live.counts(name)["steps"] for name in names} == {1}


def test_a_model_that_reads_the_calendar_wants_a_first_time(make_live):
    live = make_live(cycles=("day",))
    with pytest.raises(DataError, match="give the time of a series' first observation"):
        live.update([1.0, 2.0])
    live.update([1.0, 2.0], "2024-03-01 05:00")
    live.update([1.0, 2.0])
    assert live.last_time() == START + HOUR


def test_nothing_is_forecast_before_there_is_enough_to_go_by(make_live):
    live = make_live(channels=1)
    with pytest.raises(DataError, match="has had no update yet"):
        live.forecast()
    live.update(np.arange(7.0))
    assert live.forecast().point.isnan().all()
    live.update(8.0)
    assert not live.forecast().point.isnan().any()


def test_series_do_not_share_anything(make_live, make_values):
    live, alone = make_live(), make_live()
    values = make_values(50)
    live.update(make_values(30, seed=8), series="other")
    for step in range(50):
        live.update(values[step], series="mine")
        live.update(make_values(1, seed=step)[0], series="other")
    alone.update(values, series="mine")
    np.testing.assert_allclose(live.forecast("mine").quantiles, alone.forecast("mine").quantiles, rtol=1e-5)
    live.reset("mine")
    assert live.series == ("other",)
    live.update(values, series="mine")  # in the slot that was freed
    assert same(live.forecast("mine"), alone.forecast("mine"))


def test_a_snapshot_brings_everything_back(make_live, make_values, tmp_path):
    live, values = make_live(calibrated=True), make_values(80)
    for step in range(40):
        live.update(values[step], START + step * HOUR, series="a")
        live.forecast("a")  # so that bands are learning
    live.update(values[:20], series="b")
    live.snapshot(tmp_path / "state", extra={"line": "40"})
    other = make_live(calibrated=True)
    other.update(values[:5], series="c")
    assert other.restore(tmp_path / "state") == {"line": "40"}
    assert other.series == ("a", "b")
    for step in range(40, 80):
        for each in (live, other):
            each.update(values[step], series="a")
        assert same(live.forecast(["a", "b"]), other.forecast(["a", "b"]))
    assert other.counts("a") == live.counts("a")
    np.testing.assert_array_equal(np.array(other.drift("a")), np.array(live.drift("a")))


def test_the_state_of_another_model_is_refused(make_live, make_values, tmp_path):
    live = make_live()
    live.update(make_values(30))
    live.snapshot(tmp_path / "state")
    for settings in ({"seed": 1}, {"num_slots": 16}, {"levels": (0.1, 0.5, 0.9)}, {"options": {"adaptive": False}}):
        other = make_live(**settings)
        other.update(make_values(12))
        before = other.forecast()
        with pytest.raises(CheckpointError, match="written by another model"):
            other.restore(tmp_path / "state")
        assert same(other.forecast(), before)
    with pytest.raises(CheckpointError, match="written by another model"):
        make_live(seed=1, options={"store": store_of(make_live, tmp_path)})


def store_of(make_live, tmp_path):
    path = tmp_path / "store.sqlite"
    make_live(options={"store": path})
    return path


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other", "newer", "older"])
def test_a_damaged_state_is_refused(make_live, make_values, tmp_path, harm):
    live, path = make_live(), tmp_path / "state"
    live.update(make_values(30))
    live.snapshot(path)
    content = path.read_bytes()
    harmed = {
        "cut": content[: len(content) // 2],
        "flip": content.replace(b'"window"', b'"willow"'),
        "empty": b"",
        "other": content.replace(b"trellis_ts.state", b"trellis_ts.other"),
        "newer": content.replace(b'"version":"2"', b'"version":"9"'),
        "older": content.replace(b'"version":"2"', b'"version":"1"'),
    }
    path.write_bytes(harmed[harm])
    assert path.read_bytes() != content
    before = live.forecast()
    words = {"newer": "version 9", "older": "version 1, of an older", "other": "no state"}
    with pytest.raises(CheckpointError, match=words.get(harm, "damaged|not those")):
        live.restore(path)
    assert same(live.forecast(), before)
    with pytest.raises(CheckpointError, match="no such file"):
        live.restore(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("array", "place", "number"),
    [
        ("clock", (0, PHASE), 7),
        ("clock", (0, COUNT), -1),
        ("clock", (0, TIME), np.iinfo(np.int64).max),
        ("edge_upper", (0, 0, 0, 0), 100),
        ("pending_from", (0, 0), 9),
        ("pending_from", (0, 0), -5),
        ("unit", (0, 0, 1), 0.0),
        ("unit", (0, 0, 0), np.nan),
    ],
)
def test_numbers_that_no_state_can_hold_are_refused(make_live, make_values, tmp_path, array, place, number):
    live = make_live()
    live.update(make_values(30), START)
    live.forecast()
    arrays = live._live.table.export([0])
    arrays[array][place] = number
    write_state(tmp_path / "state", arrays, [""], fingerprint=live._key(), extra={})
    before = live.forecast()
    with pytest.raises(CheckpointError, match=f"damaged: {array} holds what no state can"):
        live.restore(tmp_path / "state")
    assert same(live.forecast(), before)


@pytest.mark.parametrize("series", ["[" * 5000, '["a", "a"]', "3", '[""]extra', '{"a": 1}'])
def test_names_that_no_state_can_hold_are_refused(make_live, make_values, tmp_path, series):
    from safetensors.numpy import save_file

    live = make_live()
    live.update(make_values(30), START)
    metadata = {"format": "trellis_ts.state", "version": "2", "fingerprint": live._key(), "series": series}
    save_file(live._live.table.export([0]), tmp_path / "state", metadata | {"extra": "{}"})
    with pytest.raises(CheckpointError, match="damaged"):
        live.restore(tmp_path / "state")


@pytest.mark.parametrize(
    "harm",
    [
        "DROP TABLE series; CREATE VIEW series AS WITH RECURSIVE n(name) AS (SELECT 1 UNION ALL SELECT name + 1 "
        "FROM n) SELECT name, x'00' AS state FROM n",  # would be read without an end
        "CREATE TRIGGER harm AFTER INSERT ON series BEGIN DELETE FROM series; END",
        "CREATE TABLE other (a)",
        "UPDATE model SET version = 'x'",
        "UPDATE series SET state = 'text'",
        "UPDATE series SET name = x'ff'",
        "UPDATE series SET name = CAST(x'ff' AS TEXT)",
        "UPDATE series SET state = zeroblob(100)",
    ],
)
def test_a_forged_store_is_refused(make_live, make_values, tmp_path, harm):
    path = tmp_path / "store.sqlite"
    live = make_live(options={"store": path})
    live.update(make_values(30), series="a")
    live.flush()
    live._store.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(harm)
        database.commit()

    def use():
        again = make_live(options={"store": path})
        assert again.series == ("a",)
        again.forecast("a")

    with pytest.raises(CheckpointError, match=r"store|state"):
        use()


def test_a_store_holds_more_series_than_memory(make_live, make_values, tmp_path):
    path = tmp_path / "store.sqlite"
    live = make_live(channels=1, options={"store": path, "max_series": 20})
    names = [f"s{index}" for index in range(100)]
    values = make_values(30, channels=100, missing=0.0)
    for step in range(30):
        live.update(values[step], series=names)
    assert len(live._slots) <= 20
    assert set(live.series) == set(names)
    expected = live.forecast(names)
    live.flush()
    again = make_live(channels=1, options={"store": path, "max_series": 20})
    assert same(again.forecast(names), expected)
    assert again.counts("s7")["steps"] == 30
    again.reset("s7")
    with pytest.raises(DataError, match="'s7' has had no update"):
        again.forecast("s7")
    assert len(again.series) == 99
    with pytest.raises(ConfigError, match="no store to evict to"):
        make_live().evict("a")


def test_what_is_not_flushed_is_lost_and_nothing_else(make_live, make_values, tmp_path):
    path = tmp_path / "store.sqlite"
    live = make_live(options={"store": path})
    live.update(make_values(30), series="a")
    live.flush()
    live.update(make_values(7, seed=1), series="a")
    del live
    again = make_live(options={"store": path})
    assert again.counts("a")["steps"] == 30


def test_a_window_model_cannot_stream(make_checkpoint, make_values, as_panel):
    with pytest.raises(ConfigError, match="--mode streaming"):
        StreamingForecaster(make_checkpoint(as_panel(make_values(60))))


def test_memory_and_state_stay_the_same_size(make_live, make_values):
    live = make_live()
    size = live.bytes_per_series
    live.update(make_values(500))
    arrays = live._live.table.arrays
    assert sum(each[0].nbytes for each in arrays.values()) == size
    assert live.bytes_per_series == size < 64 << 10


def test_bands_learn_as_adaptive_conformal_does(make_live, make_values):
    from trellis_ts import AdaptiveConformal

    live = make_live(channels=1, calibrated=True, options={"rate": 0.2})
    plain = make_live(channels=1, calibrated=True, options={"adaptive": False})
    values = make_values(120, channels=1, missing=0.05)
    adaptive, waiting = AdaptiveConformal([0.5, 0.8], rate=0.2), []
    for step in range(120):
        for each in (live, plain):
            each.update(values[step], series="a")
        for begun, forecast in list(waiting):
            if step + 1 == begun + 5:
                adaptive.update(torch.from_numpy(values[None, begun : begun + 5]), forecast)
                waiting.remove((begun, forecast))
        base, found = plain.forecast("a"), live.forecast("a")
        if base.point.isnan().any():
            continue
        if len(waiting) < 4 and (not waiting or step + 1 - waiting[-1][0] >= 2):
            waiting.append((step + 1, base))
        for band, low, high in ((0.8, 0, 4), (0.5, 1, 3)):
            lower, upper = adaptive.band(base, band)
            edges = torch.stack((lower, upper))
            # The outer band is never drawn inside the inner one.
            if band == 0.5:
                torch.testing.assert_close(
                    found.quantiles[..., [low, high]].movedim(-1, 0), edges, rtol=1e-4, atol=1e-3
                )
            assert (found.quantiles[..., low] <= lower + 1e-3).all() or band == 0.5
    assert not torch.equal(adaptive.alpha(0.8), torch.full((1, 5, 1), 0.2, dtype=torch.float64))


def test_drift_shows_a_change_of_ways(make_live):
    live = make_live(channels=1)
    rng = np.random.default_rng(0)
    calm = np.sin(np.arange(200) / 3) + 0.01 * rng.normal(size=200)

    def follow(values):
        for value in values:
            live.forecast()
            live.update(value)
        return live.drift()

    live.update(calm[:20])
    before = follow(calm[20:])
    after = follow(calm[:6] * -9 + 30)
    assert after.error[0] > 2 * before.error[0]
    assert 0 < before.forget_gate[0] < 1
    assert before.surprise[0] > 0


def test_known_series_are_forecast_as_by_the_forecaster(make_live, make_values, as_panel):
    live = make_live(calibrated=True, options={"adaptive": False})
    values = make_values(70)
    live.update(values, START, series="a")
    expected = Forecaster(live.checkpoint).forecast(as_panel(values), quantile_levels=[0.3, 0.7])
    actual = live.forecast("a", quantile_levels=[0.7, 0.3])
    torch.testing.assert_close(actual.quantiles, expected.quantiles, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "2024-03-01 05:00",
        "2024-03-01T05",
        "01.03.2024 05:00",
        "01/03/2024 05:00",
        "March 1, 2024 05:00",
        "1 Mar 2024 05:00",
    ],
)
def test_dates_are_read_in_the_layouts_of_tables(make_live, text):
    live = make_live()
    live = StreamingForecaster(replace(live.checkpoint, data=replace(live.checkpoint.data, day_first=True)))
    live.update([1.0, 2.0], text)
    assert live.last_time() == START


def test_a_date_that_may_mean_two_days_is_refused(make_live):
    with pytest.raises(DataError, match="may mean two days"):
        make_live().update([1.0, 2.0], "01/03/2024 05:00")
