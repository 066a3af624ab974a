"""The Triton kernels on a GPU: everything the interpreter is too slow for or cannot show."""

from __future__ import annotations

import itertools

import pytest
import torch

from trellis_ts.kernels import MemoryState, trellis_memory, trellis_memory_step
from trellis_ts.kernels.memory import tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
PAIRS = list(itertools.product(("identity", "silu", "ln_silu"), ("ln_silu", "l2_silu", "softmax")))
STATE_AXES = ("batch", "head", "slot", "dim")


@pytest.fixture
def poisoned():
    """Memory fresh from the allocator is filled with NaN, so that reading before writing shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def on_gpu(make_inputs, make_state):
    """Inputs and initial state in a dtype, on the GPU."""

    def make(dtype, **sizes):
        inputs = {name: tensor.to("cuda", dtype) for name, tensor in make_inputs(**sizes).items()}
        state = make_state(**{axis: sizes[axis] for axis in STATE_AXES})
        return inputs, MemoryState(*(memory.to("cuda", torch.float32) for memory in state))

    return make


def run(inputs, state, *, dtype=None, state_dtype=torch.float32, implementation="triton", **options):
    """Output, final state and the gradient of every input of a fixed loss, by name."""
    dtype = dtype or inputs["query"].dtype
    inputs = {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
    state = MemoryState(*(memory.detach().to(state_dtype, copy=True).requires_grad_() for memory in state))
    options = {"write_epsilon": 0.1} | options
    output, final_state = trellis_memory(**inputs, initial_state=state, implementation=implementation, **options)
    weights = inputs["value"].detach()
    ((output * weights).sum() + sum(memory.sin().sum() for memory in final_state)).backward()
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in (inputs | state._asdict()).items()}
    return {"output": output.detach(), **final_state._asdict(), **gradients}


@pytest.fixture
def compare(on_gpu, relative_rms):
    """Compare with the reference in float64 on the same inputs."""

    def check(dtype, options, **sizes):
        inputs, state = on_gpu(dtype, **sizes)
        wide = {"dtype": torch.float64, "state_dtype": torch.float64, "implementation": "reference"}
        expected = run(inputs, state, **wide, **options)
        for name, tensor in run(inputs, state, **options).items():
            assert relative_rms(expected[name], tensor) < TOLERANCE[dtype], name

    return check


@pytest.mark.parametrize(
    ("slot", "dim"), [(8, 8), (16, 8), (13, 60), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)]
)
@pytest.mark.parametrize("time", [1, 17, 63])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("poisoned")
def test_exact_recurrence(dtype, time, slot, dim, compare):
    compare(dtype, {}, batch=3, time=time, head=3, slot=slot, dim=dim)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("write_activation", "read_activation"), PAIRS)
@pytest.mark.parametrize("chunk_length", [1, 16])
def test_activations(chunk_length, write_activation, read_activation, second_order, compare):
    options = {
        "write_activation": write_activation,
        "read_activation": read_activation,
        "second_order": second_order,
        "chunk_length": chunk_length,
    }
    compare(torch.float32, options, batch=2, time=40, head=2, slot=24, dim=20)


@pytest.mark.parametrize(
    ("dtype", "chunk_length", "slot", "dim"),
    [
        (dtype, chunk_length, slot, dim)
        for dtype, chunk_length, (slot, dim) in itertools.product(
            TOLERANCE, tuning.CHUNK_LENGTHS, [(8, 13), (32, 32), (64, 64), (128, 128)]
        )
    ],
)
@pytest.mark.parametrize("time", [5, 127, 257])
@pytest.mark.usefixtures("poisoned")
def test_chunkwise_form(dtype, time, slot, dim, chunk_length, compare):
    compare(dtype, {"chunk_length": chunk_length}, batch=2, time=time, head=2, slot=slot, dim=dim)


@pytest.mark.parametrize("chunk_length", [1, 64])
@pytest.mark.parametrize("time", [1000, 4096])
def test_long_sequences(time, chunk_length, compare):
    compare(torch.float32, {"chunk_length": chunk_length}, batch=1, time=time, head=1, slot=16, dim=16)


@pytest.mark.parametrize("chunk_length", [1, 64])
def test_many_rows(chunk_length, on_gpu, relative_rms):
    """Rows do not meet, so the first of 70,000, more than a grid's second axis takes, equal those computed alone."""
    inputs, state = on_gpu(torch.float32, batch=70_000, time=3, head=1, slot=8, dim=8)
    many = run(inputs, state, chunk_length=chunk_length)
    first = {name: tensor[:3] for name, tensor in inputs.items()}
    few = run(first, MemoryState(*(memory[:3] for memory in state)), chunk_length=chunk_length)
    for name, tensor in few.items():
        assert relative_rms(tensor, many[name][:3]) < 1e-6, name


@pytest.mark.parametrize("chunk_length", [1, 32])
def test_the_same_command_gives_the_same_bits(chunk_length, on_gpu):
    inputs, state = on_gpu(torch.bfloat16, batch=4, time=200, head=4, slot=64, dim=64)
    first = run(inputs, state, chunk_length=chunk_length)
    second = run(inputs, state, chunk_length=chunk_length)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("chunk_length", [1, 32])
def test_inputs_need_not_be_contiguous(chunk_length, on_gpu):
    inputs, state = on_gpu(torch.float32, batch=2, time=40, head=3, slot=16, dim=16)
    expected, _ = trellis_memory(**inputs, initial_state=state, chunk_length=chunk_length, implementation="triton")
    strided = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in inputs.items()}
    actual, _ = trellis_memory(**strided, initial_state=state, chunk_length=chunk_length, implementation="triton")
    assert torch.equal(actual, expected)


def test_auto_takes_the_kernels(on_gpu):
    inputs, state = on_gpu(torch.float32, batch=2, time=20, head=2, slot=16, dim=16)
    expected, _ = trellis_memory(**inputs, initial_state=state, implementation="triton")
    assert torch.equal(trellis_memory(**inputs, initial_state=state)[0], expected)


@pytest.mark.parametrize("chunk_length", [1, 32])
def test_torch_compile_finds_no_graph_break(chunk_length, on_gpu, relative_rms):
    inputs, state = on_gpu(torch.float32, batch=2, time=40, head=2, slot=16, dim=16)

    def loss(inputs, state):
        output, final_state = trellis_memory(**inputs, initial_state=state, chunk_length=chunk_length)
        return (output * output).sum() + final_state.value_memory.sum()

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = torch.autograd.grad(loss(inputs, state), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs, state), leaves)
    for name, left, right in zip(inputs, expected, actual, strict=True):
        assert relative_rms(left, right) < 1e-5, name


@pytest.mark.parametrize("in_place", [False, True])
def test_steps_equal_the_whole(in_place, on_gpu):
    inputs, state = on_gpu(torch.bfloat16, batch=3, time=20, head=2, slot=32, dim=32)
    expected, expected_state = trellis_memory(**inputs, initial_state=state)
    for t in range(20):
        token = {name: tensor[:, t] for name, tensor in inputs.items()}
        output, state = trellis_memory_step(**token, state=state, inplace=in_place)
        assert torch.equal(output, expected[:, t])
    assert all(map(torch.equal, state, expected_state))
