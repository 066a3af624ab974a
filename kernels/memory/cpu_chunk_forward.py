"""One chunk of tokens, forward: section 5 of README.md beside this file derives what is computed.

A negative offset of a memory stands for a memory of zeros.
"""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_activations import activations, largest_over_rows, over_rows
from trellis_ts.kernels.memory.cpu_functions import function, inline
from trellis_ts.kernels.memory.cpu_layout import CHUNK, DIM, NUM_SLOTS, READ, WRITE, ZERO
from trellis_ts.kernels.memory.cpu_products import (
    add_outer_products,
    combine,
    fill_zero,
    inner_products,
    multiply,
    multiply_transposed,
)
from trellis_ts.kernels.memory.cpu_vectors import WIDTH, load, load_one, store

_ACTIVATIONS = activations(over_rows, largest_over_rows)
write_gradient, read = _ACTIVATIONS.write_gradient, _ACTIVATIONS.read


@inline
def decay_between(scratch, layout, i, t):
    """Return the product of forget gates after token i up to token t, both counted in the chunk."""
    return load(scratch, layout.decays + (t * CHUNK + i) * WIDTH)


@inline
def inner(scratch, matrix, i, j):
    """Return an entry of a matrix with ``2 CHUNK`` columns."""
    return load(scratch, matrix + (i * 2 * CHUNK + j) * WIDTH)


@function
def start_rows(scratch, layout, part, memory, first, last, n, sizes):
    """Compute the products of some of a chunk's 2 n rows with the memory before it, and with every w before them."""
    num_slots, dim, slots, dims = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.slots, layout.dims
    start = part.start + first * slots
    if memory >= 0:
        multiply(scratch, start, part.rows + first * dims, last - first, memory, layout, num_slots, dim)
    else:
        fill_zero(scratch, start, (last - first) * slots)
    for i in range(first, last, n):
        inner_products(scratch, part.gram + i * WIDTH, part.rows, part.rows + i * dims, n, dims, dim)


@function
def run_writes(scratch, layout, part, memory, n, num_rows, sizes, epsilon):
    """Compute z and u of every token of a chunk, one after the other. A negative ``memory`` stands for zero.

    What reads will need of the memory before the chunk is computed along if ``num_rows`` is 2 n.
    """
    slots = layout.slots
    start_rows(scratch, layout, part, memory, ZERO, num_rows, n, sizes)
    num_slots, coefficients = load_one(sizes, NUM_SLOTS), layout.coefficients
    size, per_slot = num_slots * WIDTH, 1.0 / num_slots
    for t in range(n):
        z, u = part.z + t * slots, part.u + t * slots
        for i in range(t):
            x = decay_between(scratch, layout, i, t - 1) * inner(scratch, part.gram, i, t)
            store(scratch, coefficients + i * WIDTH, x)
        decay = load(scratch, layout.decay + t * WIDTH)
        combine(scratch, z, part.start + t * slots, decay, coefficients, part.written, slots, t, size)
        write_gradient(
            scratch,
            z,
            part.gate + t * slots,
            layout.target + t * slots,
            u,
            layout.work,
            size,
            per_slot,
            load_one(sizes, WRITE),
            epsilon,
        )
        step = load(scratch, layout.step + t * WIDTH) * -1.0
        for j in range(t * slots, t * slots + size, WIDTH):
            store(scratch, part.written + j, load(scratch, part.u + j) * step)


@function
def run_reads(scratch, layout, part, n, sizes):
    """Compute the products of every x with the memory after its token's write; ``start_rows`` has been."""
    slots, size = layout.slots, load_one(sizes, NUM_SLOTS) * WIDTH
    for t in range(n):
        for i in range(t + 1):
            x = decay_between(scratch, layout, i, t) * inner(scratch, part.gram, i, n + t)
            store(scratch, layout.coefficients + i * WIDTH, x)
        decay, at = load(scratch, layout.decay + (t + 1) * WIDTH), t * slots
        to, start = part.reads + at, part.start + n * slots + at
        combine(scratch, to, start, decay, layout.coefficients, part.written, slots, t + 1, size)


@function
def write_chunk(scratch, layout, part, memory, to, n, sizes):
    """Compute the memory after a chunk: ``b S + sum of b written w^T``."""
    for i in range(n):
        decay = decay_between(scratch, layout, i, n - 1)
        for j in range(i * layout.slots, (i + 1) * layout.slots, WIDTH):
            store(scratch, layout.scaled + j, load(scratch, part.written + j) * decay)
    decay = load(scratch, layout.decay + n * WIDTH)
    num_slots, dim = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM)
    add_outer_products(scratch, to, memory, decay, layout.scaled, part.rows, n, layout, num_slots, dim)


@function
def read_chunk(scratch, layout, n, sizes):
    """Compute ``r = f(yhat)`` of every token."""
    num_slots, slots = load_one(sizes, NUM_SLOTS), layout.slots
    for t in range(n):
        at = t * slots
        scale = read(
            scratch,
            layout.key.reads + at,
            layout.read_gate + at,
            layout.r + at,
            num_slots * WIDTH,
            1.0 / num_slots,
            load_one(sizes, READ),
        )
        store(scratch, layout.read_scale + t * WIDTH, scale)


@function
def output_chunk(scratch, layout, memory, n, sizes):
    """Compute ``y = V^T r`` of every token into ``layout.rows``."""
    num_slots, dim, part = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.value
    if memory >= 0:
        multiply_transposed(scratch, layout.rows, layout.r, n, memory, layout, num_slots, dim)
    else:
        fill_zero(scratch, layout.rows, n * layout.dims)
    inner_products(scratch, layout.products, part.written, layout.r, n, layout.slots, num_slots)
    for t in range(n):
        for i in range(t + 1):
            x = decay_between(scratch, layout, i, t) * inner(scratch, layout.products, i, t)
            store(scratch, layout.coefficients + i * WIDTH, x)
        decay, row = load(scratch, layout.decay + (t + 1) * WIDTH), layout.rows + t * layout.dims
        combine(scratch, row, row, decay, layout.coefficients, part.rows, layout.dims, t + 1, dim * WIDTH)
