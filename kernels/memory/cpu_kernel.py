"""The compiled recurrence over sequences; section 5 of README.md beside this file derives what is computed here.

Eight rows are worked on side by side: every number here is a vector with one lane per row, so a sum over slots or
features is a sum of vectors, and no size needs to be a multiple of anything. Tokens are taken ``CHUNK`` at a time.
What they share with the memories at the chunk's start is computed by products of matrices; what they do to each
other, token by token, from products between tokens. The result is the exact recurrence.

Everything a thread works on lies in one flat array, ``scratch``; what would be a pointer is an offset into it, in
numbers, and ``Layout`` holds the offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import register_jitable

from trellis_ts.kernels.memory.cpu_activations import (
    activations,
    exponential,
    function,
    inline,
    largest_over_rows,
    over_rows,
)
from trellis_ts.kernels.memory.cpu_vectors import (
    WIDTH,
    load,
    load_one,
    multiply_add,
    pointer,
    pointer_to,
    prefetch,
    store,
    store_one,
    transpose,
    zero,
)

CHUNK = 8

# Numba finds its cache by this file's text alone. So that a change in the files it imports counts as well, here is a
# digest of theirs; a test says what it has to be.
IMPORTED = "6e777dc371a73ff6"

# What is handed to a function is a NumPy integer: Numba would compile it anew for every literal it is called with. Only
# products are called with literal strides on purpose, so that their inner loops have few pointers to step.
NONE, ZERO, ONE, LANES, WHOLE = np.array((-1, 0, 1, WIDTH, CHUNK))

# Sizes of a problem, its tensors' addresses and strides (the inputs are strided, the results contiguous); cpu.py
# writes them.
NUM_TOKENS, NUM_HEADS, NUM_SLOTS, DIM, WRITE, READ, SECOND_ORDER, SEGMENT, WITH_STATE_GRADIENTS = np.arange(9)
QUERY, KEY, VALUE, TARGET, LOG_FORGET, STEP, OUTPUT, KEY_STATE, VALUE_STATE, KEY_FINAL, VALUE_FINAL = np.arange(11)
NUM_STRIDED = 11
# Beside the places of strided tensors, those of rows in results: in steps of one row's numbers.
TOKEN_RESULTS, STATE_RESULTS = np.arange(11, 13)
NUM_PLACES = 13 * WIDTH
# In the forward pass OUTPUT, KEY_FINAL and VALUE_FINAL are results; in the backward pass they hold gradients, and these
# follow: of the six inputs and the two states.
GRADIENTS = np.int64(11)
KEY_STATE_GRADIENT, VALUE_STATE_GRADIENT = np.arange(17, 19)

_ACTIVATIONS = activations(over_rows, largest_over_rows)
write_gradient, write_gradient_backward = _ACTIVATIONS.write_gradient, _ACTIVATIONS.write_gradient_backward
read, read_backward = _ACTIVATIONS.read, _ACTIVATIONS.read_backward


def build(scalar, *, cache=True):
    """Compile both passes for ``numba.float32`` or ``numba.float64``, or find them in Numba's cache."""
    numbers, integers, matrix = types.Array(scalar, 1, "C"), types.Array(types.int64, 1, "C"), types.int64[:, ::1]
    signature = types.void(integers, integers, matrix, integers, scalar, numbers, types.int64, types.int64)
    options = {"cache": cache, "nogil": True, "error_model": "numpy"}
    return njit(signature, **options)(forward_rows), njit(signature, **options)(backward_rows)


class Pass(NamedTuple):
    """Where one of the two passes keeps what it computes of a chunk of n tokens.

    Key pass: w is the key and x the query. Value pass: w is the value and x, in the backward pass, the gradient of the
    output.
    """

    rows: int  # [2 n, dim]: every w, then every x
    start: int  # [n, slot]: every x times the memory before the chunk
    z: int  # [n, slot]; this and the next three lie side by side
    gate: int  # [n, slot]: sigmoid of z
    u: int  # [n, slot]
    written: int  # [n, slot]: -g u, what is written along w
    reads: int  # [n, slot]: x times the memory after the token's write
    gram: int  # [n, 2 n]: inner products of w with every row


