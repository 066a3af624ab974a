"""Every implementation against the reference, and what is asked of the compiled one beyond the same numbers."""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trellis_ts.errors import BackendError, ConfigError
from trellis_ts.kernels import MemoryState, implementations, precompile, trellis_memory, trellis_memory_step
from trellis_ts.kernels.memory import cpu_layout, cpu_run

# Those that compute the exact recurrence of every activation on this machine.
FAST = [name for name in ("cpu",) if implementations()[name] is None]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
STATE_DTYPE = {torch.bfloat16: torch.float32}
EXACT_ONLY = {"cpu"}

FACTORS = {
    "dtype": list(TOLERANCE),
    "write_activation": ["identity", "silu", "ln_silu"],
    "read_activation": ["ln_silu", "l2_silu", "softmax"],
    "second_order": [True, False],
    "chunk_length": [1, 4, 16, 64],
    "time": [1, 2, 7, 17, 63, 64, 129],
    "slot": [8, 13, 32, 60, 64, 128],
    "dim": [8, 13, 32, 60, 64, 128],
}


def pairwise(factors: dict[str, list]) -> Iterable[dict]:
    """Choose few combinations that hold every pair of values of any two factors, by taking the best of some."""
    names = list(factors)
    uncovered = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def pairs(choice: tuple[int, ...]) -> set:
        return {(a, i, b, j) for (a, i), (b, j) in itertools.combinations(zip(names, choice, strict=True), 2)}

    generator = torch.Generator().manual_seed(0)
    while uncovered:
        first = min(uncovered)
        candidates = []
        for _ in range(40):
            choice = {name: int(torch.randint(len(factors[name]), (), generator=generator)) for name in names}
            choice |= {first[0]: first[1], first[2]: first[3]}
            candidates.append(tuple(choice.values()))
        best = max(candidates, key=lambda candidate: len(pairs(candidate) & uncovered))
        uncovered -= pairs(best)
        yield {name: factors[name][i] for name, i in zip(names, best, strict=True)}


def label(case: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture
def poisoned():
    """Fresh memory is filled with nan, so that nothing is read before it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def evaluate(inputs, state, implementation, **options):
    """Output, final state and all gradients of an arbitrary function of both."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    state = MemoryState(*(memory.detach().clone().requires_grad_() for memory in state))
    output, final_state = trellis_memory(**inputs, initial_state=state, implementation=implementation, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (tensor * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)).sum()
        for tensor in (output, *final_state)
    )
    wanted = {**inputs, **state._asdict()}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {"output": output, **final_state._asdict(), **named}


@pytest.fixture
def compare(make_inputs, make_state, relative_rms, poisoned):
    def check(name, case, batch=2, head=2):
        case = dict(case)
        dtype = case.pop("dtype")
        sizes = {axis: case.pop(axis) for axis in ("slot", "dim")}
        inputs = make_inputs(batch=batch, time=case.pop("time"), head=head, **sizes)
        state = make_state(batch=batch, head=head, **sizes)
        inputs = {key: tensor.to(dtype) for key, tensor in inputs.items()}
        state = MemoryState(*(memory.to(STATE_DTYPE.get(dtype, dtype)) for memory in state))
        options = {**case, "write_epsilon": 0.1}
        if name in EXACT_ONLY and case["chunk_length"] > 1:
            with pytest.raises(BackendError, match=f"implementation='{name}' was asked for"):
                trellis_memory(**inputs, initial_state=state, implementation=name, **options)
            return
        expected = evaluate(inputs, state, "reference", **options)
        for key, tensor in evaluate(inputs, state, name, **options).items():
            assert tensor.dtype == expected[key].dtype, key
            error = relative_rms(expected[key], tensor)
            if error >= TOLERANCE[dtype] and dtype == torch.float32:
                # Where a sum cancels, the reference is as wrong: the error it makes itself is the measure then.
                wide = {axis: each.double() for axis, each in inputs.items()}
                exact = evaluate(wide, MemoryState(*(each.double() for each in state)), "reference", **options)[key]
                error = relative_rms(exact, tensor) - 2 * relative_rms(exact, expected[key])
            assert error < TOLERANCE[dtype], key

    return check


EXACT_FACTORS = {name: values for name, values in FACTORS.items() if name != "chunk_length"}


@pytest.mark.parametrize("case", [*pairwise(EXACT_FACTORS)], ids=label)
@pytest.mark.parametrize("name", FAST)
def test_matches_the_reference(name, case, compare):
    compare(name, {**case, "chunk_length": 1})


