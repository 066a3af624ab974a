"""The streaming network: what it carries is all it needs, it never looks ahead, and asking leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trellis_ts.causal import CausalModel
from trellis_ts.config import CovariateShape, WindowShape
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.streams import SegmentDataset, SegmentShape
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError
from trellis_ts.passes import HistoryPass
from trellis_ts.scaling import ScaleState, running_statistics
from trellis_ts.types import Columns, Panel, Segment, Series

SHAPE = WindowShape(
    context_length=14, prediction_length=5, patch_length=4, patch_stride=4, season_length=7, num_channels=2
)
OPTIONS = [
    {},
    {"linear_skip": False, "forget_gate": False},
    {"seasonal_cycle": True, "initial_memory": "learned", "step_size_form": "softplus"},
    {"write_activation": "identity", "read_activation": "softmax", "num_layers": 1, "output_activation": "silu"},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
NUM_TOKENS = 11


@pytest.fixture(scope="module")
def make_causal(make_config):
    def make(*, shape=SHAPE, levels=(0.1, 0.5, 0.9), dtype=torch.float64, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CausalModel(make_config(**options), shape, levels, implementation="reference")
            for parameter in model.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    return make


def make_segment(num_tokens=NUM_TOKENS, *, missing=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = SHAPE.history_length + num_tokens * SHAPE.patch_length + SHAPE.patch_length - 1
    values = torch.randn(3, steps, 2, generator=generator, dtype=torch.float64).cumsum(dim=1)
    observed = torch.rand(values.shape, generator=generator) >= missing
    offsets = torch.randint(SHAPE.patch_length, (3, num_tokens), generator=generator)
    return Segment(values * observed, observed, offsets, torch.tensor([0, 3, 6]))


def part(segment, first, last):
    """The tokens from the first to the last, exclusive, as a segment of their own."""
    steps = slice(first * SHAPE.patch_length, SHAPE.history_length + (last + 1) * SHAPE.patch_length - 1)
    return segment._replace(
        values=segment.values[:, steps],
        observed=segment.observed[:, steps],
        offsets=segment.offsets[:, first:last],
        phase=(segment.phase + first * SHAPE.patch_length) % SHAPE.season_length,
    )


def forecast(model, segment, state=None):
    """``[series, token, horizon, channel, quantile]`` and the state."""
    with torch.no_grad():
        found, _, state = model(segment, model.start(len(segment.values)) if state is None else state)
    return found.quantiles.unflatten(0, segment.offsets.shape), state


@every_option
def test_a_stretch_cut_anywhere_gives_the_numbers_of_the_whole(make_causal, options):
    model, segment = make_causal(**options), make_segment()
    whole, final = forecast(model, segment)
    pieces, state = [], None
    for first, last in ((0, 3), (3, 4), (4, NUM_TOKENS)):
        piece, state = forecast(model, part(segment, first, last), state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@every_option
def test_a_forecast_depends_on_no_later_step_and_on_early_ones(make_causal, options):
    model, segment = make_causal(**options), make_segment(missing=0.0)
    values = segment.values.clone().requires_grad_()
    found, _, _ = model(segment._replace(values=values), model.start(3))
    token, series = 6, 1
    found.quantiles.unflatten(0, segment.offsets.shape)[series, token].sum().backward()
    origin = SHAPE.history_length + (token + 1) * SHAPE.patch_length + int(segment.offsets[series, token])
    moved = values.grad.abs().sum(dim=2)
    assert (moved[series, origin:] == 0).all()
    assert (moved[[0, 2]] == 0).all()
    assert (moved[series, origin - SHAPE.patch_length : origin] > 0).all()
    # A step that left the context long ago still counts, through the memory alone.
    early = SHAPE.history_length
    assert moved[series, early] > 0
    assert origin - early > SHAPE.context_length


def test_where_queries_stand_changes_neither_the_state_nor_other_forecasts(make_causal):
    model, segment = make_causal(), make_segment()
    moved = segment.offsets.clone()
    moved[:, 5] = (moved[:, 5] + 1) % SHAPE.patch_length
    whole, state = forecast(model, segment)
    other, other_state = forecast(model, segment._replace(offsets=moved))
    same = [index for index in range(NUM_TOKENS) if index != 5]
    assert torch.equal(whole[:, same], other[:, same])
    assert not torch.equal(whole[:, 5], other[:, 5])
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)


def test_shifting_and_scaling_the_series_does_so_to_the_forecast(make_causal):
    model, segment = make_causal(seasonal_cycle=True), make_segment()
    expected = forecast(model, segment)[0] * 250.0 - 40.0
    values = torch.where(segment.observed, segment.values * 250.0 - 40.0, 0.0)
    actual = forecast(model, segment._replace(values=values))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-7)


def test_what_is_missing_is_not_read(make_causal):
    model, segment = make_causal(), make_segment()
    noise = torch.randn(segment.values.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    filled = torch.where(segment.observed, segment.values, 1e6 * noise)
    assert torch.equal(forecast(model, segment._replace(values=filled))[0], forecast(model, segment)[0])


def test_a_patch_without_a_value_leaves_the_memory_as_it_was(make_causal):
    model, segment = make_causal(), make_segment()
    _, before = forecast(model, part(segment, 0, 8))
    nothing = part(segment, 8, 10)._replace(observed=torch.zeros_like(part(segment, 8, 10).observed))
    _, after = forecast(model, nothing, before)
    for old, new in zip(before.layers, after.layers, strict=True):
        torch.testing.assert_close(old.memory, new.memory, rtol=0, atol=0)
    torch.testing.assert_close(before.scale[:2], after.scale[:2], rtol=0, atol=0)


def test_a_constant_series_is_forecast_as_that_constant(make_causal):
    model, segment = make_causal(), make_segment(missing=0.0)
    found, _ = forecast(model, segment._replace(values=torch.full_like(segment.values, 0.1)))
    torch.testing.assert_close(found, torch.full_like(found, 0.1), rtol=1e-12, atol=0)


def test_a_shift_of_level_leaves_the_running_scale_after_one_context():
    values = torch.randn(1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = values.clone()
    shifted[:, 100:] += 50.0
    windows, moved = values.unfold(1, 20, 5), shifted.unfold(1, 20, 5)
    state = ScaleState.start(1, values)
    loc, scale, _, _ = running_statistics(windows, torch.ones_like(windows, dtype=torch.bool), state, 5)
    found, spread, floor, _ = running_statistics(moved, torch.ones_like(moved, dtype=torch.bool), state, 5)
    after = 100 // 5  # the first window that begins with the shift
    torch.testing.assert_close(found[:, after:], loc[:, after:] + 50.0)
    torch.testing.assert_close(spread[:, after:], scale[:, after:])
    assert (floor[:, after:] < spread[:, after:]).all()


def test_the_running_scale_goes_on_where_there_are_too_few_values():
    values = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[0, 40:80] = False
    loc, scale, _, _ = running_statistics(
        values.unfold(1, 16, 4), observed.unfold(1, 16, 4), ScaleState.start(2, values), 4
    )
    start = loc[0, 8]  # the window of steps 32 to 48, the last with eight values
    assert (loc[0, 8:18] == start).all()
    assert loc[0, 7] != start
    assert loc[0, 19] != start
    assert not scale.isnan().any()
    first, _, _, _ = running_statistics(
        values.unfold(1, 16, 4), torch.zeros_like(observed).unfold(1, 16, 4), ScaleState.start(2, values), 4
    )
    assert first.isnan().all()


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({"mixer": "attention"}, SHAPE, "mixer=attention"),
        ({"chunk_length": 4}, SHAPE, "chunk_length=4"),
        ({"instance_norm": False}, SHAPE, "instance_norm"),
        ({"transform": "asinh"}, SHAPE, "transform=asinh"),
        ({}, replace(SHAPE, patch_stride=2), "make it patch_length=4"),
        ({}, replace(SHAPE, covariates=CovariateShape(known_numbers=1)), "reads the calendar only"),
    ],
)
def test_what_only_the_window_model_has_is_refused(make_causal, options, shape, words):
    with pytest.raises(ConfigError, match=words):
        make_causal(shape=shape, **options)


def make_panel(*lengths, freq_hours=1, missing=0.1, seed=0):
    rng = np.random.default_rng(seed)
    series = []
    for index, length in enumerate(lengths):
        values = rng.normal(size=(length, 2)).cumsum(axis=0)
        values[rng.random(values.shape) < missing] = np.nan
        time = np.datetime64("2021-03-01", "ns") + np.arange(length) * np.timedelta64(freq_hours, "h")
        series.append(Series(f"s{index}", time, values))
    return Panel(tuple(series), Columns("ds", "id", ("a", "b")), "h")


def scaled(panel, cycles=()):
    scaler = Scaler.fit(panel, [(0, len(each)) for each in panel.series])
    scaler = replace(scaler, covariates=replace(scaler.covariates, cycles=cycles))
    return ScaledPanel(panel, scaler, SHAPE.season_length)


@pytest.mark.parametrize("cycles", [(), ("day",)], ids=str)
def test_passes_give_the_same_from_any_start_and_in_any_company(make_causal, cycles):
    model = make_causal(shape=replace(SHAPE, covariates=CovariateShape(cycles=cycles)))
    data = scaled(make_panel(310, 90, 30), cycles)
    gather = data.gather

    def in_double(*arguments):
        batch = gather(*arguments)
        future = None if batch.future is None else batch.future.double()
        return batch._replace(context=batch.context.double(), future=future)

    data.gather = in_double
    series = np.repeat([0, 1, 2, 0], [9, 3, 30, 1])
    origins = np.concatenate((np.arange(290, 299), [20, 50, 51], np.arange(30), [310]))
    together = HistoryPass(model, data, torch.device("cpu")).forecast(series, origins)
    one_by_one = HistoryPass(model, data, torch.device("cpu"))
    for index in range(len(series)):
        alone = one_by_one.forecast(series[[index]], origins[[index]])
        torch.testing.assert_close(alone.quantiles[0], together.quantiles[index], rtol=1e-9, atol=1e-9, equal_nan=True)
    is_bare = together.point[12:42].isnan().any(dim=(1, 2))
    assert is_bare[:8].all()
    assert not is_bare[15:].any()


def segments_of(panel, ranges, **options):
    lengths = SegmentShape(SHAPE.history_length, SHAPE.prediction_length, SHAPE.patch_length, 3)
    chosen = {"stream_segments": 4, "batch_streams": 2} | options
    return SegmentDataset(scaled(panel), ranges, lengths, **chosen)


def test_training_segments_follow_one_another_and_stay_inside_their_rows():
    panel = make_panel(200, 60, missing=0.0)
    dataset = segments_of(panel, [(0, 150), (0, 40)])
    assert len(dataset) == 190
    groups = dataset.random_groups(3)
    assert [each.starts.tolist() for each in groups] == [each.starts.tolist() for each in dataset.random_groups(3)]
    assert sum(len(each.series) * each.num_segments * 3 for each in groups) == pytest.approx(190, abs=24)
    for group in groups:
        ends, previous = np.where(group.series == 0, 150, 40), None
        for number in range(group.num_segments):
            segment = dataset.segment(group, number)
            assert segment.is_first == (number == 0)
            step = 12
            if previous is not None:
                reach = segment.values.shape[1] - step
                assert torch.equal(previous.values[:, step:], segment.values[:, :reach])
            previous = segment
            origins = torch.from_numpy(group.starts + number * step)[:, None] + torch.tensor([4, 8, 12])
            last = (origins + segment.offsets)[..., None] + torch.arange(5)
            allowed = last < torch.from_numpy(ends)[:, None, None]
            seen = segment.future_observed.unflatten(0, (2, 3)).any(dim=3)
            assert (seen <= allowed).all()
            assert seen.any() or (origins >= torch.from_numpy(ends)[:, None]).any()


def test_validation_goes_through_every_patch_of_its_rows_once():
    panel = make_panel(200, 60, missing=0.0)
    dataset = segments_of(panel, [(150, 200), (40, 60)])
    scored = {0: [], 1: []}
    for group in dataset.all_groups():
        for number in range(group.num_segments):
            segment = dataset.segment(group, number)
            seen = segment.future_observed.unflatten(0, segment.offsets.shape)[..., 0, 0]
            for row, series in enumerate(group.series):
                origins = group.starts[row] + number * 12 + 4 * torch.arange(1, 4) + segment.offsets[row]
                scored[series] += origins[seen[row]].tolist()
    for series, (start, stop) in enumerate(((150, 200), (40, 60))):
        assert scored[series] == sorted(scored[series])
        assert start <= scored[series][0] < start + 8
        assert len(scored[series]) == pytest.approx((stop - start) / 4, abs=1.5)
    assert sum(len(each.series) for each in dataset.all_groups(max_forecasts=1)) == 1


def test_few_validation_rows_are_predicted_at_least_once():
    """Fewer than a patch and a horizon, as the end of a short series has them."""
    panel = make_panel(50, 31, missing=0.0)
    dataset = segments_of(panel, [(44, 50), (26, 31)])
    scored = {0: 0, 1: 0}
    for group in dataset.all_groups(max_forecasts=4):
        for number in range(group.num_segments):
            segment = dataset.segment(group, number)
            seen = segment.future_observed.unflatten(0, segment.offsets.shape).any(dim=(2, 3))
            for row, series in enumerate(group.series):
                scored[series] += int(seen[row].sum())
    assert min(scored.values()) >= 1