class Layout(NamedTuple):
    """Where everything lies in scratch, and strides; all in numbers."""

    slots: int  # one vector over slots, its length filled up to a multiple of four
    dims: int  # one vector over features, likewise
    width: int  # from one slot of a memory to the next
    memory: int  # one memory
    kept: int  # how many numbers a replayed chunk keeps for its way back
    target: int  # [n, slot]
    forget: int  # [n]
    step: int  # [n]
    decay: int  # [n + 1]: products of forget gates from the chunk's start, the first one 1
    decays: int  # [n, n]: at [t, i], the product of forget gates after token i up to token t
    key: Pass
    value: Pass
    r: int  # [n, slot]
    read_gate: int  # [n, slot]
    read_scale: int  # [n]
    coefficients: int  # [2 n]
    start: int  # [n, slot]: every w times the memory before the chunk
    scaled: int  # [2 n, slot]
    products: int  # [n, 2 n]: inner products of what was written with r, or with every zbar and read gradient
    rows: int  # [2 n, dim]: results over features
    work: int  # [2, slot]
    pull: int  # [2 n, slot]: zbar, then the gradients of what was read
    gw_start: int  # [n, slot]: w times the gradient after the chunk
    gw: int  # [slot]
    target_gradient: int  # [n, slot]
    step_gradient: int  # [n]
    gs: int  # [n, dim]: what was written times the gradient after the chunk
    sz: int  # [2 n, dim]: pull times the memory before the chunk
    flows: int  # [n + 1, n + 1]
    states: int  # memories and their gradients


@register_jitable
def make_pass(at, kept, slots, dims):
    """Return where one pass keeps its data: from ``at`` on, but z to written from ``kept`` on."""
    n = CHUNK
    start = at + 2 * n * dims
    return Pass(
        rows=at,
        start=start,
        z=kept,
        gate=kept + n * slots,
        u=kept + 2 * n * slots,
        written=kept + 3 * n * slots,
        reads=start + n * slots,
        gram=start + 2 * n * slots,
    )


def make_layout(num_slots, dim, kept):
    """Return where everything lies for memories of this size; what is kept of a chunk at ``kept`` unless negative."""
    slots, dims = (num_slots + 3) // 4 * 4 * WIDTH, (dim + 3) // 4 * 4 * WIDTH
    # Two vectors more than there are features, lest all slots' data fall into the same few cache lines.
    width = dims + 2 * WIDTH
    n = CHUNK
    at = n * slots  # the target comes first
    forget, step, decay, decays = at, at + n * WIDTH, at + 2 * n * WIDTH, at + (3 * n + 1) * WIDTH
    at = decays + n * n * WIDTH
    size = 2 * n * dims + 2 * n * slots + 2 * n * n * WIDTH
    r = at + 2 * size + 8 * n * slots
    if kept < 0:
        kept = at + 2 * size
    key = make_pass(at, kept, slots, dims)
    value = make_pass(at + size, kept + 4 * n * slots, slots, dims)
    read_scale = r + 2 * n * slots
    start = read_scale + 3 * n * WIDTH
    scaled = start + n * slots
    products = scaled + 2 * n * slots
    rows = products + 2 * n * n * WIDTH
    work = rows + 2 * n * dims
    pull = work + 2 * slots
    gw_start = pull + 2 * n * slots
    gw = gw_start + n * slots
    step_gradient = gw + slots + n * slots
    gs = step_gradient + n * WIDTH
    flows = gs + 3 * n * dims
    return Layout(
        slots=slots,
        dims=dims,
        width=width,
        memory=slots // WIDTH * width,
        kept=8 * n * slots,
        target=0,
        forget=forget,
        step=step,
        decay=decay,
        decays=decays,
        key=key,
        value=value,
        r=r,
        read_gate=r + n * slots,
        read_scale=read_scale,
        coefficients=read_scale + n * WIDTH,
        start=start,
        scaled=scaled,
        products=products,
        rows=rows,
        work=work,
        pull=pull,
        gw_start=gw_start,
        gw=gw,
        target_gradient=gw + slots,
        step_gradient=step_gradient,
        gs=gs,
        sz=gs + n * dims,
        flows=flows,
        states=flows + (n + 1) * (n + 1) * WIDTH,
    )


def forward_scratch_size(num_slots: int, dim: int) -> int:
    """Return how many numbers a thread needs in the forward pass: its work and both memories of eight rows."""
    layout = make_layout(num_slots, dim, -1)
    return layout.states + 2 * layout.memory