@pytest.mark.parametrize("chunk_length", FACTORS["chunk_length"][1:])
@pytest.mark.parametrize("name", FAST)
def test_matches_the_reference_in_chunks(name, chunk_length, compare):
    case = {"dtype": torch.float64, "write_activation": "silu", "read_activation": "ln_silu", "second_order": True}
    compare(name, {**case, "chunk_length": chunk_length, "time": 63, "slot": 13, "dim": 8})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("write_activation", FACTORS["write_activation"])
@pytest.mark.parametrize("name", FAST)
def test_matches_the_reference_everywhere(name, write_activation, dtype, compare):
    """Every combination an implementation runs; of the chunked form, which has four times as many, every fourth."""
    fixed = {"dtype": dtype, "write_activation": write_activation}
    free = {key: values for key, values in FACTORS.items() if key not in fixed}
    cases = [dict(zip(free, choice, strict=True)) for choice in itertools.product(*free.values())]
    runnable = [case for case in cases if name not in EXACT_ONLY or case["chunk_length"] == 1]
    random.Random(0).shuffle(runnable)
    for case in runnable[: len(runnable) if name in EXACT_ONLY else len(runnable) // 4]:
        compare(name, {**fixed, **case}, batch=1, head=2)


@pytest.mark.parametrize("name", FAST)
def test_states_recomputed_in_segments_change_nothing(name, compare, monkeypatch):
    """Only the compiled recurrence has segments; the others merely pass."""
    monkeypatch.setattr(cpu_run, "_CHUNKS_BYTES", 0)
    case = {"dtype": torch.float64, "write_activation": "silu", "read_activation": "ln_silu", "second_order": True}
    for time in (1, 8, 9, 40, 67):
        compare(name, {**case, "chunk_length": 1, "time": time, "slot": 9, "dim": 5})


def strided(tensor):
    """The same numbers with every axis spaced out, the last one too, and in another order."""
    order = list(reversed(range(tensor.ndim)))
    return tensor.permute(order).repeat_interleave(2, dim=0)[::2].permute(order)


@pytest.mark.parametrize("name", FAST)
def test_any_layout(name, make_inputs, make_state, relative_rms):
    inputs, state = make_inputs(slot=13, dim=9), make_state(slot=13, dim=9)

    def run(view):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs.values(), *state)]
        views = [view(leaf) for leaf in leaves]
        tokens = dict(zip(inputs, views[:6], strict=True))
        output, final = trellis_memory(**tokens, initial_state=MemoryState(*views[6:]), implementation=name)
        gradient = view(torch.ones_like(output) + output.detach())
        return [output, *final, *torch.autograd.grad([output, *final], leaves, [gradient, *map(view, final)])]

    for expected, actual in zip(run(torch.Tensor.contiguous), run(strided), strict=True):
        assert relative_rms(expected, actual) < 1e-14


@pytest.mark.parametrize("name", FAST)
def test_no_tokens_are_refused(name, make_inputs):
    with pytest.raises(ConfigError, match="the time axis"):
        trellis_memory(**make_inputs(time=0), implementation=name)


EXTREMES = {
    "never forgets": {"log_forget": math.log1p(-1e-7)},
    "forgets at once": {"log_forget": math.log(1e-7)},
    "steps at the limit": {"log_forget": math.log(0.98), "step_size": 1.9},
    "long keys": {"scale": 1e4, "step_size": 1e-9},
    "zero keys": {"scale": 0.0},
}


