"""The network as a whole: what it must not look at, and what must come along when the series is changed."""

from __future__ import annotations

import itertools

import pytest
import torch

from trellis_ts.errors import ConfigError
from trellis_ts.losses import forecast_loss

OPTIONS = [
    {},
    {"instance_norm": False},
    {"pooling": "last"},
    {"pooling": "mean", "linear_skip": False},
    {"mixer": "attention"},
    {"mixer": "attention", "pooling": "mean", "position_embedding": False},
    {"seasonal_cycle": True, "step_size_form": "softplus", "initial_memory": "learned"},
    {"write_activation": "ln_silu", "write_epsilon": 1.0, "read_activation": "softmax"},
    {"write_activation": "identity", "read_activation": "l2_silu", "conv_width": 1},
    {"chunk_length": 2, "num_layers": 1},
    {"second_order": False, "num_heads": 1},
    {"forget_gate": False, "output_activation": "silu"},
    {"mixer": "gsa"},
    {"mixer": "linear"},
    {"mixer": "none"},
    {"transform": "asinh"},
    {"transform": "asinh", "seasonal_cycle": True, "instance_norm": False},
]


def name_of(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "default"


every_option = pytest.mark.parametrize("options", OPTIONS, ids=name_of)


def forecast(model, batch):
    with torch.no_grad():
        return model(batch).quantiles


@every_option
def test_unobserved_values_are_never_read(make_model, make_batch, options):
    model, batch = make_model(**options), make_batch()
    poisoned = batch._replace(context=torch.where(batch.observed, batch.context, 1e6))
    torch.testing.assert_close(forecast(model, poisoned), forecast(model, batch), rtol=1e-9, atol=1e-9)


@every_option
def test_the_future_is_never_read(make_model, make_batch, options):
    model, batch = make_model(**options), make_batch()
    blind = batch._replace(future=None, future_observed=None)
    assert torch.equal(forecast(model, blind), forecast(model, batch))


@every_option
def test_rows_of_a_batch_are_independent(make_model, make_batch, options):
    model, batch = make_model(**options), make_batch(rows=7)
    together = forecast(model, batch)
    for row in range(7):
        alone = forecast(model, type(batch)(*(part if part is None else part[row : row + 1] for part in batch)))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-9)


