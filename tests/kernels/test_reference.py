"""The definition against finite differences, and against a loop that forms the Jacobian of phi explicitly."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from trellis_ts import kernels
from trellis_ts.kernels import MemoryState

# These are statements about the definition; the other implementations are compared with it.
trellis_memory = functools.partial(kernels.trellis_memory, implementation="reference")

WRITES = ("identity", "silu", "ln_silu")
READS = ("ln_silu", "l2_silu", "softmax")
PAIRS = list(itertools.product(WRITES, READS))

READ_EPSILON = 1e-6
WRITE_EPSILON = 0.1  # with the default, LayerNorm over three slots is too steep to compare twelve digits


@pytest.mark.parametrize("chunk_length", [1, 3])
@pytest.mark.parametrize(("write_activation", "read_activation"), PAIRS)
def test_gradients_agree_with_finite_differences(
    write_activation, read_activation, chunk_length, make_inputs, make_state
):
    sizes = {"batch": 1, "head": 2, "slot": 3, "dim": 2}
    inputs = make_inputs(time=4, **sizes)
    arguments = [*inputs.values(), *make_state(**sizes)]

    def run(*tensors):
        *tokens, key_memory, value_memory = tensors
        output, state = trellis_memory(
            **dict(zip(inputs, tokens, strict=True)),
            initial_state=MemoryState(key_memory, value_memory),
            write_activation=write_activation,
            read_activation=read_activation,
            write_epsilon=WRITE_EPSILON,
            chunk_length=chunk_length,
        )
        return output, *state

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in arguments])


def np_silu(z):
    return z / (1 + np.exp(-z))


def np_layer_norm(s, epsilon):
    centred = s - s.mean()
    return centred / np.sqrt((centred * centred).mean() + epsilon)


NP_WRITE = {
    "identity": lambda z: z,
    "silu": np_silu,
    "ln_silu": lambda z: np_layer_norm(np_silu(z), WRITE_EPSILON),
}
NP_READ = {
    "ln_silu": lambda y: np_layer_norm(np_silu(y), READ_EPSILON),
    "l2_silu": lambda y: np_silu(y) / np.sqrt((np_silu(y) ** 2).sum() + READ_EPSILON),
    "softmax": lambda y: np.exp(y) / np.exp(y).sum(),
}


def np_jacobian(function, z):
    """Derivatives by complex steps: f(z + ih).imag / h is f'(z) to the last digit, since nothing is subtracted."""
    step = 1e-30
    return np.stack([function(z + 1j * step * basis).imag / step for basis in np.eye(len(z))], axis=1)


def np_memory(inputs, key_memory, value_memory, phi, f, chunk_length):
    """One row: tokens [T, ...], memories [M, D]."""
    states, outputs = [key_memory, value_memory], []
    for t in range(len(inputs["query"])):
        if t % chunk_length == 0:
            anchors = list(states)
        for i, w in enumerate((inputs["key"][t], inputs["value"][t])):
            z = anchors[i] @ w
            u = np_jacobian(phi, z).T @ (phi(z) - inputs["target"][t])
            states[i] = np.exp(inputs["log_forget"][t]) * states[i] - inputs["step_size"][t] * np.outer(u, w)
        outputs.append(states[1].T @ f(states[0] @ inputs["query"][t]))
    return np.stack(outputs), *states


@pytest.mark.parametrize(
    ("time", "slot", "dim"), [(1, 3, 8), (2, 13, 3), (2, 8, 13), (7, 3, 13), (7, 8, 8), (17, 13, 8), (17, 8, 3)]
)
@pytest.mark.parametrize("chunk_length", [1, 4])
@pytest.mark.parametrize(("write_activation", "read_activation"), PAIRS)
def test_agrees_with_explicit_jacobians(
    write_activation, read_activation, chunk_length, time, slot, dim, make_inputs, make_state
):
    sizes = {"batch": 2, "head": 2, "slot": slot, "dim": dim}
    inputs, initial_state = make_inputs(time=time, **sizes), make_state(**sizes)
    output, state = trellis_memory(
        **inputs,
        initial_state=initial_state,
        write_activation=write_activation,
        read_activation=read_activation,
        write_epsilon=WRITE_EPSILON,
        chunk_length=chunk_length,
    )
    for b, h in itertools.product(range(2), range(2)):
        expected = np_memory(
            {name: tensor[b, :, h].numpy() for name, tensor in inputs.items()},
            initial_state.key_memory[b, h].numpy(),
            initial_state.value_memory[b, h].numpy(),
            NP_WRITE[write_activation],
            NP_READ[read_activation],
            chunk_length,
        )
        actual = (output[b, :, h], state.key_memory[b, h], state.value_memory[b, h])
        for want, have in zip(expected, actual, strict=True):
            assert np.abs(have.numpy() - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("write_activation", ["identity", "silu"])
def test_no_initial_state_is_a_zero_memory(write_activation, make_inputs, make_state):
    inputs = make_inputs()
    zero = MemoryState(*(torch.zeros_like(memory) for memory in make_state()))
    expected, expected_state = trellis_memory(**inputs, initial_state=zero, write_activation=write_activation)
    output, state = trellis_memory(**inputs, write_activation=write_activation)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, state, expected_state))


def test_chunk_of_the_whole_sequence_never_sees_its_own_writes(make_inputs):
    """From a zero memory z stays 0, so under silu, whose slope there is 1/2, every u is -target / 2."""
    inputs = make_inputs(time=6)
    _, state = trellis_memory(**inputs, chunk_length=6)
    expected = torch.zeros_like(state.key_memory)
    for t in range(6):
        decay = inputs["log_forget"][:, t].exp()[..., None, None]
        update = torch.einsum(
            "bh,bhm,bhd->bhmd", inputs["step_size"][:, t], inputs["target"][:, t] / 2, inputs["key"][:, t]
        )
        expected = decay * expected + update
    torch.testing.assert_close(state.key_memory, expected, rtol=1e-12, atol=1e-12)


def test_write_epsilon_tames_the_first_write_from_a_zero_memory(make_inputs):
    """At z = 0 the slope of LayerNorm is 1 / sqrt(epsilon)."""
    inputs = make_inputs(time=1)
    target = inputs["target"][:, 0]
    for epsilon in (1e-6, 1.0):
        _, state = trellis_memory(**inputs, write_activation="ln_silu", write_epsilon=epsilon)
        u = -(target - target.mean(-1, keepdim=True)) / (2 * epsilon**0.5)
        expected = -torch.einsum("bh,bhm,bhd->bhmd", inputs["step_size"][:, 0], u, inputs["key"][:, 0])
        torch.testing.assert_close(state.key_memory, expected, rtol=1e-12, atol=0)