@pytest.mark.parametrize("time", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", FAST)
def test_extreme_inputs(name, extreme, dtype, time, make_inputs, make_state, relative_rms):
    """At these lengths float32 is compared at a thousand times its rounding."""
    sizes = {"batch": 1, "head": 1, "slot": 8, "dim": 8}
    inputs, state = make_inputs(time=time, **sizes), make_state(**sizes)
    for key, value in EXTREMES[extreme].items():
        if key == "scale":
            inputs["key"] *= value
            inputs["value"] *= value
        else:
            inputs[key].fill_(value)
    inputs["target"] *= 0.1
    inputs = {key: tensor.to(dtype) for key, tensor in inputs.items()}
    state = MemoryState(*(memory.to(dtype) for memory in state))
    expected, actual = (evaluate(inputs, state, choice, write_activation="silu") for choice in ("reference", name))
    for key, tensor in actual.items():
        assert torch.equal(tensor.isfinite(), expected[key].isfinite()), key
        if expected[key].abs().max() > torch.finfo(tensor.dtype).tiny:
            assert relative_rms(expected[key], tensor) < (1e-4 if dtype == torch.float32 else 1e-8), key
        else:
            assert tensor.abs().max() <= torch.finfo(tensor.dtype).tiny, key


@pytest.mark.parametrize("name", FAST)
def test_divergence_leaves_the_same_numbers_finite(name, make_inputs, make_state):
    """Not with ``ln_silu`` reads: where the variance overflows, PyTorch's LayerNorm gives 0 or nan as it happens."""
    inputs, state = make_inputs(time=40, slot=8, dim=8), make_state(slot=8, dim=8)
    inputs = {key: tensor.float() for key, tensor in inputs.items()}
    inputs["step_size"][:, 5:] = 1e20
    state = MemoryState(*(memory.float() for memory in state))
    for write_activation in ("identity", "silu"):
        options = {"initial_state": state, "write_activation": write_activation, "read_activation": "l2_silu"}
        with torch.no_grad():
            expected, expected_state = trellis_memory(**inputs, implementation="reference", **options)
            output, final_state = trellis_memory(**inputs, implementation=name, **options)
        assert not expected.isfinite().all()
        for want, have in zip((expected, *expected_state), (output, *final_state), strict=True):
            assert torch.equal(have.isfinite(), want.isfinite())


@pytest.mark.parametrize("name", FAST)
def test_masked_tokens_leave_the_state_bit_equal(name, make_inputs, make_state):
    inputs, state = make_inputs(time=9, slot=13, dim=9), make_state(slot=13, dim=9)
    inputs["log_forget"].zero_()
    inputs["step_size"].zero_()
    for dtype in (torch.float32, torch.float64):
        before = MemoryState(*(memory.to(dtype) for memory in state))
        tokens = {key: tensor.to(dtype) for key, tensor in inputs.items()}
        _, after = trellis_memory(**tokens, initial_state=before, implementation=name)
        assert all(map(torch.equal, before, after))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAST)
def test_the_same_bits_whatever_the_threads(name, threads, make_inputs, make_state):
    sizes = {"batch": 9, "head": 5, "slot": 13, "dim": 16}
    inputs = {key: tensor.float() for key, tensor in make_inputs(time=40, **sizes).items()}
    state = MemoryState(*(memory.float() for memory in make_state(**sizes)))
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(evaluate(inputs, state, name))
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("name", FAST)
def test_callers_in_several_threads(name, threads, make_inputs):
    threads(2)
    inputs = {key: tensor.float() for key, tensor in make_inputs(batch=32, time=40, slot=16, dim=16).items()}
    expected, _ = trellis_memory(**inputs, implementation=name)
    run = functools.partial(trellis_memory, **inputs, implementation=name)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run) for _ in range(16)]:
            assert torch.equal(future.result()[0], expected)


def operator_arguments(make_inputs, make_state, dtype=torch.float64):
    tokens = [tensor.to(dtype).requires_grad_() for tensor in make_inputs().values()]
    return (*tokens, *(memory.to(dtype).requires_grad_() for memory in make_state()), 1, 0, True, 1e-6, True)


def test_operators_keep_pytorchs_rules(make_inputs, make_state):
    arguments = operator_arguments(make_inputs, make_state)
    torch.library.opcheck(torch.ops.trellis.memory_cpu_forward.default, arguments)
    with torch.no_grad():
        outputs = torch.ops.trellis.memory_cpu_forward(*arguments)
    detached = tuple(tensor.detach() for tensor in arguments[:8])
    for with_state in (False, True):
        torch.library.opcheck(
            torch.ops.trellis.memory_cpu_backward.default, (*detached, *outputs, *arguments[8:12], with_state)
        )


def test_the_gradient_has_no_derivative(make_inputs):
    inputs = {key: tensor.requires_grad_() for key, tensor in make_inputs().items()}
    output, _ = trellis_memory(**inputs, implementation="cpu")
    (gradient,) = torch.autograd.grad(output.sum(), inputs["key"], create_graph=True)
    with pytest.raises(BackendError, match="has no derivative of its backward pass; use implementation='reference'"):
        gradient.sum().backward()


