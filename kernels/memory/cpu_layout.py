"""What the CPU kernels over sequences share: what a problem is, and where everything lies in scratch.

Everything a thread works on lies in one flat array, ``scratch``; what would be a pointer is an offset into it, in
numbers, and ``Layout`` holds the offsets.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from trellis_ts.kernels.memory.cpu_vectors import WIDTH

CHUNK = 8

# What is handed to a function is a NumPy integer: Numba would compile it anew for every literal it is called with. Only
# products are called with literal strides on purpose, so that their inner loops have few pointers to step.
NONE, ZERO, ONE, TILE, LANES, WHOLE, BACK = np.array((-1, 0, 1, 4, WIDTH, CHUNK, -CHUNK))

# A problem is an array of integers that cpu_run.py writes: sizes and choices (WITH_STATES: whether the forward pass
# returns final states, or the backward pass the initial ones' gradients), the bits of epsilon as float64, how its rows
# are shared out, and the addresses and strides of its tensors (the inputs are strided, the results contiguous).
NUM_TOKENS, NUM_HEADS, NUM_SLOTS, DIM, WRITE, READ, SECOND_ORDER, SEGMENT, WITH_STATES, EPSILON = np.arange(10)
# Threads take BLOCK rows at a time, counted in NEXT_ROW, and each a part of scratch, counted in NEXT_THREAD.
NUM_ROWS, BLOCK, NEXT_ROW, NEXT_THREAD, SCRATCH, SCRATCH_BYTES = np.arange(10, 16)
ADDRESSES = np.int64(16)
NUM_TENSORS, NUM_STRIDED = 19, 11
STRIDES = ADDRESSES + NUM_TENSORS
PROBLEM = struct.Struct(f"{EPSILON}qd{ADDRESSES - NUM_ROWS + NUM_TENSORS + 4 * NUM_STRIDED}q")
# Those tensors:
QUERY, KEY, VALUE, TARGET, LOG_FORGET, STEP, OUTPUT, KEY_STATE, VALUE_STATE, KEY_FINAL, VALUE_FINAL = np.arange(11)
# Beside the places of strided tensors, those of rows in results: in steps of one row's numbers.
TOKEN_RESULTS, STATE_RESULTS = np.arange(11, 13)
NUM_PLACES = np.int64(13 * WIDTH)
PLACES_BYTES = 2 * 8 * int(NUM_PLACES)  # of these rows and of those after them
# In the forward pass OUTPUT, KEY_FINAL and VALUE_FINAL are results; in the backward pass they hold gradients, and these
# follow: of the six inputs and the two states.
GRADIENTS = np.int64(11)
KEY_STATE_GRADIENT, VALUE_STATE_GRADIENT = np.arange(17, 19)


class Pass(NamedTuple):
    """Where one of the two passes keeps what it computes of a chunk of n tokens.

    Key pass: w is the key and x the query. Value pass: w is the value and x, in the backward pass, the gradient of the
    output.
    """

    rows: int  # [2 n, dim]: every w, then every x
    start: int  # [2 n, slot]: every row times the memory before the chunk
    z: int  # [n, slot]; this and the next four lie side by side
    gate: int  # [n, slot]: sigmoid of z
    u: int  # [n, slot]
    written: int  # [n, slot]: -g u, what is written along w
    gram: int  # [n, 2 n]: inner products of w with every row that is not before it
    reads: int  # [n, slot]: x times the memory after the token's write


class Layout(NamedTuple):
    """Where everything lies in scratch, and strides; all in numbers."""

    slots: int  # one vector over slots, its length filled up to a multiple of eight
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
    """Return where one pass keeps its data: from ``at`` on, but z to gram from ``kept`` on."""
    n = CHUNK
    start = at + 2 * n * dims
    return Pass(
        rows=at,
        start=start,
        z=kept,
        gate=kept + n * slots,
        u=kept + 2 * n * slots,
        written=kept + 3 * n * slots,
        gram=kept + 4 * n * slots,
        reads=start + 2 * n * slots,
    )


def make_layout(num_slots, dim, kept):
    """Return where everything lies for memories of this size; what is kept of a chunk at ``kept`` unless negative."""
    # Two vectors more than there are features or slots, lest all rows' data fall into the same few cache lines.
    slots, dims = ((num_slots + 7) // 8 * 8 + 2) * WIDTH, ((dim + 7) // 8 * 8 + 2) * WIDTH
    width = dims
    n = CHUNK
    at = n * slots  # the target comes first
    forget, step, decay, decays = at, at + n * WIDTH, at + 2 * n * WIDTH, at + (3 * n + 1) * WIDTH
    at = decays + n * n * WIDTH
    size, kept_size = 2 * n * dims + 3 * n * slots, 4 * n * slots + 2 * n * n * WIDTH
    r = at + 2 * size + 2 * kept_size
    if kept < 0:
        kept = at + 2 * size
    key = make_pass(at, kept, slots, dims)
    value = make_pass(at + size, kept + kept_size, slots, dims)
    read_scale = r + 2 * n * slots
    scaled = read_scale + 3 * n * WIDTH
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
        memory=(num_slots + 3) // 4 * 4 * width,
        kept=2 * kept_size,
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


@cache
def forward_scratch_size(num_slots: int, dim: int) -> int:
    """Return how many numbers a thread needs in the forward pass: its work and both memories of eight rows."""
    layout = make_layout(num_slots, dim, -1)
    return layout.states + 2 * layout.memory


@cache
def backward_scratch_size(num_slots: int, dim: int, num_tokens: int, segment: int) -> int:
    """Return how many numbers a thread needs in the backward pass.

    Beside its work both memories' gradients, the memories at the start of every segment, and of every chunk of one
    segment, which is so many chunks, the memories at its start and what is kept of it.
    """
    layout = make_layout(num_slots, dim, -1)
    num_segments = -(-num_chunks(num_tokens) // segment)
    return layout.states + 2 * layout.memory * (1 + num_segments + segment) + layout.kept * segment


@cache
def chunk_size(num_slots: int, dim: int) -> int:
    """Return how many numbers the backward pass holds per chunk of eight rows: both memories and what is kept."""
    layout = make_layout(num_slots, dim, -1)
    return 2 * layout.memory + layout.kept


def num_chunks(num_tokens: int) -> int:
    """Return how many chunks a sequence has."""
    return (num_tokens + CHUNK - 1) // CHUNK
