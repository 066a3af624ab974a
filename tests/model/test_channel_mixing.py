"""Channels that tell each other what they know."""

from __future__ import annotations

import pytest
import torch

from trellis_ts.layers.channels import ChannelMixing
from trellis_ts.losses import forecast_loss
from trellis_ts.model import ForecastModel

MIXED = [
    {},
    {"mixer": "attention"},
    {"mixer": "none"},
    {"initial_memory": "learned", "seasonal_cycle": True},
    {"write_activation": "identity", "pooling": "mean"},
]
every_mixed = pytest.mark.parametrize("options", MIXED, ids=str)


@pytest.fixture
def make_mixed(make_model):
    def make(**options):
        return make_model(channel_mixing="trellis", **options)

    return make


def forecast(model, batch):
    with torch.no_grad():
        return model(batch).quantiles


def changed(batch, channel):
    """The same batch with other values in one channel."""
    context = batch.context.clone()
    context[..., channel] = torch.where(batch.observed[..., channel], context[..., channel].flip(1) * 3 + 1, 0.0)
    return batch._replace(context=context)


@every_mixed
def test_every_channel_reacts_to_every_other(make_mixed, make_batch, options):
    model, batch = make_mixed(**options), make_batch(missing=0.0)
    before = forecast(model, batch)
    for channel in range(3):
        moved = (forecast(model, changed(batch, channel)) - before).abs().amax(dim=(0, 1, 3))
        assert (moved > 1e-7).all(), channel


@every_mixed
def test_unobserved_values_are_never_read(make_mixed, make_batch, options):
    model, batch = make_mixed(**options), make_batch()
    poisoned = batch._replace(context=torch.where(batch.observed, batch.context, 1e6))
    torch.testing.assert_close(forecast(model, poisoned), forecast(model, batch), rtol=1e-9, atol=1e-9)


def test_a_channel_without_an_observation_is_not_read_by_others(make_config):
    torch.manual_seed(0)
    layer = ChannelMixing(make_config(channel_mixing="trellis"), num_channels=4)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    layer.double().eval()
    tokens, observed = torch.randn(2 * 4, 5, 8, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    observed[:, 1] = False
    noisy = tokens.view(2, 4, 5, 8).clone()
    noisy[:, 1] = 100.0
    mixed, other = (layer(each.reshape(8, 5, 8), observed).view(2, 4, 5, 8) for each in (tokens, noisy))
    kept = [0, 2, 3]
    torch.testing.assert_close(mixed[:, kept], other[:, kept])
    layer.identity.data = layer.identity.data[kept]
    without = layer(tokens.view(2, 4, 5, 8)[:, kept].reshape(6, 5, 8), observed[:, kept]).view(2, 3, 5, 8)
    torch.testing.assert_close(mixed[:, kept], without)


@every_mixed
def test_it_starts_from_independent_channels(make_config, make_model, make_batch, options):
    """The untrained network with channel mixing is, weight for weight, the one without."""
    shape = make_model().shape
    batch = make_batch(dtype=torch.float32)

    def untrained(channel_mixing):
        torch.manual_seed(3)
        return ForecastModel(make_config(channel_mixing=channel_mixing, **options), shape, (0.1, 0.5, 0.8)).eval()

    torch.testing.assert_close(forecast(untrained("trellis"), batch), forecast(untrained("none"), batch))


@every_mixed
def test_gradients_are_finite_and_reach_every_parameter(make_mixed, make_batch, options):
    model, batch = make_mixed(dtype=torch.float32, **options), make_batch(dtype=torch.float32)
    observed = batch.observed.clone()
    observed[0] = False
    observed[1, :, 1] = False
    batch = batch._replace(observed=observed, context=torch.where(observed, batch.context, 0.0))
    forecast_loss(model.train()(batch), batch.future, batch.future_observed, "quantile").backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_leaves_the_start(make_config, make_model, make_batch):
    """The first step moves the branches that start at zero; from the second on, the memory learns, too."""
    shape, batch = make_model().shape, make_batch(dtype=torch.float32)
    model = ForecastModel(make_config(channel_mixing="trellis"), shape, (0.1, 0.5, 0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        forecast_loss(model(batch), batch.future, batch.future_observed, "quantile").backward()
        optimizer.step()
    for name, parameter in model.channels.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_rows_of_a_batch_are_independent(make_mixed, make_batch):
    model, batch = make_mixed(), make_batch(rows=5)
    together = forecast(model, batch)
    for row in range(5):
        alone = forecast(model, type(batch)(*(part if part is None else part[row : row + 1] for part in batch)))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-9)


def test_the_order_of_channels_matters(make_config):
    """As documented: but for the reverse, another order is another model, even if channels are not told apart."""
    torch.manual_seed(0)
    layer = ChannelMixing(make_config(channel_mixing="trellis"), num_channels=3)
    for name, parameter in layer.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * (name != "identity")
    layer.double().eval()
    tokens, observed = torch.randn(3, 5, 8, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    expected = layer(tokens, observed)
    torch.testing.assert_close(layer(tokens[[2, 1, 0]], observed), expected[[2, 1, 0]])
    assert (layer(tokens[[1, 0, 2]], observed) - expected[[1, 0, 2]]).abs().max() > 1e-4


def test_half_precision_is_close_to_single(make_mixed, make_batch):
    model, batch = make_mixed(dtype=torch.float32), make_batch(dtype=torch.float32)
    expected = forecast(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(batch).quantiles
    assert (actual.float() - expected).square().mean().sqrt() < 0.05 * expected.std()