def test_modes_see_the_operators_which_autograd_alone_goes_past(make_inputs):
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    def evaluate_here():
        inputs = {key: tensor.clone().requires_grad_() for key, tensor in make_inputs().items()}
        output, _ = trellis_memory(**inputs, implementation="cpu")
        return output, *torch.autograd.grad(output.square().sum(), list(inputs.values()))

    expected = evaluate_here()
    with Watch():
        actual = evaluate_here()
    operators = torch.ops.trellis
    assert {operators.memory_cpu_forward.default, operators.memory_cpu_backward.default} <= seen
    assert all(map(torch.equal, actual, expected))


def test_precompiling_builds_what_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_run, "_kernel", lambda name, dtype: asked.append((name.name, dtype)))
    precompile()
    precompile(torch.bfloat16, backward=False)
    precompile(torch.float64, step=True)
    both = [("FORWARD", torch.float32), ("BACKWARD", torch.float32)]
    assert asked == [*both, ("FORWARD", torch.float32), ("STEP", torch.float64)]


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_outputs_and_gradients_are_the_same_without_a_final_state(name, make_inputs, make_state):
    inputs, state = make_inputs(time=19, slot=13, dim=9), make_state(slot=13, dim=9)

    def run(final_state):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs.values(), *state)]
        tokens = dict(zip(inputs, leaves, strict=False))
        options = {"initial_state": MemoryState(*leaves[6:]), "implementation": name, "final_state": final_state}
        output, final = trellis_memory(**tokens, **options)
        return final, [output, *torch.autograd.grad(output.square().sum(), leaves)]

    (kept, expected), (dropped, actual) = run(True), run(False)
    assert all(map(torch.equal, expected, actual))
    for memory, nothing in zip(kept, dropped, strict=True):
        assert (nothing.shape, nothing.dtype) == (memory.shape, memory.dtype)
        assert nothing.isnan().all()
        assert not nothing.requires_grad


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAST)
def test_compiles_without_a_break(name, make_inputs, make_state):
    inputs, state = make_inputs(), make_state()

    def run(inputs, state):
        output, final_state = trellis_memory(**inputs, initial_state=state, implementation=name)
        return output.sin().sum() + final_state.key_memory.cos().sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in inputs.items()}
        loss = function(leaves, state)
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST)
def test_autocast_computes_in_float32(name, dtype, make_inputs):
    inputs = {key: tensor.to(dtype) for key, tensor in make_inputs().items()}
    expected, expected_state = trellis_memory(**inputs, implementation=name)
    with torch.autocast("cpu", dtype=dtype):
        output, state = trellis_memory(**inputs, implementation=name)
    assert output.dtype == dtype
    assert state.key_memory.dtype == torch.float32
    assert torch.equal(output, expected)
    assert all(map(torch.equal, state, expected_state))


STEPS = [
    (13, 9, torch.float64, "silu", "ln_silu"),
    (16, 8, torch.float64, "ln_silu", "l2_silu"),
    (8, 32, torch.float64, "identity", "softmax"),
    (24, 16, torch.float32, "silu", "ln_silu"),
]


@pytest.mark.parametrize(("slot", "dim", "dtype", "write_activation", "read_activation"), STEPS)
@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_steps_equal_the_whole(
    name, slot, dim, dtype, write_activation, read_activation, make_inputs, make_state, relative_rms
):
    inputs = {key: tensor.to(dtype) for key, tensor in make_inputs(time=12, slot=slot, dim=dim).items()}
    state = MemoryState(*(memory.to(dtype) for memory in make_state(slot=slot, dim=dim)))
    options = {"write_activation": write_activation, "read_activation": read_activation, "write_epsilon": 0.1}
    options["implementation"] = name
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    expected, expected_state = trellis_memory(**inputs, initial_state=state, **options)
    copied = MemoryState(*(memory.clone() for memory in state))
    spaced = MemoryState(*(strided(memory) for memory in state))
    for inplace, carried in ((False, state), (True, copied), (True, spaced)):
        places = [memory.data_ptr() for memory in carried]
        for t in range(12):
            token = {key: tensor[:, t] for key, tensor in inputs.items()}
            output, carried = trellis_memory_step(**token, state=carried, inplace=inplace, **options)
            assert relative_rms(expected[:, t], output) < tolerance
        assert all(relative_rms(*pair) < tolerance for pair in zip(expected_state, carried, strict=True))
        assert ([memory.data_ptr() for memory in carried] == places) == inplace


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_steps_have_gradients_unless_in_place(name, make_inputs, make_state):
    token = {key: tensor[:, 0].clone().requires_grad_() for key, tensor in make_inputs().items()}
    output, _ = trellis_memory_step(**token, state=make_state(), implementation=name)
    output.sum().backward()
    assert token["key"].grad.any()
    with pytest.raises(ConfigError, match="inplace=True would overwrite a state that autograd needs"):
        trellis_memory_step(**token, state=make_state(), inplace=True, implementation=name)