@every_option
def test_channels_are_independent(make_model, make_batch, options):
    model, batch = make_model(**options), make_batch()
    changed = batch.context.clone()
    changed[..., 0] = torch.where(batch.observed[..., 0], torch.randn_like(changed[..., 0]), 0.0)
    before, after = forecast(model, batch), forecast(model, batch._replace(context=changed))
    assert (before[:, :, 0] - after[:, :, 0]).abs().max() > 1e-3
    torch.testing.assert_close(after[:, :, 1:], before[:, :, 1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [each for each in OPTIONS if "seasonal_cycle" not in each], ids=name_of)
def test_channels_share_their_weights(make_model, make_batch, options):
    model, batch = make_model(**options), make_batch()
    order = [2, 0, 1]
    turned = batch._replace(context=batch.context[..., order], observed=batch.observed[..., order])
    torch.testing.assert_close(forecast(model, turned), forecast(model, batch)[:, :, order], rtol=1e-10, atol=1e-10)


@every_option
def test_gradients_are_finite_and_reach_every_parameter(make_model, make_batch, options):
    model, batch = make_model(dtype=torch.float32, **options), make_batch(dtype=torch.float32)
    empty = batch.observed.clone()
    empty[0] = False
    batch = batch._replace(observed=empty, context=torch.where(empty, batch.context, 0.0))
    forecast_loss(model.train()(batch), batch.future, batch.future_observed, "quantile").backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@every_option
def test_half_precision_is_close_to_single(make_model, make_batch, options):
    model, batch = make_model(dtype=torch.float32, **options), make_batch(dtype=torch.float32)
    expected = forecast(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(batch).quantiles
        loss = forecast_loss(model(batch), batch.future, batch.future_observed, "quantile")
    loss.backward()
    assert (actual.float() - expected).square().mean().sqrt() < 0.05 * expected.std()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(("size", "shift"), [(1.0, 100.0), (7.0, 0.0), (1e3, -5.0), (0.5, 3.0)])
@pytest.mark.parametrize("mixer", ["trellis", "attention"])
def test_shifting_and_scaling_the_series_shifts_and_scales_the_forecast(make_model, make_batch, mixer, size, shift):
    model, batch = make_model(mixer=mixer), make_batch()
    big = batch._replace(context=torch.where(batch.observed, 1e3 * batch.context, 0.0))  # far above the variance floor
    moved = big._replace(context=torch.where(batch.observed, size * big.context + shift, 0.0))
    torch.testing.assert_close(forecast(model, moved), size * forecast(model, big) + shift, rtol=1e-6, atol=1e-4)


def test_shifting_is_exact_whatever_the_size(make_model, make_batch):
    model, batch = make_model(), make_batch()
    moved = batch._replace(context=torch.where(batch.observed, batch.context + 10.0, 0.0))
    torch.testing.assert_close(forecast(model, moved), forecast(model, batch) + 10.0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, {"initial_memory": "learned"}], ids=name_of)
def test_rows_before_a_series_are_as_if_they_were_missing(make_model, make_batch, options):
    """A context padded on the left gives what the same context with those rows unobserved gives."""
    model, batch = make_model(**options), make_batch(missing=0.0)
    observed = batch.observed.clone()
    observed[:, :6] = False
    noise = batch._replace(observed=observed)
    padded = noise._replace(context=torch.where(observed, batch.context, 0.0))
    torch.testing.assert_close(forecast(model, noise), forecast(model, padded), rtol=1e-10, atol=1e-10)
    assert (forecast(model, padded) - forecast(model, batch)).abs().max() > 1e-4


def test_nothing_observed_gives_the_training_mean_and_spread(make_model, make_batch):
    for mixer in ("trellis", "attention"):
        model, batch = make_model(mixer=mixer), make_batch(missing=1.0)
        result = forecast(model, batch)
        assert torch.isfinite(result).all()
        torch.testing.assert_close(result[0], result[1])


@pytest.mark.parametrize("phase", range(7))
def test_the_seasonal_cycle_is_read_at_the_right_phase(make_model, make_batch, phase):
    """With every other weight at zero the forecast is the cycle itself, from the step after the context on."""
    model = make_model(seasonal_cycle=True, instance_norm=False, levels=())
    for name, parameter in model.named_parameters():
        parameter.data.zero_() if name != "cycle" else parameter.data.normal_()
    batch = make_batch()._replace(phase=torch.full((4,), phase))
    with torch.no_grad():
        point = model(batch).point
    expected = torch.stack([model.cycle[(phase + 13 + step) % 7] for step in range(5)])
    torch.testing.assert_close(point, expected.expand(4, -1, -1).detach())


def test_the_seasonal_cycle_is_taken_off_the_context(make_model, make_batch):
    """A context that is the cycle leaves nothing to see: as if the cycle and the context were zero."""
    model = make_model(seasonal_cycle=True, instance_norm=False, levels=())
    batch = make_batch(missing=0.0)
    steps = (batch.phase[:, None] + torch.arange(18)) % 7
    seasonal = batch._replace(context=model.cycle.detach()[steps[:, :13]])
    with torch.no_grad():
        actual = model(seasonal).point - model.cycle[steps[:, 13:]]
        model.cycle.zero_()
        expected = model(seasonal._replace(context=torch.zeros_like(batch.context))).point
    torch.testing.assert_close(actual, expected)


def test_the_phase_matters_only_to_the_cycle(make_model, make_batch):
    batch = make_batch()
    later = batch._replace(phase=(batch.phase + 3) % 7)
    plain, seasonal = make_model(), make_model(seasonal_cycle=True)
    assert torch.equal(forecast(plain, later), forecast(plain, batch))
    assert (forecast(seasonal, later) - forecast(seasonal, batch)).abs().max() > 1e-3


def test_the_point_is_the_level_nearest_to_the_median(make_model, make_batch):
    for levels, center in (((0.1, 0.5, 0.8), 1), ((0.05,), 0), ((0.2, 0.4, 0.9), 1), ((0.6, 0.7), 0)):
        result = make_model(levels=levels)(make_batch())
        assert result.quantile_levels == levels
        assert torch.equal(result.point, result.quantiles[..., center])
        assert torch.equal(result.quantile(levels[-1]), result.quantiles[..., -1])
        if len(levels) == 1:
            with pytest.raises(ConfigError, match=r"the level 0\.05 only"):
                result.quantile(0.33)
        else:
            assert (result.quantile(levels[-1] + 0.01) > result.quantiles[..., -1]).all()


def test_quantiles_do_not_cross_whatever_the_series(make_model, make_batch):
    model = make_model(levels=tuple(level / 20 for level in range(1, 20)))
    for factor in (1e-6, 1.0, 1e6):
        batch = make_batch()
        result = forecast(model, batch._replace(context=factor * batch.context))
        assert (result.diff(dim=-1) > 0).all()


def test_the_memory_does_not_grow_with_the_context(make_model, make_batch, monkeypatch):
    """Only the skip, the positions and a flattening head know the context's length; the blocks do not."""
    import trellis_ts.layers.trellis as layer

    run, states = layer.trellis_memory, []

    def watch(**inputs):
        output, state = run(**inputs)
        states.append([tuple(memory.shape) for memory in state])
        return output, state

    monkeypatch.setattr(layer, "trellis_memory", watch)
    for length in (13, 130):
        model = make_model(context_length=length, channels=1, initial_memory="learned")
        model(make_batch(rows=2, context_length=length, channels=1))
    assert len(states) == 4
    assert all(state == [(2, 2, 3, 4)] * 2 for state in states)
    short, long = (
        {name: value.shape for name, value in make_model(context_length=length).blocks.state_dict().items()}
        for length in (13, 130)
    )
    assert short == long


def test_no_argument_is_changed(make_model, make_batch):
    batch = make_batch()
    parts = [part for part in batch if part is not None]
    before = [part.clone() for part in parts]
    forecast(make_model(seasonal_cycle=True), batch)
    assert len(parts) == 8
    assert all(map(torch.equal, parts, before))


def test_dropout_is_off_when_forecasting_and_on_when_training(make_model, make_batch):
    model, batch = make_model(dropout=0.5), make_batch()
    assert torch.equal(forecast(model, batch), forecast(model, batch))
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(forecast(model, batch), forecast(model, batch))


@pytest.mark.parametrize(("context", "patch", "stride"), list(itertools.product([8, 13], [1, 3, 8], [1, 2])))
def test_every_step_of_the_context_moves_the_forecast(make_model, make_batch, context, patch, stride):
    """No patching leaves a step out, the skip being off."""
    model = make_model(
        context_length=context, patch_length=patch, patch_stride=min(patch, stride), linear_skip=False, channels=1
    )
    batch = make_batch(rows=1, context_length=context, channels=1, missing=0.0)
    values = batch.context.clone().requires_grad_()
    model(batch._replace(context=values)).point.square().sum().backward()
    assert (values.grad.abs() > 1e-9).all()


def test_transformed_values_come_back(make_model, make_batch):
    """A skip that repeats the last value repeats it, however far out it lies."""
    model, batch = make_model(transform="asinh", levels=()), make_batch()
    batch = batch._replace(observed=torch.ones_like(batch.observed))
    batch.context[0, -1] = 40.0
    with torch.no_grad():
        for weight in (model.head.projection.weight, model.head.projection.bias, model.skip.weight, model.skip.bias):
            weight.zero_()
        model.skip.weight[:, -1] = 1.0
        point = model(batch).point
    torch.testing.assert_close(point, batch.context[:, -1:].expand_as(point))


def test_no_transformed_forecast_overflows(make_model, make_batch):
    model, batch = make_model(transform="asinh"), make_batch()
    with torch.no_grad():
        model.skip.bias.fill_(1e4)
        quantiles = model(batch).quantiles
    assert quantiles.isfinite().all()
