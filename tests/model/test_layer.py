"""The Trellis layer by itself: pieces give the numbers of the whole, and its state stays of one size."""

from __future__ import annotations

import pytest
import torch

from trellis_ts import ConfigError, TrellisLayer, TrellisState
from trellis_ts.layers.convolution import CausalConvolution

SETTINGS = [
    {},
    {"initial_memory": "learned", "conv_width": 3},
    {"write_activation": "identity", "conv_width": 1, "step_size_form": "softplus"},
    {"read_activation": "softmax", "conv_width": 9},
]


def make_layer(**settings):
    torch.manual_seed(0)
    layer = TrellisLayer(8, num_heads=2, num_slots=3, **settings).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


@pytest.fixture
def tokens():
    return torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def observed():
    return torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) > 0.3


def in_pieces(layer, tokens, observed, lengths):
    outputs, state = [], None
    for piece, seen in zip(tokens.split(lengths, dim=1), observed.split(lengths, dim=1), strict=True):
        output, state = layer(piece, seen, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("lengths", [[1] * 7, [5, 2], [2, 1, 4]])
@pytest.mark.parametrize("settings", SETTINGS)
def test_pieces_give_the_output_the_state_and_the_gradients_of_the_whole(settings, lengths, tokens, observed):
    layer = make_layer(**settings)
    leaves = [tokens.requires_grad_(), *layer.parameters()]
    results = []
    for output, state in (layer(tokens, observed), in_pieces(layer, tokens, observed, lengths)):
        loss = output.square().sum() + sum(each.square().sum() for each in (*state.memory, state.tail))
        results.append((output, *state.memory, state.tail, *torch.autograd.grad(loss, leaves)))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole)


def test_whole_chunks_give_the_numbers_of_a_single_call(tokens, observed):
    layer = make_layer(chunk_length=3)
    whole, _ = layer(tokens, observed)
    torch.testing.assert_close(in_pieces(layer, tokens, observed, [3, 4])[0], whole)
    assert not torch.allclose(in_pieces(layer, tokens, observed, [2, 5])[0], whole)


def test_the_state_stays_of_one_size_and_is_not_kept(tokens, observed):
    layer = make_layer()
    _, short = layer(tokens[:, :1])
    _, long = layer(tokens, observed, short)
    assert isinstance(long, TrellisState)
    assert [each.shape for each in (*short.memory, short.tail)] == [each.shape for each in (*long.memory, long.tail)]
    again, _ = layer(tokens, observed, short)
    torch.testing.assert_close(again, layer(tokens, observed, short)[0], rtol=0, atol=0)
    assert not any(each.requires_grad for each in (*long.detach().memory, long.detach().tail))


def test_padding_leaves_no_trace(tokens):
    layer = make_layer(conv_width=1)
    seen = torch.tensor([True, True, False, False, True, True, True]).expand(3, 7)
    there = [0, 1, 4, 5, 6]
    torch.testing.assert_close(layer(tokens, seen)[0][:, there], layer(tokens[:, there])[0])
    assert not torch.allclose(layer(tokens)[0][:, there], layer(tokens, seen)[0][:, there])


def test_half_precision_keeps_a_state_in_single(tokens):
    layer = make_layer().bfloat16()
    output, state = layer(tokens.bfloat16())
    assert output.dtype == torch.bfloat16
    assert state.memory.key_memory.dtype == torch.float32
    assert torch.isfinite(layer(tokens.bfloat16(), state=state)[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"tokens": t[0]}, r"tokens must be \[batch, token, width=8\].*found \[7, 8\]"),
        (lambda t: {"tokens": t[:, :0]}, "at least one token"),
        (lambda t: {"tokens": t, "observed": torch.ones(3, 6).bool()}, r"observed must be \[3, 7\].*found \[3, 6\]"),
        (lambda t: {"tokens": t, "state": make_layer()(t[:2])[1]}, "state is that of 2 rows, tokens has 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message, tokens):
    with pytest.raises(ConfigError, match=message):
        make_layer()(**change(tokens))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="width=10 is not a multiple of num_heads=4"):
        TrellisLayer(10)


def test_a_convolution_is_its_weighted_sum_of_lags():
    convolution = CausalConvolution(2, 3)
    convolution.kernel.data = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    tokens = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]])
    assert convolution(tokens)[0, :, 0].tolist() == [1.0, 12.0, 123.0, 234.0]
    assert convolution(tokens[:, :1])[0, :, 1].tolist() == [2.0]