def test_exponentials_are_right_to_the_last_digits(make_inputs):
    """Through the operator: with an open memory and no write, log_forget alone decides what is left of the state."""
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 5e-16)):
        log_forget = torch.cat([torch.linspace(-86, 0, 100_001), torch.tensor([-math.inf, -1e4, -104.0])]).to(dtype)
        rows = log_forget.numel()
        one = torch.ones(rows, 1, 1, 1, dtype=dtype)
        zero = torch.zeros_like(one)
        state = MemoryState(one, one)
        _, final = trellis_memory(
            query=zero,
            key=zero,
            value=zero,
            target=zero,
            log_forget=log_forget.view(-1, 1, 1),
            step_size=zero[..., 0],
            initial_state=state,
            implementation="cpu",
        )
        expected = log_forget.double().exp()
        error = (final.key_memory.flatten().double() - expected).abs()
        assert (error <= tolerance * expected + torch.finfo(dtype).smallest_normal * 1e-6).all()
        assert final.key_memory[-4].item() == 1
        assert not final.key_memory[-3:-1].any()


MEMORY_PROGRAM = """
import resource, sys, torch
from trellis_ts.kernels import trellis_memory
torch.set_num_threads(2)
def run(time):
    shape = (1, time, 4, 32)
    tokens = {name: torch.randn(shape).mul_(0.1).requires_grad_() for name in ("query", "key", "value", "target")}
    gates = {"log_forget": torch.full(shape[:3], -0.02), "step_size": torch.full(shape[:3], 0.1)}
    for gate in gates.values():
        gate.requires_grad_()
    output, _ = trellis_memory(**tokens, **gates, implementation="cpu")
    torch.autograd.backward(output, torch.ones(()).expand(shape))
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16384)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024 - (9 * 32 + 4) * 4 * 16384 * 4 / 2**20)
"""


def test_memory_beyond_inputs_outputs_and_gradients_is_bounded():
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64


def test_nothing_in_scratch_is_read_before_it_is_written(compare, monkeypatch):
    lend = cpu_run._lend

    def lend_poisoned(num_bytes):
        lent = lend(num_bytes)
        lent[0].fill(255)  # nan to whoever takes it for numbers
        return lent

    monkeypatch.setattr(cpu_run, "_lend", lend_poisoned)
    case = {"dtype": torch.float64, "read_activation": "ln_silu", "second_order": True, "chunk_length": 1}
    for write_activation in FACTORS["write_activation"]:
        compare("cpu", {**case, "write_activation": write_activation, "time": 23, "slot": 9, "dim": 5})


def test_the_scratch_of_a_thread_grows_with_the_root_of_the_length():
    for time in (42, 512, 16_384):
        segment = cpu_run.segment_length(cpu_layout.num_chunks(time), 4 * cpu_layout.chunk_size(32, 32))
        assert 4 * cpu_layout.backward_scratch_size(32, 32, time, segment) < 10 * 2**20


KERNEL_PARTS = {
    "cpu_kernel": [
        "activations",
        "chunk_backward",
        "chunk_forward",
        "functions",
        "layout",
        "products",
        "transfer",
        "vectors",
    ],
    "cpu_step": ["activations", "functions", "vectors"],
}


@pytest.mark.parametrize("kernel", KERNEL_PARTS)
def test_a_change_in_what_a_kernel_imports_makes_it_compile_again(kernel):
    """Numba's cache looks at the kernel's own file only, so that file holds a digest of the others."""
    folder = Path(cpu_run.__file__).parent
    digest = hashlib.sha256()
    for part in KERNEL_PARTS[kernel]:
        text = (folder / f"cpu_{part}.py").read_text(encoding="utf-8")
        digest.update(text.encode())
        imported = set(re.findall(r"^from trellis_ts.kernels.memory.cpu_(\w+) import", text, re.MULTILINE))
        assert imported <= set(KERNEL_PARTS[kernel])
    module = importlib.import_module(f"trellis_ts.kernels.memory.{kernel}")
    assert digest.hexdigest()[:16] == module.IMPORTED, "enter this digest in the kernel's file"
