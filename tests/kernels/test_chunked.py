"""The chunkwise form against the definition."""

import itertools

import pytest
import torch

from trellis_ts.errors import BackendError
from trellis_ts.kernels import MemoryState, trellis_memory

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_inputs(batch, num_tokens, num_heads, head_dim, num_slots, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    tokens = {
        "query": unit(draw(batch, num_tokens, num_heads, head_dim), dim=-1),
        "key": unit(draw(batch, num_tokens, num_heads, head_dim), dim=-1),
        "value": unit(draw(batch, num_tokens, num_heads, head_dim), dim=-1),
        "target": draw(batch, num_tokens, num_heads, num_slots),
        "log_forget": -0.1 * draw(batch, num_tokens, num_heads).abs(),
        "step_size": 0.3 * draw(batch, num_tokens, num_heads).abs(),
    }
    tokens["step_size"][:, 1::5] = 0.0  # masked tokens among the others
    tokens["log_forget"][:, 1::5] = 0.0
    state_dtype = torch.promote_types(dtype, torch.float32)
    state = [draw(batch, num_heads, num_slots, head_dim).to(state_dtype).requires_grad_() for _ in range(2)]
    return {name: value.to(dtype).requires_grad_() for name, value in tokens.items()}, tuple(state)


def run(implementation, tokens, state, autocast=False, **options):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, final = trellis_memory(
            **tokens, initial_state=MemoryState(*state), implementation=implementation, **options
        )
    generator = torch.Generator().manual_seed(1)
    results = {"output": output, "key_memory": final.key_memory, "value_memory": final.value_memory}
    loss = sum(
        (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
        for value in results.values()
    )
    names = [*tokens, "initial_key_memory", "initial_value_memory"]
    gradients = torch.autograd.grad(loss, [*tokens.values(), *state])
    return results | dict(zip(names, gradients, strict=True))


def assert_same(expected, actual, tolerance):
    for name, value in expected.items():
        error = (value.double() - actual[name].double()).square().mean().sqrt()
        assert error <= tolerance * value.double().square().mean().sqrt() + 1e-300, name


# Every chunk length with every write; lengths, sizes, reads and orders take turns.
CASES = [
    (num_tokens, chunk_length, sizes, phi, read, second_order)
    for index, (num_tokens, chunk_length, phi) in enumerate(
        itertools.product((1, 17, 63, 129), (1, 4, 16, 64), ("identity", "silu", "ln_silu"))
    )
    if chunk_length > 1 or phi == "identity"
    for sizes in [((8, 13), (13, 8), (32, 60), (64, 8))[index % 4]]
    for read in [("ln_silu", "l2_silu", "softmax")[index % 3]]
    for second_order in [index % 2 == 0]
]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_state_and_every_gradient_equal_the_definition(dtype):
    for num_tokens, chunk_length, (head_dim, num_slots), phi, read, second_order in CASES:
        tokens, state = make_inputs(1, num_tokens, 2, head_dim, num_slots, dtype)
        options = {
            "chunk_length": chunk_length,
            "write_activation": phi,
            "read_activation": read,
            "second_order": second_order,
            "write_epsilon": 0.1,
        }
        assert_same(
            run("reference", tokens, state, **options), run("chunked", tokens, state, **options), TOLERANCE[dtype]
        )


@pytest.mark.parametrize("log_forget", [-1e-7, -16.0, -torch.inf])
def test_gates_nearly_open_and_shut_stay_right(log_forget):
    tokens, state = make_inputs(1, 300, 1, 8, 8, torch.float32)
    tokens["log_forget"] = torch.full_like(tokens["log_forget"], log_forget).requires_grad_()
    for options in ({"write_activation": "identity"}, {"chunk_length": 64}):
        expected, actual = run("reference", tokens, state, **options), run("chunked", tokens, state, **options)
        assert all(value.isfinite().all() for value in actual.values())
        assert_same(expected, actual, 1e-5)


def test_the_exact_recurrence_of_a_non_linear_write_is_refused():
    tokens, state = make_inputs(1, 4, 1, 8, 8, torch.float32)
    with pytest.raises(BackendError, match="write_activation='identity' only"):
        run("chunked", tokens, state, write_activation="silu")


def test_autocast_changes_nothing():
    tokens, state = make_inputs(1, 20, 1, 8, 8, torch.float32)
    plain = run("chunked", tokens, state, chunk_length=4)
    cast = run("chunked", tokens, state, autocast=True, chunk_length=4)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_compiles_without_a_graph_break():
    tokens, _ = make_inputs(1, 9, 1, 8, 8, torch.float32)
    compiled = torch.compile(lambda: trellis_memory(**tokens, chunk_length=4)[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(), trellis_memory(**tokens, chunk_length=4)[0])
