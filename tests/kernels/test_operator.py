"""The public operator: dtypes, layouts, second order, degenerate inputs, and everything it refuses."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from trellis_ts import kernels
from trellis_ts.errors import ConfigError
from trellis_ts.kernels import MemoryState

# These are statements about the definition; the other implementations are compared with it.
trellis_memory = functools.partial(kernels.trellis_memory, implementation="reference")
trellis_memory_step = functools.partial(kernels.trellis_memory_step, implementation="reference")

WRITES = ("identity", "silu", "ln_silu")
READS = ("ln_silu", "l2_silu", "softmax")
PAIRS = list(itertools.product(WRITES, READS))


GATES = ("log_forget", "step_size")


def leaves(tensors, dtype=torch.float64):
    return {name: tensor.detach().to(dtype).clone().requires_grad_() for name, tensor in tensors.items()}


def state_of(inputs):
    return MemoryState(inputs["key_memory"], inputs["value_memory"])


def run_all(inputs, dtype, state_dtype, **options):
    """Output, final state and the gradient of every input of a fixed loss, by name."""
    tokens = leaves({name: tensor for name, tensor in inputs.items() if "memory" not in name}, dtype)
    state = leaves({name: tensor for name, tensor in inputs.items() if "memory" in name}, state_dtype)
    output, final_state = trellis_memory(**tokens, initial_state=state_of(state), **options)
    weights = tokens["value"].detach()  # something the dtype represents exactly
    ((output * weights).sum() + sum(memory.sin().sum() for memory in final_state)).backward()
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in {**tokens, **state}.items()}
    return {"output": output, **final_state._asdict(), **gradients}


@pytest.mark.parametrize("write_activation", WRITES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "state_tolerance"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 1e-5), (torch.float16, 2e-3, 1e-5)],
)
def test_narrow_dtypes_follow_float64(
    dtype, tolerance, state_tolerance, write_activation, make_inputs, make_state, relative_rms
):
    sizes = {"batch": 3, "head": 2, "slot": 8, "dim": 8}
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(time=17, **sizes).items()}
    inputs |= {name: memory.float() for name, memory in make_state(**sizes)._asdict().items()}
    options = {"write_activation": write_activation, "write_epsilon": 0.1}
    expected = run_all(inputs, torch.float64, torch.float64, **options)
    actual = run_all(inputs, dtype, torch.float32, **options)
    for name, tensor in actual.items():
        kept_in_state_dtype = "memory" in name
        assert tensor.dtype == (torch.float32 if kept_in_state_dtype else dtype), name
        allowed = state_tolerance if kept_in_state_dtype else tolerance
        assert relative_rms(expected[name], tensor) < allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "options"), [("reference", {}), ("cpu", {}), ("chunked", {"chunk_length": 4}), ("auto", {})]
)
def test_gates_may_be_wider_than_the_rest(name, options, dtype, make_inputs, relative_rms):
    """The result is that of the same numbers in float32, rounded; each gradient comes in its input's dtype."""
    wide = {key: tensor.to(dtype).float() for key, tensor in make_inputs(time=9, slot=8, dim=8).items()}
    wide["log_forget"] = wide["log_forget"] - 1e-4  # no number of half precision
    results = []
    for dtypes in (
        dict.fromkeys(wide, torch.float32),
        dict.fromkeys(wide, dtype) | dict.fromkeys(GATES, torch.float32),
    ):
        inputs = {key: tensor.to(dtypes[key], copy=True).requires_grad_() for key, tensor in wide.items()}
        output, state = trellis_memory(**inputs, implementation=name, **options)
        output.float().sum().backward()
        assert state.key_memory.dtype == torch.float32
        assert all(tensor.grad.dtype == tensor.dtype for tensor in inputs.values())
        results.append([output, *(tensor.grad for tensor in inputs.values())])
    assert results[1][0].dtype == dtype
    for expected, actual in zip(*results, strict=True):
        assert relative_rms(expected, actual) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("gates", [torch.float64, torch.float16])
def test_gates_of_any_other_dtype_are_refused(gates, make_inputs):
    inputs = {key: tensor.bfloat16() for key, tensor in make_inputs().items()}
    with pytest.raises(ConfigError, match="cast them to one dtype"):
        trellis_memory(**inputs | {"step_size": inputs["step_size"].to(gates)})


