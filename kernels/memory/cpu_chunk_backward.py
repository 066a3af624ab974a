"""One chunk of tokens, backward: section 5 of README.md beside this file derives what is computed.

A negative offset of a memory, or of a gradient of one, stands for zeros.
"""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_activations import activations, largest_over_rows, over_rows
from trellis_ts.kernels.memory.cpu_chunk_forward import (
    decay_between,
    inner,
    read_chunk,
    run_reads,
    run_writes,
    start_rows,
)
from trellis_ts.kernels.memory.cpu_functions import function, inline
from trellis_ts.kernels.memory.cpu_layout import (
    BACK,
    CHUNK,
    DIM,
    KEY,
    LANES,
    LOG_FORGET,
    NONE,
    NUM_SLOTS,
    ONE,
    OUTPUT,
    QUERY,
    READ,
    SECOND_ORDER,
    STEP,
    TARGET,
    VALUE,
    WRITE,
    ZERO,
)
from trellis_ts.kernels.memory.cpu_products import (
    add_multiples,
    add_outer_products,
    fill_zero,
    inner_product,
    inner_products,
    multiply,
    multiply_transposed,
    scaled,
    store_sums,
)
from trellis_ts.kernels.memory.cpu_transfer import load_chunk, load_token, save_tokens
from trellis_ts.kernels.memory.cpu_vectors import WIDTH, load, load_one, store, zero

_ACTIVATIONS = activations(over_rows, largest_over_rows)
write_gradient_backward, read_backward = _ACTIVATIONS.write_gradient_backward, _ACTIVATIONS.read_backward


@function
def pull_back(scratch, layout, part, memory, gradient, n, with_read_gradient, sizes, epsilon):
    """Carry the gradient of a memory from after a chunk to its tokens.

    Finds the gradients of every x's product with the memory in the second half of ``layout.pull``. Leaves those of w
    and, ``with_read_gradient``, of x in ``layout.rows``; adds to those of targets, step sizes and flows. A negative
    ``memory`` or ``gradient`` stands for zero.
    """
    num_slots, dim, slots, dims = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.slots, layout.dims
    last = n - 1
    if gradient >= 0:
        multiply(scratch, layout.gw_start, part.rows, n, gradient, layout, num_slots, dim)
    else:
        fill_zero(scratch, layout.gw_start, n * slots)
    for t in range(last, -1, -1):
        pull_back_token(scratch, layout, part, memory, n, t, sizes, epsilon)
    if memory >= 0 and gradient >= 0:
        through = zero(scratch)
        for m in range(num_slots):
            at = m * layout.width
            through += inner_product(scratch, gradient + at, memory + at, dim * WIDTH)
        add_flow(scratch, layout, ZERO, n, through * load(scratch, layout.decay + n * WIDTH))

    for i in range(0, 2 * n, n):
        to, vectors = layout.products + i * WIDTH, layout.pull + i * slots
        inner_products(scratch, to, part.written, vectors, n, slots, num_slots)
    weigh_products(scratch, layout, part, n)
    if gradient >= 0:
        multiply_transposed(scratch, layout.gs, part.written, n, gradient, layout, num_slots, dim)
    else:
        fill_zero(scratch, layout.gs, n * dims)
    num_rows = 2 * n if with_read_gradient else n
    if memory >= 0:
        multiply_transposed(scratch, layout.sz, layout.pull, num_rows, memory, layout, num_slots, dim)
    else:
        fill_zero(scratch, layout.sz, num_rows * dims)
    size = dim * WIDTH
    for t in range(n):
        through = inner_product(scratch, part.rows + t * dims, layout.sz + t * dims, size)
        add_flow(scratch, layout, ZERO, t, load(scratch, layout.decay + t * WIDTH) * through)
        gather_row(scratch, layout, part, n, t, size)
        if with_read_gradient:
            gather_read_row(scratch, layout, part, n, t, size)


@function
def gather_row(scratch, layout, part, n, t, size):
    """Compute the gradient of ``w``: what comes by the memories around the chunk and by its other tokens."""
    dims, row_stride = layout.dims, 2 * CHUNK * WIDTH
    rows, own, column = part.rows, layout.products + t * row_stride, layout.products + t * WIDTH
    decay, after = load(scratch, layout.decay + t * WIDTH), layout.decays + ((n - 1) * CHUNK + t) * WIDTH
    for j in range(0, size, 8 * WIDTH):
        sums = scaled(scratch, layout.sz + t * dims + j, decay)
        sums = add_multiples(scratch, sums, after, LANES, layout.gs + t * dims + j, dims, ONE)
        sums = add_multiples(scratch, sums, column, row_stride, rows + j, dims, t)
        later, reads = t + 1, n + t
        sums = add_multiples(scratch, sums, own + later * WIDTH, LANES, rows + later * dims + j, dims, n - later)
        sums = add_multiples(scratch, sums, own + reads * WIDTH, LANES, rows + reads * dims + j, dims, n - t)
        store_sums(scratch, layout.rows + t * dims + j, sums)


