"""The compiled recurrence for one token: row by row, on the memories as they lie in their tensors.

A sequence is worth rearranging for, eight rows side by side; a single token is not. Here the lanes of a vector are
eight neighbouring features or eight slots, whose numbers must therefore be multiples of eight.
"""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_activations import (
    activations,
    exponential,
    largest_over_lanes,
    over_lanes,
)
from trellis_ts.kernels.memory.cpu_functions import build_entry, function, inline
from trellis_ts.kernels.memory.cpu_vectors import (
    WIDTH,
    after,
    as_integers,
    load,
    load_double,
    load_one,
    multiply_add,
    pointer_to,
    repeat,
    store,
    sum_each,
    take,
    zero,
)

# As in cpu_kernel.py: a digest of the files imported here, because Numba's cache does not look at them.
IMPORTED = "41f1133a1d98ad66"

# A problem: sizes, choices, the bits of epsilon as float64, how its rows are shared out (as in cpu_layout.py), and the
# addresses of its tensors, all contiguous; cpu_run.py writes it.
NUM_SLOTS, DIM, WRITE, READ, EPSILON, NUM_ROWS, BLOCK, NEXT_ROW, NEXT_THREAD, SCRATCH = range(10)
QUERY, KEY, VALUE, TARGET, LOG_FORGET, STEP, KEY_STATE, VALUE_STATE, OUTPUT, KEY_FINAL, VALUE_FINAL = range(10, 21)
NUM_ENTRIES = 21
# Vectors over slots in scratch: z, or what was read; its sigmoid; u; the target; r; and work.
Z, GATE, U, GOAL, R, WORK = range(6)
NUM_FIELDS = 6

_ACTIVATIONS = activations(over_lanes, largest_over_lanes)
write_gradient, read = _ACTIVATIONS.write_gradient, _ACTIVATIONS.read


def build(scalar, *, cache=True):
    """Compile for ``numba.float32`` or ``numba.float64``, or find it in Numba's cache."""
    return build_entry(step, scalar, cache)


@inline
def tensor_at(scratch, problem, tensor):
    return pointer_to(scratch, load_one(problem, tensor))


@inline
def lanes_of_products(array, at, stride, vector, start, dim):
    """Return the products of eight slots of a memory with a vector over features."""
    a = b = c = d = e = f = g = h = zero(array)
    for i in range(0, dim, WIDTH):
        w, j = load(vector, start + i), at + i
        a = multiply_add(load(array, j), w, a)
        b = multiply_add(load(array, j + stride), w, b)
        c = multiply_add(load(array, j + 2 * stride), w, c)
        d = multiply_add(load(array, j + 3 * stride), w, d)
        e = multiply_add(load(array, j + 4 * stride), w, e)
        f = multiply_add(load(array, j + 5 * stride), w, f)
        g = multiply_add(load(array, j + 6 * stride), w, g)
        h = multiply_add(load(array, j + 7 * stride), w, h)
    return sum_each(a, b, c, d, e, f, g, h)


@function
def write(scratch, memory, final, at, w, w_at, target, target_at, forget, step, problem, epsilon):
    """Write one token: ``S = b S - g u w^T`` from one memory to another, or in place."""
    num_slots, dim = load_one(problem, NUM_SLOTS), load_one(problem, DIM)
    z, u, goal = Z * num_slots, U * num_slots, GOAL * num_slots
    for m in range(0, num_slots, WIDTH):
        store(scratch, z + m, lanes_of_products(memory, at + m * dim, dim, w, w_at, dim))
        store(scratch, goal + m, load(target, target_at + m))
    gate, work = GATE * num_slots, WORK * num_slots
    phi = load_one(problem, WRITE)
    write_gradient(scratch, z, gate, goal, u, work, num_slots, 1.0 / num_slots, phi, epsilon)
    for m in range(num_slots):
        written, row = repeat(load_one(scratch, u + m)) * step * -1.0, at + m * dim
        for d in range(0, dim, WIDTH):
            s = multiply_add(written, load(w, w_at + d), load(memory, row + d) * forget)
            store(final, row + d, s)


def step(data):
    """Compute one token; ``data`` is the address of a problem, whose type says that of the numbers.

    As many threads as there is scratch for may run this at once on the same problem.
    """
    problem = as_integers(data)
    scratch = after(
        tensor_at(data, problem, SCRATCH), take(problem, NEXT_THREAD, 1) * NUM_FIELDS * load_one(problem, NUM_SLOTS)
    )
    num_rows, block = load_one(problem, NUM_ROWS), load_one(problem, BLOCK)
    first = take(problem, NEXT_ROW, block)
    while first < num_rows:
        step_rows(problem, scratch, first, min(first + block, num_rows))
        first = take(problem, NEXT_ROW, block)


@function
def step_rows(problem, scratch, first_row, last_row):
    epsilon = load_double(problem, EPSILON)
    num_slots, dim = load_one(problem, NUM_SLOTS), load_one(problem, DIM)
    query, output = tensor_at(scratch, problem, QUERY), tensor_at(scratch, problem, OUTPUT)
    key, value = tensor_at(scratch, problem, KEY), tensor_at(scratch, problem, VALUE)
    target = tensor_at(scratch, problem, TARGET)
    log_forget, step_size = tensor_at(scratch, problem, LOG_FORGET), tensor_at(scratch, problem, STEP)
    key_state, key_final = tensor_at(scratch, problem, KEY_STATE), tensor_at(scratch, problem, KEY_FINAL)
    value_state, value_final = tensor_at(scratch, problem, VALUE_STATE), tensor_at(scratch, problem, VALUE_FINAL)
    yhat, gate, r = Z * num_slots, GATE * num_slots, R * num_slots
    for row in range(first_row, last_row):
        at, features, slots = row * num_slots * dim, row * dim, row * num_slots
        forget = exponential(repeat(load_one(log_forget, row)))
        step = repeat(load_one(step_size, row))
        write(scratch, key_state, key_final, at, key, features, target, slots, forget, step, problem, epsilon)
        for m in range(0, num_slots, WIDTH):
            store(scratch, yhat + m, lanes_of_products(key_final, at + m * dim, dim, query, features, dim))
        read(scratch, yhat, gate, r, num_slots, 1.0 / num_slots, load_one(problem, READ))
        write(scratch, value_state, value_final, at, value, features, target, slots, forget, step, problem, epsilon)
        for d in range(0, dim, WIDTH):
            y = zero(scratch)
            for m in range(num_slots):
                y = multiply_add(load(value_final, at + m * dim + d), load_one(scratch, r + m), y)
            store(output, features + d, y)
