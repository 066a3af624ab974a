"""The Triton kernels statement by statement on the CPU, against the reference; test_triton_interpreter.py runs this.

Not collected by itself: Triton asks for its interpreter once, when it is imported, so this needs a process of its own
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from trellis_ts.errors import BackendError
from trellis_ts.kernels import MemoryState, trellis_memory, trellis_memory_step
from trellis_ts.kernels.memory import launch, tuning

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
PAIRS = list(product(("identity", "silu", "ln_silu"), ("ln_silu", "l2_silu", "softmax")))
SHAPES = [(1, 13, 13), (2, 8, 13), (5, 13, 8), (7, 8, 8)]  # tokens, slots, head width
WRITE_EPSILON = 0.1


@pytest.fixture
def compare(make_inputs, make_state, relative_rms):
    """Compare output, final state and every gradient of one problem with the reference in float64."""

    def run(inputs, state, dtype, state_dtype, implementation, options):
        # Inputs in the state's dtype stay in it: gates, which may be wider than the rest.
        inputs = {
            name: tensor.to(dtype if tensor.dtype != torch.float32 else state_dtype, copy=True).requires_grad_()
            for name, tensor in inputs.items()
        }
        state = MemoryState(*(memory.to(state_dtype, copy=True).requires_grad_() for memory in state))
        output, final_state = trellis_memory(
            **inputs,
            initial_state=state,
            write_epsilon=WRITE_EPSILON,
            implementation=implementation,
            **options,
        )
        weights = inputs["value"].detach()
        ((output * weights).sum() + sum(memory.sin().sum() for memory in final_state)).backward()
        gradients = {f"gradient of {name}": tensor.grad for name, tensor in (inputs | state._asdict()).items()}
        return {"output": output, **final_state._asdict(), **gradients}

    def check(*, time, slot, dim, batch=1, head=1, dtype=torch.float32, shut_at=None, gates=None, **options):
        sizes = {"batch": batch, "head": head, "slot": slot, "dim": dim}
        inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(time=time, **sizes).items()}
        for name in ("log_forget", "step_size"):
            inputs[name] = inputs[name].to(gates or dtype)
        if shut_at is not None:
            inputs["log_forget"][:, shut_at] = -math.inf
        state = MemoryState(*(memory.float() for memory in make_state(**sizes)))
        expected = run(inputs, state, torch.float64, torch.float64, "reference", options)
        actual = run(inputs, state, dtype, torch.float32, "triton", options)
        for name, tensor in actual.items():
            kept_in_float32 = "memory" in name or (gates and name.endswith(("log_forget", "step_size")))
            assert tensor.dtype == (torch.float32 if kept_in_float32 else dtype), name
            assert relative_rms(expected[name], tensor) < TOLERANCE[dtype], name

    return check


@pytest.mark.parametrize(("write_activation", "read_activation"), PAIRS)
def test_exact_recurrence(write_activation, read_activation, compare):
    time, slot, dim = SHAPES[PAIRS.index((write_activation, read_activation)) % len(SHAPES)]
    activations = {"write_activation": write_activation, "read_activation": read_activation}
    compare(time=time, slot=slot, dim=dim, head=3, **activations)  # three rows do not fill the programs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_recurrence_in_half_precision(dtype, compare):
    compare(time=5, slot=8, dim=13, dtype=dtype)


def test_exact_recurrence_over_checkpoints(compare):
    assert tuning.segment_length(18, tuning.EXACT_BACKWARD[128].replay) == 16
    compare(time=18, slot=13, dim=8, shut_at=4)


@pytest.mark.parametrize("write_activation", ["silu", "ln_silu"])
@pytest.mark.parametrize("chunk_length", [1, 16])
def test_first_order(write_activation, chunk_length, compare):
    compare(
        time=17 if chunk_length == 16 else 3,
        slot=8,
        dim=8,
        second_order=False,
        write_activation=write_activation,
        chunk_length=chunk_length,
    )


@pytest.mark.parametrize(("write_activation", "read_activation"), [PAIRS[i] for i in (0, 4, 8)])
@pytest.mark.parametrize(("time", "slot", "dim"), [(17, 13, 8), (33, 8, 13)])
def test_chunkwise_form(write_activation, read_activation, time, slot, dim, compare):
    activations = {"write_activation": write_activation, "read_activation": read_activation}
    compare(time=time, slot=slot, dim=dim, head=2, chunk_length=16, **activations)


def test_chunkwise_form_with_shut_gates(compare):
    compare(time=20, slot=8, dim=8, chunk_length=16, shut_at=slice(3, 18, 7))


def test_chunkwise_form_with_programs_that_share_slots(compare):
    assert tuning.state_slots(64, "silu") < 40
    compare(time=17, slot=40, dim=8, chunk_length=16)


@pytest.mark.parametrize(("dtype", "write_activation"), [(torch.float32, "silu"), (torch.bfloat16, "ln_silu")])
def test_chunkwise_form_in_several_tiles(dtype, write_activation, compare):
    assert tuning.chunk(8, dtype).reads.tile < 64
    compare(
        time=105,
        slot=8,
        dim=13,
        dtype=dtype,
        chunk_length=64,
        shut_at=slice(3, 90, 31),
        write_activation=write_activation,
    )


def test_chunkwise_form_in_several_tiles_to_first_order(compare):
    compare(time=40, slot=8, dim=8, chunk_length=32, second_order=False, read_activation="softmax")


@pytest.mark.parametrize("chunk_length", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_float32_beside_half_precision(dtype, chunk_length, compare):
    time = 5 if chunk_length == 1 else 17
    compare(time=time, slot=8, dim=8, dtype=dtype, gates=torch.float32, chunk_length=chunk_length)


def test_chunkwise_form_of_a_short_sequence(compare):
    compare(time=3, slot=8, dim=8, chunk_length=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunkwise_form_in_half_precision(dtype, compare):
    compare(time=33, slot=13, dim=8, chunk_length=16, dtype=dtype)


def test_masked_tokens_leave_the_state_as_it_was(make_inputs, make_state):
    sizes = {"slot": 8, "dim": 8}
    inputs = {name: tensor.float() for name, tensor in make_inputs(time=3, **sizes).items()}
    inputs["log_forget"][:], inputs["step_size"][:] = 0, 0
    state = MemoryState(*(memory.float() for memory in make_state(**sizes)))
    for chunk_length in (1, 16):
        _, after = trellis_memory(**inputs, initial_state=state, chunk_length=chunk_length, implementation="triton")
        assert all(map(torch.equal, after, state))


def test_inputs_need_not_be_contiguous(make_inputs):
    inputs = {name: tensor.float() for name, tensor in make_inputs(slot=8, dim=8).items()}
    expected, _ = trellis_memory(**inputs, implementation="triton")
    strided = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in inputs.items()}
    assert not strided["query"].is_contiguous()
    assert torch.equal(trellis_memory(**strided, implementation="triton")[0], expected)


def test_no_rows(make_inputs):
    inputs = {name: tensor.float()[:0].requires_grad_() for name, tensor in make_inputs(slot=8, dim=8).items()}
    for chunk_length in (1, 16):
        output, _ = trellis_memory(**inputs, chunk_length=chunk_length, implementation="triton")
        output.sum().backward()
        assert inputs["query"].grad.shape == inputs["query"].shape


@pytest.mark.parametrize("contiguous", [True, False])
def test_step_in_place(contiguous, make_inputs, make_state):
    sizes = {"slot": 8, "dim": 13}
    inputs = {name: tensor.float()[:, 0] for name, tensor in make_inputs(time=1, **sizes).items()}
    state = MemoryState(*(memory.float() for memory in make_state(**sizes)))
    if not contiguous:
        state = MemoryState(*(memory.mT.contiguous().mT for memory in state))
    expected = trellis_memory_step(**inputs, state=state, implementation="triton")
    before = state.key_memory.clone()
    output, after = trellis_memory_step(**inputs, state=state, implementation="triton", inplace=True)
    assert after is state
    assert not torch.equal(before, state.key_memory)
    torch.testing.assert_close((output, after), expected, rtol=0, atol=0)


@pytest.mark.parametrize("chunk_length", [1, 16])
def test_compiles_without_a_graph_break(chunk_length, make_inputs):
    inputs = {name: tensor.float().requires_grad_() for name, tensor in make_inputs(slot=8, dim=8, time=2).items()}

    def run(inputs):
        output, state = trellis_memory(**inputs, chunk_length=chunk_length, implementation="triton")
        return output.square().sum() + state.value_memory.sum()

    expected = torch.autograd.grad(run(inputs), list(inputs.values()))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(inputs), list(inputs.values()))
    assert all(map(torch.equal, actual, expected))


def test_registrations_are_sound(make_inputs, make_state):
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(batch=1, time=1, slot=8, dim=8).values()]
    state = [memory.float().requires_grad_() for memory in make_state(batch=1, slot=8, dim=8)]
    arguments = (*inputs, *state, "silu", "softmax", 1e-6, 1, True, True)
    torch.library.opcheck(torch.ops.trellis_ts.triton_memory.default, arguments)
    arguments = tuple(tensor.detach() for tensor in (*inputs, *state))
    torch.library.opcheck(torch.ops.trellis_ts.triton_memory_in_place.default, (*arguments, "silu", "softmax", 1e-6))


def test_twice_differentiating_is_refused(make_inputs):
    inputs = {name: tensor.float().requires_grad_() for name, tensor in make_inputs(time=1, slot=8, dim=8).items()}
    output, _ = trellis_memory(**inputs, implementation="triton")
    (gradient,) = torch.autograd.grad(output.sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_autocast_changes_nothing(make_inputs):
    inputs = {name: tensor.float() for name, tensor in make_inputs(time=2, slot=8, dim=8).items()}
    expected, _ = trellis_memory(**inputs, implementation="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = trellis_memory(**inputs, implementation="triton")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ({"slot": 4, "dim": 8}, {}, "there are 4 slots, outside 8 to 128"),
        ({"slot": 8, "dim": 129}, {}, "there are 129 dimensions per head, outside 8 to 128"),
        ({"slot": 8, "dim": 8}, {"chunk_length": 8}, "chunk_length=8 is none of 1, 16, 32, 64, 128"),
        (
            {"slot": 8, "dim": 33},
            {"chunk_length": 16, "write_activation": "ln_silu"},
            "chunks of ln_silu writes in float32 are taken up to 32 slots and dimensions per head",
        ),
    ],
)
def test_what_it_cannot_run_is_refused(sizes, options, reason, make_inputs):
    inputs = {name: tensor.float() for name, tensor in make_inputs(**sizes).items()}
    with pytest.raises(BackendError, match=reason):
        trellis_memory(**inputs, implementation="triton", **options)


def test_float64_is_refused(make_inputs):
    with pytest.raises(BackendError, match="the tensors are float64"):
        trellis_memory(**make_inputs(slot=8, dim=8), implementation="triton")


def test_a_missing_triton_is_said_so(monkeypatch):
    monkeypatch.setattr(launch, "_IS_INSTALLED", False)
    assert launch.why_not(None) == "Triton is not installed"
