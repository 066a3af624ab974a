"""The network's parts one by one: statistics, patches, head, losses, convolution and mixers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trellis_ts.config import WindowShape
from trellis_ts.heads import ForecastHead, center_index, spread_quantiles
from trellis_ts.layers import trellis
from trellis_ts.layers.attention import AttentionMixer
from trellis_ts.layers.block import Block, make_mixer
from trellis_ts.layers.convolution import CausalConvolution
from trellis_ts.layers.trellis import TrellisMixer
from trellis_ts.losses import forecast_loss, quantile_loss
from trellis_ts.patching import PatchEmbedding
from trellis_ts.scaling import instance_statistics
from trellis_ts.types import Forecast

# --- statistics ---


@given(seed=st.integers(0, 1000), missing=st.sampled_from([0.0, 0.3, 0.9]), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_instance_statistics_are_those_of_the_observed_values(seed, missing, size):
    rng = np.random.default_rng(seed)
    values = 5 * size + size * rng.normal(size=(3, 20, 2))
    values[rng.random(values.shape) < missing] = np.nan
    observed = ~np.isnan(values)
    loc, scale = instance_statistics(torch.tensor(np.where(observed, values, 1e3)), torch.tensor(observed))
    for row in range(3):
        for channel in range(2):
            seen = values[row, observed[row, :, channel], channel]
            expected = (seen.mean(), math.sqrt(seen.var() + 1e-4)) if len(seen) else (0.0, 1.0)
            actual = float(loc[row, 0, channel]), float(scale[row, 0, channel])
            assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


# --- patches ---


@given(context=st.integers(1, 30), patch=st.integers(1, 10), stride=st.integers(1, 10))
def test_patches_are_slices_that_end_at_the_last_step(context, patch, stride):
    patch = min(patch, context)
    shape = WindowShape(context, 1, patch, min(stride, patch), 1, 1)
    embedding = PatchEmbedding(shape, 2 * patch, position_embedding=False)
    torch.nn.init.eye_(embedding.projection.weight)  # a token is then its patch, with the mask beside it
    torch.nn.init.zeros_(embedding.projection.bias)
    values = torch.arange(1.0, context + 1)[None]
    observed = torch.arange(context)[None] % 3 != 1
    tokens, token_observed = embedding(values, observed)
    assert tokens.shape[1] == shape.num_patches
    for index in range(shape.num_patches):
        stop = context - (shape.num_patches - 1 - index) * shape.patch_stride
        steps = range(stop - patch, stop)
        expected = [float(values[0, step]) if step >= 0 else 0.0 for step in steps]
        seen = [step >= 0 and bool(observed[0, step]) for step in steps]
        assert tokens[0, index, :patch].tolist() == expected
        assert tokens[0, index, patch:].tolist() == [float(each) for each in seen]
        assert bool(token_observed[0, index]) == any(seen)


def test_positions_are_told_apart():
    shape = WindowShape(12, 1, 4, 4, 1, 1)
    tokens, _ = PatchEmbedding(shape, 6, position_embedding=True)(torch.ones(1, 12), torch.ones(1, 12).bool())
    assert not torch.allclose(tokens[0, 0], tokens[0, 1])
    tokens, _ = PatchEmbedding(shape, 6, position_embedding=False)(torch.ones(1, 12), torch.ones(1, 12).bool())
    torch.testing.assert_close(tokens[0, 0], tokens[0, 1])


# --- head ---


@given(
    num_levels=st.integers(1, 9),
    seed=st.integers(0, 1000),
    size=st.sampled_from([0.0, 1e-3, 1.0, 5.0]),
    data=st.data(),
)
def test_quantiles_rise_strictly_around_a_free_centre(num_levels, seed, size, data):
    center = data.draw(st.integers(0, num_levels - 1))
    raw = size * torch.randn(4, 3, num_levels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = raw.clone()
    spread = spread_quantiles(raw, center)
    assert torch.equal(raw, before)
    assert torch.equal(spread[..., center], raw[..., center])
    assert (spread.diff(dim=-1) > 0).all()
    for index in range(center + 1, num_levels):
        torch.testing.assert_close(spread[..., index] - spread[..., index - 1], F.softplus(raw[..., index]))
    for index in range(center):
        torch.testing.assert_close(spread[..., index + 1] - spread[..., index], F.softplus(raw[..., index]))


@pytest.mark.parametrize(
    ("levels", "index"),
    [((0.5,), 0), ((0.1, 0.5, 0.9), 1), ((0.9,), 0), ((0.01, 0.02, 0.6), 2), ((0.4, 0.6), 0), ((0.05, 0.45, 0.52), 2)],
)
def test_the_centre_is_the_level_nearest_to_the_median(levels, index):
    assert center_index(levels) == index


def test_pooling():
    def head(pooling):
        torch.manual_seed(0)
        return ForecastHead(num_patches=3, width=4, prediction_length=2, num_outputs=3, pooling=pooling, dropout=0.0)

    tokens = torch.randn(5, 3, 4)
    observed = torch.tensor([[True, False, True]] * 4 + [[False] * 3])
    normed = F.rms_norm(tokens, (4,))
    for pooling, pooled in (
        ("flatten", normed.reshape(5, 12)),
        ("last", normed[:, 2]),
        ("mean", torch.where(observed.any(1)[:, None], (normed[:, 0] + normed[:, 2]) / 2, 0.0)),
    ):
        layer = head(pooling)
        expected = F.linear(pooled, layer.projection.weight, layer.projection.bias).view(5, 2, 3)
        torch.testing.assert_close(layer(tokens, observed), expected)


# --- losses ---

POINT = torch.tensor([[[1.0], [2.0], [5.0]]])
FUTURE = torch.tensor([[[2.0], [2.5], [1.0]]])
ALL = torch.ones(1, 3, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("mae", (1 + 0.5 + 4) / 3), ("mse", (1 + 0.25 + 16) / 3), ("huber", (0.5 + 0.125 + 3.5) / 3)],
)
def test_losses_by_hand(loss, expected):
    assert float(forecast_loss(Forecast(POINT), FUTURE, ALL, loss)) == pytest.approx(expected)


def test_the_quantile_loss_by_hand():
    quantiles = torch.tensor([[[[0.0, 1.0, 3.0]]]])
    future = torch.tensor([[[2.0]]])
    # 2 * mean of 0.1 * 2, 0.5 * 1 and (0.9 - 1) * (2 - 3)
    expected = 2 * (0.2 + 0.5 + 0.1) / 3
    assert float(quantile_loss(quantiles, future, (0.1, 0.5, 0.9))) == pytest.approx(expected)
    forecast = Forecast(quantiles[..., 1], quantiles, (0.1, 0.5, 0.9))
    assert float(forecast_loss(forecast, future, ALL[:, :1], "quantile")) == pytest.approx(expected)


def test_at_the_median_the_quantile_loss_is_the_absolute_error():
    torch.testing.assert_close(quantile_loss(POINT[..., None], FUTURE, (0.5,)), (POINT - FUTURE).abs())


def test_the_quantile_loss_is_least_at_the_quantile():
    values = torch.randn(2001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level in (0.1, 0.5, 0.8):
        candidates = torch.linspace(-2, 2, 401, dtype=torch.float64)
        losses = quantile_loss(candidates[:, None, None].expand(-1, 2001, 1), values.expand(401, -1), (level,)).mean(1)
        assert float(candidates[losses.argmin()]) == pytest.approx(float(values.quantile(level)), abs=0.02)


@pytest.mark.parametrize("loss", ["quantile", "mae", "mse", "huber"])
def test_masked_values_do_not_matter(loss):
    quantiles = torch.randn(2, 3, 1, 2, generator=torch.Generator().manual_seed(0)).cumsum(-1).requires_grad_()
    forecast = Forecast(quantiles[..., 0], quantiles, (0.5, 0.9))
    future, observed = torch.randn(2, 3, 1), torch.tensor([1, 0, 1, 0, 0, 1]).view(2, 3, 1).bool()
    poisoned = torch.where(observed, future, 1e9)
    value = forecast_loss(forecast, poisoned, observed, loss)
    torch.testing.assert_close(value, forecast_loss(forecast, future, observed, loss))
    kept = Forecast(quantiles[..., 0][observed], quantiles[observed], (0.5, 0.9))
    torch.testing.assert_close(value, forecast_loss(kept, future[observed], observed[observed], loss))
    value.backward()
    assert (quantiles.grad[~observed] == 0).all()
    nothing = forecast_loss(forecast, poisoned, torch.zeros_like(observed), loss)
    assert float(nothing.detach()) == 0.0


def test_the_quantile_loss_needs_quantiles():
    with pytest.raises(ValueError, match="quantile levels"):
        forecast_loss(Forecast(POINT), FUTURE, ALL, "quantile")


# --- convolution ---


@pytest.mark.parametrize(("width", "kernel_width", "length"), [(3, 1, 5), (4, 4, 9), (4, 4, 2), (5, 3, 1)])
def test_the_convolution_is_a_causal_depthwise_one(width, kernel_width, length):
    layer = CausalConvolution(width, kernel_width).double()
    tokens = torch.randn(2, length, width, dtype=torch.float64)
    assert torch.equal(layer(tokens), tokens)
    layer.kernel.data.normal_()
    weight = layer.kernel.flip(0).T[:, None]  # conv1d correlates: the last tap is the current token
    padded = F.pad(tokens.transpose(1, 2), (kernel_width - 1, 0))
    torch.testing.assert_close(layer(tokens), F.conv1d(padded, weight, groups=width).transpose(1, 2))


# --- mixers ---


def randomise(module):
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module.double().eval()


@pytest.fixture
def tokens():
    return torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


SEEN = torch.ones(3, 6, dtype=torch.bool)


@pytest.mark.parametrize("settings", [{}, {"initial_memory": "learned"}, {"write_activation": "identity"}])
def test_the_mixer_does_not_look_ahead(make_config, tokens, settings):
    mixer = randomise(TrellisMixer(make_config(**settings)))
    tokens.requires_grad_()
    for step in range(6):
        (gradient,) = torch.autograd.grad(mixer(tokens, SEEN)[:, step].square().sum(), tokens)
        assert (gradient[:, step + 1 :] == 0).all()
        assert (gradient[:, step].abs().sum(-1) > 0).all()
        if step:
            assert (gradient[:, 0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("settings", [{}, {"mixer": "attention"}, {"step_size_form": "softplus"}])
def test_masked_tokens_are_not_read_by_others(make_config, tokens, settings):
    config = make_config(**settings)
    mixer = randomise((AttentionMixer if config.mixer == "attention" else TrellisMixer)(config))
    observed = SEEN.clone()
    observed[:, [0, 3]] = False
    changed = tokens.clone()
    changed[:, [0, 3]] = 100.0
    kept = [1, 2, 4, 5]
    torch.testing.assert_close(mixer(changed, observed)[:, kept], mixer(tokens, observed)[:, kept])
    assert not torch.allclose(mixer(changed, SEEN)[:, kept], mixer(tokens, SEEN)[:, kept])


def test_a_masked_token_neither_writes_nor_forgets(make_config, tokens):
    """Without the convolution, which has its own idea of neighbours, a masked token may as well not be there."""
    mixer = randomise(TrellisMixer(make_config(conv_width=1)))
    observed = SEEN.clone()
    observed[:, [2, 3]] = False
    kept = [0, 1, 4, 5]
    torch.testing.assert_close(mixer(tokens, observed)[:, kept], mixer(tokens[:, kept], SEEN[:, kept]))


def test_half_precision_for_a_gpus_kernels_leaves_the_gates_wide(make_config, tokens, monkeypatch):
    """What autocast to bfloat16 does on a GPU, done here on the CPU, where it is not done by itself."""
    mixer, tokens = randomise(TrellisMixer(make_config())).float(), tokens.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer.project(tokens, SEEN)[0].query.dtype == torch.float32
    expected = mixer(tokens, SEEN)
    monkeypatch.setattr(trellis, "_operand_dtype", lambda tokens, wide: torch.bfloat16)
    inputs, _ = mixer.project(tokens, SEEN)
    assert {name for name, tensor in inputs._asdict().items() if tensor.dtype == torch.float32} == {
        "log_forget",
        "step_size",
    }
    output = mixer(tokens, SEEN)
    assert output.dtype == torch.float32
    assert (output - expected).square().mean() < 2e-2**2 * expected.square().mean()
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


@pytest.mark.parametrize("form", ["bounded", "softplus"])
def test_gates_start_where_they_should(make_config, monkeypatch, form):
    forget, step = gates_of(TrellisMixer(make_config(step_size_form=form)), torch.zeros(2, 5, 8), monkeypatch)
    torch.testing.assert_close(forget, torch.full_like(forget, 0.98))
    torch.testing.assert_close(step, torch.full_like(step, 0.1))


def gates_of(mixer, tokens, monkeypatch):
    """Forget gate and step size as the operator gets them."""
    import trellis_ts.layers.trellis as layer

    run, seen = layer.trellis_memory, []

    def watch(**inputs):
        seen.append((inputs["log_forget"].exp().detach(), inputs["step_size"].detach()))
        return run(**inputs)

    monkeypatch.setattr(layer, "trellis_memory", watch)
    mixer(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
    return seen[0]


def test_the_bounded_step_stays_within_the_stable_range(make_config, monkeypatch):
    mixer = TrellisMixer(make_config()).double()
    mixer.gates.weight.data.normal_(std=2.0)
    forget, step = gates_of(mixer, torch.randn(20, 6, 8, dtype=torch.float64), monkeypatch)
    assert (step > 0).all()
    assert (step < 1 + forget).all()
    assert (forget > 0).all()
    assert (forget <= 1).all()
    assert step.max() > 1.5


def test_masked_tokens_have_no_step_and_keep_everything(make_config, monkeypatch):
    import trellis_ts.layers.trellis as layer

    seen = {}
    run = layer.trellis_memory
    monkeypatch.setattr(layer, "trellis_memory", lambda **inputs: seen.update(inputs) or run(**inputs))
    observed = SEEN.clone()
    observed[:, 2] = False
    TrellisMixer(make_config())(torch.randn(3, 6, 8), observed)
    assert (seen["step_size"][:, 2] == 0).all()
    assert (seen["log_forget"][:, 2] == 0).all()
    assert (seen["step_size"][:, 1] > 0).all()
    torch.testing.assert_close(seen["key"][:, 1].norm(dim=-1), torch.ones(3, 2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_attention_with_nothing_observed_is_finite(make_config, tokens, rows):
    mixer = randomise(AttentionMixer(make_config(mixer="attention")))
    observed = SEEN.clone()
    observed[rows] = False
    tokens.requires_grad_()
    output = mixer(tokens, observed)
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(tokens.grad).all()


def test_attention_is_that_of_the_textbook(make_config, tokens):
    mixer = randomise(AttentionMixer(make_config(mixer="attention")))
    query, key, value = (part.view(3, 6, 2, 4) for part in mixer.query_key_value(tokens).chunk(3, dim=-1))
    weight = torch.einsum("rqhd,rkhd->rhqk", query, key).div(2.0).softmax(-1)
    expected = torch.einsum("rhqk,rkhd->rqhd", weight, value).flatten(2)
    torch.testing.assert_close(mixer(tokens, SEEN), expected)


def test_a_block_whose_outputs_are_zero_is_the_identity(make_config, tokens):
    config = make_config()
    block = randomise(Block(config, make_mixer(config, "auto")))
    block.output.weight.data.zero_()
    block.feedforward.down.weight.data.zero_()
    assert torch.equal(block(tokens, SEEN), tokens)