def test_a_step_takes_wider_gates_too(make_inputs, make_state):
    inputs = {key: tensor[:, 0].bfloat16() for key, tensor in make_inputs(slot=8, dim=8).items()}
    state = MemoryState(*(memory.float() for memory in make_state(slot=8, dim=8)))
    expected, _ = trellis_memory_step(**inputs, state=state)
    actual, _ = trellis_memory_step(**inputs | {name: inputs[name].float() for name in GATES}, state=state)
    assert torch.equal(actual, expected)


def test_step_keeps_the_dtypes_of_the_whole(make_inputs):
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(time=2).items()}
    expected, expected_state = trellis_memory(**inputs)
    _, state = trellis_memory(**{name: tensor[:, :1] for name, tensor in inputs.items()})
    output, state = trellis_memory_step(**{name: tensor[:, 1] for name, tensor in inputs.items()}, state=state)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected[:, 1])
    assert all(map(torch.equal, state, expected_state))


def test_autocast_changes_nothing(make_inputs):
    inputs = {name: tensor.float() for name, tensor in make_inputs().items()}
    expected, expected_state = trellis_memory(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = trellis_memory(**inputs)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, state, expected_state))


@pytest.mark.parametrize("chunk_length", [1, 2])
def test_arguments_are_not_modified(chunk_length, make_inputs, make_state):
    inputs, state = make_inputs(), make_state()
    before = [tensor.clone() for tensor in (*inputs.values(), *state)]
    _, final_state = trellis_memory(**inputs, initial_state=state, chunk_length=chunk_length)
    trellis_memory_step(**{name: tensor[:, 0] for name, tensor in inputs.items()}, state=state)
    assert all(map(torch.equal, (*inputs.values(), *state), before))
    assert not {memory.data_ptr() for memory in final_state} & {memory.data_ptr() for memory in state}


