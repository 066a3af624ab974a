"""The compiled recurrence over sequences: what runs over rows and chunks.

Eight rows are worked on side by side: every number here is a vector with one lane per row, so a sum over slots or
features is a sum of vectors, and no size needs to be a multiple of anything. Tokens are taken ``CHUNK`` at a time.
What they share with the memories at the chunk's start is computed by products of matrices; what they do to each
other, token by token, from products between tokens. The result is the exact recurrence.
"""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_chunk_backward import backward_chunk
from trellis_ts.kernels.memory.cpu_chunk_forward import output_chunk, read_chunk, run_reads, run_writes, write_chunk
from trellis_ts.kernels.memory.cpu_functions import build_entry, function, inline
from trellis_ts.kernels.memory.cpu_layout import (
    ADDRESSES,
    BLOCK,
    CHUNK,
    DIM,
    EPSILON,
    KEY_FINAL,
    KEY_STATE,
    KEY_STATE_GRADIENT,
    NEXT_ROW,
    NEXT_THREAD,
    NONE,
    NUM_HEADS,
    NUM_PLACES,
    NUM_ROWS,
    NUM_SLOTS,
    NUM_TOKENS,
    ONE,
    OUTPUT,
    PLACES_BYTES,
    SCRATCH,
    SCRATCH_BYTES,
    SEGMENT,
    STRIDES,
    TOKEN_RESULTS,
    VALUE_FINAL,
    VALUE_STATE,
    VALUE_STATE_GRADIENT,
    WHOLE,
    WITH_STATES,
    ZERO,
    make_layout,
    num_chunks,
)
from trellis_ts.kernels.memory.cpu_transfer import find_rows, load_chunk, load_memory, save_memory, save_rows
from trellis_ts.kernels.memory.cpu_vectors import WIDTH, after, as_integers, load_double, load_one, pointer_to, take

# Numba finds its cache by this file's text alone. So that a change in the files it imports counts as well, here is a
# digest of theirs; a test says what it has to be.
IMPORTED = "7360f927338bcce9"

_make_layout, _num_chunks = inline(make_layout), inline(num_chunks)


def build_forward(scalar, *, cache=True):
    """Compile for ``numba.float32`` or ``numba.float64``, or find it in Numba's cache."""
    return build_entry(forward, scalar, cache)


def build_backward(scalar, *, cache=True):
    """As ``build_forward``."""
    return build_entry(backward, scalar, cache)


def forward(data):
    """Compute outputs and final states; ``data`` is the address of a problem, whose type says that of the numbers.

    As many threads as there is scratch for may run this at once on the same problem.
    """
    problem = as_integers(data)
    places, scratch = own_scratch(data, problem)
    first, num_rows, block = take_rows(problem), load_one(problem, NUM_ROWS), load_one(problem, BLOCK)
    while first < num_rows:
        forward_rows(problem, places, scratch, first, min(first + block, num_rows))
        first = take_rows(problem)


def backward(data):
    """Compute all gradients, as ``forward`` does outputs."""
    problem = as_integers(data)
    places, scratch = own_scratch(data, problem)
    first, num_rows, block = take_rows(problem), load_one(problem, NUM_ROWS), load_one(problem, BLOCK)
    while first < num_rows:
        backward_rows(problem, places, scratch, first, min(first + block, num_rows))
        first = take_rows(problem)


@inline
def own_scratch(data, problem):
    """Return where a thread looks up the places of rows, and its scratch."""
    shift = take(problem, NEXT_THREAD, 1) * load_one(problem, SCRATCH_BYTES)
    address = load_one(problem, SCRATCH) + shift
    return as_integers(pointer_to(data, address)), pointer_to(data, address + PLACES_BYTES)


@inline
def take_rows(problem):
    return take(problem, NEXT_ROW, load_one(problem, BLOCK))


