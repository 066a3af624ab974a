"""The mixers Trellis is compared with: recurrences against a plain loop over time, then the layers around them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from trellis_ts.errors import ConfigError
from trellis_ts.layers.block import make_mixer
from trellis_ts.layers.recurrences import gated_linear_attention, gated_slot_attention


def linear_loop(query, key, value, log_forget):
    """S_t = b_t S_{t-1} + k_t v_t^T, y_t = S_t^T q_t."""
    state = torch.zeros(*key.shape[:2], key.shape[-1], value.shape[-1], dtype=key.dtype)
    outputs = []
    for t in range(key.shape[2]):
        state = log_forget[:, :, t, None, None].exp() * state + key[:, :, t, :, None] * value[:, :, t, None]
        outputs.append(torch.einsum("rhkv,rhk->rhv", state, query[:, :, t]))
    return torch.stack(outputs, dim=2)


def slot_loop(query, key, value, log_forget):
    """K_t = a_t K_{t-1} + (1 - a_t) k_t^T, the same for V; y_t = V_t^T softmax(K_t q_t)."""
    keys = torch.zeros(*key.shape[:2], log_forget.shape[-1], key.shape[-1], dtype=key.dtype)
    values, outputs = keys.clone(), []
    for t in range(key.shape[2]):
        a = log_forget[:, :, t, :, None].exp()
        keys = a * keys + (1 - a) * key[:, :, t, None]
        values = a * values + (1 - a) * value[:, :, t, None]
        weight = torch.einsum("rhmd,rhd->rhm", keys, query[:, :, t]).softmax(-1)
        outputs.append(torch.einsum("rhmd,rhm->rhd", values, weight))
    return torch.stack(outputs, dim=2)


RECURRENCES = {"linear": (gated_linear_attention, linear_loop), "gsa": (gated_slot_attention, slot_loop)}
every_recurrence = pytest.mark.parametrize("name", RECURRENCES)


def make_inputs(name, length, *, strength=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, length, 5)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    gates = torch.randn(*shape[:3], *((4,) if name == "gsa" else ()), generator=generator, dtype=torch.float64)
    inputs = (query, key, value, -strength * F.softplus(gates))
    return [each.to(dtype).requires_grad_() for each in inputs]


def outputs_and_gradients(function, inputs, **options):
    output = function(*inputs, **options)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


@every_recurrence
@pytest.mark.parametrize(("length", "chunk_length"), [(1, 4), (4, 4), (7, 1), (17, 4), (63, 16), (63, 64)])
@pytest.mark.parametrize("strength", [0.0, 0.1, 30.0])
def test_chunks_give_what_the_loop_gives(name, length, chunk_length, strength):
    """Also with gates that forget all within a token, where products of decays underflow."""
    function, loop = RECURRENCES[name]
    inputs = make_inputs(name, length, strength=strength)
    expected = outputs_and_gradients(loop, inputs)
    actual = outputs_and_gradients(function, inputs, chunk_length=chunk_length)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@every_recurrence
def test_single_precision_is_close_to_double(name):
    function, loop = RECURRENCES[name]
    expected = loop(*make_inputs(name, 200))
    actual = function(*make_inputs(name, 200, dtype=torch.float32))
    assert (actual - expected).square().mean().sqrt() < 1e-6 * expected.square().mean().sqrt()


@every_recurrence
def test_gradients_agree_with_finite_differences(name):
    function, _ = RECURRENCES[name]
    assert torch.autograd.gradcheck(
        lambda *inputs: function(*inputs, chunk_length=2), make_inputs(name, 3), fast_mode=True
    )


@every_recurrence
def test_an_open_gate_forgets_nothing(name):
    """Linear attention sums up all tokens; slots that never forget are never written."""
    function, _ = RECURRENCES[name]
    query, key, value, gates = make_inputs(name, 9)
    output = function(query, key, value, torch.zeros_like(gates), chunk_length=4)
    expected = (query @ key.mT).tril() @ value if name == "linear" else torch.zeros_like(value)
    torch.testing.assert_close(output, expected)


# --- layers ---

LAYERS = [{"mixer": "gsa"}, {"mixer": "linear"}, {"mixer": "linear", "forget_gate": False}]
every_layer = pytest.mark.parametrize("settings", LAYERS)
SEEN = torch.ones(3, 6, dtype=torch.bool)


@pytest.fixture
def make_layer(make_config):
    def make(**settings):
        torch.manual_seed(0)
        layer = make_mixer(make_config(**settings), "auto")
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return layer.double().eval()

    return make


@pytest.fixture
def tokens():
    return torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_layer
def test_the_mixer_does_not_look_ahead(make_layer, tokens, settings):
    layer = make_layer(**settings)
    tokens.requires_grad_()
    for step in range(6):
        (gradient,) = torch.autograd.grad(layer(tokens, SEEN)[:, step].square().sum(), tokens)
        assert (gradient[:, step + 1 :] == 0).all()
        assert (gradient[:, : step + 1].abs().sum(-1) > 0).all()


@every_layer
def test_a_masked_token_may_as_well_not_be_there(make_layer, tokens, settings):
    layer = make_layer(conv_width=1, **settings)
    observed = SEEN.clone()
    observed[:, [0, 2, 3]] = False
    kept = [1, 4, 5]
    mixed = layer(torch.where(observed[..., None], tokens, 100.0), observed)
    torch.testing.assert_close(mixed[:, kept], layer(tokens[:, kept], SEEN[:, kept]))
    assert not torch.allclose(mixed[:, kept], layer(tokens, SEEN)[:, kept])


@every_layer
def test_masked_tokens_are_not_read_through_the_convolution(make_layer, tokens, settings):
    layer = make_layer(**settings)
    observed = SEEN.clone()
    observed[:, [0, 3]] = False
    changed = torch.where(observed[..., None], tokens, 100.0)
    kept = [1, 2, 4, 5]
    torch.testing.assert_close(layer(changed, observed)[:, kept], layer(tokens, observed)[:, kept])


@every_layer
def test_nothing_observed_is_finite(make_layer, tokens, settings):
    layer = make_layer(**settings)
    tokens.requires_grad_()
    output = layer(tokens, torch.zeros_like(SEEN))
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(tokens.grad).all()


def test_a_slot_mixer_by_hand(make_layer, tokens):
    """Projections, silu, a root in the gate, and the loop."""
    layer = make_layer(mixer="gsa", conv_width=1)

    def heads(features):
        return features.view(3, 6, 2, -1).transpose(1, 2)

    query, key = F.silu(layer.query_key(tokens) * layer.convolution.kernel[0]).chunk(2, dim=-1)
    gates = F.logsigmoid(heads(layer.gates(tokens))) / 8
    expected = slot_loop(heads(query) / math.sqrt(4), heads(key), heads(layer.value(tokens)), gates)
    torch.testing.assert_close(layer(tokens, SEEN), expected.transpose(1, 2).flatten(2))


def test_gates_start_open(make_config):
    linear, slots = (make_mixer(make_config(mixer=name), "auto") for name in ("linear", "gsa"))
    torch.testing.assert_close(linear.gate.bias.sigmoid(), torch.full((2,), 0.98))
    start = slots.gates(torch.zeros(1, 8)).detach().sigmoid() ** (1 / 8)
    assert 0.85 < float(start.min()) <= float(start.max()) < 0.97


def test_mixers_are_of_one_size(make_config):
    """Within a few percent at a usual width, but for linear attention, whose gates are fewer."""

    def size(name):
        settings = {"width": 64, "num_heads": 4, "num_slots": 16}
        return sum(p.numel() for p in make_mixer(make_config(mixer=name, **settings), "auto").parameters())

    trellis = size("trellis")
    assert abs(size("gsa") / trellis - 1) < 0.05
    assert 0.7 < size("linear") / trellis < 1
    assert 0.7 < size("attention") / trellis < 1


# --- switches of the memory ---


def watch_memory(monkeypatch):
    import trellis_ts.layers.trellis as layer

    run, seen = layer.trellis_memory, {}

    def watch(**inputs):
        seen.update(inputs)
        seen["output"], state = run(**inputs)
        return seen["output"], state

    monkeypatch.setattr(layer, "trellis_memory", watch)
    return seen


@pytest.mark.parametrize("form", ["bounded", "softplus"])
def test_without_its_forget_gate_the_memory_keeps_all(make_config, monkeypatch, form):
    seen = watch_memory(monkeypatch)
    mixer = make_mixer(make_config(forget_gate=False, step_size_form=form), "auto")
    mixer(torch.zeros(3, 6, 8), SEEN)
    assert (seen["log_forget"] == 0).all()
    torch.testing.assert_close(seen["step_size"], torch.full((3, 6, 2), 0.1))
    assert mixer.gates.out_features == 2


def test_the_output_activation_comes_after_the_memory(make_layer, monkeypatch, tokens):
    seen = watch_memory(monkeypatch)
    mixed = make_layer(mixer="trellis", output_activation="silu")(tokens, SEEN)
    torch.testing.assert_close(mixed, F.silu(seen["output"]).flatten(2))


def test_slots_cannot_do_without_their_gate(make_config):
    with pytest.raises(ConfigError, match="mixer=gsa"):
        make_config(mixer="gsa", forget_gate=False)


def test_no_mixer_means_no_blocks(make_model):
    names = {name.split(".")[0] for name, _ in make_model(mixer="none").named_parameters()}
    assert names == {"patches", "head", "skip"}
