"""The compiled recurrence over sequences: what runs over rows and chunks.

Eight rows are worked on side by side: every number here is a vector with one lane per row, so a sum over slots or
features is a sum of vectors, and no size needs to be a multiple of anything. Tokens are taken ``CHUNK`` at a time.
What they share with the memories at the chunk's start is computed by products of matrices; what they do to each
other, token by token, from products between tokens. The result is the exact recurrence.
"""

from __future__ import annotations

from numba import njit, types

from trellis_ts.kernels.memory.cpu_chunk_backward import backward_chunk
from trellis_ts.kernels.memory.cpu_chunk_forward import output_chunk, read_chunk, run_reads, run_writes, write_chunk
from trellis_ts.kernels.memory.cpu_functions import function, inline
from trellis_ts.kernels.memory.cpu_layout import (
    CHUNK,
    DIM,
    KEY_FINAL,
    KEY_STATE,
    KEY_STATE_GRADIENT,
    NONE,
    NUM_HEADS,
    NUM_SLOTS,
    NUM_TOKENS,
    ONE,
    OUTPUT,
    SEGMENT,
    TOKEN_RESULTS,
    VALUE_FINAL,
    VALUE_STATE,
    VALUE_STATE_GRADIENT,
    WHOLE,
    WITH_STATE_GRADIENTS,
    ZERO,
    make_layout,
    num_chunks,
)
from trellis_ts.kernels.memory.cpu_transfer import find_rows, load_chunk, load_memory, save_memory, save_rows
from trellis_ts.kernels.memory.cpu_vectors import WIDTH, load_one, pointer

# Numba finds its cache by this file's text alone. So that a change in the files it imports counts as well, here is a
# digest of theirs; a test says what it has to be.
IMPORTED = "a26b303c5945ef47"

_make_layout, _num_chunks = inline(make_layout), inline(num_chunks)


def build_forward(scalar, *, cache=True):
    """Compile for ``numba.float32`` or ``numba.float64``, or find it in Numba's cache."""
    return _build(forward_rows, scalar, cache)


def build_backward(scalar, *, cache=True):
    """As ``build_forward``."""
    return _build(backward_rows, scalar, cache)


def _build(kernel, scalar, cache):
    numbers, integers, matrix = types.Array(scalar, 1, "C"), types.Array(types.int64, 1, "C"), types.int64[:, ::1]
    signature = types.void(integers, integers, matrix, integers, scalar, numbers, types.int64, types.int64)
    return njit(signature, cache=cache, nogil=True, error_model="numpy")(kernel)


def forward_rows(sizes, addresses, strides, places, epsilon, scratch, first_row, last_row):
    """Compute outputs and final states of some rows."""
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
    """Compute all gradients of some rows."""
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