@function
def forward_rows(problem, places, scratch, first_row, last_row):
    sizes, addresses, strides = problem, after(problem, ADDRESSES), after(problem, STRIDES)
    num_tokens, num_slots, dim = load_one(sizes, NUM_TOKENS), load_one(sizes, NUM_SLOTS), load_one(sizes, DIM)
    num_heads, wants_states = load_one(sizes, NUM_HEADS), load_one(sizes, WITH_STATES) != 0
    epsilon = load_double(sizes, EPSILON)
    layout = _make_layout(num_slots, dim, NONE)
    key_memory, value_memory = layout.states, layout.states + layout.memory
    next_places = after(places, NUM_PLACES)
    find_rows(next_places, sizes, strides, first_row, last_row)
    for row in range(first_row, last_row, WIDTH):
        num_rows = min(WIDTH, last_row - row)
        places, next_places = next_places, places
        find_rows(next_places, sizes, strides, row + WIDTH, last_row)
        key = value = NONE
        if load_memory(scratch, key_memory, addresses, places, strides, KEY_STATE, num_slots, dim, layout.width):
            key = key_memory
        if load_memory(scratch, value_memory, addresses, places, strides, VALUE_STATE, num_slots, dim, layout.width):
            value = value_memory
        for first in range(0, num_tokens, CHUNK):
            n = min(CHUNK, num_tokens - first)
            load_chunk(scratch, layout, addresses, places, next_places, strides, sizes, first, n, ONE, WHOLE)
            run_writes(scratch, layout, layout.key, key, n, 2 * n, sizes, epsilon)
            run_reads(scratch, layout, layout.key, n, sizes)
            read_chunk(scratch, layout, n, sizes)
            run_writes(scratch, layout, layout.value, value, n, n, sizes, epsilon)
            output_chunk(scratch, layout, value, n, sizes)
            for t in range(n):
                source, shift = layout.rows + t * layout.dims, (first + t) * num_heads * dim
                address = load_one(addresses, OUTPUT)
                save_rows(scratch, source, address, places, TOKEN_RESULTS, dim, shift, dim, num_rows)
            if wants_states or first + n < num_tokens:
                write_chunk(scratch, layout, layout.key, key, key_memory, n, sizes)
                write_chunk(scratch, layout, layout.value, value, value_memory, n, sizes)
                key, value = key_memory, value_memory
        if wants_states:
            save_memory(scratch, key, addresses, places, KEY_FINAL, num_slots, dim, layout.width, num_rows)
            save_memory(scratch, value, addresses, places, VALUE_FINAL, num_slots, dim, layout.width, num_rows)


@function
def replay(scratch, layout, addresses, places, strides, sizes, epsilon, key, value, key_to, value_to, first):
    """Run the writes of one whole chunk from one pair of memories to another; negative ones stand for zero.

    What the way back needs of them stays where ``layout`` keeps it.
    """
    load_chunk(scratch, layout, addresses, places, places, strides, sizes, first, WHOLE, ZERO, WHOLE)
    run_writes(scratch, layout, layout.key, key, WHOLE, WHOLE, sizes, epsilon)
    write_chunk(scratch, layout, layout.key, key, key_to, WHOLE, sizes)
    run_writes(scratch, layout, layout.value, value, WHOLE, WHOLE, sizes, epsilon)
    write_chunk(scratch, layout, layout.value, value, value_to, WHOLE, sizes)


@function
def backward_rows(problem, places, scratch, first_row, last_row):
    sizes, addresses, strides = problem, after(problem, ADDRESSES), after(problem, STRIDES)
    num_tokens, num_slots, dim = load_one(sizes, NUM_TOKENS), load_one(sizes, NUM_SLOTS), load_one(sizes, DIM)
    segment, wants_states = load_one(sizes, SEGMENT), load_one(sizes, WITH_STATES) != 0
    epsilon = load_double(sizes, EPSILON)
    layout = _make_layout(num_slots, dim, NONE)
    width, pair = layout.width, 2 * layout.memory
    gradients, checkpoints = layout.states, layout.states + pair
    chunks = _num_chunks(num_tokens)
    num_segments = (chunks + segment - 1) // segment
    kept = checkpoints + pair * (num_segments + segment)
    next_places = after(places, NUM_PLACES)
    find_rows(next_places, sizes, strides, first_row, last_row)
    for row in range(first_row, last_row, WIDTH):
        num_rows = min(WIDTH, last_row - row)
        places, next_places = next_places, places
        find_rows(next_places, sizes, strides, row + WIDTH, last_row)
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
                    next_places,
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
