"""What must hold of the memory whatever the numbers: causality, hand-over, independence, masking, forgetting."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_ts import kernels
from trellis_ts.kernels import MemoryState

# These are statements about the definition; the other implementations are compared with it.
trellis_memory = functools.partial(kernels.trellis_memory, implementation="reference")
trellis_memory_step = functools.partial(kernels.trellis_memory_step, implementation="reference")

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STATE_AXES = ("batch", "head", "slot", "dim")

few = settings(max_examples=20, deadline=None)


@st.composite
def cases(draw: st.DrawFn, *, max_chunk_length: int = 4) -> dict[str, Any]:
    """Sizes and a seed for the inputs, and the options of a call."""
    axes = {"batch": 3, "time": 9, "head": 3, "slot": 5, "dim": 5}
    sizes = {axis: draw(st.integers(1, largest), label=axis) for axis, largest in axes.items()}
    options = {
        "write_activation": draw(st.sampled_from(["identity", "silu", "ln_silu"])),
        "read_activation": draw(st.sampled_from(["ln_silu", "l2_silu", "softmax"])),
        "chunk_length": draw(st.integers(1, max_chunk_length)),
        "write_epsilon": 0.1,
    }
    return {"sizes": {**sizes, "seed": draw(st.integers(0, 10_000))}, "options": options}


@pytest.fixture(scope="session")
def make_case(make_inputs, make_state):
    """Inputs, initial state and options of a drawn case."""

    def make(case):
        sizes = case["sizes"]
        state = make_state(**{axis: sizes[axis] for axis in STATE_AXES}, seed=sizes["seed"])
        return make_inputs(**sizes), state, case["options"]

    return make


def between(inputs, start, stop):
    return {name: tensor[:, start:stop] for name, tensor in inputs.items()}


def gradients(inputs, state, run):
    """Gradients of an arbitrary fixed function of run's output and final state, with respect to every input."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    state = MemoryState(*(memory.detach().clone().requires_grad_() for memory in state))
    output, final_state = run(inputs, state)
    loss = sum(tensor.sin().sum() for tensor in (output, *final_state))
    return torch.autograd.grad(loss, [*inputs.values(), *state])


@few
@given(case=cases(), data=st.data())
def test_later_tokens_change_nothing_earlier(make_case, case, data):
    inputs, state, options = make_case(case)
    stop = data.draw(st.integers(1, case["sizes"]["time"]), label="stop")
    for tensor in inputs.values():
        tensor.requires_grad_()
    output, _ = trellis_memory(**inputs, initial_state=state, **options)
    for gradient in torch.autograd.grad(output[:, :stop].sum(), inputs.values(), allow_unused=True):
        assert not gradient[:, stop:].any()

    disturbed = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for tensor in disturbed.values():
        tensor[:, stop:] = math.nan
    assert torch.equal(trellis_memory(**disturbed, initial_state=state, **options)[0][:, :stop], output[:, :stop])


@few
@given(case=cases(), data=st.data())
def test_handing_the_state_over_at_a_cut_equals_one_pass(make_case, case, data):
    inputs, state, options = make_case(case)
    chunk_length = options["chunk_length"]
    cut = chunk_length * data.draw(st.integers(1, max(1, (case["sizes"]["time"] - 1) // chunk_length)), label="chunks")

    def whole(inputs, state):
        return trellis_memory(**inputs, initial_state=state, **options)

    def in_two(inputs, state):
        if cut >= inputs["query"].shape[1]:
            return whole(inputs, state)
        first, state = trellis_memory(**between(inputs, 0, cut), initial_state=state, **options)
        second, state = trellis_memory(**between(inputs, cut, None), initial_state=state, **options)
        return torch.cat([first, second], dim=1), state

    (expected, expected_state), (output, final_state) = whole(inputs, state), in_two(inputs, state)
    torch.testing.assert_close((output, *final_state), (expected, *expected_state), **EXACT)
    torch.testing.assert_close(gradients(inputs, state, in_two), gradients(inputs, state, whole), **EXACT)


@few
@given(case=cases(max_chunk_length=1))
def test_token_by_token_equals_the_whole(make_case, case):
    inputs, state, options = make_case(case)
    expected, expected_state = trellis_memory(**inputs, initial_state=state, **options)
    del options["chunk_length"]
    outputs = []
    for t in range(case["sizes"]["time"]):
        token = {name: tensor[:, t] for name, tensor in inputs.items()}
        output, state = trellis_memory_step(**token, state=state, **options)
        outputs.append(output)
    torch.testing.assert_close((torch.stack(outputs, dim=1), *state), (expected, *expected_state), **EXACT)


@few
@given(case=cases(), data=st.data())
def test_rows_and_heads_do_not_meet(make_case, case, data):
    inputs, state, options = make_case(case)
    b = data.draw(st.integers(0, case["sizes"]["batch"] - 1), label="row")
    h = data.draw(st.integers(0, case["sizes"]["head"] - 1), label="head")
    output, final_state = trellis_memory(**inputs, initial_state=state, **options)

    alone, state_alone = trellis_memory(
        **{name: tensor[b : b + 1, :, h : h + 1] for name, tensor in inputs.items()},
        initial_state=MemoryState(*(memory[b : b + 1, h : h + 1] for memory in state)),
        **options,
    )
    torch.testing.assert_close(alone[0, :, 0], output[b, :, h], **EXACT)
    for memory, memory_alone in zip(final_state, state_alone, strict=True):
        torch.testing.assert_close(memory_alone[0, 0], memory[b, h], **EXACT)

    for tensor in inputs.values():
        tensor[b, :, h] = math.nan
    others = torch.ones(output.shape[0], output.shape[2], dtype=torch.bool)
    others[b, h] = False
    disturbed, _ = trellis_memory(**inputs, initial_state=state, **options)
    assert torch.equal(disturbed.transpose(1, 2)[others], output.transpose(1, 2)[others])


@few
@given(case=cases(), data=st.data())
def test_masked_tokens_leave_the_memory_bit_equal(make_case, case, data):
    inputs, state, options = make_case(case)
    time = case["sizes"]["time"]
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=time, max_size=time), label="masked"))
    inputs["log_forget"][:, masked] = 0
    inputs["step_size"][:, masked] = 0
    for t in range(time):
        before = state
        output, state = trellis_memory(**between(inputs, t, t + 1), initial_state=state, **options)
        assert output.isfinite().all()
        if masked[t]:
            assert all(map(torch.equal, state, before))


