"""A large sample of all combinations of dtype, options and sizes, against the reference.

There are 54,432 combinations for each implementation, more than half an hour of an idle core. The sample is an eighth
of them, drawn once for all, and holds every combination of any three values among write, read, order, chunk length,
slots, head width and group of lengths; dtypes and the lengths of a group are always all there. The other two means of
keeping it short: all inputs are numbers bfloat16 holds, so the reference computes each problem once, in float64, for
all dtypes; and sequences of several lengths are rows of one reference run, filled up with masked tokens, which leave a
memory as it was. One head of one row has to do: rows and heads are in the ordinary tests.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from trellis_ts.kernels import MemoryState, implementations, trellis_memory

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
STATE_DTYPE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
TIMES = ((1, 2, 7, 17), (63, 64, 129))
"""Lengths that share a reference run."""
SIZES = (8, 13, 32, 60, 64, 128)
WRITES = ("identity", "silu", "ln_silu")
GROUPS = list(
    itertools.product(WRITES, ("ln_silu", "l2_silu", "softmax"), (True, False), (1, 4, 16, 64), SIZES, SIZES, TIMES)
)
SHARE = 8
"""One in so many is drawn."""
WRITE_EPSILON = 0.1

# The Triton kernels run statement by statement here, for which all combinations are too many: interpreted.py.
FAST = [name for name in ("cpu", "chunked") if implementations()[name] is None]


def runs(name, chunk_length, write_activation):
    """Whether an implementation computes a chunk length at all; what it says otherwise is tested elsewhere."""
    return chunk_length == 1 if name == "cpu" else chunk_length > 1 or write_activation == "identity"


def evaluate(inputs, state, weights, implementation, options):
    """Output, final state and the gradient of every input, of the sum of all results times ``weights``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in (inputs | state._asdict()).items()}
    state = MemoryState(leaves["key_memory"], leaves["value_memory"])
    output, final_state = trellis_memory(
        **{name: leaves[name] for name in inputs}, initial_state=state, implementation=implementation, **options
    )
    results = {"output": output, **{f"final {name}": tensor for name, tensor in final_state._asdict().items()}}
    cotangents = [weights[name].to(tensor.dtype) for name, tensor in results.items()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), cotangents)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in (results | named).items()}


def of_row(tensors, row, time):
    """One row of each tensor, without the tokens it was filled up with."""
    without_time = {"memory"}
    return {
        name: tensor[row : row + 1] if any(part in name for part in without_time) else tensor[row : row + 1, :time]
        for name, tensor in tensors.items()
    }


class Problem:
    """Several sequences, one per row, in float64 but of numbers bfloat16 holds."""

    def __init__(self, times, slot, dim, make_inputs, make_state):
        sizes = {"batch": len(times), "head": 1, "slot": slot, "dim": dim}
        inputs = make_inputs(time=max(times), **sizes)
        generator = torch.Generator().manual_seed(2)
        weights = {"output": torch.randn(inputs["query"].shape, generator=generator)}
        for name in ("final key_memory", "final value_memory"):
            weights[name] = torch.randn((len(times), 1, slot, dim), generator=generator)
        for row, time in enumerate(times):
            for tensor in (inputs["log_forget"], inputs["step_size"], weights["output"]):
                tensor[row, time:] = 0
        self.times = times
        self.inputs, self.weights = (
            {name: tensor.bfloat16().double() for name, tensor in each.items()} for each in (inputs, weights)
        )
        self.state = MemoryState(*(memory.bfloat16().double() for memory in make_state(**sizes)))

    def row(self, row, dtype):
        """Inputs, state and weights of one sequence."""
        time = self.times[row]
        inputs = {name: tensor.to(dtype) for name, tensor in of_row(self.inputs, row, time).items()}
        state = MemoryState(*(memory[row : row + 1].to(STATE_DTYPE[dtype]) for memory in self.state))
        return inputs, state, of_row(self.weights, row, time)


def blurred(arguments, expected, key, options, relative_rms):
    """How far off float32 is anyway: the reference in it, and in float64 with inputs rounded to float32 differently.

    With one token the gradient of a gate is a single number, and may be a hundred-thousandth of the terms it sums.
    """
    inputs, state, weights = arguments
    errors = [relative_rms(expected, evaluate(inputs, state, weights, "reference", options)[key])]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)

        def move(tensor, generator=generator):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor.double() * (1 + 2**-24 * noise)

        moved = {name: move(tensor) for name, tensor in inputs.items()}
        result = evaluate(moved, MemoryState(*map(move, state)), weights, "reference", options)
        errors.append(relative_rms(expected, result[key]))
    return max(errors)


def differences(problem, chunk_length, relative_rms, **options):
    """Compare every implementation in every dtype with one reference run; yield what differs too much."""
    options = options | {"chunk_length": chunk_length, "write_epsilon": WRITE_EPSILON}
    names = [name for name in FAST if runs(name, chunk_length, options["write_activation"])]
    if not names:
        return
    everything = evaluate(problem.inputs, problem.state, problem.weights, "reference", options)
    for row, time in enumerate(problem.times):
        expected = of_row(everything, row, time)
        for dtype, name in itertools.product(TOLERANCE, names):
            arguments = problem.row(row, dtype)
            for key, tensor in evaluate(*arguments, name, options).items():
                error = relative_rms(expected[key], tensor)
                if error >= TOLERANCE[dtype] and dtype == torch.float32:
                    error -= 3 * blurred(arguments, expected[key], key, options, relative_rms)
                if not error < TOLERANCE[dtype]:
                    shape = f"T={time} M={arguments[0]['target'].shape[-1]} D={arguments[0]['query'].shape[-1]}"
                    yield f"{name} {dtype} {shape} {options}: {key} is off by {error:.1e}"


def sample():
    """Draw groups at random, and then those that hold three values not yet seen together."""
    groups = GROUPS.copy()
    random.Random(0).shuffle(groups)
    seen = set()
    for index, group in enumerate(groups):
        triples = set(itertools.combinations(enumerate(group), 3))
        if index < len(groups) // SHARE or triples - seen:
            seen |= triples
            yield group


@pytest.mark.slow
@pytest.mark.parametrize("write_activation", WRITES)
def test_equals_the_reference(write_activation, make_inputs, make_state, relative_rms):
    found = []
    for write, read_activation, second_order, chunk_length, slot, dim, times in sample():
        if write == write_activation:
            problem = Problem(times, slot, dim, make_inputs, make_state)
            options = {"write_activation": write, "read_activation": read_activation, "second_order": second_order}
            found += differences(problem, chunk_length, relative_rms, **options)
    assert not found, "\n".join(found)


def test_a_reference_run_of_several_lengths_is_that_of_each(make_inputs, make_state):
    """What the test above rests on."""
    problem = Problem((3, 7, 17), 8, 13, make_inputs, make_state)
    for chunk_length in (1, 4):
        options = {"chunk_length": chunk_length, "write_activation": "silu", "read_activation": "ln_silu"}
        together = evaluate(problem.inputs, problem.state, problem.weights, "reference", options)
        for row, time in enumerate(problem.times):
            alone = evaluate(*problem.row(row, torch.float64), "reference", options)
            torch.testing.assert_close(of_row(together, row, time), alone, rtol=1e-13, atol=1e-13)