def test_layout_does_not_matter(make_inputs, make_state):
    inputs, state = make_inputs(), make_state()

    def permuted(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def spaced(tensor):
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    expected, expected_state = trellis_memory(**inputs, initial_state=state)
    for layout in (permuted, spaced):
        arguments = {name: layout(tensor) for name, tensor in inputs.items()}
        assert not any(tensor.is_contiguous() for tensor in arguments.values())
        output, final_state = trellis_memory(**arguments, initial_state=MemoryState(*map(layout, state)))
        torch.testing.assert_close((output, *final_state), (expected, *expected_state), rtol=1e-12, atol=1e-12)


def test_an_expanded_state_is_shared_by_the_rows(make_inputs, make_state):
    inputs = make_inputs(batch=3)
    one = make_state(batch=1)
    for memory in one:
        memory.requires_grad_()
    expanded = MemoryState(*(memory.expand(3, -1, -1, -1) for memory in one))
    copied = MemoryState(*(memory.detach().repeat(3, 1, 1, 1).requires_grad_() for memory in one))
    output, _ = trellis_memory(**inputs, initial_state=expanded)
    expected, _ = trellis_memory(**inputs, initial_state=copied)
    assert torch.equal(output, expected)
    for shared, separate in zip(
        torch.autograd.grad(output.sum(), one), torch.autograd.grad(expected.sum(), copied), strict=True
    ):
        torch.testing.assert_close(shared, separate.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


def test_an_empty_batch_passes_through(make_inputs):
    inputs = leaves(make_inputs(batch=0))
    output, state = trellis_memory(**inputs)
    output.sum().backward()
    assert output.shape == inputs["query"].shape
    assert state.key_memory.shape == (0, 2, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("targets", ["zero", "random"])
@pytest.mark.parametrize(("write_activation", "read_activation"), PAIRS)
def test_zero_vectors_stay_finite(write_activation, read_activation, targets, dtype, make_inputs):
    inputs = make_inputs()
    for name in ("query", "key", "value", *(["target"] if targets == "zero" else [])):
        inputs[name].zero_()
    inputs = leaves(inputs, dtype)
    output, state = trellis_memory(**inputs, write_activation=write_activation, read_activation=read_activation)
    (output.sum() + sum(memory.sum() for memory in state)).backward()
    for tensor in (output, *state, *(tensor.grad for tensor in inputs.values())):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("write_activation", WRITES)
def test_one_slot_and_one_dim_stay_finite(write_activation, make_inputs):
    inputs = leaves(make_inputs(slot=1, dim=1))
    output, _ = trellis_memory(**inputs, write_activation=write_activation)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in inputs.values())


PHI = {
    "identity": lambda z: z,
    "silu": functional.silu,
    "ln_silu": lambda z: functional.layer_norm(functional.silu(z), z.shape[-1:], eps=0.1),
}


def detached_memory(tokens, state, phi, constants=None):
    """The recurrence with the given z as constants; without them, the z it passes through are recorded instead."""
    memories, outputs, recorded = list(state), [], []
    for t in range(tokens["query"].shape[1]):
        q, k, v, a, log_b, g = (tensor[:, t] for tensor in tokens.values())
        for i, w in enumerate((k, v)):
            z = torch.einsum("bhmd,bhd->bhm", memories[i], w) if constants is None else constants[2 * t + i]
            recorded.append(z)
            reproduced, pull_back = torch.func.vjp(phi, z)
            (u,) = pull_back(reproduced - a)
            memories[i] = torch.einsum("bh,bhmd->bhmd", log_b.exp(), memories[i]) - torch.einsum(
                "bh,bhm,bhd->bhmd", g, u, w
            )
        read = torch.einsum("bhmd,bhd->bhm", memories[0], q).softmax(-1)
        outputs.append(torch.einsum("bhmd,bhm->bhd", memories[1], read))
    return torch.stack(outputs, dim=1), recorded


@pytest.mark.parametrize("write_activation", WRITES)
def test_first_order_gradients_are_those_of_a_constant_z(write_activation, make_inputs, make_state):
    inputs = leaves({**make_inputs(), **make_state()._asdict()})
    tokens = {name: tensor for name, tensor in inputs.items() if "memory" not in name}
    options = {"write_activation": write_activation, "read_activation": "softmax", "write_epsilon": 0.1}

    output, _ = trellis_memory(**tokens, initial_state=state_of(inputs), second_order=False, **options)
    exact, _ = trellis_memory(**tokens, initial_state=state_of(inputs), **options)
    with torch.no_grad():
        _, constants = detached_memory(tokens, state_of(inputs), PHI[write_activation])
    by_hand, _ = detached_memory(tokens, state_of(inputs), PHI[write_activation], constants)

    assert torch.equal(output, exact)
    torch.testing.assert_close(by_hand, output, rtol=1e-10, atol=1e-10)
    first, second, hand = (
        dict(zip(inputs, torch.autograd.grad(result.square().sum(), inputs.values()), strict=True))
        for result in (output, exact, by_hand)
    )
    for name in inputs:
        torch.testing.assert_close(
            first[name], hand[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert first["target"].abs().max() > 1e-3
    assert not torch.allclose(first["key"], second["key"], rtol=1e-3)


def changed(name, change):
    """A refused call: ``change`` applied to one argument of a good one."""
    return lambda arguments: {**arguments, name: change(arguments.get(name))}


def changed_state(part, change):
    def apply(arguments):
        state = arguments["initial_state"]
        return {**arguments, "initial_state": state._replace(**{part: change(getattr(state, part))})}

    return apply


def every_token(change):
    return lambda arguments: {
        name: change(tensor) if isinstance(tensor, torch.Tensor) else tensor for name, tensor in arguments.items()
    }


REFUSED = {
    "query without heads": (
        changed("query", lambda x: x[:, :, 0]),
        r"query has shape \[2, 5, 3\]; expected \[batch, time, head, dim\]",
    ),
    "key of another width": (
        changed("key", lambda x: x[..., :2]),
        r"key has shape \[2, 5, 2, 2\]; expected \[batch=2, time=5, head=2, dim=3\]",
    ),
    "value of another length": (changed("value", lambda x: x[:, :4]), r"value has shape \[2, 4, 2, 3\]; expected"),
    "target of another batch": (
        changed("target", lambda x: x[:1]),
        r"target has shape \[1, 5, 2, 4\]; expected \[batch=2, time=5, head=2, slot\]",
    ),
    "log_forget per slot": (
        changed("log_forget", lambda x: x[..., None]),
        r"log_forget has shape \[2, 5, 2, 1\]; expected \[batch=2, time=5, head=2\]",
    ),
    "step_size to be broadcast": (changed("step_size", lambda x: x[:, :, :1]), r"step_size has shape \[2, 5, 1\]"),
    "no tokens": (every_token(lambda x: x[:, :0]), "the time axis"),
    "no heads": (every_token(lambda x: x[:, :, :0]), "the head axis"),
    "no slots": (changed("target", lambda x: x[..., :0]), "the slot axis"),
    "an array": (changed("query", lambda x: x.numpy()), r"query is a ndarray; expected a tensor \[batch, time"),
    "nothing": (changed("target", lambda x: None), "target is a NoneType"),
    "whole numbers": (every_token(lambda x: x.long()), "query has dtype int64; the memory takes float64, float32"),
    "two dtypes": (changed("value", lambda x: x.float()), "value has dtype float32 and query float64; cast"),
    "two devices": (changed("step_size", lambda x: x.to("meta")), "step_size is on meta and query on cpu; move"),
    "state of another width": (
        changed_state("value_memory", lambda x: x[..., :2]),
        r"initial_state.value_memory has shape \[2, 2, 4, 2\]; expected \[batch=2, head=2, slot=4, dim=3\]",
    ),
    "state for one row": (changed_state("key_memory", lambda x: x[:1]), r"initial_state.key_memory has shape \[1, 2"),
    "state in another dtype": (
        changed_state("key_memory", lambda x: x.float()),
        "initial_state.key_memory has dtype float32; with inputs in float64 the state is kept in float64",
    ),
    "state elsewhere": (changed_state("key_memory", lambda x: x.to("meta")), "initial_state.key_memory is on meta"),
    "half a state": (changed("initial_state", lambda x: x.key_memory), "initial_state is a Tensor; expected a Memory"),
    "state of an array": (changed_state("key_memory", lambda x: x.numpy()), "initial_state.key_memory is a ndarray"),
    "unknown write": (
        changed("write_activation", lambda x: "relu"),
        "write_activation='relu' is unknown; choose one of identity, silu, ln_silu",
    ),
    "unknown read": (
        changed("read_activation", lambda x: "silu"),
        "read_activation='silu' is unknown; choose one of ln_silu, l2_silu, softmax",
    ),
    "chunk of nothing": (changed("chunk_length", lambda x: 0), "chunk_length=0 must be a whole number of at least 1"),
    "half a chunk": (changed("chunk_length", lambda x: 2.5), "chunk_length=2.5 must be"),
    "no epsilon": (changed("write_epsilon", lambda x: 0.0), "write_epsilon=0.0 must be positive and finite"),
    "negative epsilon": (changed("write_epsilon", lambda x: -1e-6), "write_epsilon=-1e-06 must be"),
    "undefined epsilon": (changed("write_epsilon", lambda x: math.nan), "write_epsilon=nan must be"),
    "infinite epsilon": (changed("write_epsilon", lambda x: math.inf), "write_epsilon=inf must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, make_inputs, make_state):
    change, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        trellis_memory(**change({**make_inputs(), "initial_state": make_state()}))


def test_refuses_an_empty_width(make_inputs):
    with pytest.raises(ConfigError, match="the dim axis"):
        trellis_memory(**make_inputs(dim=0))


def test_refuses_a_narrow_state_of_narrow_inputs(make_inputs, make_state):
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs().items()}
    state = MemoryState(*(memory.bfloat16() for memory in make_state()))
    with pytest.raises(ConfigError, match="with inputs in bfloat16 the state is kept in float32"):
        trellis_memory(**inputs, initial_state=state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": None}, "state is a NoneType; expected a MemoryState"),
        ({"key": torch.zeros(2, 1, 2, 3)}, r"key has shape \[2, 1, 2, 3\]; expected \[batch=2, head=2, dim=3\]"),
        ({"state": MemoryState(torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 3, 4))}, "state.value_memory has shape"),
        ({"write_activation": "gelu"}, "write_activation='gelu' is unknown"),
    ],
)
def test_step_refuses(arguments, message, make_inputs, make_state):
    token = {name: tensor[:, 0].float() for name, tensor in make_inputs().items()}
    state = MemoryState(*(memory.float() for memory in make_state()))
    with pytest.raises(ConfigError, match=message):
        trellis_memory_step(**{**token, "state": state, **arguments})


def test_every_tensor_is_named():
    with pytest.raises(TypeError, match="positional"):
        trellis_memory(np.zeros(1))