@few
@given(case=cases(max_chunk_length=1), data=st.data())
def test_dropping_masked_tokens_changes_nothing_else(make_case, case, data):
    inputs, state, options = make_case(case)
    time = case["sizes"]["time"]
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=time, max_size=time), label="masked"))
    masked[-1] = False
    inputs["log_forget"][:, masked] = 0
    inputs["step_size"][:, masked] = 0
    output, final_state = trellis_memory(**inputs, initial_state=state, **options)
    kept = {name: tensor[:, ~masked] for name, tensor in inputs.items()}
    expected, expected_state = trellis_memory(**kept, initial_state=state, **options)
    torch.testing.assert_close((output[:, ~masked], *final_state), (expected, *expected_state), **EXACT)


@few
@given(case=cases(max_chunk_length=1), shut=st.sampled_from([-math.inf, -1e4]), data=st.data())
def test_a_shut_forget_gate_without_a_write_remembers_nothing(make_case, case, shut, data):
    inputs, state, options = make_case(case)
    t = data.draw(st.integers(0, case["sizes"]["time"] - 1), label="t")
    inputs["log_forget"][:, t] = shut
    inputs["step_size"][:, t] = 0
    for tensor in (*inputs.values(), *state):
        tensor.requires_grad_()
    output, _ = trellis_memory(**inputs, initial_state=state, **options)

    from_zero = MemoryState(*(torch.zeros_like(memory) for memory in state))
    expected, _ = trellis_memory(**between(inputs, t, None), initial_state=from_zero, **options)
    torch.testing.assert_close(output[:, t:], expected, **EXACT)

    gradient_of_inputs = torch.autograd.grad(output[:, t:].sum(), [*inputs.values(), *state])
    assert all(gradient.isfinite().all() for gradient in gradient_of_inputs)
    *of_tokens, of_key_memory, of_value_memory = gradient_of_inputs
    assert not any(gradient[:, :t].any() for gradient in of_tokens)
    assert not of_key_memory.any()
    assert not of_value_memory.any()


@few
@given(case=cases(max_chunk_length=1))
def test_a_shut_forget_gate_with_a_write_keeps_only_what_the_write_saw(make_case, case):
    """The residual is taken before the decay, so the old memory is seen along the written vector and nowhere else."""
    inputs, state, options = make_case(case)
    inputs["log_forget"][:, 0] = -math.inf
    elsewhere = []
    for memory, written in zip(state, (inputs["key"][:, 0], inputs["value"][:, 0]), strict=True):
        noise = torch.randn(memory.shape, generator=torch.Generator().manual_seed(1), dtype=memory.dtype)
        along = torch.einsum("bhmd,bhd->bhm", noise, written)
        elsewhere.append(memory + noise - torch.einsum("bhm,bhd->bhmd", along, written))
    output, final_state = trellis_memory(**inputs, initial_state=MemoryState(*elsewhere), **options)
    expected, expected_state = trellis_memory(**inputs, initial_state=state, **options)
    torch.testing.assert_close((output, *final_state), (expected, *expected_state), rtol=1e-9, atol=1e-9)


@few
@given(case=cases(max_chunk_length=1))
def test_an_identity_write_is_the_gated_delta_rule(make_case, case):
    """With step size g / b and target b a, where that rule takes the residual from the decayed state."""
    inputs, state, options = make_case(case)
    _, final_state = trellis_memory(**inputs, initial_state=state, **{**options, "write_activation": "identity"})
    for memory, expected, name in zip(final_state, state, ("key", "value"), strict=True):
        for t in range(case["sizes"]["time"]):
            w, b = inputs[name][:, t], inputs["log_forget"][:, t].exp()
            step, target = inputs["step_size"][:, t] / b, b[..., None] * inputs["target"][:, t]
            decayed = b[..., None, None] * expected
            held = torch.einsum("bhmd,bhd->bhm", decayed, w)
            expected = decayed + torch.einsum("bh,bhm,bhd->bhmd", step, target - held, w)
        torch.testing.assert_close(memory, expected, **EXACT)