@function
def gather_read_row(scratch, layout, part, n, t, size):
    """Compute the gradient of ``x`` likewise: from the memory before the chunk and from the writes up to its token."""
    dims, column = layout.dims, layout.products + (n + t) * WIDTH
    decay = load(scratch, layout.decay + (t + 1) * WIDTH)
    for j in range(0, size, 8 * WIDTH):
        sums = scaled(scratch, layout.sz + (n + t) * dims + j, decay)
        sums = add_multiples(scratch, sums, column, 2 * CHUNK * WIDTH, part.rows + j, dims, t + 1)
        store_sums(scratch, layout.rows + (n + t) * dims + j, sums)


@inline
def add_flow(scratch, layout, start, stop, number):
    """Add what the loss gains by way of a memory from after write ``start`` to before the read at ``stop``."""
    at = layout.flows + (start * (CHUNK + 1) + stop) * WIDTH
    store(scratch, at, load(scratch, at) + number)


@function
def pull_back_token(scratch, layout, part, memory, n, t, sizes, epsilon):
    """Compute ``G w`` after a token's write and from it zbar, and add to the gradients of target and step size."""
    slots, coefficients = layout.slots, layout.coefficients
    size, per_slot = load_one(sizes, NUM_SLOTS) * WIDTH, 1.0 / load_one(sizes, NUM_SLOTS)
    u, gw_start, gw, zbar = part.u + t * slots, layout.gw_start + t * slots, layout.gw, layout.pull + t * slots
    num_later, later, reads = n - 1 - t, zbar + slots, zbar + n * slots
    for j in range(t, n):
        x = decay_between(scratch, layout, t, j) * inner(scratch, part.gram, t, n + j)
        store(scratch, coefficients + (j - t) * WIDTH, x)
    for j in range(t + 1, n):
        x = decay_between(scratch, layout, t, j - 1) * inner(scratch, part.gram, t, j)
        store(scratch, coefficients + (n + j - t) * WIDTH, x)
    decay = decay_between(scratch, layout, t, n - 1)
    for j in range(0, size, 8 * WIDTH):
        sums = scaled(scratch, gw_start + j, decay)
        sums = add_multiples(scratch, sums, coefficients, LANES, reads + j, slots, n - t)
        sums = add_multiples(scratch, sums, coefficients + (n + 1) * WIDTH, LANES, later + j, slots, num_later)
        store_sums(scratch, gw + j, sums)

    step, to = load(scratch, layout.step + t * WIDTH), layout.step_gradient + t * WIDTH
    store(scratch, to, load(scratch, to) - inner_product(scratch, u, gw, size))
    add_flow(scratch, layout, t + 1, n, decay * inner_product(scratch, part.written + t * slots, gw_start, size))
    write_gradient_backward(
        scratch,
        part.z + t * slots,
        part.gate + t * slots,
        layout.target + t * slots,
        gw,
        step,
        zbar,
        layout.target_gradient + t * slots,
        layout.work,
        layout.work + slots,
        size,
        per_slot,
        load_one(sizes, WRITE),
        epsilon,
    )
    if load_one(sizes, SECOND_ORDER) == 0:
        fill_zero(scratch, zbar, size)
    if memory >= 0:
        decay, read_gradient = load(scratch, layout.decay + (t + 1) * WIDTH), layout.pull + (n + t) * slots
        through = inner_product(scratch, read_gradient, part.start + (n + t) * slots, size)
        add_flow(scratch, layout, ZERO, t + 1, decay * through)


@function
def weigh_products(scratch, layout, part, n):
    """Turn inner products of what was written with zbar, and with gradients of reads, into weights of rows."""
    for i in range(n):
        row = layout.products + i * 2 * CHUNK * WIDTH
        for j in range(i + 1, n):
            weight = decay_between(scratch, layout, i, j - 1) * load(scratch, row + j * WIDTH)
            store(scratch, row + j * WIDTH, weight)
            add_flow(scratch, layout, i + 1, j, weight * inner(scratch, part.gram, i, j))
        for j in range(i, n):
            at = row + (n + j) * WIDTH
            weight = decay_between(scratch, layout, i, j) * load(scratch, at)
            store(scratch, at, weight)
            add_flow(scratch, layout, i + 1, j + 1, weight * inner(scratch, part.gram, i, n + j))


