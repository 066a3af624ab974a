"""Between tensors and scratch: eight rows of a tensor become vectors with one lane per row, and back."""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_activations import exponential
from trellis_ts.kernels.memory.cpu_functions import function, inline
from trellis_ts.kernels.memory.cpu_layout import (
    CHUNK,
    DIM,
    GRADIENTS,
    KEY,
    LOG_FORGET,
    NUM_HEADS,
    NUM_SLOTS,
    NUM_STRIDED,
    NUM_TOKENS,
    ONE,
    OUTPUT,
    QUERY,
    STATE_RESULTS,
    STEP,
    TARGET,
    TOKEN_RESULTS,
    VALUE,
)
from trellis_ts.kernels.memory.cpu_vectors import (
    WIDTH,
    load,
    load_each,
    load_one,
    pointer_to,
    prefetch,
    store,
    store_one,
    transpose,
    zero,
)


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
def load_chunk(scratch, layout, addresses, places, next_places, strides, sizes, first, n, with_reads, ahead):
    """Copy a chunk's tokens, ``with_reads`` also what reads multiply by, and form the products of forget gates.

    The value pass has reads of its own in the backward pass only. The same tokens are asked for ``ahead`` tokens from
    here, where the walk over chunks will come next, or at the start of the next rows where it ends.
    """
    num_slots, dim, dims = load_one(sizes, NUM_SLOTS), load_one(sizes, DIM), layout.dims
    key_rows, value_rows = layout.key.rows, layout.value.rows
    last = load_one(sizes, NUM_TOKENS) - 1
    later_places, begin = next_places, first * 0
    if first + ahead >= 0 and first + ahead <= last:
        later_places, begin = places, first + ahead
    for t in range(n):
        time, later = first + t, min(begin + t, last)
        load_token(scratch, key_rows + t * dims, addresses, places, strides, KEY, time, later_places, later, dim)
        load_token(scratch, value_rows + t * dims, addresses, places, strides, VALUE, time, later_places, later, dim)
        if with_reads:
            to = key_rows + (n + t) * dims
            load_token(scratch, to, addresses, places, strides, QUERY, time, later_places, later, dim)
        to = layout.target + t * layout.slots
        load_token(scratch, to, addresses, places, strides, TARGET, time, later_places, later, num_slots)
        load_gates(scratch, layout.forget + t * WIDTH, addresses, places, strides, LOG_FORGET, time)
        load_gates(scratch, layout.step + t * WIDTH, addresses, places, strides, STEP, time)
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
def load_token(scratch, to, addresses, places, strides, tensor, time, later_places, later, count):
    address, stride = load_one(addresses, tensor), load_one(strides, 4 * tensor + 1)
    load_rows(scratch, to, address, places, tensor, time * stride, count)
    prefetch_rows(scratch, address, later_places, tensor, later * stride, count)


@inline
def load_gates(scratch, to, addresses, places, strides, tensor, time):
    source, at = pointer_to(scratch, load_one(addresses, tensor)), tensor * WIDTH
    shift = time * load_one(strides, 4 * tensor + 1)
    numbers = load_each(
        source,
        load_one(places, at) + shift,
        load_one(places, at + 1) + shift,
        load_one(places, at + 2) + shift,
        load_one(places, at + 3) + shift,
        load_one(places, at + 4) + shift,
        load_one(places, at + 5) + shift,
        load_one(places, at + 6) + shift,
        load_one(places, at + 7) + shift,
    )
    store(scratch, to, numbers)


@inline
def prefetch_rows(scratch, address, places, tensor, shift, count):
    """Ask for a token of another chunk: a row's tokens lie a whole row of heads apart."""
    source, at = pointer_to(scratch, address), tensor * WIDTH
    for lane in range(WIDTH):
        start = load_one(places, at + lane) + shift
        for i in range(0, count, 2 * WIDTH):
            prefetch(source, start + i)


@function
def save_tokens(scratch, source, stride, addresses, places, sizes, tensor, first, n, count, num_rows):
    """Copy a chunk's gradients of one input to where they belong."""
    for t in range(n):
        shift = (first + t) * load_one(sizes, NUM_HEADS) * count
        address = load_one(addresses, GRADIENTS + tensor)
        save_rows(scratch, source + t * stride, address, places, TOKEN_RESULTS, count, shift, count, num_rows)