def backward_scratch_size(num_slots: int, dim: int, num_tokens: int, segment: int) -> int:
    """Return how many numbers a thread needs in the backward pass.

    Beside its work both memories' gradients, the memories at the start of every segment, and of every chunk of one
    segment, which is so many chunks, the memories at its start and what is kept of it.
    """
    layout = make_layout(num_slots, dim, -1)
    num_segments = -(-num_chunks(num_tokens) // segment)
    return layout.states + 2 * layout.memory * (1 + num_segments + segment) + layout.kept * segment


def chunk_size(num_slots: int, dim: int) -> int:
    """Return how many numbers the backward pass holds per chunk of eight rows: both memories and what is kept."""
    layout = make_layout(num_slots, dim, -1)
    return 2 * layout.memory + layout.kept


def num_chunks(num_tokens: int) -> int:
    """Return how many chunks a sequence has."""
    return (num_tokens + CHUNK - 1) // CHUNK


_make_layout, _num_chunks = inline(make_layout), inline(num_chunks)


# Between tensors and scratch


@function
def find_rows(places, sizes, strides, first_row, last_row):
    """Look up where eight rows start in every strided tensor and, in steps of one row's numbers, in the results.

    Lanes without a row of their own repeat the last one.
    """
    num_heads = load_one(sizes, NUM_HEADS)
    for lane in range(WIDTH):
        row = min(first_row + lane, last_row - 1)
        batch, head = row // num_heads, row % num_heads
        for tensor in range(NUM_STRIDED):
            axis = 2 if tensor <= OUTPUT else 1  # of the heads
            start = batch * load_one(strides, 4 * tensor) + head * load_one(strides, 4 * tensor + axis)
            store_one(places, tensor * WIDTH + lane, start)
        store_one(places, TOKEN_RESULTS * WIDTH + lane, batch * load_one(sizes, NUM_TOKENS) * num_heads + head)
        store_one(places, STATE_RESULTS * WIDTH + lane, row)


@function
def load_rows(scratch, to, address, places, tensor, shift, count):
    """Copy ``count`` neighbouring numbers of each of eight rows, ``shift`` after where the row starts."""
    source, at = pointer_to(scratch, address), tensor * WIDTH
    whole = count // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        start = shift + i
        columns = transpose(
            load(source, load_one(places, at) + start),
            load(source, load_one(places, at + 1) + start),
            load(source, load_one(places, at + 2) + start),
            load(source, load_one(places, at + 3) + start),
            load(source, load_one(places, at + 4) + start),
            load(source, load_one(places, at + 5) + start),
            load(source, load_one(places, at + 6) + start),
            load(source, load_one(places, at + 7) + start),
        )
        j = to + i * WIDTH
        store(scratch, j, columns[0])
        store(scratch, j + WIDTH, columns[1])
        store(scratch, j + 2 * WIDTH, columns[2])
        store(scratch, j + 3 * WIDTH, columns[3])
        store(scratch, j + 4 * WIDTH, columns[4])
        store(scratch, j + 5 * WIDTH, columns[5])
        store(scratch, j + 6 * WIDTH, columns[6])
        store(scratch, j + 7 * WIDTH, columns[7])
    for i in range(whole, count):
        for lane in range(WIDTH):
            number = load_one(source, load_one(places, at + lane) + shift + i)
            store_one(scratch, to + i * WIDTH + lane, number)


@function
def save_rows(scratch, source, address, places, table, step, shift, count, num_rows):
    """Copy ``count`` numbers of each of ``num_rows`` rows to a contiguous tensor, in which one row takes ``step``."""
    destination, at = pointer_to(scratch, address), table * WIDTH
    whole = count // WIDTH * WIDTH if num_rows == WIDTH else 0
    for i in range(0, whole, WIDTH):
        j = source + i * WIDTH
        columns = transpose(
            load(scratch, j),
            load(scratch, j + WIDTH),
            load(scratch, j + 2 * WIDTH),
            load(scratch, j + 3 * WIDTH),
            load(scratch, j + 4 * WIDTH),
            load(scratch, j + 5 * WIDTH),
            load(scratch, j + 6 * WIDTH),
            load(scratch, j + 7 * WIDTH),
        )
        start = shift + i
        store(destination, load_one(places, at) * step + start, columns[0])
        store(destination, load_one(places, at + 1) * step + start, columns[1])
        store(destination, load_one(places, at + 2) * step + start, columns[2])
        store(destination, load_one(places, at + 3) * step + start, columns[3])
        store(destination, load_one(places, at + 4) * step + start, columns[4])
        store(destination, load_one(places, at + 5) * step + start, columns[5])
        store(destination, load_one(places, at + 6) * step + start, columns[6])
        store(destination, load_one(places, at + 7) * step + start, columns[7])
    for lane in range(num_rows):
        start = load_one(places, at + lane) * step + shift
        for i in range(whole, count):
            store_one(destination, start + i, load_one(scratch, source + i * WIDTH + lane))


@function
def load_memory(scratch, to, addresses, places, strides, tensor, num_slots, dim, width):
    """Copy eight rows' memories, or gradients of them; return whether there is any, which one zero expanded is not."""
    address = load_one(addresses, tensor)
    slot_stride, dim_stride = load_one(strides, 4 * tensor + 2), load_one(strides, 4 * tensor + 3)
    is_one_number = slot_stride == 0 and dim_stride == 0
    for axis in range(2):
        is_one_number = is_one_number and load_one(strides, 4 * tensor + axis) == 0
    if is_one_number and load_one(pointer_to(scratch, address), load_one(places, tensor * WIDTH)) == 0:
        return False
    for m in range(num_slots):
        if dim_stride == 1:
            load_rows(scratch, to + m * width, address, places, tensor, m * slot_stride, dim)
        else:
            for d in range(dim):
                shift = m * slot_stride + d * dim_stride
                load_rows(scratch, to + m * width + d * WIDTH, address, places, tensor, shift, ONE)
    return True


@function
def save_memory(scratch, source, addresses, places, tensor, num_slots, dim, width, num_rows):
    for m in range(num_slots):
        save_rows(
            scratch,
            source + m * width,
            load_one(addresses, tensor),
            places,
            STATE_RESULTS,
            num_slots * dim,
            m * dim,
            dim,
            num_rows,
        )


@function
def load_chunk(scratch, layout, addresses, places, strides, sizes, first, n, with_reads):
    """Copy a chunk's tokens, ``with_reads`` also what reads multiply by, and form the products of forget gates.

    The value pass has reads of its own in the backward pass only.
    """
    num_slots, dim, dims = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.dims
    key_rows, value_rows = layout.key.rows, layout.value.rows
    for t in range(n):
        time = first + t
        load_token(scratch, key_rows + t * dims, addresses, places, strides, KEY, time, dim)
        load_token(scratch, value_rows + t * dims, addresses, places, strides, VALUE, time, dim)
        if with_reads:
            load_token(scratch, key_rows + (n + t) * dims, addresses, places, strides, QUERY, time, dim)
        load_token(scratch, layout.target + t * layout.slots, addresses, places, strides, TARGET, time, num_slots)
        load_token(scratch, layout.forget + t * WIDTH, addresses, places, strides, LOG_FORGET, time, ONE)
        load_token(scratch, layout.step + t * WIDTH, addresses, places, strides, STEP, time, ONE)
    decay = zero(scratch) + 1.0
    store(scratch, layout.decay, decay)
    for t in range(n):
        forget = exponential(load(scratch, layout.forget + t * WIDTH))
        decay = decay * forget
        store(scratch, layout.decay + (t + 1) * WIDTH, decay)
        now = layout.decays + t * CHUNK * WIDTH
        for i in range(t):
            store(scratch, now + i * WIDTH, load(scratch, now - CHUNK * WIDTH + i * WIDTH) * forget)
        store(scratch, now + t * WIDTH, zero(scratch) + 1.0)


@inline
def load_token(scratch, to, addresses, places, strides, tensor, time, count):
    address, stride = load_one(addresses, tensor), load_one(strides, 4 * tensor + 1)
    load_rows(scratch, to, address, places, tensor, time * stride, count)
    if count > 1:
        prefetch_rows(scratch, address, places, tensor, (time + CHUNK) * stride, count)


@inline
def prefetch_rows(scratch, address, places, tensor, shift, count):
    """Ask for the same token of the next chunk: a row's tokens lie a whole row of heads apart."""
    source, at = pointer_to(scratch, address), tensor * WIDTH
    for lane in range(WIDTH):
        start = load_one(places, at + lane) + shift
        for i in range(0, count, 2 * WIDTH):
            prefetch(source, start + i)


# Products


@function
def product(scratch, out, out_i, out_j, num_i, num_j, a, a_i, a_k, b, b_j, b_k, count, initial, factor):
    """Compute ``out[i, j] = factor initial[i, j] + sum over k of a[i, k] b[j, k]``, lane by lane.

    ``initial`` is laid out like ``out``; if negative, there is none. Two values of i and four of j are taken at a time,
    enough sums to hide the latency of each; where they are no multiples, what follows is read and written as well.
    """
    for j in range(0, num_j, 4):
        for i in range(0, num_i, 2):
            p, q = a + i * a_i, b + j * b_j
            x_0 = x_1 = x_2 = x_3 = y_0 = y_1 = y_2 = y_3 = factor * 0.0
            at = out + i * out_i + j * out_j
            if initial >= 0:
                start = initial + i * out_i + j * out_j
                x_0 = load(scratch, start) * factor
                x_1 = load(scratch, start + out_j) * factor
                x_2 = load(scratch, start + 2 * out_j) * factor
                x_3 = load(scratch, start + 3 * out_j) * factor
                start += out_i
                y_0 = load(scratch, start) * factor
                y_1 = load(scratch, start + out_j) * factor
                y_2 = load(scratch, start + 2 * out_j) * factor
                y_3 = load(scratch, start + 3 * out_j) * factor
            for _ in range(count):
                left, lower = load(scratch, p), load(scratch, p + a_i)
                right = load(scratch, q)
                x_0, y_0 = multiply_add(left, right, x_0), multiply_add(lower, right, y_0)
                right = load(scratch, q + b_j)
                x_1, y_1 = multiply_add(left, right, x_1), multiply_add(lower, right, y_1)
                right = load(scratch, q + 2 * b_j)
                x_2, y_2 = multiply_add(left, right, x_2), multiply_add(lower, right, y_2)
                right = load(scratch, q + 3 * b_j)
                x_3, y_3 = multiply_add(left, right, x_3), multiply_add(lower, right, y_3)
                p += a_k
                q += b_k
            store(scratch, at, x_0)
            store(scratch, at + out_j, x_1)
            store(scratch, at + 2 * out_j, x_2)
            store(scratch, at + 3 * out_j, x_3)
            at += out_i
            store(scratch, at, y_0)
            store(scratch, at + out_j, y_1)
            store(scratch, at + 2 * out_j, y_2)
            store(scratch, at + 3 * out_j, y_3)


@function
def combine(scratch, out, first, factor, coefficients, step, vectors, stride, count, size):
    """Compute ``out = factor first + sum over i of coefficients[i] vectors[i]``, four numbers at a time."""
    for j in range(0, size, 4 * WIDTH):
        a, b = load(scratch, first + j) * factor, load(scratch, first + j + WIDTH) * factor
        c, d = load(scratch, first + j + 2 * WIDTH) * factor, load(scratch, first + j + 3 * WIDTH) * factor
        for i in range(count):
            x, v = load(scratch, coefficients + i * step), vectors + i * stride + j
            a, b = multiply_add(x, load(scratch, v), a), multiply_add(x, load(scratch, v + WIDTH), b)
            c = multiply_add(x, load(scratch, v + 2 * WIDTH), c)
            d = multiply_add(x, load(scratch, v + 3 * WIDTH), d)
        store(scratch, out + j, a)
        store(scratch, out + j + WIDTH, b)
        store(scratch, out + j + 2 * WIDTH, c)
        store(scratch, out + j + 3 * WIDTH, d)


@function
def inner_product(scratch, a, b, size):
    """Return the sum of the products of two stretches."""
    total = zero(scratch)
    for j in range(0, size, WIDTH):
        total = multiply_add(load(scratch, a + j), load(scratch, b + j), total)
    return total


@inline
def multiply(scratch, out, rows, num_rows, memory, layout, num_slots, dim):
    """Compute ``S w`` of many vectors w over features."""
    product(
        scratch,
        out,
        layout.slots,
        WIDTH,
        num_rows,
        num_slots,
        rows,
        layout.dims,
        WIDTH,
        memory,
        layout.width,
        WIDTH,
        dim,
        NONE,
        zero(scratch),
    )


@inline
def multiply_transposed(scratch, out, vectors, num_vectors, memory, layout, num_slots, dim):
    """Compute ``S^T r`` of many vectors r over slots."""
    product(
        scratch,
        out,
        layout.dims,
        WIDTH,
        num_vectors,
        dim,
        vectors,
        layout.slots,
        WIDTH,
        memory,
        WIDTH,
        layout.width,
        num_slots,
        NONE,
        zero(scratch),
    )


@inline
def inner_products(scratch, out, a, num_a, b, num_b, stride, count):
    """Compute all inner products of two lists of vectors, into rows of ``2 CHUNK``."""
    product(
        scratch,
        out,
        2 * CHUNK * WIDTH,
        WIDTH,
        num_a,
        num_b,
        a,
        stride,
        WIDTH,
        b,
        stride,
        WIDTH,
        count,
        NONE,
        zero(scratch),
    )


@inline
def add_outer_products(scratch, to, memory, factor, vectors, rows, count, layout, num_slots, dim):
    """Compute ``factor S + sum of r w^T``; a negative ``memory`` stands for zero."""
    product(
        scratch,
        to,
        layout.width,
        WIDTH,
        num_slots,
        dim,
        vectors,
        WIDTH,
        layout.slots,
        rows,
        WIDTH,
        layout.dims,
        count,
        memory,
        factor,
    )


@inline
def fill_zero(scratch, to, size):
    for j in range(0, size, WIDTH):
        store(scratch, to + j, zero(scratch))


# The forward pass


@inline
def decay_between(scratch, layout, i, t):
    """Return the product of forget gates after token i up to token t, both counted in the chunk."""
    return load(scratch, layout.decays + (t * CHUNK + i) * WIDTH)


@inline
def inner(scratch, matrix, i, j):
    """Return an entry of a matrix with ``2 CHUNK`` columns."""
    return load(scratch, matrix + (i * 2 * CHUNK + j) * WIDTH)


@function
def run_writes(scratch, layout, part, memory, n, sizes, epsilon):
    """Compute z and u of every token of a chunk, one after the other. A negative ``memory`` stands for zero."""
    num_slots, dim, slots = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.slots
    if memory >= 0:
        multiply(scratch, layout.start, part.rows, n, memory, layout, num_slots, dim)
    else:
        fill_zero(scratch, layout.start, n * slots)
    inner_products(scratch, part.gram, part.rows, n, part.rows, n, layout.dims, dim)
    size, per_slot, coefficients = num_slots * WIDTH, 1.0 / num_slots, layout.coefficients
    for t in range(n):
        z, u = part.z + t * slots, part.u + t * slots
        for i in range(t):
            x = decay_between(scratch, layout, i, t - 1) * inner(scratch, part.gram, i, t)
            store(scratch, coefficients + i * WIDTH, x)
        decay = load(scratch, layout.decay + t * WIDTH)
        combine(scratch, z, layout.start + t * slots, decay, coefficients, LANES, part.written, slots, t, slots)
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
def run_reads(scratch, layout, part, memory, n, sizes):
    """Compute the products of every x with the memory after its token's write; ``run_writes`` has been."""
    num_slots, dim, slots = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.slots
    reads = part.rows + n * layout.dims
    if memory >= 0:
        multiply(scratch, part.start, reads, n, memory, layout, num_slots, dim)
    else:
        fill_zero(scratch, part.start, n * slots)
    inner_products(scratch, part.gram + n * WIDTH, part.rows, n, reads, n, layout.dims, dim)
    for t in range(n):
        for i in range(t + 1):
            x = decay_between(scratch, layout, i, t) * inner(scratch, part.gram, i, n + t)
            store(scratch, layout.coefficients + i * WIDTH, x)
        decay, at = load(scratch, layout.decay + (t + 1) * WIDTH), t * slots
        to, start = part.reads + at, part.start + at
        combine(scratch, to, start, decay, layout.coefficients, LANES, part.written, slots, t + 1, slots)


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
    inner_products(scratch, layout.products, part.written, n, layout.r, n, layout.slots, num_slots)
    for t in range(n):
        for i in range(t + 1):
            x = decay_between(scratch, layout, i, t) * inner(scratch, layout.products, i, t)
            store(scratch, layout.coefficients + i * WIDTH, x)
        decay, row = load(scratch, layout.decay + (t + 1) * WIDTH), layout.rows + t * layout.dims
        combine(scratch, row, row, decay, layout.coefficients, LANES, part.rows, layout.dims, t + 1, layout.dims)


def forward_rows(sizes, addresses, strides, places, epsilon, scratch, first_row, last_row):
    sizes, addresses, strides = pointer(sizes), pointer(addresses), pointer(strides)
    places, scratch = pointer(places), pointer(scratch)
    num_tokens, num_slots, dim = load_one(sizes, NUM_TOKENS), load_one(sizes, NUM_SLOTS), load_one(sizes, DIM)
    num_heads = load_one(sizes, NUM_HEADS)
    layout = _make_layout(num_slots, dim, NONE)
    key_memory, value_memory = layout.states, layout.states + layout.memory
    for row in range(first_row, last_row, WIDTH):
        num_rows = min(WIDTH, last_row - row)
        find_rows(places, sizes, strides, row, last_row)
        key = value = NONE
        if load_memory(scratch, key_memory, addresses, places, strides, KEY_STATE, num_slots, dim, layout.width):
            key = key_memory
        if load_memory(scratch, value_memory, addresses, places, strides, VALUE_STATE, num_slots, dim, layout.width):
            value = value_memory
        for first in range(0, num_tokens, CHUNK):
            n = min(CHUNK, num_tokens - first)
            load_chunk(scratch, layout, addresses, places, strides, sizes, first, n, ONE)
            run_writes(scratch, layout, layout.key, key, n, sizes, epsilon)
            run_reads(scratch, layout, layout.key, key, n, sizes)
            read_chunk(scratch, layout, n, sizes)
            run_writes(scratch, layout, layout.value, value, n, sizes, epsilon)
            output_chunk(scratch, layout, value, n, sizes)
            for t in range(n):
                source, shift = layout.rows + t * layout.dims, (first + t) * num_heads * dim
                address = load_one(addresses, OUTPUT)
                save_rows(scratch, source, address, places, TOKEN_RESULTS, dim, shift, dim, num_rows)
            write_chunk(scratch, layout, layout.key, key, key_memory, n, sizes)
            write_chunk(scratch, layout, layout.value, value, value_memory, n, sizes)
            key, value = key_memory, value_memory
        save_memory(scratch, key, addresses, places, KEY_FINAL, num_slots, dim, layout.width, num_rows)
        save_memory(scratch, value, addresses, places, VALUE_FINAL, num_slots, dim, layout.width, num_rows)


# The backward pass


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

    inner_products(scratch, layout.products, part.written, n, layout.pull, 2 * n, slots, num_slots)
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
    row_stride, size = 2 * CHUNK * LANES, dim * WIDTH
    for t in range(n):
        row, column = layout.rows + t * dims, layout.products + t * WIDTH
        own = layout.products + t * row_stride
        store(scratch, layout.coefficients, decay_between(scratch, layout, t, last))
        decay = load(scratch, layout.decay + t * WIDTH)
        through = inner_product(scratch, part.rows + t * dims, layout.sz + t * dims, size)
        add_flow(scratch, layout, ZERO, t, decay * through)
        combine(
            scratch, row, layout.sz + t * dims, decay, layout.coefficients, LANES, layout.gs + t * dims, ZERO, ONE, size
        )
        one = zero(scratch) + 1.0
        combine(scratch, row, row, one, column, row_stride, part.rows, dims, t, size)
        later = part.rows + (t + 1) * dims
        combine(scratch, row, row, one, own + (t + 1) * WIDTH, LANES, later, dims, last - t, size)
        reads = part.rows + (n + t) * dims
        combine(scratch, row, row, one, own + (n + t) * WIDTH, LANES, reads, dims, n - t, size)
        if with_read_gradient:
            decay = load(scratch, layout.decay + (t + 1) * WIDTH)
            to, start, column = row + n * dims, layout.sz + (n + t) * dims, column + n * WIDTH
            combine(scratch, to, start, decay, column, row_stride, part.rows, dims, t + 1, size)


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
    for j in range(t, n):
        x = decay_between(scratch, layout, t, j) * inner(scratch, part.gram, t, n + j)
        store(scratch, coefficients + (j - t) * WIDTH, x)
    decay = decay_between(scratch, layout, t, n - 1)
    combine(scratch, gw, gw_start, decay, coefficients, LANES, layout.pull + (n + t) * slots, slots, n - t, slots)
    for j in range(t + 1, n):
        x = decay_between(scratch, layout, t, j - 1) * inner(scratch, part.gram, t, j)
        store(scratch, coefficients + (j - t - 1) * WIDTH, x)
    one = zero(scratch) + 1.0
    combine(scratch, gw, gw, one, coefficients, LANES, zbar + slots, slots, n - 1 - t, slots)

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
        through = inner_product(scratch, read_gradient, part.start + t * slots, size)
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
def save_tokens(scratch, source, stride, addresses, places, sizes, tensor, first, n, count, num_rows):
    """Copy a chunk's gradients of one input to where they belong."""
    for t in range(n):
        shift = (first + t) * load_one(sizes, NUM_HEADS) * count
        address = load_one(addresses, GRADIENTS + tensor)
        save_rows(scratch, source + t * stride, address, places, TOKEN_RESULTS, count, shift, count, num_rows)


@function
def backward_chunk(
    scratch,
    layout,
    addresses,
    places,
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
    load_chunk(scratch, layout, addresses, places, strides, sizes, first, n, ONE)
    for t in range(n):
        to = layout.value.rows + (n + t) * dims
        load_token(scratch, to, addresses, places, strides, OUTPUT, first + t, dim)
    if is_kept:
        rows, value_rows = layout.key.rows, layout.value.rows
        inner_products(scratch, layout.key.gram, rows, n, rows, n, dims, dim)
        inner_products(scratch, layout.value.gram, value_rows, n, value_rows, n, dims, dim)
    else:
        run_writes(scratch, layout, layout.key, key, n, sizes, epsilon)
        run_writes(scratch, layout, layout.value, value, n, sizes, epsilon)
    run_reads(scratch, layout, layout.key, key, n, sizes)
    read_chunk(scratch, layout, n, sizes)
    run_reads(scratch, layout, layout.value, value, n, sizes)
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


@function
def replay(scratch, layout, addresses, places, strides, sizes, epsilon, key, value, key_to, value_to, first):
    """Run the writes of one whole chunk from one pair of memories to another; negative ones stand for zero.

    What the way back needs of them stays where ``layout`` keeps it.
    """
    load_chunk(scratch, layout, addresses, places, strides, sizes, first, WHOLE, ZERO)
    run_writes(scratch, layout, layout.key, key, WHOLE, sizes, epsilon)
    write_chunk(scratch, layout, layout.key, key, key_to, WHOLE, sizes)
    run_writes(scratch, layout, layout.value, value, WHOLE, sizes, epsilon)
    write_chunk(scratch, layout, layout.value, value, value_to, WHOLE, sizes)


def backward_rows(sizes, addresses, strides, places, epsilon, scratch, first_row, last_row):
    sizes, addresses, strides = pointer(sizes), pointer(addresses), pointer(strides)
    places, scratch = pointer(places), pointer(scratch)
    num_tokens, num_slots, dim = load_one(sizes, NUM_TOKENS), load_one(sizes, NUM_SLOTS), load_one(sizes, DIM)
    segment, wants_states = load_one(sizes, SEGMENT), load_one(sizes, WITH_STATE_GRADIENTS) != 0
    layout = _make_layout(num_slots, dim, NONE)
    width, pair = layout.width, 2 * layout.memory
    gradients, checkpoints = layout.states, layout.states + pair
    chunks = _num_chunks(num_tokens)
    num_segments = (chunks + segment - 1) // segment
    kept = checkpoints + pair * (num_segments + segment)
    for row in range(first_row, last_row, WIDTH):
        num_rows = min(WIDTH, last_row - row)
        find_rows(places, sizes, strides, row, last_row)
        first_value = checkpoints + layout.memory
        has_key = load_memory(scratch, checkpoints, addresses, places, strides, KEY_STATE, num_slots, dim, width)
        has_value = load_memory(scratch, first_value, addresses, places, strides, VALUE_STATE, num_slots, dim, width)
        has_key_gradient = load_memory(scratch, gradients, addresses, places, strides, KEY_FINAL, num_slots, dim, width)
        has_value_gradient = load_memory(
            scratch, gradients + layout.memory, addresses, places, strides, VALUE_FINAL, num_slots, dim, width
        )
        # Slot s holds the memories before segment s, or chunk s of the last segment; the last segment comes first.
        for c in range((num_segments - 1) * segment):
            source = checkpoints + (c // segment + (1 if c % segment > 0 else 0)) * pair
            to = checkpoints + (c // segment + 1) * pair
            key = source if c > 0 or has_key else NONE
            value = source + layout.memory if c > 0 or has_value else NONE
            to_value = to + layout.memory
            replay(scratch, layout, addresses, places, strides, sizes, epsilon, key, value, to, to_value, c * CHUNK)
        for s in range(num_segments - 1, -1, -1):
            base, begin = checkpoints + s * pair, s * segment
            count = min(segment, chunks - begin)
            for c in range(count - 1):
                source = base + c * pair
                to = source + pair
                key = source if begin + c > 0 or has_key else NONE
                value = source + layout.memory if begin + c > 0 or has_value else NONE
                at, to_value = (begin + c) * CHUNK, to + layout.memory
                own = _make_layout(num_slots, dim, kept + c * layout.kept)
                replay(scratch, own, addresses, places, strides, sizes, epsilon, key, value, to, to_value, at)
            for c in range(count - 1, -1, -1):
                source, first = base + c * pair, (begin + c) * CHUNK
                backward_chunk(
                    scratch,
                    _make_layout(num_slots, dim, kept + c * layout.kept),
                    addresses,
                    places,
                    strides,
                    sizes,
                    epsilon,
                    source if begin + c > 0 or has_key else NONE,
                    source + layout.memory if begin + c > 0 or has_value else NONE,
                    gradients,
                    has_key_gradient,
                    has_value_gradient,
                    first,
                    min(CHUNK, num_tokens - first),
                    c < count - 1,
                    wants_states or begin + c > 0,
                    num_rows,
                )
                has_key_gradient = has_value_gradient = True
        if wants_states:
            save_memory(scratch, gradients, addresses, places, KEY_STATE_GRADIENT, num_slots, dim, width, num_rows)
            value_gradients = gradients + layout.memory
            tensor = VALUE_STATE_GRADIENT
            save_memory(scratch, value_gradients, addresses, places, tensor, num_slots, dim, width, num_rows)