@function
def pull_back_memory(scratch, layout, part, gradient, to, n, sizes):
    """Compute the gradient of the memory before a chunk: ``b G + sum of b zbar w^T + sum of b xbar x^T``."""
    slots = layout.slots
    for i in range(2 * n):
        decay = load(scratch, layout.decay + (i if i < n else i - n + 1) * WIDTH)
        for j in range(i * slots, (i + 1) * slots, WIDTH):
            store(scratch, layout.scaled + j, load(scratch, layout.pull + j) * decay)
    decay = load(scratch, layout.decay + n * WIDTH)
    num_slots, dim = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM)
    add_outer_products(scratch, to, gradient, decay, layout.scaled, part.rows, 2 * n, layout, num_slots, dim)


@function
def forget_gradients(scratch, layout, n):
    """Sum, for every token, what flows past its forget gate, into the first column of flows.

    Sums only: a difference of sums would lose the small gradients of strong forgetting.
    """
    row_stride = (CHUNK + 1) * WIDTH
    for i in range(n + 1):
        row = layout.flows + i * row_stride
        for j in range(n - 1, -1, -1):
            store(scratch, row + j * WIDTH, load(scratch, row + j * WIDTH) + load(scratch, row + (j + 1) * WIDTH))
    for t in range(1, n + 1):
        total = zero(scratch)
        for i in range(t):
            total += load(scratch, layout.flows + i * row_stride + t * WIDTH)
        store(scratch, layout.forget + (t - 1) * WIDTH, total)


@function
def backward_chunk(
    scratch,
    layout,
    addresses,
    places,
    next_places,
    strides,
    sizes,
    epsilon,
    key,
    value,
    gradients,
    has_key,
    has_value,
    first,
    n,
    is_kept,
    wants_states,
    num_rows,
):
    """Compute the gradients of a chunk's tokens and, if wanted, carry those of both memories to before it.

    Of a chunk that ``is_kept``, its replay has left the writes.
    """
    num_slots, dim, slots, dims = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.slots, layout.dims
    load_chunk(scratch, layout, addresses, places, next_places, strides, sizes, first, n, ONE, BACK)
    later_places, later = (places, first - CHUNK) if first > 0 else (next_places, ZERO)
    for t in range(n):
        to = layout.value.rows + (n + t) * dims
        load_token(scratch, to, addresses, places, strides, OUTPUT, first + t, later_places, later + t, dim)
    if is_kept:
        start_rows(scratch, layout, layout.key, key, n, 2 * n, n, sizes)
        start_rows(scratch, layout, layout.value, value, n, 2 * n, n, sizes)
    else:
        run_writes(scratch, layout, layout.key, key, n, 2 * n, sizes, epsilon)
        run_writes(scratch, layout, layout.value, value, n, 2 * n, sizes, epsilon)
    run_reads(scratch, layout, layout.key, n, sizes)
    read_chunk(scratch, layout, n, sizes)
    run_reads(scratch, layout, layout.value, n, sizes)
    fill_zero(scratch, layout.target_gradient, n * slots)
    fill_zero(scratch, layout.step_gradient, n * WIDTH)
    fill_zero(scratch, layout.flows, (CHUNK + 1) * (CHUNK + 1) * WIDTH)

    for j in range(0, n * slots, WIDTH):
        store(scratch, layout.pull + n * slots + j, load(scratch, layout.r + j))
    value_gradient = gradients + layout.memory
    gradient = value_gradient if has_value else NONE
    pull_back(scratch, layout, layout.value, value, gradient, n, ZERO, sizes, epsilon)
    save_tokens(scratch, layout.rows, dims, addresses, places, sizes, VALUE, first, n, dim, num_rows)
    if wants_states:
        pull_back_memory(scratch, layout, layout.value, gradient, value_gradient, n, sizes)

    for t in range(n):
        at = t * slots
        read_backward(
            scratch,
            layout.key.reads + at,
            layout.read_gate + at,
            layout.r + at,
            layout.value.reads + at,
            layout.pull + n * slots + at,
            load(scratch, layout.read_scale + t * WIDTH),
            num_slots * WIDTH,
            1.0 / num_slots,
            load_one(sizes, READ),
        )
    gradient = gradients if has_key else NONE
    pull_back(scratch, layout, layout.key, key, gradient, n, ONE, sizes, epsilon)
    save_tokens(scratch, layout.rows, dims, addresses, places, sizes, KEY, first, n, dim, num_rows)
    save_tokens(scratch, layout.rows + n * dims, dims, addresses, places, sizes, QUERY, first, n, dim, num_rows)
    if wants_states:
        pull_back_memory(scratch, layout, layout.key, gradient, gradients, n, sizes)

    target_gradient = layout.target_gradient
    save_tokens(scratch, target_gradient, slots, addresses, places, sizes, TARGET, first, n, num_slots, num_rows)
    save_tokens(scratch, layout.step_gradient, WIDTH, addresses, places, sizes, STEP, first, n, ONE, num_rows)
    forget_gradients(scratch, layout, n)
    save_tokens(scratch, layout.forget, WIDTH, addresses, places, sizes, LOG_FORGET, first, n, ONE, num_rows)
